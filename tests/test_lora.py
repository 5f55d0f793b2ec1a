# SPDX-License-Identifier: Apache-2.0
"""lora, lora_shrink, lora_expand: values, edges, errors, and what torch asks of an op."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fmkernels import _library, lora, lora_expand, lora_shrink, reference
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("lora_shrink")
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [4, 8, 16, 24, 64, 128]


def inputs(num_tokens=9, rank=16, sizes=(72, 40), adapters=3, dtype=torch.float32, device="cpu", seed=0):
    """(x, base, a, b, idx, scale); about a quarter of the tokens has no adapter."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    x, base = normal(num_tokens, sizes[0]), normal(num_tokens, sizes[1])
    a, b = normal(adapters, rank, sizes[0]), normal(adapters, sizes[1], rank)
    idx = torch.randint(-1, adapters, (num_tokens,), generator=generator, dtype=torch.int32).to(device)
    return x, base, a, b, idx, torch.rand(adapters, generator=generator).to(device) + 0.5


def check(backend, x, base, a, b, idx, scale):
    h = backend.run(lora_shrink, x, a, idx)
    assert h.dtype == torch.float32
    assert_as_good_as_torch(h, reference.lora_shrink, x, a, idx)
    y = backend.run(lora_expand, h, base, b, idx, scale)
    assert y.dtype == base.dtype
    assert_as_good_as_torch(y, reference.lora_expand, h, base, b, idx, scale)
    assert torch.equal(backend.run(lora, x, base, a, b, idx, scale), y)
    assert torch.equal(y[idx < 0], base[idx < 0])
    assert (h[idx < 0] == 0).all()


# ---- values ----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
def test_both_halves_match_the_reference(rank, dtype, backend):
    check(backend, *inputs(rank=rank, dtype=dtype, device=backend.device))


@EVERY_BACKEND
@pytest.mark.parametrize("rank", [1, 3, 7, 13])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_vectors(dtype, rank, backend):
    check(backend, *inputs(rank=rank, sizes=(37, 45), dtype=dtype, device=backend.device))


@EVERY_BACKEND
def test_without_a_scale(backend):
    *args, _ = inputs(device=backend.device)
    ones = torch.ones(3, device=backend.device)
    assert torch.equal(backend.run(lora, *args), backend.run(lora, *args, ones))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_many_blocks(dtype):
    """Sums of 256 columns, whole and not, and features of more than one task of 256."""
    check(BACKENDS[0], *inputs(num_tokens=40, rank=12, sizes=(1100, 600), adapters=2, dtype=dtype))


