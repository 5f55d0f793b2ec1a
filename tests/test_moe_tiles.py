# SPDX-License-Identifier: Apache-2.0
"""The tiles of grouped products on CUDA: blocks take them by turns where there are more than are resident."""

import dataclasses
import re

import pytest
import torch
from faults import missing_synchronisations

from fmkernels import reference
from fmkernels._library import ops
from fmkernels.testing import EMULATED_NAMESPACE, assert_as_good_as_torch, backends

GPUS = [b for b in backends("moe_grouped_mm") if b.namespace == EMULATED_NAMESPACE and b in backends("moe_gated_mm")]
EVERY_GPU = pytest.mark.parametrize("gpu", GPUS, ids=str)

# Ends of the groups, one of which is empty, rows of none behind them, inner indices, columns of b: so many rows on
# average as the tile is chosen for, no whole number of strips of 8 tiles, and for one tile more than its stages hold.
TILES = {
    "16 x 64": ([20, 36, 36, 52, 70, 90, 95], 7, 264, 144),
    "16 x 256": ([1, 3, 3, 9, 23], 2, 8, 18944),
    "32 x 256": ([10, 10, 60, 100, 140, 180, 200, 240, 250, 280], 35, 72, 272),
    "64 x 256": ([70, 70, 200, 270, 290, 300], 70, 136, 272),
    "64 x 256, by elements": ([70, 70, 200, 270, 290, 300], 70, 37, 262),
    "128 x 128": ([130, 130, 400, 600], 140, 136, 272),
}
EVERY_TILE = pytest.mark.parametrize(
    ("tile", "trans_b"),
    [
        pytest.param(
            tile,
            trans_b,
            id=f"{tile}, {'columns' if trans_b else 'rows'}",
            marks=() if index in (0, 5) or index % 2 == trans_b else pytest.mark.slow,
        )
        for index, tile in enumerate(TILES)
        for trans_b in (False, True)
    ],
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def inputs(tile, trans_b):
    """(a, b, offsets, tokens of the rows, of which one in seven has none)"""
    ends, num_others, inner, columns = TILES[tile]
    num_rows = ends[-1] + num_others
    b = (
        normal(len(ends), columns, inner, seed=1).transpose(1, 2)
        if trans_b
        else normal(len(ends), inner, columns, seed=1)
    )
    tokens = torch.randint(0, num_rows, [num_rows], generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    tokens[4::7] = -1
    return normal(num_rows, inner), b, torch.tensor(ends, dtype=torch.int32), tokens


def mm(*args):
    """Of the backend that runs it, as the next one."""
    return ops.moe_grouped_mm(*args)


def gated_mm(*args):
    return ops.moe_gated_mm(*args)


def run_and_count(gpu, function, *args):
    """(result, blocks that were launched)"""
    import emulator

    with emulator.watch() as watched:
        result = gpu.run(function, *args)
    return result, watched.launches[-1]["grid"][0]


def num_tiles(tile):
    ends, num_others, _, columns = TILES[tile]
    rows, tile_columns = (int(number) for number in re.findall(r"\d+", tile))
    counts = torch.tensor([*ends, ends[-1] + num_others]).diff(prepend=torch.zeros(1, dtype=torch.int64))
    return int((-(-counts // rows)).sum()) * -(-columns // tile_columns)


@EVERY_TILE
@EVERY_GPU
def test_a_block_of_several_tiles_gives_the_bits_of_a_block_each(gpu, tile, trans_b):
    a, b, offsets, _ = inputs(tile, trans_b)
    bias = normal(len(offsets), b.shape[2], seed=2).float()
    few, num_blocks = run_and_count(dataclasses.replace(gpu, num_sms=1), mm, a, b, offsets, bias)
    assert 1 <= num_blocks <= 5  # that are resident on a multiprocessor
    assert num_tiles(tile) > 4 * num_blocks
    many, num_blocks = run_and_count(dataclasses.replace(gpu, num_sms=1000), mm, a, b, offsets, bias)
    assert num_blocks >= num_tiles(tile)
    assert torch.equal(few, many)
    assert not few[offsets[-1] :].any()
    assert_as_good_as_torch(few, lambda a, b, bias: reference.moe.grouped_mm(a, b, offsets, bias=bias), a, b, bias)


@EVERY_TILE
@EVERY_GPU
def test_the_gated_product_too(gpu, tile, trans_b):
    a, b, offsets, tokens = inputs(tile, trans_b)
    interleaved = trans_b
    one = dataclasses.replace(gpu, num_sms=1)
    (out, both), num_blocks = run_and_count(one, gated_mm, a, b, offsets, tokens, interleaved, True)
    assert num_tiles(tile) > 4 * num_blocks
    many = dataclasses.replace(gpu, num_sms=1000).run(gated_mm, a, b, offsets, tokens, interleaved, True)
    assert torch.equal(out, many[0])
    assert torch.equal(both, many[1])
    assert not out[offsets[-1] :].any()
    assert not both[tokens < 0].any()
    rows = torch.where(tokens[:, None] >= 0, a[tokens.clamp(min=0).long()], 0)
    assert torch.equal(one.run(mm, rows, b, offsets, None), both)


@pytest.mark.parametrize("architecture", [80, 90])
@EVERY_GPU
def test_a_gpu_that_is_full_gets_no_more_blocks(gpu, architecture):
    """Of tiles of 16 x 64, as many as its shared memory holds; and never more than there may be tiles."""
    a, b, offsets, _ = inputs("16 x 64", True)
    blocks = [
        run_and_count(dataclasses.replace(gpu, architecture=architecture, num_sms=num), mm, a, b, offsets, None)[1]
        for num in (1, 2, 0)
    ]
    resident = {80: 4, 90: 5}[architecture]
    assert blocks[:2] == [resident, 2 * resident]
    bound = (len(a) + (len(offsets) + 1) * 15) // 16  # of tiles of rows
    assert blocks[2] == bound * 3


@pytest.mark.parametrize("num_groups", [31, 150, 1030])
@EVERY_GPU
def test_many_groups_whose_offsets_are_any(gpu, num_groups):
    """A lane knows of 1, 5 and 33 groups. Offsets that decrease, or are no rows, are clamped."""
    generator = torch.Generator().manual_seed(num_groups)
    offsets = torch.randint(-5, 39, [num_groups], generator=generator).sort().values.int()
    offsets[::9] = torch.randint(-(2**31), 0, offsets[::9].shape, generator=generator).int()
    offsets[-3:] = torch.tensor([2, 2**31 - 1, 11])
    a, b = normal(40, 8), normal(num_groups, 8, 80, seed=1)
    ends = offsets.clamp(0, 40).cummax(0).values.int()
    for num_sms in (0, 1):
        out = dataclasses.replace(gpu, num_sms=num_sms).run(mm, a, b, offsets, None)
        assert_as_good_as_torch(out, lambda a, b: reference.moe.grouped_mm(a, b, ends), a, b)


@pytest.mark.parametrize("function", [mm, gated_mm], ids=["plain", "gated"])
@EVERY_GPU
def test_every_synchronisation_is_needed(gpu, function):
    """Also those between the sums of a tile and the next tile, which takes their place."""

    def run():
        for trans_b in (False, True):
            b = normal(2, 272, 72, seed=1).transpose(1, 2) if trans_b else normal(2, 72, 272, seed=1)
            a, offsets = normal(32, 72), torch.tensor([13, 28], dtype=torch.int32)
            further = (None,) if function is mm else (None, False, False)
            dataclasses.replace(gpu, num_sms=1).run(function, a, b, offsets, *further)

    kernel = "moe_grouped_mm_kernel" if function is mm else "moe_gated_mm_kernel"
    count, unseen = missing_synchronisations(kernel, "FewTraitsINS_8BFloat16E", run)
    assert count == 2 * 8
    assert unseen == []
