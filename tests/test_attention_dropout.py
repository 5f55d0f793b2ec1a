# SPDX-License-Identifier: Apache-2.0
"""Dropout of attention: which weights are dropped whatever the path, values, gradients, replay. What the bits
are worth is in test_philox.py."""

import math
from dataclasses import replace

import pytest
import torch
from test_attention import EVERYTHING
from test_attention_backward import check as check_gradients
from test_attention_backward import check_definition, on
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fmkernels import attention, attention_varlen, create_block_mask, reference
from fmkernels.testing import Case, assert_attention, backends

BACKENDS = backends("attention_backward")
DTYPES = [(backend, dtype) for backend in BACKENDS for dtype in backend.attention_dtypes]
# What is dropped is the concern of code that float32 on a GPU shares with half inputs: a few cases of it are enough.
HALF_OR_CPU = [pair for pair in DTYPES if pair[1] != torch.float32 or not pair[0].has_tensor_cores]
FLOAT32_ON_GPU = [backend for backend in BACKENDS if backend.has_tensor_cores]
P, RNG = 0.3, torch.tensor([3, 4])

# ---- what is dropped -----------------------------------------------------------------------------------------------


def dropped_by_forward(backend, case, keys):
    """[batch, heads, seq_q, 256]: whether the weight of keys[n] is dropped; values are rows of the identity."""
    (q, k, _), kwargs = case.inputs(backend.device)
    v = torch.zeros(*k.shape[:3], 256, dtype=k.dtype, device=k.device)
    v[:, keys, :, torch.arange(len(keys))] = 1.0
    return backend.run(attention, q * 0.1, k, v, **kwargs).transpose(1, 2) == 0


@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("seq_q", [1, 2, 4, 60])
def test_every_path_drops_the_same(seq_q, heads, dtype, backend):
    """Few rows go the direct way in chunks of keys, more the tiled one in blocks."""
    case = Case("path", seq_q=seq_q, seq_k=1300, heads=heads, kv_heads=2, dtype=dtype, dropout_p=P)
    expected = reference.dropout_factors(P, case.inputs()[1]["dropout_rng"], 2, heads, seq_q, 1300) == 0
    for first in (0, 400, 1044):
        keys = torch.arange(first, first + 256)
        assert torch.equal(dropped_by_forward(backend, case, keys).cpu(), expected[..., keys])


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_backward_drops_the_same(backend):
    case = Case("path", seq_q=256, seq_k=300, heads=2, v_head_dim=256, dropout_p=P)
    (q, k, v), kwargs = on(backend, case).inputs(backend.device)
    v.requires_grad_()
    o = backend.run(attention, q * 0.1, k, v, **kwargs)
    rows = torch.eye(256, device=v.device)[:, None].expand(o.shape)
    (grad,) = backend.run(torch.autograd.grad, o, v, rows)  # of key j, column i: what the query i weighs it
    expected = reference.dropout_factors(P, kwargs["dropout_rng"].cpu(), 2, 2, 256, 300) == 0
    assert torch.equal(grad.permute(0, 2, 3, 1).cpu() == 0, expected)


# ---- values and gradients --------------------------------------------------------------------------------------------

