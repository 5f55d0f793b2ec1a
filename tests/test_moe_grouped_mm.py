# SPDX-License-Identifier: Apache-2.0
"""moe.grouped_mm: values, gradients and edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmkernels import moe, reference
from fmkernels.testing import FLOAT_DTYPES, assert_as_good_as_torch, backends

BACKENDS = [
    b for b in backends("moe_grouped_mm") if b in backends("moe_grouped_mm_inner") + backends("moe_grouped_sum")
]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
BACKENDS_AND_DTYPES = [
    (b, dtype) for b in BACKENDS for dtype in (FLOAT_DTYPES if b.name == "cpu" else FLOAT_DTYPES[1:])
]
EVERY_DTYPE = pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES, ids=lambda x: str(x).split(".")[-1])


def of(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def inputs(ends, num_rows=None, inner=40, columns=48, dtype=torch.float32, device="cpu", trans_b=False):
    """(a, b, offsets, bias); b lies as [experts, columns, inner] where trans_b."""
    num_rows = ends[-1] if num_rows is None else num_rows
    a = normal(num_rows, inner, dtype=dtype, device=device)
    shape = (len(ends), columns, inner) if trans_b else (len(ends), inner, columns)
    bias = normal(len(ends), columns, device=device, seed=2)
    return a, normal(*shape, dtype=dtype, device=device, seed=1), of(*ends, device=device), bias


def gradients(function, tensors, offsets, **options):
    """With respect to a, b and, where there is a third tensor, bias."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    if len(leaves) > 2:
        options["bias"] = leaves[2]
    out = function(leaves[0], leaves[1], offsets, **options)
    grad = torch.randint(-9, 9, out.shape, generator=torch.Generator().manual_seed(3))  # exact in every dtype
    return torch.autograd.grad(out, leaves, grad.to(out.dtype).to(out.device))


# ---- values ----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
def test_by_hand(backend):
    device, dtype = backend.device, torch.bfloat16
    a = torch.arange(10, dtype=dtype, device=device).view(5, 2)  # rows [0, 1], [2, 3], ...
    b = torch.tensor([[[1, 10], [2, 20]], [[7, 7], [7, 7]], [[3, 0], [0, 3]]], dtype=dtype, device=device)
    offsets = of(2, 2, 4, device=device)
    expected = torch.tensor([[2, 20], [8, 80], [12, 15], [18, 21], [0, 0]], dtype=dtype, device=device)
    assert torch.equal(backend.run(moe.grouped_mm, a, b, offsets), expected)
    bias = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1.0, 0.5]], device=device)
    expected[:4] += bias[[0, 0, 2, 2]].to(dtype)
    assert torch.equal(backend.run(moe.grouped_mm, a, b, offsets, bias=bias), expected)
    ragged = torch.tensor([[[4, 6], [6, 10]], [[0, 0], [0, 0]], [[52, 58], [58, 66]]], dtype=dtype, device=device)
    ragged[2] = torch.tensor([[4 * 4 + 6 * 6, 4 * 5 + 6 * 7], [5 * 4 + 7 * 6, 5 * 5 + 7 * 7]])
    assert torch.equal(backend.run(moe.grouped_mm, a.t(), a, offsets), ragged)


# On average 3, 27, 45 and 100 rows an expert, which are the four tiles of CUDA; up to 6 are read in place on the CPU.
LOADS = {
    "few": [1, 3, 3, 9, 12],
    "uneven": [16, 17, 80],
    "halves of a tile": [33, 33, 135],
    "two tiles": [130, 200],
    "one": [0, 0, 0, 37],
}


SIZES = {"whole chunks": (72, 136), "odd sizes": (37, 19)}
# Emulated, float16 differs from bfloat16 in one instruction, and odd sizes have one tile for all loads.
CASES = [
    pytest.param(backend, dtype, load, size, id=f"{backend}-{str(dtype)[6:]}-{load}-{size}")
    for backend, dtype in BACKENDS_AND_DTYPES
    for load in LOADS
    for size in SIZES
    if backend.name != "emulated"
    or (load == "uneven" if dtype == torch.float16 else size != "odd sizes")
    or (load == "few" and dtype == torch.bfloat16)
]
EVERY_CASE = pytest.mark.parametrize(("backend", "dtype", "load", "size"), CASES)


