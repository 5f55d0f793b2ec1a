# SPDX-License-Identifier: Apache-2.0
"""`stk.ops`: products and the little around them, by stk's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _check as check
from ... import block_sparse
from ...block_sparse_matrix import BlockSparse
from ...block_topology import BLOCK_SIZES
from .matrix import Matrix, topology_of

__all__ = ["dds", "dsd", "mul", "ones_like", "row_indices", "sdd", "sum", "to_dense", "to_sparse"]


def dsd(a: Matrix, b: Tensor) -> Tensor:
    """a @ b of a sparse a, as `fmkernels.dsd` in all else; differentiable in `a.data` and b.

    Args:
        a: [rows, inner], transposed or not.
        b: [inner, columns], dtype of a, contiguous or the transpose of what is.

    Returns:
        [rows, columns].

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    return block_sparse.dsd(_matrix("dsd", "a", a).block_sparse(), b)


def dds(a: Tensor, b: Matrix) -> Tensor:
    """a @ b of a sparse b, as `fmkernels.dds` in all else; differentiable in a and `b.data`.

    Args:
        a: [..., inner], dtype of b; of two dimensions also the transpose of what is contiguous.
        b: [inner, columns], transposed or not.

    Returns:
        [..., columns].

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    return block_sparse.dds(a, _matrix("dds", "b", b).block_sparse())


def sdd(a: Tensor, b: Tensor, topo: Matrix) -> Matrix:
    """The blocks of a @ b that `topo` stores, as `fmkernels.sdd` in all else; differentiable in a and b.

    Args:
        a: [rows, inner], contiguous or the transpose of what is.
        b: [inner, columns], dtype of a, likewise.
        topo: of (rows, columns), not transposed; its data is not read, and may be on the meta device.

    Returns:
        A matrix with the indices of topo and the dtype of a.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    if not _matrix("sdd", "topo", topo).is_contiguous():
        raise ValueError("stk.ops.sdd: topo must not be transposed; topo.contiguous() is not.")
    if topo.dim() != 2:
        raise ValueError(f"stk.ops.sdd: topo must have 2 dimensions, got {tuple(topo.size())}.")
    return Matrix._of(topo.size(), block_sparse.sdd(a, b, topo.topology).values, topo.topology)


@torch.no_grad()
def to_dense(x: Matrix) -> Tensor:
    """The matrix with its zeros, without gradients, as in stk: those `x.block_sparse().to_dense()` has."""
    is_transposed = not _matrix("to_dense", "x", x).is_contiguous()
    return BlockSparse.of(x.data, x.topology, is_transposed).to_dense().reshape(x.size())


@torch.no_grad()
def to_sparse(x: Tensor, blocking: int = 1) -> Matrix:
    """The blocks of a dense matrix that are not all zeros, without gradients, as in stk.

    Args:
        x: [rows, columns], multiples of the blocking; float32, bfloat16 or float16.
        blocking: 16, 32, 64 or 128. stk's default of 1 has no kernel, here or there, and is refused.
    """
    op = "stk.ops.to_sparse"
    check.is_tensor(op, "x", x)
    check.rank(op, "x", x, 2, "[rows, columns]")
    if type(blocking) is not int or blocking not in BLOCK_SIZES:
        raise ValueError(f"{op}: blocking must be 16, 32, 64 or 128, got {blocking!r}.")
    if x.shape[0] % blocking or x.shape[1] % blocking:
        raise ValueError(f"{op}: x must have multiples of {blocking} rows and columns, got {list(x.shape)}.")
    check.dtype(op, "x", x, check.FLOAT_DTYPES)
    s = BlockSparse.from_dense(x, blocking)
    return Matrix._of(s.shape, s.values, s.topology)


@torch.no_grad()
def ones_like(x: Matrix) -> Matrix:
    """The same blocks, full of ones."""
    return _matrix("ones_like", "x", x)._with_data(torch.ones_like(x.data))


def sum(x: Matrix) -> Tensor:
    """Of all elements, without dimensions; differentiable."""
    return _matrix("sum", "x", x).data.sum()


def mul(a: Matrix, b: Matrix) -> Matrix:
    """Element by element, of two matrices with the same blocks, transposed alike; differentiable in both data."""
    op = "stk.ops.mul"
    _matrix("mul", "a", a), _matrix("mul", "b", b)
    if a.size() != b.size():
        raise ValueError(f"{op}: b must have the size of a, {tuple(a.size())}, got {tuple(b.size())}.")
    if a.is_contiguous() != b.is_contiguous():
        raise ValueError(f"{op}: a and b must both be transposed, or neither of them.")
    check.same_device(op, "b", b.data, "a", a.data)
    check.shape(op, "the data of b", b.data, "that of a", a.data)
    if a.topology is not b.topology and check.sees_values(a.offsets):
        same = torch.equal(a.offsets, b.offsets) and torch.equal(a.column_indices, b.column_indices)
        if not same:
            raise ValueError(f"{op}: a and b must store the same blocks.")
    return a._with_data(a.data * b.data)


@torch.no_grad()
def row_indices(shape: Sequence[int], data: Tensor, offsets: Tensor, column_indices: Tensor) -> Tensor:
    """[num_blocks] int32, the row of each block.

    Args:
        shape: of the matrix, as the size of `Matrix`.
        data: [num_blocks, blocking, blocking]; its shape alone counts, it may be on the meta device.
        offsets: [rows of blocks + 1], int32 or int16.
        column_indices: [num_blocks], int32 or int16.
    """
    return topology_of("stk.ops.row_indices", shape, data, offsets, column_indices).row_indices


def _matrix(op: str, name: str, value: Any) -> Matrix:
    if not isinstance(value, Matrix):
        raise TypeError(f"stk.ops.{op}: {name} must be a stk.Matrix, got {type(value).__name__}.")
    return value
