# SPDX-License-Identifier: Apache-2.0
"""BlockTopology, BlockSparse and topology_moe: known answers, forms, errors."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fmkernels import BlockSparse, BlockTopology, _library, dds, dsd, reference, sdd, topology_moe
from fmkernels.testing import backends

DEVICES = sorted({backend.device for backend in backends("block_sparse_dsd")})
EVERY_DEVICE = pytest.mark.parametrize("device", DEVICES)

#   . 0 1
#   . . .
#   2 . 3
MASK = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def equal(t, *values):
    return t.dtype == torch.int32 and t.tolist() == list(values)


# ---- known answers ---------------------------------------------------------------------------------------------------


@EVERY_DEVICE
def test_the_lists_of_rows_and_columns(device):
    of = BlockTopology.from_mask(MASK.to(device), 16)
    assert of.shape == (48, 48)
    assert equal(of.row_offsets, 0, 2, 2, 4)
    assert equal(of.column_indices, 1, 2, 0, 2)
    assert equal(of.row_indices, 0, 0, 2, 2)
    offsets, indices, positions, order = of.lists(False)
    assert equal(offsets[0], 0, 2, 2, 4)
    assert equal(indices, 1, 2, 0, 2)
    assert positions is None
    assert equal(order, 0, 2, 1)  # two blocks, two, none
    offsets, indices, positions, order = of.lists(True)
    assert equal(offsets[0], 0, 1, 2, 4)
    assert equal(indices, 2, 0, 0, 2)
    assert equal(positions, 2, 0, 1, 3)
    assert equal(order, 2, 0, 1)


@EVERY_DEVICE
def test_the_lists_of_a_batch_go_on(device):
    of = BlockTopology.from_mask(torch.stack([MASK, ~MASK, torch.zeros_like(MASK)]).to(device), (16, 32))
    assert of.shape == (3, 48, 96)
    assert of.row_offsets.tolist() == [[0, 2, 2, 4], [4, 5, 8, 9], [9, 9, 9, 9]]
    assert equal(of.row_indices, 0, 0, 2, 2, 3, 4, 4, 4, 5)
    offsets, indices, positions, order = of.lists(True)
    assert offsets.tolist() == [[0, 1, 2, 4], [4, 6, 8, 9], [9, 9, 9, 9]]
    assert equal(indices, 2, 0, 0, 2, 0, 1, 1, 2, 1)
    assert equal(positions, 2, 0, 1, 3, 4, 5, 6, 8, 7)
    assert equal(order, 2, 3, 4, 0, 1, 5, 6, 7, 8)


@EVERY_DEVICE
@pytest.mark.parametrize("ends", [[32, 32, 96], [0, 0, 0], [64, 128, 128], [128, 128, 128]])
def test_moe_topology_is_block_diagonal(ends, device):
    of = topology_moe(torch.tensor(ends, device=device), 128, 64, (32, 16))
    assert of.shape == (128, 192)
    assert of.num_blocks == 4 * 4
    stored = BlockSparse.of(torch.ones(of.num_blocks, 32, 16, device=device), of).to_dense() != 0
    assert torch.equal(
        stored.cpu(),
        reference.topology_moe(torch.tensor(ends), 128, 64, (32, 16)) & (torch.arange(128)[:, None] < ends[-1]),
    )


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_lists_of_columns_are_those_of_the_transposed_mask(data):
    grid = [data.draw(st.integers(0, 4)) for _ in range(2)]
    batch = data.draw(st.sampled_from([(), (1,), (3,)]))
    seed = data.draw(st.integers(0, 999))
    mask = torch.rand(*batch, *grid, generator=torch.Generator().manual_seed(seed)) < 0.4
    of, transposed = BlockTopology.from_mask(mask, (16, 32)), BlockTopology.from_mask(mask.mT, (32, 16))
    offsets, indices, positions, order = of.lists(True)
    assert torch.equal(offsets, transposed.lists(False)[0])
    assert torch.equal(indices, transposed.column_indices)
    assert torch.equal(order, transposed.lists(False)[3])
    assert torch.equal(positions.long().sort().values, torch.arange(of.num_blocks))
    values = torch.arange(of.num_blocks, dtype=torch.float32)[:, None, None].expand(-1, 16, 32).contiguous()
    assert torch.equal(BlockSparse.of(values, of).to_dense().mT, BlockSparse.of(values, of, True).to_dense())


# ---- forms -----------------------------------------------------------------------------------------------------------


def dense(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@EVERY_DEVICE
@pytest.mark.parametrize("shape", [(50, 40), (3, 50, 40), (0, 40), (2, 0, 0)])
def test_dense_and_back(shape, device):
    whole = dense(*shape).to(device)
    s = BlockSparse.from_dense(whole, (16, 32))
    assert torch.equal(s.to_dense(), whole)
    assert torch.equal(s.t().to_dense(), whole.mT)
    assert s.t().t().shape == s.shape == tuple(shape)
    assert s.t().block == (32, 16)
    assert s.density == (1.0 if whole.numel() else 0.0)


def test_blocks_of_zeros_are_left_out():
    whole = dense(48, 48)
    whole[16:32] = 0
    whole[:16, 32:] = 0
    s = BlockSparse.from_dense(whole, 16)
    assert s.num_blocks == 5
    assert torch.equal(s.to_dense(), whole)


@pytest.mark.parametrize("shape", [(48, 64), (2, 48, 64)])
def test_bsr_and_back(shape):
    mask = torch.zeros(*shape[:-2], 3, 2, dtype=torch.bool)
    mask[..., 0, 1] = mask[..., 2, :] = True
    s = BlockSparse.from_dense(dense(*shape), (16, 32), mask)
    bsr = s.to_bsr()
    assert torch.equal(bsr.to_dense(), s.to_dense())
    assert torch.equal(BlockSparse.from_bsr(bsr).to_dense(), s.to_dense())
    assert torch.equal(s.t().to_bsr().to_dense(), s.t().to_dense())


def test_bsr_of_blocks_that_no_row_lists():
    """torch was given more blocks than its rows have, unchecked."""
    s = BlockSparse.from_dense(dense(48, 64), (16, 32))
    longer = BlockTopology(s.topology.row_offsets, F.pad(s.topology.column_indices, (0, 2)), s.shape, s.block)
    with_more = BlockSparse.of(F.pad(s.values, (0, 0, 0, 0, 0, 2), value=3.0), longer)
    assert torch.equal(with_more.to_bsr().to_dense(), s.to_dense())


def test_values_have_gradients_through_dense():
    whole = dense(50, 40).requires_grad_()
    s = BlockSparse.from_dense(whole, 16, torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) < 0.5)
    weight = dense(50, 40, seed=1)
    (grad,) = torch.autograd.grad((s.to_dense() * weight).sum(), whole)
    stored = BlockSparse.from_dense(torch.ones(50, 40), 16, s.topology).to_dense() != 0
    assert torch.equal(grad, torch.where(stored, weight, 0))


def test_a_matrix_moves_and_names_itself():
    s = BlockSparse.from_dense(dense(32, 32), 16)
    half = s.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.topology is s.topology
    assert repr(s.t()).startswith("BlockSparse(shape=(32, 32), block=(16, 16), num_blocks=4, density=1")
    assert "num_blocks=4" in repr(s.topology)
    assert s.to("meta").topology.device.type == "meta"


# ---- errors ----------------------------------------------------------------------------------------------------------

OFFSETS, INDICES = ints(0, 2, 2, 4), ints(1, 2, 0, 2)
ERRORS = [
    (lambda: BlockTopology(OFFSETS.long(), INDICES, (48, 48), 16), "row_offsets must be int32, got int64."),
    (
        lambda: BlockTopology(OFFSETS[1:], INDICES, (48, 48), 16),
        "row_offsets must be [4] for shape (48, 48) in blocks of (16, 16), got [3].",
    ),
    (
        lambda: BlockTopology(OFFSETS + 1, INDICES, (48, 48), 16),
        "row_offsets must begin with 0, not decrease, and go on from list to list.",
    ),
    (
        lambda: BlockTopology(ints(0, 3, 2, 4), INDICES, (48, 48), 16),
        "row_offsets must begin with 0, not decrease, and go on from list to list.",
    ),
    (
        lambda: BlockTopology(ints(0, 2, 2, 5), INDICES, (48, 48), 16),
        "row_offsets must end with at most the 4 blocks of column_indices, got 5.",
    ),
    (
        lambda: BlockTopology(OFFSETS, ints(1, 3, 0, 2), (48, 48), 16),
        "column_indices must be from 0 to 2, got 3.",
    ),
    (
        lambda: BlockTopology(OFFSETS, ints(1, 2, -1, 2), (48, 48), 16),
        "column_indices must be from 0 to 2, got -1.",
    ),
    (
        lambda: BlockTopology(OFFSETS, ints(2, 1, 0, 2), (48, 48), 16),
        "column_indices must ascend within a row of blocks, got column 1 of row 0 not in order.",
    ),
    (
        lambda: BlockTopology(OFFSETS, ints(1, 2, 2, 2), (48, 48), 16),
        "column_indices must ascend within a row of blocks, got column 2 of row 2 twice.",
    ),
    (
        lambda: BlockTopology(OFFSETS, INDICES, (48, 48), 24),
        "block must be 16, 32, 64 or 128, or two of these, got 24.",
    ),
    (lambda: BlockTopology(OFFSETS, INDICES, (48,), 16), "shape must be 2 or 3 sizes, got (48,)."),
]


@pytest.mark.parametrize(("run", "sentence"), ERRORS, ids=[sentence for _, sentence in ERRORS])
def test_errors_of_a_topology(run, sentence):
    with pytest.raises(ValueError, match=re.escape(f"BlockTopology: {sentence}")):
        run()


@pytest.mark.parametrize(
    ("run", "kind", "sentence"),
    [
        (
            lambda: BlockSparse(torch.zeros(3, 16, 16), OFFSETS, INDICES, (48, 48)),
            ValueError,
            "BlockSparse: values must be [4, 16, 16] for this topology, got [3, 16, 16].",
        ),
        (
            lambda: BlockSparse(torch.zeros(4, 16, 16).double(), OFFSETS, INDICES, (48, 48)),
            ValueError,
            "BlockSparse: values must be float32 or bfloat16 or float16, got float64.",
        ),
        (
            lambda: BlockSparse.of(torch.zeros(1), OFFSETS),
            TypeError,
            "BlockSparse: topology must be a BlockTopology, got Tensor.",
        ),
        (
            lambda: BlockSparse.from_bsr(torch.zeros(2, 2)),
            TypeError,
            "BlockSparse.from_bsr: bsr must be a tensor of layout torch.sparse_bsr, got torch.strided.",
        ),
        (
            lambda: BlockSparse.from_dense(torch.ones(20, 20), 16).to_bsr(),
            ValueError,
            "BlockSparse.to_bsr: sizes must be multiples of the block (16, 16), got (20, 20).",
        ),
        (
            lambda: BlockTopology.from_mask(MASK, 16, (48, 50)),
            ValueError,
            "BlockTopology.from_mask: mask must be [3, 4] for shape (48, 50), got [3, 3].",
        ),
        (
            lambda: topology_moe(torch.tensor([16, 40]), 64, 32, 16),
            ValueError,
            "topology_moe: expert_ends must ascend in multiples of 16 to at most 64, got [16, 40].",
        ),
        (
            lambda: topology_moe(torch.tensor([16, 32]), 60, 32, 16),
            ValueError,
            "topology_moe: num_rows must be a multiple of 16, got 60.",
        ),
    ],
)
def test_errors_of_a_matrix(run, kind, sentence):
    with pytest.raises(kind) as raised:
        run()
    assert str(raised.value) == sentence


def test_values_are_not_looked_at_on_a_device(monkeypatch):
    """On CUDA lists are trusted, unless FMKERNELS_CHECK=1; meta stands for such a device here."""
    monkeypatch.setattr(_library, "check_values", False)
    of = BlockTopology(OFFSETS.to("meta"), INDICES.to("meta"), (48, 48), 16)
    assert math.isclose(of.density, 4 / 9)


def test_moe_topology_compiles_to_one_graph():
    make = lambda ends: topology_moe(ends, 64, 32, 16).lists(True)  # noqa: E731
    ends = torch.tensor([16, 16, 48])
    for found, expected in zip(
        torch.compile(topology_moe, fullgraph=True, backend="aot_eager")(ends, 64, 32, 16).lists(True),
        make(ends),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_compiled_gradients_of_a_topology_made_in_the_graph():
    """The backward made the lists then, which torch.compile refuses."""
    values, a, b = (t.requires_grad_() for t in (dense(9, 16, 16), dense(48, 8), dense(8, 48)))
    offsets, indices = torch.arange(0, 10, 3, dtype=torch.int32), torch.arange(3, dtype=torch.int32).repeat(3)

    def loss(values, a, b):
        of = BlockTopology(offsets.clone(), indices.clone(), (48, 48), 16)
        s = BlockSparse.of(values, of)
        return dsd(s, a).square().sum() + dds(b, s).square().sum() + sdd(a, b, of).values.square().sum()

    leaves = (values, a, b)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(*leaves), leaves), expected))