DOCUMENTS = lambda b, h, i, j: (i // 37 == j // 37) & (i >= j)  # noqa: E731
CASES = [
    Case("plain", dropout_p=P),
    Case("most", dropout_p=0.95, seq_q=130, seq_k=300),
    Case("all but nothing", dropout_p=1 - 1e-9, seq_q=40),
    Case("causal", causal=True, seq_q=130, seq_k=130, dropout_p=0.1),
    Case("no visible key", causal=True, seq_q=120, seq_k=40, dropout_p=P),
    Case("window", window=(20, 7), seq_q=130, seq_k=130, dropout_p=P),
    Case("window beside groups of keys", window=(40, -1), causal=True, seq_q=70, seq_k=165, dropout_p=P),
    Case("one query", seq_q=1, seq_k=1190, dropout_p=P),
    Case("few queries", seq_q=5, seq_k=700, kv_heads=4, causal=True, dropout_p=P),
    Case("three heads a group", heads=9, kv_heads=3, causal=True, seq_q=65, dropout_p=P),
    Case("other values", head_dim=24, v_head_dim=40, dropout_p=P),
    Case("other keys", head_dim=72, v_head_dim=8, causal=True, dropout_p=P),
    Case("softcap", softcap=1.5, causal=True, dropout_p=P),
    Case("sinks", sinks=True, causal=True, dropout_p=P),
    Case("bias", bias="bhqk", bias_dtype=torch.float32, dropout_p=P),
    Case("bias of keys", bias="bk", softcap=2.0, dropout_p=P),
    Case("everything", **EVERYTHING, seq_q=70, seq_k=110, heads=6, kv_heads=3, transposed=True, dropout_p=P),
    Case("documents", seq_q=130, seq_k=130, dropout_p=P, block_mask=create_block_mask(DOCUMENTS, None, None, 130, 130)),
    Case("packed", seqlens=((33, 33), (0, 5), (1, 70), (100, 97), (4, 0)), causal=True, sinks=True, dropout_p=P),
    Case("packed window", seqlens=((60, 100), (7, 7)), window=(9, 3), softcap=2.0, alibi="batch", dropout_p=P),
]


@pytest.mark.parametrize(("backend", "dtype"), HALF_OR_CPU, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_matches_reference(case, dtype, backend):
    args, kwargs = replace(case, dtype=dtype).inputs(backend.device)
    function, definition = attention, reference.attention
    if case.is_packed:
        function, definition = attention_varlen, reference.attention_varlen
    actual = backend.run(function, *args, return_lse=True, **kwargs)
    assert_attention(backend, actual, definition, *args[:5], **kwargs)
    without = {name: value for name, value in kwargs.items() if name != "dropout_p"}
    assert torch.equal(backend.run(function, *args, return_lse=True, **without)[1], actual[1]), "lse knows no dropout"


@pytest.mark.parametrize(("backend", "dtype"), HALF_OR_CPU, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_match_those_of_the_definition(case, dtype, backend):
    check_gradients(backend, replace(case, dtype=dtype))


@pytest.mark.parametrize("backend", FLOAT32_ON_GPU, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("causal", "everything", "packed")], ids=str)
def test_float32_on_a_gpu(case, backend):
    test_forward_matches_reference(case, torch.float32, backend)
    check_gradients(backend, case)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("seq", range(64, 97, 3))
def test_every_tail(seq, backend):
    check_gradients(backend, on(backend, Case("tail", seq_q=seq, seq_k=seq + 32, causal=True, dropout_p=P)))


def test_the_gradients_from_saved_results_are_those_of_the_definition():
    check_definition(CASES)


def test_the_definition_has_the_gradients_of_finite_differences():
    args, kwargs = Case("small", batch=1, seq_q=5, seq_k=6, head_dim=8, sinks=True, bias="hqk", dropout_p=P).inputs()
    rng = kwargs.pop("dropout_rng")
    leaves = [t.double().requires_grad_() for t in (*args, kwargs["sinks"], kwargs["bias"])]

    def call(q, k, v, sinks, bias):
        return reference.attention(q, k, v, sinks=sinks, bias=bias, dropout_p=P, dropout_rng=rng)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("seq_q", [2, 60])
def test_a_dropped_value_counts_zero_times(seq_q, backend):
    """0 * NaN is NaN, as in torch; what a row does not see it does not count."""
    (q, k, v), kwargs = on(backend, Case("poison", seq_q=seq_q, seq_k=60, dropout_p=0.5)).inputs(backend.device)
    v[:, -1] = math.nan
    o = backend.run(attention, q, k, v, causal=True, **kwargs)
    assert o[:, -1].isnan().all()
    assert o[:, :-1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seq_q": 0}, {"seq_k": 0}], ids=str)
def test_nothing_to_drop(sizes, backend):
    args, kwargs = on(backend, replace(Case("empty", dropout_p=P), **sizes)).inputs(backend.device)
    assert all((t == 0).all() for t in backend.run(gradients, attention, args, **kwargs))


# ---- replay ----------------------------------------------------------------------------------------------------------


def gradients(function, args, **kwargs):
    leaves = [t.clone().requires_grad_() for t in args]
    o = function(*leaves, **kwargs)
    o.square().sum().backward()
    return o, *(t.grad for t in leaves)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_bits_do_not_depend_on_threads_or_on_what_is_packed_after(backend):
    case = Case("threads", batch=3, seq_q=70, seq_k=111, causal=True, dropout_p=P)
    args, kwargs = on(backend, case).inputs(backend.device)
    first = backend.run(gradients, attention, args, causal=True, dropout_p=P, dropout_rng=kwargs["dropout_rng"])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(map(torch.equal, first, backend.run(gradients, attention, args, **kwargs)))
    cu_q, cu_k = (torch.arange(0, 4 * n, n, dtype=torch.int32, device=args[0].device) for n in (70, 111))
    packed = [t.flatten(0, 1) for t in args]
    again = backend.run(gradients, lambda *a, **kw: attention_varlen(*a, cu_q, cu_k, 70, 111, **kw), packed, **kwargs)
    assert all(torch.equal(a.flatten(0, 1), b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_no_dropout_changes_nothing_and_draws_nothing(backend):
    args, kwargs = on(backend, Case("none", causal=True)).inputs(backend.device)
    rng = RNG.to(args[0].device)
    expected = backend.run(gradients, attention, args, **kwargs)
    before = torch.get_rng_state()
    for more in ({"dropout_p": 0.0}, {"dropout_p": 0, "dropout_rng": rng}, {"dropout_p": 1e-9, "dropout_rng": rng}):
        assert all(map(torch.equal, expected, backend.run(gradients, attention, args, **kwargs, **more)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_the_generator_of_torch_decides(backend):
    for function, case in ((attention, Case("seed")), (attention_varlen, Case("seed", seqlens=((9, 9), (4, 30))))):
        args, _ = on(backend, case).inputs(backend.device)
        torch.manual_seed(5)
        first, second = (backend.run(function, *args, dropout_p=P) for _ in range(2))
        torch.manual_seed(5)
        assert torch.equal(backend.run(function, *args, dropout_p=P), first)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays(use_reentrant):
    args, _ = Case("checkpoint").inputs()

    def run(*tensors):
        return attention(*tensors, dropout_p=P)

    torch.manual_seed(5)
    expected = gradients(run, args)
    torch.manual_seed(5)
    actual = gradients(lambda *a: checkpoint(run, *a, use_reentrant=use_reentrant), args)
    assert all(map(torch.equal, actual, expected))


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_compiled_bits_and_gradients_are_the_same():
    torch._dynamo.reset()
    args, kwargs = Case("compiled", causal=True, dropout_p=P).inputs()
    rng = kwargs.pop("dropout_rng")
    compiled = torch.compile(lambda *a: attention(*a[:3], dropout_rng=a[3], **kwargs), fullgraph=True)
    expected = gradients(attention, args, dropout_rng=rng, **kwargs)
    assert all(map(torch.equal, gradients(lambda *a: compiled(*a, rng), args), expected))
    other = gradients(attention, args, dropout_rng=rng + 1, **kwargs)
    assert all(map(torch.equal, gradients(lambda *a: compiled(*a, rng + 1), args), other)), "the pair is no constant"


def test_compiled_code_draws_and_its_gradients_drop_the_same():
    torch._dynamo.reset()
    (q, k, v), _ = Case("compiled", seq_q=16, seq_k=32, v_head_dim=32, heads=2).inputs()
    v[:] = torch.eye(32)[:, None]
    v.requires_grad_()
    compiled = torch.compile(attention, fullgraph=True)
    torch.manual_seed(5)
    first, second = (compiled(q, k, v, dropout_p=P) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(compiled(q, k, v, dropout_p=P), first)
    assert not torch.equal(first, second)
    (grad,) = torch.autograd.grad(first, v, torch.eye(16, 32)[:, None].expand(first.shape))
    assert torch.equal(grad[..., :16].permute(0, 2, 3, 1) == 0, first.transpose(1, 2) == 0)


@pytest.mark.parametrize("case", [Case("op", dropout_p=P), Case("op", seqlens=((5, 9), (3, 3)), dropout_p=P)], ids=str)
def test_opcheck(case):
    args, kwargs = case.inputs()
    tail = (None, None, False, -1, -1, 0.25, 0.0, P, kwargs["dropout_rng"])
    name = "attention_varlen" if case.is_packed else "attention"
    extra, last = ((), ()) if case.is_packed else ((None,), (False,))
    forward, backward = (getattr(torch.ops.fmkernels, f"{name}_{way}").default for way in ("forward", "backward"))
    opcheck(forward, (*args, *extra, *tail))
    o, lse = forward(*args, *extra, *tail)
    opcheck(backward, (torch.ones_like(o), None, *args[:3], o, lse, *args[3:], *extra, *tail, *last))


# ---- errors ----------------------------------------------------------------------------------------------------------

ERRORS = [
    ("dropout_p", -0.1, ValueError, "dropout_p must not be negative, got -0.1."),
    ("dropout_p", 1.0, ValueError, "dropout_p must be less than 1, got 1.0."),
    ("dropout_p", math.nan, ValueError, "dropout_p must be finite in float32, got nan."),
    ("dropout_p", "0.1", TypeError, "dropout_p must be a number, got str."),
    ("dropout_rng", 5, TypeError, "dropout_rng must be a tensor, got int."),
    ("dropout_rng", RNG.int(), ValueError, "dropout_rng must be int64, got int32."),
    ("dropout_rng", RNG[:1], ValueError, "dropout_rng must have size 2, got 1."),
    ("dropout_rng", RNG[0], ValueError, "dropout_rng must be [2], got 0 dimensions []."),
    ("dropout_rng", RNG.repeat(2)[::2], ValueError, "dropout_rng must have a contiguous last dimension, got stride 2."),
    ("dropout_rng", RNG.to("meta"), ValueError, "dropout_rng must be on the device of q, cpu, got meta."),
]


@pytest.mark.parametrize(("name", "value", "error", "sentence"), ERRORS)
def test_wrong_arguments(name, value, error, sentence):
    for function, case in ((attention, Case("wrong")), (attention_varlen, Case("wrong", seqlens=((9, 9),)))):
        with pytest.raises(error) as raised:
            function(*case.inputs()[0], **{"dropout_p": P, name: value})
        assert str(raised.value) == f"{function.__name__}: {sentence}"


BOUNDS = "dropout_p must be at least 0 and less than 1, got "
REFUSED = [(-0.5, None, f"{BOUNDS}-0.5"), (1.0, None, f"{BOUNDS}1"), (math.nan, None, f"{BOUNDS}nan")]
REFUSED += [
    (P, None, "dropout_rng must be given where dropout_p is not 0"),
    (0.0, RNG.int(), "dropout_rng must be int64"),
]
REFUSED += [(P, RNG[:1], "dropout_rng must have size 2")]


@pytest.mark.parametrize(("dropout_p", "dropout_rng", "sentence"), REFUSED)
def test_the_op_itself_refuses(dropout_p, dropout_rng, sentence):
    args, _ = Case("wrong").inputs()
    tail = (None, None, None, False, -1, -1, 0.25, 0.0, dropout_p, dropout_rng)
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.fmkernels.attention_forward(*args, *tail)
