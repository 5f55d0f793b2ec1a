# SPDX-License-Identifier: Apache-2.0
"""integrations.sdpa and integrations.flash_attn; transformers has test_integrations_transformers.py."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F

from fmkernels import attention, attention_varlen
from fmkernels.integrations import sdpa
from fmkernels.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func
from fmkernels.testing import Case, assert_as_good_as_torch

torch_sdpa = F.scaled_dot_product_attention


def qkv(seq_q=12, seq_k=12, heads=4, kv_heads=4, dtype=torch.float32, batch=2):
    """[batch, heads, seq, head_dim], with a v_head_dim of its own."""
    generator = torch.Generator().manual_seed(seq_q + 100 * seq_k)
    shapes = (batch, heads, seq_q, 16), (batch, kv_heads, seq_k, 16), (batch, kv_heads, seq_k, 24)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def visible(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True
    return mask


@pytest.fixture
def served(monkeypatch):
    """The calls that reach fmkernels, each as (q, k, v, keyword arguments)."""
    calls = []

    def record(q, k, v, **kwargs):
        calls.append((q, k, v, kwargs))
        return attention(q, k, v, **kwargs)

    monkeypatch.setattr(sdpa, "attention", record)
    return calls


# ---- sdpa ----

MASKS = {
    "boolean, full": visible(2, 4, 12, 12),
    "boolean, padding": visible(2, 1, 1, 12),
    "boolean, expanded": visible(2, 1, 1, 12).expand(2, 4, 12, 12),
    "boolean, two dimensions": visible(12, 12),
    "boolean, per head": visible(4, 12, 12),
    "additive, full": torch.randn(2, 4, 12, 12),
    "additive, per query": torch.randn(12, 1),
    "additive, hides": torch.zeros(12, 12).masked_fill(~visible(12, 12), -torch.inf),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_sdpa_masks(mask, served):
    q, k, v = qkv()
    with sdpa.override():
        actual = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert len(served) == 1
    assert_as_good_as_torch(actual, lambda *args: torch_sdpa(*args[:3], attn_mask=args[3]), q, k, v, mask)


@pytest.mark.parametrize(("seq_q", "seq_k"), [(12, 12), (5, 12), (12, 5), (1, 9), (9, 1), (70, 130), (130, 70)])
def test_sdpa_causal_is_aligned_at_the_first_key(seq_q, seq_k, served):
    q, k, v = qkv(seq_q, seq_k)
    with sdpa.override():
        actual = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert len(served) == 1
    mask = torch.ones(seq_q, seq_k, dtype=torch.bool).tril()
    assert_as_good_as_torch(actual, lambda *args: torch_sdpa(*args, attn_mask=mask), q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sdpa_scale_and_grouped_heads(dtype, served):
    q, k, v = qkv(heads=6, kv_heads=2, dtype=dtype)
    options = {"scale": 0.7, "enable_gqa": True}
    with sdpa.override():
        actual = F.scaled_dot_product_attention(q, k, v, **options)
    assert len(served) == 1
    assert_as_good_as_torch(actual, lambda *args: torch_sdpa(*args, **options), q, k, v)


@pytest.mark.parametrize("mask", [None, visible(12, 12), visible(2, 12, 12)], ids=["none", "rank 2", "rank 3"])
def test_sdpa_without_a_dimension_of_heads(mask, served):
    q, k, v = (t[:, 0] for t in qkv())
    with sdpa.override():
        actual = F.scaled_dot_product_attention(q, k, v, mask)
    assert len(served) == 1
    assert_as_good_as_torch(actual, lambda *args: torch_sdpa(*args, mask), q, k, v)


def test_sdpa_query_without_a_visible_key_gives_zeros(served):
    q, k, v = qkv()
    mask = visible(12, 12)
    mask[3] = False
    actual = sdpa.scaled_dot_product_attention(q, k, v, mask)
    assert len(served) == 1
    assert torch.equal(actual[:, :, 3], torch.zeros_like(actual[:, :, 3]))


def test_sdpa_reads_the_inputs_where_they_lie(served):
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(5, 12))
    sdpa.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert [t.data_ptr() for t in served[0][:3]] == [t.data_ptr() for t in (q, k, v)]


def test_sdpa_converts_an_expanded_mask_once(served):
    sdpa.scaled_dot_product_attention(*qkv(), MASKS["boolean, expanded"])
    assert served[0][3]["bias"].shape == (2, 1, 1, 12)


def test_sdpa_drops_as_attention_does(served):
    q, k, v = qkv(5, 12)
    torch.manual_seed(3)
    actual = sdpa.scaled_dot_product_attention(q, k, v, None, 0.5, True)
    assert len(served) == 1
    torch.manual_seed(3)
    expected = attention(*(t.transpose(1, 2) for t in (q, k[:, :, :5], v[:, :, :5])), causal=True, dropout_p=0.5)
    assert torch.equal(actual, expected.transpose(1, 2))


@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_sdpa_trains_on_the_kernels(mask, served):
    inputs = [*qkv(5, 12)]
    if mask != "none":
        inputs.append(visible(5, 12) if mask == "boolean" else torch.randn(5, 12))

    def gradients(function, *inputs):
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
        function(*leaves).square().sum().backward()
        return [t.grad for t in leaves if t.grad is not None]

    actual = gradients(sdpa.scaled_dot_product_attention, *inputs)
    assert len(served) == 1
    assert len(actual) == (4 if mask == "additive" else 3)
    assert_as_good_as_torch(actual, lambda *inputs: gradients(F.scaled_dot_product_attention, *inputs), *inputs)


def test_sdpa_leaves_functional_differentiation_to_torch(served):
    q, k, v = qkv()
    derivative = torch.func.grad(lambda q: sdpa.scaled_dot_product_attention(q, k, v).square().sum())
    expected = torch.func.grad(lambda q: F.scaled_dot_product_attention(q, k, v).square().sum())(q)
    assert torch.equal(derivative(q), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            sdpa.scaled_dot_product_attention(dual, k, v)
    assert served == []


def nested(*tensors):
    with warnings.catch_warnings():  # torch calls them a prototype
        warnings.simplefilter("ignore")
        return tuple(torch.nested.nested_tensor(list(t), layout=torch.strided) for t in tensors)


q, k, v = qkv()
FALLBACKS = {
    "a dropout_p that is no number of [0, 1)": ((q, k, v), {"dropout_p": 1.0}),
    "dtypes torch.float64": ((q.double(), k.double(), v.double()), {}),
    "head_dim 12": ((q[..., :12], k[..., :12], v), {}),
    "ranks 5": ((q[None], k[None], v[None]), {}),
    "ranks 2": ((q[0, 0], k[0, 0], v[0, 0]), {}),
    "a last dimension that is not contiguous": ((q.mT.contiguous().mT, k, v), {}),
    "attn_mask together with is_causal": ((q, k, v, visible(12, 12)), {"is_causal": True}),
    "attn_mask of torch.float64": ((q, k, v, torch.zeros(12, 12).double()), {}),
    "a device without a kernel, meta": (tuple(t.to("meta") for t in (q, k, v)), {}),
    "a nested or sparse tensor": (nested(q, k, v), {}),
    "shapes that do not match": ((q[:1], k, v), {}),
    "an argument of the wrong type": ((q, None, v), {}),
    "a scale that is not a finite number": ((q, k, v), {"scale": float("inf")}),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_sdpa_falls_back_to_torch_with_one_logged_line(reason, served, caplog):
    args, kwargs = FALLBACKS[reason]
    sdpa._log.cache_clear()

    def outcome(function):
        torch.manual_seed(0)
        try:
            return function(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            return str(error)

    with caplog.at_level(logging.WARNING, "fmkernels"), sdpa.override():
        results = [outcome(F.scaled_dot_product_attention) for _ in range(2)]
    expected = outcome(torch_sdpa)
    assert served == []
    assert [record.name for record in caplog.records] == ["fmkernels"], "logged once"
    assert reason in caplog.records[0].getMessage()
    for result in results:
        if isinstance(expected, str) or expected.is_nested or expected.is_meta:
            assert type(result) is type(expected)
        else:
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "wrong", [{"query": None}, {"value": [1.0]}, {"attn_mask": [0.0]}, {"is_causal": 1}, {"scale": "1"}], ids=str
)
def test_sdpa_raises_the_error_of_torch_for_an_argument_of_another_type(wrong, served):
    sentence = rf"^scaled_dot_product_attention\(\): argument '{next(iter(wrong))}' .*must be"
    for function in (torch_sdpa, sdpa.scaled_dot_product_attention):
        with pytest.raises(TypeError, match=sentence):
            function(**{"query": q, "key": k, "value": v, **wrong})
    assert served == []


def test_sdpa_leaves_forward_mode_to_torch(served):
    def jvp(function):
        return torch.func.jvp(lambda q: function(q, k, v), (q,), (torch.ones_like(q),))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = jvp(torch_sdpa)
        assert all(map(torch.equal, jvp(sdpa.scaled_dot_product_attention), expected))
    assert served == []
    assert expected[1].abs().max() > 0


def test_sdpa_override_ends_with_its_block_and_disable_with_all():
    with sdpa.override():
        with sdpa.override():
            pass
        assert F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
    assert F.scaled_dot_product_attention is torch_sdpa
    sdpa.enable()
    sdpa.enable()
    assert F.scaled_dot_product_attention is sdpa.scaled_dot_product_attention
    sdpa.disable()
    assert F.scaled_dot_product_attention is torch_sdpa
    with pytest.raises(ZeroDivisionError), sdpa.override():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is torch_sdpa


def test_sdpa_serves_the_modules_of_torch(served):
    module = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.randn(2, 9, 64)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[0, 6:] = True

    def forward(x):
        weights = {name: t.detach().to(x.dtype) for name, t in module.state_dict().items()}
        return torch.func.functional_call(
            module, weights, (x, x, x), {"key_padding_mask": padding, "need_weights": False}
        )[0]

    with sdpa.override():
        actual = forward(x)
    assert len(served) == 1
    assert_as_good_as_torch(actual, forward, x)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"attn_mask": visible(2, 1, 1, 12)}], ids=["causal", "mask"])
def test_sdpa_compiles_without_a_graph_break(options):
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    with sdpa.override():
        expected = function(*qkv(5, 12))
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*qkv(5, 12)), expected, rtol=0, atol=0)


# ---- flash_attn ----


@pytest.mark.parametrize(
    "case",
    [
        Case("plain"),
        Case("causal, window", causal=True, window=(7, 3)),
        Case("softcap", softcap=2.0, softmax_scale=0.3),
        Case("alibi", alibi="batch"),
        Case("transposed", transposed=True),
    ],
    ids=str,
)
def test_flash_attn_func_has_the_bits_of_attention(case):
    args, kwargs = case.inputs()
    expected = attention(*args, **kwargs, return_lse=True)
    kwargs["window_size"] = kwargs.pop("window", (-1, -1))
    o, lse, probabilities = flash_attn_func(*args, **kwargs, deterministic=True, return_attn_probs=True)
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])
    assert probabilities.numel() == 0
    assert torch.equal(flash_attn_func(*args, **kwargs), o)


def test_flash_attn_takes_its_arguments_in_the_order_of_flash_attn():
    args, kwargs = Case("positional", alibi="heads", causal=True).inputs()
    slopes = kwargs["alibi_slopes"]
    expected = attention(*args, causal=True, window=(9, 0), softmax_scale=0.3, softcap=2.0, alibi_slopes=slopes)
    assert torch.equal(flash_attn_func(*args, 0.0, 0.3, True, (9, 0), 2.0, slopes, False, False), expected)

    args, kwargs = Case("packed, positional", seqlens=((3, 5), (7, 7)), alibi="heads").inputs()
    slopes = kwargs["alibi_slopes"]
    expected = attention_varlen(*args, causal=True, window=(4, 0), softmax_scale=0.3, softcap=2.0, alibi_slopes=slopes)
    actual = flash_attn_varlen_func(*args, 0.0, 0.3, True, (4, 0), 2.0, slopes, False, False, None)
    assert torch.equal(actual, expected)


def test_flash_attn_varlen_func_has_the_bits_of_attention_varlen():
    args, kwargs = Case("packed", seqlens=((3, 5), (0, 4), (7, 7)), causal=True).inputs()
    expected = attention_varlen(*args, **kwargs, return_lse=True)
    o, lse, probabilities = flash_attn_varlen_func(*args, **kwargs, return_attn_probs=True)
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])
    assert probabilities.numel() == 0


def test_flash_attn_drops_as_attention_does():
    for case, function, own in (
        (Case("plain"), flash_attn_func, attention),
        (Case("packed", seqlens=((3, 5), (7, 7))), flash_attn_varlen_func, attention_varlen),
    ):
        args, _ = case.inputs()
        torch.manual_seed(3)
        actual = function(*args, 0.5)
        torch.manual_seed(3)
        assert torch.equal(actual, own(*args, dropout_p=0.5))


def test_flash_attn_reads_pages_by_their_table():
    args, kwargs = Case("packed", seqlens=((3, 5), (1, 7), (7, 7)), alibi="heads", causal=True).inputs()
    q, k, v, cu_q, cu_k, *longest = args
    pages, table = [torch.zeros(8, 3, *t.shape[1:]) for t in (k, v)], torch.tensor([[6, 2, 0], [1, 7, 3], [4, 0, 5]])
    for row, begin, end in zip(table, cu_k.tolist(), cu_k[1:].tolist(), strict=False):
        for token in range(begin, end):
            place = int(row[(token - begin) // 3]), (token - begin) % 3
            pages[0][place], pages[1][place] = k[token], v[token]
    options = {"window_size": (4, 0), "softmax_scale": 0.3, "return_attn_probs": True, **kwargs}
    expected = flash_attn_varlen_func(*args, **options)
    actual = flash_attn_varlen_func(q, *pages, cu_q, cu_k, *longest, **options, block_table=table.int())
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match=r"^flash_attn_varlen_func: dropout_p must be 0 with block_table, got 0\.5\."):
        flash_attn_varlen_func(q, *pages, cu_q, cu_k, *longest, 0.5, block_table=table.int())


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        ({"window_size": 5}, TypeError, "window_size must be a pair (left, right), got 5."),
        ({"window_size": (0, -2)}, ValueError, "window_size[1] must be at least -1, got -2."),
        ({"deterministic": None}, TypeError, "deterministic must be True or False, got NoneType."),
        ({"return_attn_probs": 1}, TypeError, "return_attn_probs must be True or False, got int."),
    ],
    ids=str,
)
def test_flash_attn_names_its_own_arguments(wrong, error, sentence):
    for function, case in ((flash_attn_func, Case("plain")), (flash_attn_varlen_func, Case("p", seqlens=((3, 5),)))):
        with pytest.raises(error) as raised:
            function(*case.inputs()[0], **wrong)
        assert str(raised.value) == f"{function.__name__}: {sentence}"


@pytest.mark.parametrize(
    ("function", "case"),
    [(flash_attn_func, Case("plain")), (flash_attn_varlen_func, Case("packed", seqlens=((3, 5), (7, 7))))],
    ids=["func", "varlen"],
)
def test_flash_attn_compiles_without_a_graph_break(function, case):
    torch._dynamo.reset()
    args, _ = case.inputs()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    options = {"causal": True, "window_size": (4, 0), "return_attn_probs": True}
    assert all(map(torch.equal, compiled(*args, **options), function(*args, **options)))