@pytest.mark.parametrize("trans_b", [False, True], ids=["rows", "columns"])
@EVERY_CASE
def test_matches_the_reference(load, trans_b, size, dtype, backend):
    (inner, columns), ends = SIZES[size], LOADS[load]
    a, b, offsets, bias = inputs(ends, ends[-1] + 2, inner, columns, dtype, backend.device, trans_b)
    for given_bias in (None, bias):
        out = backend.run(moe.grouped_mm, a, b, offsets, bias=given_bias, trans_b=trans_b)
        expected = lambda a, b, bias: reference.moe.grouped_mm(a, b, offsets, bias=bias, trans_b=trans_b)  # noqa: E731
        assert_as_good_as_torch(out, expected, a, b, given_bias)
        assert torch.equal(out[ends[-1] :], torch.zeros_like(out[ends[-1] :]))


@EVERY_CASE
def test_a_ragged_inner_dimension(load, size, dtype, backend):
    (inner, columns), ends = SIZES[size], LOADS[load]
    a, _, offsets, _ = inputs(ends, ends[-1] + 2, inner, columns, dtype, backend.device)
    b = normal(len(a), columns, dtype=dtype, device=backend.device, seed=4)
    out = backend.run(moe.grouped_mm, a.t(), b, offsets)
    expected = lambda a, b: reference.moe.grouped_mm(a.t(), b, offsets)  # noqa: E731
    assert_as_good_as_torch(out, expected, a, b)
    copied = backend.run(moe.grouped_mm, a.t().contiguous(), b.t().contiguous(), offsets, trans_b=True)
    assert torch.equal(copied, out)


@EVERY_DTYPE
def test_long_sums(dtype, backend):
    """Several stages, and several chains of additions."""
    ends = [5, 14, 60] if backend.name == "emulated" else [5, 14, 300]
    a, b, offsets, bias = inputs(ends, None, 600, 40, dtype, backend.device)
    out = backend.run(moe.grouped_mm, a, b, offsets, bias=bias)
    assert_as_good_as_torch(out, lambda a, b, bias: reference.moe.grouped_mm(a, b, offsets, bias=bias), a, b, bias)
    x = normal(600, 24, dtype=dtype, device=backend.device)
    offsets = of(3, 590, device=backend.device)
    out = backend.run(moe.grouped_mm, x.t(), x, offsets)
    assert_as_good_as_torch(out, lambda x: reference.moe.grouped_mm(x.t(), x, offsets), x)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.integers(0, 70),
    st.integers(0, 50),
    st.booleans(),
    st.sampled_from(FLOAT_DTYPES),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_any_sizes(counts, inner, columns, trans_b, dtype, num_threads):
    ends = torch.tensor(counts).cumsum(0).tolist()
    a, b, offsets, bias = inputs(ends, ends[-1] + 1, inner, columns, dtype, trans_b=trans_b)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        out = moe.grouped_mm(a, b, offsets, bias=bias, trans_b=trans_b)
        ragged = moe.grouped_mm(a.t(), out, offsets)
    finally:
        torch.set_num_threads(before)
    expected = lambda a, b, bias: reference.moe.grouped_mm(a, b, offsets, bias=bias, trans_b=trans_b)  # noqa: E731
    assert_as_good_as_torch(out, expected, a, b, bias)
    assert_as_good_as_torch(ragged, lambda a, b: reference.moe.grouped_mm(a.t(), b, offsets), a, out)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trans_b", [False, True], ids=["rows", "columns"])
@EVERY_DTYPE
def test_gradients_match_the_reference(trans_b, dtype, backend):
    a, b, offsets, bias = inputs([3, 3, 24, 40], 43, 24, 56, dtype, backend.device, trans_b)
    actual = backend.run(gradients, moe.grouped_mm, (a, b, bias), offsets, trans_b=trans_b)
    assert all(t.is_contiguous() for t in actual)
    wanted = lambda *t: gradients(reference.moe.grouped_mm, t, offsets, trans_b=trans_b)  # noqa: E731
    for i in range(3):
        assert_as_good_as_torch(actual[i], lambda *t, i=i: wanted(*t)[i], a, b, bias)
    assert not actual[0][40:].any()
    assert not actual[1][1].any()