@settings(max_examples=12)
@given(
    num_tokens=st.integers(0, 40),
    rank=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    adapters=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_any_size(num_tokens, rank, sizes, adapters, dtype, seed):
    for backend in BACKENDS:
        args = inputs(num_tokens, rank, sizes, adapters, dtype, backend.device, seed)
        if num_tokens > 0:
            check(backend, *args)
        else:
            assert backend.run(lora, *args).shape == (0, sizes[1])


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_in_any_batch(dtype, backend):
    """Alone, among tokens of its adapter, of others, in another order: 1, 2 and 4 tokens share registers on the CPU."""
    x, base, a, b, _, scale = inputs(num_tokens=14, dtype=dtype, device=backend.device)
    idx = torch.tensor([0, 1, 0, -1, 0, 0, 2, 0, 0, 0, 1, 0, 0, 1], dtype=torch.int32, device=backend.device)
    together = backend.run(lora, x, base, a, b, idx, scale)
    for rows in ([0], [1, 10], [13, 6, 3], list(range(13, -1, -1)), [4, 5, 7, 8, 9]):
        part = backend.run(lora, x[rows], base[rows], a, b, idx[rows], scale)
        assert torch.equal(part, together[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_code_for_sm_90(dtype):
    sm_80 = next((backend for backend in BACKENDS if backend.name == "emulated"), None)
    if sm_80 is None:
        pytest.skip("no emulated backend")
    args = inputs(dtype=dtype)
    assert torch.equal(replace(sm_80, architecture=90).run(lora, *args), sm_80.run(lora, *args))


def test_threads_change_no_bits():
    args = inputs(num_tokens=100, rank=32, sizes=(800, 900))
    results = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        results.append(lora(*args))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ---- edges -----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
def test_what_is_not_finite_reaches_its_tokens_alone(backend):
    x, base, a, b, _, scale = inputs(num_tokens=6, device=backend.device)
    idx = torch.tensor([0, 1, -1, 1, 2, 0], dtype=torch.int32, device=backend.device)
    clean = backend.run(lora, x, base, a, b, idx, scale)
    x[0, 5] = math.nan
    x[2] = math.inf  # of a token without an adapter: not read
    b[2, 7, 3] = math.nan
    y = backend.run(lora, x, base, a, b, idx, scale)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[0] = True
    expected[4, 7] = True
    assert torch.equal(y.isnan(), expected)
    assert torch.equal(y[~expected], clean[~expected])


@EVERY_BACKEND
def test_no_token_has_an_adapter(backend):
    x, base, a, b, idx, scale = inputs(device=backend.device)
    none = torch.full_like(idx, -1)
    y = backend.run(lora, x, base, a * math.nan, b * math.nan, none, scale)
    assert torch.equal(y, base)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.name != "cpu"], ids=str)
def test_an_adapter_that_does_not_exist_is_none_on_the_device(backend):
    x, base, a, b, idx, scale = inputs(num_tokens=4, device=backend.device)
    idx = torch.tensor([3, -2, 2**31 - 1, 1], dtype=torch.int32, device=backend.device)
    y = backend.run(lora, x, base, a, b, idx, scale)
    assert torch.equal(y[:3], base[:3])
    assert not torch.equal(y[3], base[3])


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "offset by one element", "column slice", "expanded"])
def test_strides_change_no_bits(layout, dtype, backend):
    def laid_out(t):
        if layout == "transposed":
            return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t
        if layout == "offset by one element":
            return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)
        if layout == "expanded":
            return t[:1].expand_as(t)
        return torch.cat([t, t], dim=-1)[..., : t.shape[-1]] if t.dim() > 1 else torch.stack([t, t], 1)[:, 0]

    x, base, a, b, idx, scale = inputs(dtype=dtype, device=backend.device)
    views = [laid_out(t) for t in (x, base, a, b, idx)]
    expected = backend.run(lora, *(t.contiguous() for t in views), scale)
    assert_as_good_as_torch(expected, reference.lora, *views, scale, computed_in=torch.float32)
    actual = backend.run(lora, *views, scale)
    if backend.name == "cpu":
        assert torch.equal(actual, expected)
    else:  # rows that do not begin on 16 bytes are summed in another order
        assert_as_good_as_torch(actual, reference.lora, *views, scale, computed_in=torch.float32)


@pytest.mark.parametrize(("num_tokens", "adapters"), [(0, 3), (0, 0), (5, 0)])
def test_nothing_to_do(num_tokens, adapters):
    x, base, a, b, _, scale = inputs(num_tokens)
    idx = torch.full((num_tokens,), -1, dtype=torch.int32)
    y = lora(x, base, a[:adapters], b[:adapters], idx, scale[:adapters])
    assert torch.equal(y, base)


# ---- errors ----------------------------------------------------------------------------------------------------------

