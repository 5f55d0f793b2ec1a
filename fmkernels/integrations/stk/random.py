# SPDX-License-Identifier: Apache-2.0
"""`stk.random`: random blocks, from torch's generator of the CPU. stk draws from numpy's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _check as check
from ...block_topology import BLOCK_SIZES, BlockTopology
from .matrix import Matrix

__all__ = ["dense_mask", "mask", "randn"]


def dense_mask(rows: int, cols: int, sparsity: float, blocking: int = 1) -> Tensor:
    """[rows, cols] float32 of zeros and ones, alike within a block.

    Args:
        rows, cols: multiples of the blocking.
        sparsity: the share of blocks that are zeros, of [0, 1], rounded to a whole number of blocks.
        blocking: rows and columns of a block, at least 1.
    """
    blocks = _blocks("stk.random.dense_mask", rows, cols, sparsity, blocking)
    return blocks.repeat_interleave(blocking, 0).repeat_interleave(blocking, 1).float()


def mask(m: int, n: int, sparsity: float, blocking: int = 1) -> Matrix:
    """(m, n), float16: the blocks of `dense_mask` that are ones; blocking 16, 32, 64 or 128."""
    topology = _topology("stk.random.mask", m, n, sparsity, blocking)
    data = torch.ones(topology.num_blocks, blocking, blocking, dtype=torch.float16)
    return Matrix._of((m, n), data, topology)


def randn(shape: Sequence[int], sparsity: float, blocking: int = 1) -> Matrix:
    """A float16 matrix of `shape` with normally distributed numbers in the blocks of `mask`."""
    op = "stk.random.randn"
    if not isinstance(shape, (tuple, list)) or len(shape) < 2:
        raise ValueError(f"{op}: shape must be at least 2 numbers, got {shape!r}.")
    for number in shape:
        check.integer(op, "shape", number, 0)
    topology = _topology(op, math.prod(shape[:-1]), shape[-1], sparsity, blocking)
    data = torch.randn(topology.num_blocks, blocking, blocking).half()
    return Matrix._of(shape, data, topology)


def _topology(op: str, rows: int, cols: int, sparsity: float, blocking: int) -> BlockTopology:
    if type(blocking) is not int or blocking not in BLOCK_SIZES:
        raise ValueError(f"{op}: blocking must be 16, 32, 64 or 128, got {blocking!r}.")
    return BlockTopology.from_mask(_blocks(op, rows, cols, sparsity, blocking), blocking)


def _blocks(op: str, rows: int, cols: int, sparsity: float, blocking: int) -> Tensor:
    """[rows of blocks, columns of blocks], bool."""
    check.integer(op, "blocking", blocking, 1)
    for name, number in (("rows", rows), ("cols", cols)):
        check.integer(op, name, number, 0)
        if number % blocking != 0:
            raise ValueError(f"{op}: {name} must be a multiple of the blocking, {blocking}, got {number}.")
    check.number(op, "sparsity", sparsity)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{op}: sparsity must be from 0 to 1, got {sparsity}.")
    block_rows, block_cols = rows // blocking, cols // blocking
    num_stored = round(block_rows * block_cols * (1 - sparsity))
    blocks = torch.zeros(block_rows * block_cols, dtype=torch.bool)
    blocks[torch.randperm(block_rows * block_cols)[:num_stored]] = True
    return blocks.view(block_rows, block_cols)