@EVERY_DTYPE
def test_gradients_of_a_ragged_inner_dimension(dtype, backend):
    a, _, offsets, _ = inputs([3, 3, 24, 40], 43, 24, 56, dtype, backend.device)
    b = normal(43, 56, dtype=dtype, device=backend.device, seed=4)
    actual = backend.run(gradients, moe.grouped_mm, (a.t(), b), offsets)
    wanted = lambda a, b: gradients(reference.moe.grouped_mm, (a.t(), b), offsets)  # noqa: E731
    for i in range(2):
        assert_as_good_as_torch(actual[i], lambda *t, i=i: wanted(*t)[i], a, b)


@EVERY_BACKEND
def test_an_expanded_gradient_and_a_bias_in_the_dtype_of_a(backend):
    a, b, offsets, bias = inputs([2, 7], 8, 16, 24, torch.bfloat16, backend.device)

    def step(function):
        leaves = [t.clone().requires_grad_() for t in (a, b, bias.bfloat16())]
        function(leaves[0], leaves[1], offsets, bias=leaves[2]).sum().backward()
        ragged = function(leaves[0].t(), leaves[0], offsets)
        ragged.sum().backward()
        return [leaf.grad for leaf in leaves]

    for actual, expected in zip(backend.run(step, moe.grouped_mm), step(reference.moe.grouped_mm), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_second_derivative_is_refused():
    a, b, offsets, _ = inputs([2, 7])
    a.requires_grad_()
    (grad,) = torch.autograd.grad(moe.grouped_mm(a, b, offsets).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "num_rows", "inner", "columns"),
    [([0, 0], 0, 8, 8), ([0, 0], 3, 8, 8), ([1], 1, 1, 1), ([2, 3], 4, 0, 8), ([2, 3], 4, 8, 0), ([], 5, 8, 16)],
    ids=["no rows", "no row has an expert", "ones", "inner 0", "no columns", "no experts"],
)
@EVERY_BACKEND
def test_nothing_to_do(ends, num_rows, inner, columns, backend):
    a, b, offsets, bias = inputs(ends, num_rows, inner, columns, torch.bfloat16, backend.device)
    out = backend.run(moe.grouped_mm, a, b, offsets, bias=bias)
    assert torch.equal(out, reference.moe.grouped_mm(a, b, offsets, bias=bias))
    ragged = backend.run(moe.grouped_mm, a.t(), out, offsets)
    assert torch.equal(ragged, reference.moe.grouped_mm(a.t(), out, offsets))
    backend.run(gradients, moe.grouped_mm, (a, b, bias), offsets)


@EVERY_BACKEND
def test_rows_of_no_expert_are_not_read(backend):
    a, b, offsets, bias = inputs([3, 3, 20], 50, 24, 40, torch.bfloat16, backend.device)
    a[20:] = torch.nan
    b[1] = torch.nan  # an expert without rows
    out = backend.run(moe.grouped_mm, a, b, offsets, bias=bias)
    assert torch.equal(out[20:], torch.zeros_like(out[20:]))
    assert out.isfinite().all()
    grads = backend.run(gradients, moe.grouped_mm, (a, b, bias), offsets)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[1][1].any()


@EVERY_BACKEND
def test_nan_reaches_its_row_and_its_expert(backend):
    a, b, offsets, _ = inputs([3, 9, 20], None, 24, 40, torch.bfloat16, backend.device)
    a[4, 7] = torch.nan
    b[2, 3, 5] = torch.inf
    out = backend.run(moe.grouped_mm, a, b, offsets)
    expected = torch.zeros(20, 40, dtype=torch.bool, device=backend.device)
    expected[4] = True
    expected[9:, 5] = True
    assert torch.equal(~out.isfinite(), expected)
    ragged = backend.run(moe.grouped_mm, a.t(), a, offsets)
    assert ragged[[0, 2]].isfinite().all()
    assert ragged[1, 7].isnan().all()
    assert ragged[1, :, 7].isnan().all()
    assert ragged[1].isnan().sum() == 2 * 24 - 1


