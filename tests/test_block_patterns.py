# SPDX-License-Identifier: Apache-2.0
"""The masks of blocks: known answers, and what each promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmkernels import BlockTopology, banded_blocks, block_norms, butterfly_blocks, largest_blocks, random_blocks

GRIDS = st.tuples(st.integers(0, 20), st.integers(0, 20))


def rows_of(mask):
    return ["".join(".x"[int(v)] for v in row) for row in mask]


@settings(max_examples=200, deadline=None)
@given(GRIDS, st.floats(0, 1), st.integers(0, 1000))
def test_random_blocks_are_spread_evenly_and_repeat_with_the_seed(grid, density, seed):
    rows, columns = grid
    mask = random_blocks(rows, columns, density, generator=torch.Generator().manual_seed(seed))
    assert mask.shape == (rows, columns)
    assert mask.dtype == torch.bool
    assert mask.sum() == round(density * rows * columns)
    for dim in (0, 1):
        if mask.numel() > 0:
            counts = mask.sum(dim)
            assert counts.max() - counts.min() <= 1
    assert torch.equal(mask, random_blocks(rows, columns, density, generator=torch.Generator().manual_seed(seed)))


def test_random_blocks_follow_the_global_seed_and_differ():
    torch.manual_seed(0)
    first, second = random_blocks(8, 8, 0.5), random_blocks(8, 8, 0.5)
    torch.manual_seed(0)
    assert torch.equal(first, random_blocks(8, 8, 0.5))
    assert not torch.equal(first, second)


def test_banded_blocks_follow_the_diagonal():
    assert rows_of(banded_blocks(4, 4, 0)) == ["x...", ".x..", "..x.", "...x"]
    assert rows_of(banded_blocks(4, 4, 1)) == ["xx..", "xxx.", ".xxx", "..xx"]
    assert rows_of(banded_blocks(2, 4, 0)) == ["xx..", "..xx"]
    assert rows_of(banded_blocks(4, 2, 0)) == ["x.", "x.", ".x", ".x"]
    assert rows_of(banded_blocks(2, 3, 0)) == ["xx.", ".xx"]
    assert banded_blocks(5, 7, 7).all()
    assert banded_blocks(0, 3, 1).shape == (0, 3)


def test_butterfly_blocks_are_the_strides_of_two():
    whole = ["xxx.x...", "xx.x.x..", "x.xx..x.", ".xxx...x", "x...xxx.", ".x..xx.x", "..x.x.xx", "...x.xxx"]
    assert rows_of(butterfly_blocks(8, 8)) == whole
    assert rows_of(butterfly_blocks(4, 4, 1)) == ["xx..", "xx..", "..xx", "..xx"]
    assert torch.equal(butterfly_blocks(4, 4, 0), torch.eye(4).bool())
    assert rows_of(butterfly_blocks(1, 3)) == ["xxx"]
    assert butterfly_blocks(0, 3).shape == (0, 3)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24))
def test_every_input_reaches_every_output_through_butterflies(rows, columns):
    mask = butterfly_blocks(rows, columns)
    square = butterfly_blocks(columns, columns)
    reached = mask.long()
    for _ in range(columns.bit_length()):
        reached = (reached @ square.long()).clamp(max=1)
    assert reached.all()


def test_largest_blocks_are_chosen_over_the_whole_grid():
    scores = torch.tensor([[1.0, 9.0, 2.0], [2.0, 2.0, float("nan")]])
    assert rows_of(largest_blocks(scores, 0.5)) == [".xx", "..x"]  # of three 2.0 the first
    assert not largest_blocks(scores, 0.0).any()
    assert largest_blocks(scores, 1.0).all()


def test_block_norms_with_sizes_that_are_no_multiples():
    weight = torch.randn(40, 50)
    norms = block_norms(weight, (16, 32))
    assert norms.shape == (3, 2)
    expected = torch.stack([torch.stack([b.norm() for b in row.split(32, 1)]) for row in weight.split(16, 0)])
    torch.testing.assert_close(norms, expected)


def test_masks_join_into_a_topology():
    mask = butterfly_blocks(8, 8, 2) | banded_blocks(8, 8, 1)
    topology = BlockTopology.from_mask(mask, 16)
    assert topology.num_blocks == mask.sum()


def test_errors():
    for function in (lambda d: random_blocks(4, 4, d), lambda d: largest_blocks(torch.ones(2, 2), d)):
        with pytest.raises(ValueError, match=r"density must be from 0 to 1, got 1.5\."):
            function(1.5)
        with pytest.raises(ValueError, match=r"density must not be negative"):
            function(-0.5)
        with pytest.raises(TypeError, match=r"density must be a number, got str\."):
            function("half")
    with pytest.raises(ValueError, match=r"banded_blocks: rows must be at least 0, got -1\."):
        banded_blocks(-1, 4, 0)
    with pytest.raises(ValueError, match=r"butterfly_blocks: max_stride must be 0 or a power of two, got 3\."):
        butterfly_blocks(4, 4, 3)
    with pytest.raises(
        ValueError, match=r"largest_blocks: scores must be \[rows of blocks, columns of blocks\], got 1"
    ):
        largest_blocks(torch.ones(4), 0.5)
    with pytest.raises(TypeError, match=r"block_norms: weight must be a tensor, got list\."):
        block_norms([[1.0]], 16)