X, BASE, A, B, IDX, SCALE = inputs()
H = lora_shrink(X, A, IDX)
ERRORS_OF_SHRINK = [
    ("x", None, TypeError, "x must be a tensor, got NoneType."),
    ("x", X[0], ValueError, "x must be [tokens, features], got 1 dimensions [72]."),
    ("x", X.double(), ValueError, "x must be float32 or bfloat16 or float16, got float64."),
    ("x", X.half(), ValueError, "a must have the dtype of x, float16, got float32."),
    ("x", X.t().contiguous().t(), ValueError, "x must have a contiguous last dimension, got stride 9."),
    ("a", A[0], ValueError, "a must be [adapters, rank, in_features], got 2 dimensions [16, 72]."),
    ("a", A[..., :71], ValueError, "a must have the features of x 72, got 71."),
    ("a", A[:, :0], ValueError, "a must have a rank from 1 to 128, got 0."),
    ("a", A.repeat(1, 9, 1), ValueError, "a must have a rank from 1 to 128, got 144."),
    ("a", A.to("meta"), ValueError, "a must be on the device of x, cpu, got meta."),
    ("idx", IDX.long(), ValueError, "idx must be int32, got int64."),
    ("idx", IDX[1:], ValueError, "idx must have the tokens of x 9, got 8."),
    ("idx", IDX + 3, ValueError, "idx must be from -1 to 2, got 5."),
    ("idx", IDX - 1, ValueError, "idx must be from -1 to 2, got -2."),
]  # fmt: skip
ERRORS_OF_EXPAND = [
    ("base", BASE.to_sparse(), ValueError, "base must be a strided tensor, got layout torch.sparse_coo."),
    ("base", BASE[:, 1:], ValueError, "b must have the features of base 39, got 40."),
    ("b", B.bfloat16(), ValueError, "b must have the dtype of base, float32, got bfloat16."),
    ("b", B[..., :0], ValueError, "b must have a rank from 1 to 128, got 0."),
    ("b", B[..., :15], ValueError, "h must have the rank of b 15, got 16."),
    ("b", B.mT.contiguous().mT, ValueError, "b must have a contiguous last dimension, got stride 40."),
    ("h", H.half(), ValueError, "h must be float32, got float16."),
    ("h", H[:8], ValueError, "h must have the tokens of base 9, got 8."),
    ("h", H.t().contiguous().t(), ValueError, "h must have a contiguous last dimension, got stride 9."),
    ("idx", IDX + 3, ValueError, "idx must be from -1 to 2, got 5."),
    ("scale", 1.0, TypeError, "scale must be a tensor, got float."),
    ("scale", SCALE.half(), ValueError, "scale must be float32, got float16."),
    ("scale", SCALE[:2], ValueError, "scale must have the adapters of b 3, got 2."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "right", "name", "value", "error", "sentence"),
    [(lora_shrink, {"x": X, "a": A, "idx": IDX}, *row) for row in ERRORS_OF_SHRINK]
    + [(lora_expand, {"h": H, "base": BASE, "b": B, "idx": IDX, "scale": SCALE}, *row) for row in ERRORS_OF_EXPAND],
)
def test_wrong_arguments(function, right, name, value, error, sentence):
    function(**right)
    with pytest.raises(error) as raised:
        function(**{**right, name: value})
    assert str(raised.value) == f"{function.__name__}: {sentence}"


def test_a_base_of_another_dtype_and_gradients_are_refused():
    with pytest.raises(ValueError, match="lora: base must have the dtype of x, float32, got float16"):
        lora(X, BASE.half(), A, B, IDX, SCALE)
    with pytest.raises(ValueError, match="lora_shrink: gradients are not computed; call it under"):
        lora(X.clone().requires_grad_(), BASE, A, B, IDX, SCALE)
    with pytest.raises(ValueError, match="lora_expand: gradients are not computed; call it under"):
        lora(X, BASE, A, B.clone().requires_grad_(), IDX, SCALE)
    with torch.no_grad():
        assert torch.equal(lora(X.clone().requires_grad_(), BASE, A, B, IDX), lora(X, BASE, A, B, IDX))


def test_values_of_idx_are_checked_on_the_device_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(_library, "check_values", True)
    with pytest.raises(ValueError, match="lora_shrink: idx must be from -1 to 2, got 5"):
        lora(X, BASE, A, B, IDX + 3, SCALE)