@EVERY_DTYPE
def test_a_row_has_the_same_bits_wherever_it_stands(dtype, backend):
    a, b, offsets, bias = inputs([70, 75, 150], None, 264, 48, dtype, backend.device)
    for trans_b in (False, True):
        weights = b.transpose(1, 2).contiguous() if trans_b else b
        run = lambda a, o, w=weights, t=trans_b: backend.run(moe.grouped_mm, a, w, o, bias=bias, trans_b=t)  # noqa: E731
        out = run(a, offsets)
        assert torch.equal(run(a, offsets), out)
        for rows, ends in ((slice(80, 81), (0, 0, 1)), (slice(71, 74), (0, 3, 3)), (slice(33, 50), (17, 17, 17))):
            assert torch.equal(run(a[rows], of(*ends, device=backend.device)), out[rows])
    wide = torch.cat([weights, weights], 1)  # as a part of a wider matrix, whose rows are further apart
    view = wide[:, :48] if trans_b else wide
    assert torch.equal(run(a, offsets, view), out)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_the_bits_do_not_depend_on_how_b_lies(dtype):
    """On either side of the numbers of rows and columns at which the CPU takes another way."""
    ends = torch.tensor([1, 3, 4, 5, 6, 7, 16, 24, 25, 130]).cumsum(0).tolist()
    a, b, offsets, bias = inputs(ends, None, 530, 37, dtype)
    by_columns = b.transpose(1, 2).contiguous().transpose(1, 2)
    for more in (None, bias):
        rows, columns = moe.grouped_mm(a, b, offsets, bias=more), moe.grouped_mm(a, by_columns, offsets, bias=more)
        assert torch.equal(rows, columns)


@pytest.mark.parametrize("trans_b", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_no_bits(num_threads, trans_b):
    a, b, offsets, bias = inputs([600, 603], None, 300, 500, trans_b=trans_b)
    before = torch.get_num_threads()
    run = lambda: (moe.grouped_mm(a, b, offsets, bias=bias, trans_b=trans_b), moe.grouped_mm(a.t(), a, offsets))  # noqa: E731
    expected = run()
    torch.set_num_threads(num_threads)
    try:
        actual = run()
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, actual, expected))


@EVERY_BACKEND
def test_many_experts_of_which_few_have_rows(backend):
    """More than a warp looks at together."""
    counts = torch.zeros(150, dtype=torch.int64)
    counts[[2, 31, 32, 64, 149]] = torch.tensor([3, 1, 17, 2, 5])
    a, b, offsets, _ = inputs(counts.cumsum(0).tolist(), 30, 16, 8, torch.bfloat16, backend.device)
    assert_as_good_as_torch(
        backend.run(moe.grouped_mm, a, b, offsets), lambda a, b: reference.moe.grouped_mm(a, b, offsets), a, b
    )
    ragged = backend.run(moe.grouped_mm, a.t(), a, offsets)
    assert_as_good_as_torch(ragged, lambda a: reference.moe.grouped_mm(a.t(), a, offsets), a)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.has_tensor_cores], ids=str)
def test_offsets_that_only_the_device_sees_are_clamped(backend):
    a, b, _, bias = inputs([1] * 5, 40, 24, 16, torch.bfloat16, backend.device)
    given_offsets, ends = of(-3, 9, 4, 2**31 - 1, 12, device=backend.device), [0, 9, 9, 40, 40]
    out = backend.run(moe.grouped_mm, a, b, given_offsets, bias=bias)
    assert torch.equal(out, backend.run(moe.grouped_mm, a, b, of(*ends, device=backend.device), bias=bias))
    ragged = backend.run(moe.grouped_mm, a.t(), a, given_offsets)
    assert torch.equal(ragged, backend.run(moe.grouped_mm, a.t(), a, of(*ends, device=backend.device)))
