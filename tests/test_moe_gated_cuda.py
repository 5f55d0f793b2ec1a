# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the product with a gated unit: tiles, layouts, and lists that only the device sees."""

import pytest
import torch
from torch import Tensor

from fmkernels import _library, moe, reference
from fmkernels._library import ops
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = [b for b in backends("moe_gated_mm") if b.has_tensor_cores and b in backends("moe_gated_backward")]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
EVERY_ORDER = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "in turns"])
EVERY_LAYOUT = pytest.mark.parametrize("trans_b", [False, True], ids=["rows", "columns"])


def of(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def normal(*shape, dtype=torch.bfloat16, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def inputs(ends, inner, width, trans_b=False, num_tokens=50, dtype=torch.bfloat16, device="cpu"):
    """(a, b, offsets, pos_to_token), with two rows more than the experts have, and a row in seven without a token."""
    num_rows = ends[-1] + 2
    tokens = torch.randint(0, num_tokens, [num_rows], generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    tokens[4::7] = -1
    shape = (len(ends), 2 * width, inner) if trans_b else (len(ends), inner, 2 * width)
    b = normal(*shape, dtype=dtype, device=device, seed=1)
    b = b.transpose(1, 2) if trans_b else b
    return normal(num_tokens, inner, dtype=dtype, device=device), b, of(*ends, device=device), tokens.to(device)


def mm(*args):
    """Of the backend that runs it, as those below."""
    return ops.moe_gated_mm(*args)


def gradients(*args):
    return ops.moe_gated_backward(*args)


def permute(*args):
    return ops.moe_permute(*args)


def grouped_mm(*args):
    return ops.moe_grouped_mm(*args)


def gates_and_ups(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)


def gated_mm(a, b, offsets, tokens, interleaved):
    """(silu(g) u, (g | u)), by the definition."""
    rows = torch.where(tokens[:, None] >= 0, a[tokens.clamp(min=0).long()], 0) if tokens is not None else a
    both = reference.moe.grouped_mm(rows, b, offsets)
    gate, up = gates_and_ups(both, interleaved)
    return torch.nn.functional.silu(gate) * up, both


# ---- values ----------------------------------------------------------------------------------------------------------

# On average 5, 29, 49 and 101 rows an expert, which are the four tiles; sizes that the fast kernel does not take.
TILES = {"16": [1, 3, 3, 9, 23], "32": [16, 17, 84], "64": [33, 33, 143], "128": [130, 201]}
SIZES = {"odd sizes": (37, 19), "ups off their boundary": (40, 20), "lines off theirs": (42, 24)}


@EVERY_LAYOUT
@EVERY_ORDER
@pytest.mark.parametrize("tile", TILES)
@EVERY_BACKEND
def test_tiles_and_layouts(backend, tile, interleaved, trans_b):
    a, b, offsets, tokens = inputs(TILES[tile], 72, 136, trans_b, device=backend.device)
    out, both = backend.run(mm, a, b, offsets, tokens, interleaved, True)
    assert_as_good_as_torch((out, both), lambda a, b: gated_mm(a, b, offsets, tokens, interleaved), a, b)
    assert not out[-2:].any()
    assert not both[-2:].any()
    assert not both[:-2][tokens[:-2] < 0].any()


@EVERY_LAYOUT
@EVERY_ORDER
@pytest.mark.parametrize("size", SIZES)
@EVERY_BACKEND
def test_sizes_that_are_not_whole_chunks(backend, size, interleaved, trans_b):
    a, b, offsets, tokens = inputs([3, 3, 23], *SIZES[size], trans_b, device=backend.device)
    out, both = backend.run(mm, a, b, offsets, tokens, interleaved, True)
    assert_as_good_as_torch((out, both), lambda a, b: gated_mm(a, b, offsets, tokens, interleaved), a, b)
    alone, nothing = backend.run(mm, a, b, offsets, tokens, interleaved, False)
    assert torch.equal(alone, out)
    assert nothing.shape == (0,)


@EVERY_LAYOUT
@EVERY_BACKEND
def test_few_rows_of_many_columns_have_the_bits_of_few_columns(backend, trans_b):
    """Tiles of 16 x 256 where there are enough of them, else of 16 x 64; in both products."""
    a, b, offsets, tokens = inputs([1, 3, 3, 9, 23], 40, 9472, trans_b, device=backend.device)
    out, both = backend.run(mm, a, b, offsets, tokens, True, True)
    columns = slice(18752, 18944)
    few, few_both = backend.run(mm, a, b[..., columns], offsets, tokens, True, True)
    assert torch.equal(out[:, 9376:], few)
    assert torch.equal(both[:, columns], few_both)
    rows = backend.run(permute, a, tokens)
    assert torch.equal(backend.run(grouped_mm, rows, b, offsets, None), both)
    assert torch.equal(backend.run(grouped_mm, rows, b[..., columns], offsets, None), few_both)


@EVERY_BACKEND
def test_float16_and_rows_that_stand_in_order(backend):
    a, b, offsets, _ = inputs([3, 40], 72, 40, num_tokens=42, dtype=torch.float16, device=backend.device)
    out, both = backend.run(mm, a, b, offsets, None, False, True)
    assert_as_good_as_torch((out, both), lambda a, b: gated_mm(a, b, offsets, None, False), a, b)


@EVERY_LAYOUT
@pytest.mark.parametrize("tile", TILES)
@EVERY_BACKEND
def test_a_row_has_the_same_bits_in_every_tile_and_gathered_or_not(backend, tile, trans_b):
    a, b, offsets, tokens = inputs(TILES[tile], 264, 24, trans_b, device=backend.device)
    out, both = backend.run(mm, a, b, offsets, tokens, False, True)
    rows = backend.run(permute, a, tokens)
    ordered = backend.run(mm, rows, b, offsets, None, False, True)
    assert torch.equal(ordered[0], out)
    assert torch.equal(ordered[1], both)
    assert torch.equal(backend.run(grouped_mm, rows, b, offsets, None), both)
    last = offsets[-1:] - 1
    one = torch.where(torch.arange(len(offsets), device=last.device) == len(offsets) - 1, 1, 0).int()
    alone, _ = backend.run(mm, a, b, one, tokens[last], False, False)
    assert torch.equal(alone, out[last])


# ---- gradients -------------------------------------------------------------------------------------------------------


def backward_inputs(width, dtype, device, num_tokens=10, num_topk=3, num_experts=5):
    generator = torch.Generator().manual_seed(7)
    idx = torch.randint(-1, num_experts, (num_tokens, num_topk), generator=generator, dtype=torch.int32).to(device)
    weights = torch.rand(num_tokens, num_topk, generator=generator).to(device)
    mapping = moe.build_mapping(idx, num_experts, alignment=4)
    num_rows = len(mapping.pos_to_token)
    grad = normal(num_rows, width, dtype=dtype, device=device, seed=5)
    return grad, normal(num_rows, 2 * width, dtype=dtype, device=device, seed=6), mapping, weights


def backward(grad, gate_up, mapping, weights, interleaved):
    """By autograd, rows without a token left out: a row's weight is that of the slot that names it."""
    tokens, positions = mapping.pos_to_token.long(), mapping.token_topk_to_pos
    row_weights = torch.ones_like(grad[:, 0])
    slots = (positions >= 0).nonzero()
    rows = positions[positions >= 0].long()
    if weights is not None:
        row_weights = torch.zeros_like(row_weights).index_put((rows,), weights[slots[:, 0], slots[:, 1]])
    row_weights = torch.where(tokens >= 0, row_weights, 0).requires_grad_()
    both = gate_up.detach().requires_grad_()
    gate, up = gates_and_ups(both, interleaved)
    inner = torch.nn.functional.silu(gate) * up * row_weights[:, None]
    grad_both, grad_rows = torch.autograd.grad(inner, (both, row_weights), grad)
    if weights is None:
        return [grad_both]
    return grad_both, inner.detach(), torch.zeros_like(weights).index_put((*slots.t(),), grad_rows[rows])


@EVERY_ORDER
@pytest.mark.parametrize("width", [264, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_BACKEND
def test_backward(backend, dtype, width, interleaved):
    grad, gate_up, mapping, weights = backward_inputs(width, dtype, backend.device)
    actual = backend.run(gradients, grad, gate_up, *mapping[:2], weights, interleaved)
    reference_of = lambda *t: backward(*t[:2], mapping, *t[2:], interleaved)  # noqa: E731
    assert_as_good_as_torch(actual, reference_of, grad, gate_up, weights)
    plain = backend.run(gradients, grad, gate_up, mapping[0], None, None, interleaved)
    assert_as_good_as_torch(plain[0], lambda g, x: backward(g, x, mapping, None, interleaved)[0], grad, gate_up)
    every = backend.run(gradients, grad, gate_up, None, None, None, interleaved)
    has_token = mapping.pos_to_token >= 0
    assert torch.equal(every[0][has_token], plain[0][has_token])
    assert not plain[0][~has_token].any()


# ---- lists that only the device sees ---------------------------------------------------------------------------------


@EVERY_BACKEND
def test_tokens_out_of_range_are_rows_of_zeros(backend):
    a, b, offsets, tokens = inputs([3, 3, 30], 40, 24, device=backend.device)
    a[7], b[2, 1, -1] = torch.nan, torch.inf  # of the ups
    tokens[tokens == 7] = -1
    expected = backend.run(mm, a, b, offsets, tokens, False, True)
    assert not any(t[tokens < 0].any() for t in expected)
    assert not expected[1].isnan().any()
    wrong = tokens.clone()
    outside = of(-5, len(a), 2**31 - 1, -(2**31), device=backend.device)
    wrong[wrong < 0] = outside.repeat(9)[: (wrong < 0).sum()]
    for trans_b in (False, True):
        weights = b.transpose(1, 2).contiguous().transpose(1, 2) if trans_b else b
        actual = backend.run(mm, a, weights, offsets, wrong, False, True)
        assert all(map(torch.equal, actual, expected))
    odd = a[:, 1:], b[:, 1:]  # copied element by element
    expected = backend.run(mm, *odd, offsets, tokens, False, True)
    assert all(map(torch.equal, backend.run(mm, *odd, offsets, wrong, False, True), expected))


@pytest.mark.parametrize("how", ["clamped", "checked"])
@EVERY_BACKEND
def test_a_mapping_with_a_token_out_of_range(backend, how, monkeypatch):
    monkeypatch.setattr(_library, "check_values", how == "checked")  # as FMKERNELS_CHECK=1
    a, b, ends, tokens = inputs([3, 3, 30], 40, 24, num_tokens=20, device=backend.device)
    positions = torch.full((20, 1), -1, dtype=torch.int32, device=backend.device)
    mapping = moe.Mapping(tokens, positions, ends.expand(2, -1).contiguous())
    out = backend.run(moe.grouped_mm_gated, a, b, mapping)
    wrong = mapping._replace(pos_to_token=torch.where(tokens < 0, 20, tokens))
    if how == "clamped":
        assert torch.equal(backend.run(moe.grouped_mm_gated, a, b, wrong), out)
        return
    with pytest.raises(ValueError, match=r"grouped_mm_gated: .*pos_to_token must be from -1 to 19, got 20"):
        backend.run(moe.grouped_mm_gated, a, b, wrong)


@EVERY_BACKEND
def test_offsets_are_clamped(backend):
    a, b, _, tokens = inputs([1, 2, 3, 4, 38], 24, 16, device=backend.device)
    wrong, ends = of(-3, 9, 4, 2**31 - 1, 12, device=backend.device), of(0, 9, 9, 40, 40, device=backend.device)
    expected = backend.run(mm, a, b, ends, tokens, True, True)
    assert all(map(torch.equal, backend.run(mm, a, b, wrong, tokens, True, True), expected))


@EVERY_BACKEND
def test_a_mapping_that_lies_touches_nothing_else(backend):
    grad, gate_up, mapping, weights = backward_inputs(40, torch.bfloat16, backend.device)
    tokens, positions = mapping.pos_to_token.clone(), mapping.token_topk_to_pos.clone()
    tokens[tokens < 0], positions[positions < 0] = 2**31 - 1, -7
    expected = backend.run(gradients, grad, gate_up, *mapping[:2], weights, False)
    actual = backend.run(gradients, grad, gate_up, tokens, positions, weights, False)
    assert all(map(torch.equal, actual, expected))
    nowhere = torch.full_like(positions, 2**31 - 1)  # no slot names a row
    nothing = backend.run(gradients, grad, gate_up, tokens, nowhere, weights, False)
    assert not any(t.any() for t in nothing)