def test_a_device_without_a_kernel_is_named(monkeypatch):
    monkeypatch.setattr(_library, "cuda_ops", frozenset())
    monkeypatch.setattr(_library, "cuda_error", None)
    with FakeTensorMode():
        x, a = torch.empty(2, 8, device="cuda"), torch.empty(3, 4, 8, device="cuda")
        idx = torch.empty(2, device="cuda", dtype=torch.int32)
        with pytest.raises(ValueError, match="lora_shrink: there is no kernel for cuda tensors"):
            lora_shrink(x, a, idx)


HOSTILE = [
    torch.zeros(()),
    torch.zeros(4),
    torch.zeros(9, 3),
    torch.zeros(3, 2, 2),
    X.to_sparse(),
    torch.zeros(9, 16).int(),
]
HOSTILE += [torch.zeros(9, 144)[:, ::2], torch.zeros(3, 16, 144)[..., ::2], torch.full((9,), 3).int(), IDX.long()]


@pytest.mark.parametrize("name", ["x", "a", "idx", "base", "b", "h", "scale"])
def test_the_ops_themselves_refuse(name):
    for op, right in (
        (torch.ops.fmkernels.lora_shrink, {"x": X, "a": A, "idx": IDX}),
        (torch.ops.fmkernels.lora_expand, {"base": BASE, "b": B, "h": H, "idx": IDX, "scale": SCALE}),
    ):
        op(**right)
        for value in HOSTILE if name in right else []:
            with pytest.raises(RuntimeError):
                op(**{**right, name: value})
        if name in right:
            shrunk = right[name].clone()
            shrunk.untyped_storage().resize_(shrunk.nbytes - 1)
            with pytest.raises(RuntimeError, match=r"storage of \d+ bytes, which does not hold its elements"):
                op(**{**right, name: shrunk})


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.namespace == "fmkernels"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, backend):
    x, base, a, b, idx, scale = inputs(dtype=dtype, device=backend.device)
    opcheck(torch.ops.fmkernels.lora_shrink.default, (x, a, idx))
    h = lora_shrink(x, a, idx)
    opcheck(torch.ops.fmkernels.lora_expand.default, (base, b, h, idx, scale))
    opcheck(torch.ops.fmkernels.lora_expand.default, (base, b, h, idx, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic):
    torch._dynamo.reset()
    whole = torch.compile(lora, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    first = torch.compile(lora_shrink, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    second = torch.compile(lora_expand, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (5, 8):
        x, base, a, b, idx, scale = inputs(num_tokens)
        expected = lora(x, base, a, b, idx, scale)
        assert torch.equal(whole(x, base, a, b, idx, scale), expected)
        assert torch.equal(second(first(x, a, idx), base, b, idx, scale), expected)


@pytest.mark.parametrize("how", ["compiled", "checked"])
def test_autocast_is_refused_neither_compiled_nor_with_checked_values(how, monkeypatch):
    """The checks once saw the dtypes of the caller, and not those that autocast gives the kernels."""
    x, base, a, b, idx, scale = inputs()
    torch._dynamo.reset()
    function = torch.compile(lora, fullgraph=True, backend="aot_eager") if how == "compiled" else lora
    monkeypatch.setattr(_library, "check_values", how == "checked")  # as FMKERNELS_CHECK=1
    with torch.autocast("cpu", torch.bfloat16):
        y = function(x, base.bfloat16(), a, b.half(), idx, scale)
    expected = lora(*(t.bfloat16() for t in (x, base, a)), b.half().bfloat16(), idx, scale)
    assert torch.equal(y, expected)


def test_autocast_and_flops():
    x, base, a, b, idx, scale = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = lora(x, base, a, b, idx, scale)
    assert torch.equal(y, lora(*(t.bfloat16() for t in (x, base, a, b)), idx, scale))
    with torch.autocast("cpu", torch.bfloat16):  # a layer's output is half there, its input still float32
        assert torch.equal(lora(x, base.bfloat16(), a, b, idx, scale), y)
    with FlopCounterMode(display=False) as counter:
        lora(x, base, a, b, idx, scale)
    assert counter.get_total_flops() == 2 * 9 * 16 * (72 + 40)
