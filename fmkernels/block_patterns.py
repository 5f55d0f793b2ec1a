# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a weight to keep: masks for `BlockTopology.from_mask`, of which some may be joined by `|`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check as check
from .block_topology import _checked_block


def random_blocks(
    rows: int, columns: int, density: float, *, generator: torch.Generator | None = None, device: str | None = None
) -> Tensor:
    """A random mask in which all rows have the same number of blocks, to within one, and so have all columns.

    Args:
        rows, columns: of blocks.
        density: blocks over rows * columns, from 0 to 1; the number of blocks is rounded to the nearest.
        generator: of the random numbers; default: torch's.
        device: of the mask; default: the generator's, else the CPU.

    Returns:
        [rows, columns] bool.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    The same number of blocks in all rows is the same work for all thread blocks, and the same number of inputs for all
    outputs. A cyclic band, of which rows and columns are shuffled.
    """
    op = "random_blocks"
    _check_grid(op, rows, columns)
    check.share(op, "density", density)
    num_blocks = round(density * rows * columns)
    if device is None:
        device = str(generator.device) if generator is not None else "cpu"
    mask = torch.zeros(rows, columns, dtype=torch.bool, device=device)
    if num_blocks > 0:
        # Block i stands in row i mod rows. Columns go on by one from block to block; where a cycle of both would close
        # before it has met all places, it moves on by one.
        i = torch.arange(num_blocks, device=device)
        mask[i % rows, (i + i // math.lcm(rows, columns)) % columns] = True
    order = [torch.randperm(n, generator=generator, device=device) for n in (rows, columns)]
    return mask[order[0]][:, order[1]]


def banded_blocks(rows: int, columns: int, bandwidth: int, *, device: str | None = None) -> Tensor:
    """The blocks that the diagonal goes through, and at most `bandwidth` beside them.

    Args:
        rows, columns: of blocks. In a grid that is not square the diagonal goes from corner to corner.
        bandwidth: blocks of a row on either side; 0: the diagonal alone.
        device: of the mask; default: the CPU.

    Returns:
        [rows, columns] bool.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "banded_blocks"
    _check_grid(op, rows, columns)
    check.integer(op, "bandwidth", bandwidth, 0)
    i, j = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)[None]
    return (i * columns < (j + 1 + bandwidth) * rows) & ((j - bandwidth) * rows < (i + 1) * columns)


def butterfly_blocks(rows: int, columns: int, max_stride: int | None = None, *, device: str | None = None) -> Tensor:
    """The flat block butterfly: the diagonal, and the blocks whose row and column differ in one bit.

    Args:
        rows, columns: of blocks. The butterfly of the largest power of two that fits is stretched over the grid.
        max_stride: the largest difference, a power of two; default: half of the side, the whole butterfly. 0: none.
        device: of the mask; default: the CPU.

    Returns:
        [rows, columns] bool; of n x n, n log2(2 n) blocks with the default.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    From any input to any output there is a path through log2(n) such layers. After Dao et al. 2022, Pixelated
    Butterfly.
    """
    op = "butterfly_blocks"
    _check_grid(op, rows, columns)
    side = 1 << max(0, min(rows, columns).bit_length() - 1)
    if max_stride is None:
        max_stride = side // 2
    check.integer(op, "max_stride", max_stride, 0)
    if max_stride & (max_stride - 1):
        raise ValueError(f"{op}: max_stride must be 0 or a power of two, got {max_stride}.")
    i = torch.arange(rows, device=device) * side // max(1, rows)
    j = torch.arange(columns, device=device) * side // max(1, columns)
    difference = i[:, None] ^ j[None]
    return (difference & (difference - 1) == 0) & (difference <= max_stride)


def largest_blocks(scores: Tensor, density: float) -> Tensor:
    """The blocks with the largest scores of the whole grid; of equal ones, the first.

    Args:
        scores: [rows of blocks, columns of blocks], as of `block_norms`.
        density: blocks over all, from 0 to 1; the number of blocks is rounded to the nearest.

    Returns:
        [rows of blocks, columns of blocks] bool. NaN counts as the largest, so that it is not lost.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "largest_blocks"
    check.is_tensor(op, "scores", scores)
    check.rank(op, "scores", scores, 2, "[rows of blocks, columns of blocks]")
    flat = scores.detach().flatten()
    check.share(op, "density", density)
    num_blocks = round(density * flat.numel())
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[flat.argsort(descending=True, stable=True)[:num_blocks]] = True
    return mask.view(scores.shape)


def block_norms(weight: Tensor, block: int | tuple[int, int]) -> Tensor:
    """The Frobenius norm of each block of a matrix.

    Args:
        weight: [rows, columns]; sizes need not be multiples of the block.
        block: (rows, columns) of a block, each 16, 32, 64 or 128; an integer: both.

    Returns:
        [rows of blocks, columns of blocks] float32.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "block_norms"
    check.is_tensor(op, "weight", weight)
    check.rank(op, "weight", weight, 2, "[rows, columns]")
    block_rows, block_columns = _checked_block(block)
    rows, columns = weight.shape
    padded = F.pad(weight.detach().float(), (0, -columns % block_columns, 0, -rows % block_rows))
    grid = padded.view(padded.shape[0] // block_rows, block_rows, padded.shape[1] // block_columns, block_columns)
    return torch.linalg.vector_norm(grid, dim=(1, 3))


def _check_grid(op: str, rows: int, columns: int) -> None:
    for name, value in (("rows", rows), ("columns", columns)):
        check.integer(op, name, value, 0)
