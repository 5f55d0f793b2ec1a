# SPDX-License-Identifier: Apache-2.0
"""moe.grouped_mm_gated: values, gradients, edges, errors, and one graph."""

import pytest
import torch

from fmkernels import moe, reference
from fmkernels._library import ops
from fmkernels.testing import FLOAT_DTYPES, assert_as_good_as_torch, backends

BACKENDS = [b for b in backends("moe_gated_mm") if b in backends("moe_gated_backward")]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
EVERY_DTYPE = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, dtype) for b in BACKENDS for dtype in (FLOAT_DTYPES if b.name == "cpu" else FLOAT_DTYPES[1:])],
    ids=lambda value: str(value).split(".")[-1],
)
FLOAT32_AND_BFLOAT16 = pytest.mark.parametrize(  # torch's own float16 products take seconds
    ("backend", "dtype"),
    [(b, dtype) for b in BACKENDS for dtype in (FLOAT_DTYPES[:2] if b.name == "cpu" else FLOAT_DTYPES[1:2])],
    ids=lambda value: str(value).split(".")[-1],
)
EVERY_LAYOUT = pytest.mark.parametrize(
    ("interleaved", "trans_b"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["rows", "columns", "rows in turns", "columns in turns"],
)
# Rows of the experts: none, few that are read where they lie, a panel, parts of two, and of several.
COUNTS = [0, 1, 5, 8, 9, 37]


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def inputs(counts=COUNTS, inner=40, width=26, dtype=torch.float32, device="cpu", trans_b=False, num_tokens=23):
    """(tokens, rows, b, mapping): a mapping of tokens that have the experts so often, -1 and padding among its rows."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    slots = -torch.ones(-(-len(ids) // num_tokens) * num_tokens, dtype=torch.int64)
    slots[torch.randperm(len(slots), generator=generator)[: len(ids)]] = ids
    mapping = reference.moe.build_mapping(slots.view(num_tokens, -1), len(counts), alignment=2)
    mapping = moe.Mapping(*(t.to(device) for t in mapping))
    shape = (len(counts), 2 * width, inner) if trans_b else (len(counts), inner, 2 * width)
    b = (normal(*shape, seed=2) * max(inner, 1) ** -0.5).to(dtype).to(device)
    a = normal(num_tokens, inner, dtype=dtype, device=device)
    return a, normal(len(mapping[0]), inner, dtype=dtype, device=device, seed=3), b, mapping


def gradients(function, a, b, offsets, **options):
    leaves = [t.detach().requires_grad_() for t in (a, b)]
    out = function(*leaves, offsets, **options)
    grad = torch.randint(-4, 5, out.shape, generator=torch.Generator().manual_seed(4)).to(out.dtype).to(out.device)
    return torch.autograd.grad(out, leaves, grad)


# ---- values ----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
def test_by_hand(backend):
    """Of a gate of 0 the unit is 0, of a large one the product of both."""
    a = torch.tensor([[64.0, 0.0], [0.0, -64.0]], dtype=torch.bfloat16, device=backend.device)
    b = torch.tensor([[[1.0, 3.0], [0.0, 5.0]]], dtype=torch.bfloat16, device=backend.device)
    idx = torch.tensor([[0], [0]], device=backend.device)
    mapping = backend.run(moe.build_mapping, idx, 1, num_rows=3)
    expected = torch.tensor([[64.0 * 192.0], [0.0], [0.0]], dtype=torch.bfloat16, device=backend.device)
    assert torch.equal(backend.run(moe.grouped_mm_gated, a, b, mapping), expected)
    offsets = mapping.expert_offsets[0]
    assert torch.equal(backend.run(moe.grouped_mm_gated, a, b, offsets), expected[:2])


@EVERY_LAYOUT
@EVERY_DTYPE
def test_matches_the_reference(interleaved, trans_b, dtype, backend):
    tokens, rows, b, mapping = inputs(dtype=dtype, device=backend.device, trans_b=trans_b)
    options = {"interleaved": interleaved, "trans_b": trans_b}
    for a, offsets in ((tokens, mapping), (rows, mapping.expert_offsets[0])):
        out = backend.run(moe.grouped_mm_gated, a, b, offsets, **options)
        expected = lambda a, b, o=offsets: reference.moe.grouped_mm_gated(a, b, o, **options)  # noqa: E731
        assert_as_good_as_torch(out, expected, a, b)
        assert out.is_contiguous()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_long_sums_have_the_bits_of_grouped_mm(interleaved, dtype):
    """Several chains of additions, whichever way the columns lie and however many rows an expert has."""
    tokens, _, b, mapping = inputs([1, 3, 7, 17, 150], 600, 37, dtype, trans_b=True, num_tokens=60)
    b = b.transpose(1, 2)
    offsets, found = mapping.expert_offsets[0], []
    for weights in (b, b.contiguous()):
        for keeps in (True, False):
            found.append(ops.moe_gated_mm(tokens, weights, offsets, mapping[0], interleaved, keeps))
    assert all(torch.equal(out, found[0][0]) for out, _ in found)
    both = moe.grouped_mm(moe.permute(tokens, mapping), b, offsets)
    assert torch.equal(found[0][1], both)
    assert torch.equal(found[2][1], both)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_no_bits(num_threads):
    tokens, _, b, mapping = inputs([2, 150], 300, 500, trans_b=True)
    expected = [moe.grouped_mm_gated(tokens, w, mapping) for w in (b.transpose(1, 2), b.transpose(1, 2).contiguous())]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        actual = [moe.grouped_mm_gated(tokens, w, mapping) for w in (b.transpose(1, 2), b.transpose(1, 2).contiguous())]
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, actual, expected))


# ---- gradients -------------------------------------------------------------------------------------------------------


@EVERY_LAYOUT
@FLOAT32_AND_BFLOAT16
def test_gradients_match_the_reference(interleaved, trans_b, dtype, backend):
    tokens, rows, b, mapping = inputs(dtype=dtype, device=backend.device, trans_b=trans_b)
    options = {"interleaved": interleaved, "trans_b": trans_b}
    for a, offsets in ((tokens, mapping), (rows, mapping.expert_offsets[0])):
        actual = backend.run(gradients, moe.grouped_mm_gated, a, b, offsets, **options)
        assert all(t.is_contiguous() for t in actual)
        for i in range(2):
            wanted = lambda *t, i=i, o=offsets: gradients(reference.moe.grouped_mm_gated, *t, o, **options)[i]  # noqa: E731
            assert_as_good_as_torch(actual[i], wanted, a, b, computed_in=dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@EVERY_DTYPE
def test_backward_with_weights(interleaved, dtype, backend):
    """The gradients of sum_k w (inner W), by their definition."""
    _, _, _, mapping = inputs(device=backend.device)
    positions, num_rows, width = mapping.token_topk_to_pos, len(mapping[0]), 21
    grad_inner = normal(num_rows, width, dtype=dtype, device=backend.device)
    gate_up = normal(num_rows, 2 * width, dtype=dtype, device=backend.device, seed=1)
    weights = normal(*positions.shape, device=backend.device, seed=2)

    def wanted(grad_inner, gate_up, weights):
        leaves = [t.detach().requires_grad_() for t in (gate_up, weights)]
        of_rows = torch.zeros(num_rows, dtype=weights.dtype, device=weights.device)
        there = positions >= 0
        of_rows = of_rows.index_put((positions[there].long(),), leaves[1][there])
        gate, up = (leaves[0][:, 0::2], leaves[0][:, 1::2]) if interleaved else leaves[0].chunk(2, -1)
        inner = of_rows.unsqueeze(-1) * torch.nn.functional.silu(gate) * up
        grads = torch.autograd.grad(inner, leaves, grad_inner.to(inner.dtype))
        return grads[0].to(gate_up.dtype), inner.detach().to(gate_up.dtype), grads[1]

    actual = backend.run(
        lambda *args: ops.moe_gated_backward(*args), grad_inner, gate_up, mapping[0], positions, weights, interleaved
    )
    for i in range(3):
        expected = lambda *t, i=i: wanted(*t)[i]  # noqa: E731
        assert_as_good_as_torch(actual[i], expected, grad_inner, gate_up, weights, computed_in=dtype)


def test_a_second_derivative_is_refused():
    tokens, _, b, mapping = inputs()
    tokens.requires_grad_()
    (grad,) = torch.autograd.grad(moe.grouped_mm_gated(tokens, b, mapping).square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "inner", "width"), [([0, 0], 8, 8), ([3], 1, 1), ([2, 3], 0, 8), ([2, 3], 8, 0), ([1, 9], 1, 2)]
)
@pytest.mark.parametrize("trans_b", [False, True])
@EVERY_BACKEND
def test_nothing_to_do(counts, inner, width, trans_b, backend):
    tokens, rows, b, mapping = inputs(counts, inner, width, torch.bfloat16, backend.device, trans_b)
    for a, offsets in ((tokens, mapping), (rows, mapping.expert_offsets[0])):
        out = backend.run(moe.grouped_mm_gated, a, b, offsets, trans_b=trans_b)
        expected = lambda a, b, o=offsets: reference.moe.grouped_mm_gated(a, b, o, trans_b=trans_b)  # noqa: E731
        assert_as_good_as_torch(out, expected, a, b)
        backend.run(gradients, moe.grouped_mm_gated, a, b, offsets, trans_b=trans_b)


@pytest.mark.parametrize("trans_b", [False, True])
@EVERY_BACKEND
def test_padding_is_not_read_and_infinite_weights_do_not_reach_it(trans_b, backend):
    tokens, rows, b, mapping = inputs(dtype=torch.bfloat16, device=backend.device, trans_b=trans_b)
    padding = mapping.pos_to_token < 0
    assert padding.any()
    b[:] = torch.inf
    out = backend.run(moe.grouped_mm_gated, tokens, b, mapping, trans_b=trans_b)
    assert not out[padding].any()
    _, rows, b, _ = inputs(dtype=torch.bfloat16, device=backend.device, trans_b=trans_b)
    offsets = mapping.expert_offsets[0] // 2
    rows[int(offsets[-1]) :] = torch.nan
    b[0] = torch.nan  # an expert without rows
    out = backend.run(moe.grouped_mm_gated, rows, b, offsets, trans_b=trans_b)
    assert out.isfinite().all()
    assert not out[int(offsets[-1]) :].any()
    grads = backend.run(gradients, moe.grouped_mm_gated, rows, b, offsets, trans_b=trans_b)
    assert all(grad.isfinite().all() for grad in grads)


@EVERY_BACKEND
def test_nan_reaches_its_rows(backend):
    tokens, _, b, mapping = inputs(dtype=torch.bfloat16, device=backend.device, trans_b=True)
    tokens[4, 7] = torch.nan
    out = backend.run(moe.grouped_mm_gated, tokens, b, mapping, trans_b=True)
    of_token = mapping.pos_to_token == 4
    assert out[of_token].isnan().all()
    assert out[~of_token].isfinite().all()


@EVERY_DTYPE
def test_a_row_has_the_same_bits_wherever_it_stands(dtype, backend):
    _, rows, b, _ = inputs([70, 75], 264, 48, dtype, backend.device, True)
    for trans_b in (False, True):
        weights = b if trans_b else b.transpose(1, 2).contiguous()
        run = lambda a, *ends, w=weights, t=trans_b: backend.run(  # noqa: E731
            moe.grouped_mm_gated, a, w, torch.tensor(ends, dtype=torch.int32, device=backend.device), trans_b=t
        )
        out = run(rows[:145], 70, 145)
        for part, ends in ((slice(80, 81), (0, 1)), (slice(71, 75), (0, 4)), (slice(33, 50), (17, 17))):
            assert torch.equal(run(rows[part], *ends), out[part])


# ---- errors ----------------------------------------------------------------------------------------------------------

A, ROWS, B, MAPPING = inputs()
OFFSETS = MAPPING.expert_offsets[0]
ERRORS = [
    ({"a": None}, TypeError, "a must be a tensor, got NoneType."),
    ({"a": A.t()}, ValueError, "a must have a contiguous last dimension, got stride 40."),
    ({"b": B[0]}, ValueError, "b must be [num_experts, K, 2 * N], got 2 dimensions"),
    ({"b": B[:, :, :51]}, ValueError, "b must have an even number of columns, got 51."),
    ({"b": B.half()}, ValueError, "b must have the dtype of a, float32, got float16."),
    ({"b": B[:, :20]}, ValueError, "b must have for this a K = 40, got 20."),
    ({"b": B[:5]}, ValueError, "offsets must have as many elements as b has experts, 5, got 6."),
    ({"offsets": OFFSETS.long()}, ValueError, "offsets must be int32, got int64."),
    ({"offsets": OFFSETS + 40}, ValueError, "offsets must not decrease and be at most M, 23, got"),
    ({"offsets": MAPPING._replace(pos_to_token=MAPPING[0] + 9)}, ValueError, "mapping.pos_to_token must be from -1 to"),
    ({"interleaved": 1}, TypeError, "interleaved must be True or False, got int."),
    ({"trans_b": None}, TypeError, "trans_b must be True or False, got NoneType."),
]


@pytest.mark.parametrize(("changed", "error", "sentence"), ERRORS)
def test_wrong_arguments(changed, error, sentence):
    arguments = {"a": A, "b": B, "offsets": MAPPING, **changed}
    with pytest.raises(error) as raised:
        moe.grouped_mm_gated(**arguments)
    assert str(raised.value).startswith(f"moe.grouped_mm_gated: {sentence}")


def test_a_mapping_that_backward_could_not_use_is_refused_before():
    wrong = MAPPING._replace(token_topk_to_pos=MAPPING.token_topk_to_pos[:5])
    with pytest.raises(ValueError, match="token_topk_to_pos must have the tokens of a, 23, got 5"):
        moe.grouped_mm_gated(A.clone().requires_grad_(), B, wrong)


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_opcheck():
    gate_up, weights = torch.randn(len(ROWS), 16), torch.rand(MAPPING.token_topk_to_pos.shape)
    for keeps in (False, True):
        torch.library.opcheck(torch.ops.fmkernels.moe_gated_mm.default, (A, B, OFFSETS, MAPPING[0], False, keeps))
    torch.library.opcheck(torch.ops.fmkernels.moe_gated_mm.default, (ROWS, B, OFFSETS, None, True, True))
    for given in ((None, None, None), (MAPPING[0], MAPPING[1], weights)):
        args = (torch.randn(len(ROWS), 8), gate_up, *given, False)
        torch.library.opcheck(torch.ops.fmkernels.moe_gated_backward.default, args)


def test_compile_is_one_graph():
    torch._dynamo.reset()
    grouped_mm_gated = torch.compile(moe.grouped_mm_gated, fullgraph=True, backend="aot_eager")
    for a, offsets in ((A, MAPPING), (ROWS, OFFSETS)):
        assert torch.equal(grouped_mm_gated(a, B, offsets), moe.grouped_mm_gated(a, B, offsets))
        actual = gradients(grouped_mm_gated, a, B, offsets)
        assert all(map(torch.equal, actual, gradients(moe.grouped_mm_gated, a, B, offsets)))


def test_autocast_and_flops():
    with torch.autocast("cpu", torch.bfloat16):
        out = moe.grouped_mm_gated(A, B, MAPPING)
    assert torch.equal(out, moe.grouped_mm_gated(A.bfloat16(), B.bfloat16(), MAPPING))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        moe.grouped_mm_gated(A, B, MAPPING)
    assert counter.get_total_flops() == 2 * len(ROWS) * 40 * 52
