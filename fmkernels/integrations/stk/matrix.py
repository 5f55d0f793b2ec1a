# SPDX-License-Identifier: Apache-2.0
"""`stk.Matrix`: data and indices by stk's names, over a `BlockTopology`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _check as check
from ...block_sparse_matrix import BlockSparse
from ...block_topology import BLOCK_SIZES, BlockTopology

_OP = "stk.Matrix"


class Matrix:
    """A matrix of which only some square blocks are stored; what is transposed shares data and indices.

    Args:
        size: (rows, columns), multiples of the blocking; of more than two numbers all but the last are rows.
        data: [num_blocks, blocking, blocking], by rows of blocks; blocking is 16, 32, 64 or 128. Gradients land in
            `data.grad`. A matrix that names blocks alone, for `stk.ops.sdd`, may have it on the meta device.
        row_indices: [num_blocks], the row of each block; int32 or int16, as all indices.
        column_indices: [num_blocks], ascending within a row.
        offsets: [rows of blocks + 1], where the blocks of each row begin.
        column_indices_t: [num_blocks], the rows of the blocks, column by column.
        offsets_t: [columns of blocks + 1], where the blocks of each column begin there.
        block_offsets_t: [num_blocks], the place in data of each block there. Where one of these three is missing they
            are made when first asked for.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. On CUDA the values of the indices
            are checked under FMKERNELS_CHECK=1 alone.

    int16 indices are widened: the properties give int32.
    """

    def __init__(
        self,
        size: Sequence[int],
        data: Tensor,
        row_indices: Tensor,
        column_indices: Tensor,
        offsets: Tensor,
        column_indices_t: Tensor | None = None,
        offsets_t: Tensor | None = None,
        block_offsets_t: Tensor | None = None,
    ) -> None:
        topology = topology_of(_OP, size, data, offsets, column_indices)
        self._set(torch.Size(size), data, topology, False)
        rows = _index(_OP, "row_indices", row_indices, topology.num_blocks, "one for each block,", offsets)
        if check.sees_values(rows):
            wrong = (rows != topology.row_indices).nonzero()
            if len(wrong) > 0:
                block = int(wrong[0])
                raise ValueError(
                    f"{_OP}: row_indices must be the rows that offsets give, got {int(rows[block])} for block {block} "
                    f"of row {int(topology.row_indices[block])}."
                )
        if column_indices_t is not None and offsets_t is not None and block_offsets_t is not None:
            _take_columns(topology, column_indices_t, offsets_t, block_offsets_t)

    @classmethod
    def _of(cls, size: Sequence[int], data: Tensor, topology: BlockTopology, is_transposed: bool = False) -> Matrix:
        matrix = cls.__new__(cls)
        matrix._set(torch.Size(size), data, topology, is_transposed)
        return matrix

    def _set(self, size: torch.Size, data: Tensor, topology: BlockTopology, is_transposed: bool) -> None:
        self._size, self._data, self._topology, self._is_transposed = size, data, topology, is_transposed

    def _with_data(self, data: Tensor) -> Matrix:
        return Matrix._of(self._size, data, self._topology, self._is_transposed)

    # ---- what it is --------------------------------------------------------------------------------------------------

    def size(self) -> torch.Size:
        return self._size

    @property
    def shape(self) -> torch.Size:
        return self._size

    def dim(self) -> int:
        return len(self._size)

    @property
    def data(self) -> Tensor:
        return self._data

    @property
    def dtype(self) -> torch.dtype:
        return self._data.dtype

    @property
    def device(self) -> torch.device:
        return self._data.device

    @property
    def is_cuda(self) -> bool:
        return self._data.is_cuda

    @property
    def nnz(self) -> int:
        """Elements that are stored, zeros among them too."""
        return self._data.numel()

    @property
    def blocking(self) -> int:
        return self._topology.block[0]

    @property
    def topology(self) -> BlockTopology:
        """Of the matrix as it is stored: a transposed one has that of the other. stk has no such property."""
        return self._topology

    @property
    def row_indices(self) -> Tensor:
        return self._topology.row_indices

    @property
    def column_indices(self) -> Tensor:
        return self._topology.column_indices

    @property
    def offsets(self) -> Tensor:
        return self._topology.row_offsets

    @property
    def column_indices_t(self) -> Tensor:
        return self._topology.lists(True)[1]

    @property
    def offsets_t(self) -> Tensor:
        return self._topology.lists(True)[0][0]

    @property
    def block_offsets_t(self) -> Tensor:
        return self._topology.lists(True)[2]

    def __repr__(self) -> str:
        kind = ", transposed" if self._is_transposed else ""
        return (
            f"stk.Matrix(size={tuple(self._size)}, blocking={self.blocking}, num_blocks={self._topology.num_blocks}, "
            f"dtype={self.dtype}, device={self.device}{kind})"
        )

    # ---- gradients ---------------------------------------------------------------------------------------------------

    @property
    def requires_grad(self) -> bool:
        return self._data.requires_grad

    def requires_grad_(self, requires_grad: bool = True) -> Matrix:
        self._data.requires_grad_(requires_grad)
        return self

    @property
    def grad(self) -> Matrix | None:
        """`data.grad` as a matrix of the same blocks, transposed where this one is; None as long as there is none."""
        return None if self._data.grad is None else self._with_data(self._data.grad)

    # ---- the same in another form ------------------------------------------------------------------------------------

    def is_contiguous(self) -> bool:
        return not self._is_transposed

    def contiguous(self) -> Matrix:
        """Itself, or of a transposed matrix a copy whose blocks lie by its own rows, differentiable; stk has none."""
        if not self._is_transposed:
            return self
        offsets, indices, positions, _ = self._topology.lists(True)
        blocks = self._data.index_select(0, positions).mT.contiguous()
        topology = BlockTopology(offsets[0], indices, tuple(self._size), self._topology.block)
        return Matrix._of(self._size, blocks, topology)

    def t(self) -> Matrix:
        """The transpose, over the same data."""
        if self.dim() != 2:
            raise ValueError(f"{_OP}.t: the matrix must have 2 dimensions, got {tuple(self._size)}.")
        return Matrix._of(self._size[::-1], self._data, self._topology, not self._is_transposed)

    def view(self, *shape: int) -> Matrix:
        """The same rows under another shape; the columns stay."""
        op = f"{_OP}.view"
        if self._is_transposed:
            raise ValueError(f"{op}: the matrix must not be transposed.")
        is_size = len(shape) >= 2 and all(type(x) is int and x >= 0 for x in shape)
        if not is_size or shape[-1] != self._size[-1] or math.prod(shape[:-1]) != math.prod(self._size[:-1]):
            raise ValueError(
                f"{op}: shape must have the {self._size[-1]} columns and {math.prod(self._size[:-1])} rows of the "
                f"matrix, got {shape}."
            )
        return Matrix._of(shape, self._data, self._topology)

    def clone(self) -> Matrix:
        """With data of its own; the indices, which nothing changes, are shared."""
        return self._with_data(self._data.clone())

    def to(self, *args: Any, **kwargs: Any) -> Matrix:
        """Moves this matrix itself, as stk does, to a device or a dtype, as `Tensor.to`; the indices to the device."""
        self._data = self._data.to(*args, **kwargs)
        self._topology = self._topology.to(self._data.device)
        return self

    def cuda(self) -> Matrix:
        return self.to("cuda")

    def block_sparse(self) -> BlockSparse:
        """As fmkernels has it, over the same data."""
        if self.dim() != 2:
            raise ValueError(f"{_OP}: a matrix that is multiplied must have 2 dimensions, got {tuple(self._size)}.")
        return BlockSparse.of(self._data, self._topology, self._is_transposed)


def topology_of(op: str, size: Sequence[int], data: Tensor, offsets: Tensor, column_indices: Tensor) -> BlockTopology:
    """Of the flat matrix of rows and columns, whose blocks are those of data."""
    if not isinstance(size, (tuple, list)) or len(size) < 2 or any(type(x) is not int or x < 0 for x in size):
        raise ValueError(f"{op}: size must be at least 2 numbers, none negative, got {size!r}.")
    check.is_tensor(op, "data", data)
    shape = list(data.shape)
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] not in BLOCK_SIZES:
        raise ValueError(
            f"{op}: data must be [num_blocks, blocking, blocking] with a blocking of 16, 32, 64 or 128, got {shape}."
        )
    num_blocks, blocking, _ = shape
    if size[-2] % blocking or size[-1] % blocking:
        raise ValueError(f"{op}: rows and columns must be multiples of the blocking, {blocking}, got {tuple(size)}.")
    rows = math.prod(size[:-1])
    offsets = _index(op, "offsets", offsets, rows // blocking + 1, "one for each row of blocks and one more,", offsets)
    columns = _index(op, "column_indices", column_indices, num_blocks, "one for each block,", offsets)
    if check.sees_values(offsets):
        check.prefix_sums(op, "offsets", offsets, "the number of blocks", num_blocks)
    return BlockTopology(offsets, columns, (rows, size[-1]), blocking)


def _index(op: str, name: str, index: Tensor, length: int, what: str, offsets: Tensor) -> Tensor:
    """In int32."""
    check.is_tensor(op, name, index)
    check.rank(op, name, index, 1, "a vector")
    check.dtype(op, name, index, (torch.int32, torch.int16))
    check.same_device(op, name, index, "offsets", offsets)
    check.size(op, name, index, 0, what, length)
    return index.to(torch.int32).contiguous()


def _take_columns(topology: BlockTopology, indices: Tensor, offsets: Tensor, positions: Tensor) -> None:
    """The lists of the columns as they were given, where they are seen after they were checked."""
    offsets_of, num_blocks = topology.row_offsets, topology.num_blocks
    indices = _index(_OP, "column_indices_t", indices, num_blocks, "one for each block,", offsets_of)
    num_offsets = topology.num_block_columns + 1
    what = "one for each column of blocks and one more,"
    offsets = _index(_OP, "offsets_t", offsets, num_offsets, what, offsets_of)
    positions = _index(_OP, "block_offsets_t", positions, num_blocks, "one for each block,", offsets_of)
    if check.sees_values(offsets):
        check.prefix_sums(_OP, "offsets_t", offsets, "the number of blocks", num_blocks)
        if ((positions < 0) | (positions >= num_blocks)).any():
            raise ValueError(f"{_OP}: block_offsets_t must be from 0 to {num_blocks - 1}.")
        rows, columns = (t[positions.long()].long() for t in (topology.row_indices, topology.column_indices))
        ascends = ((columns * topology.num_block_rows + rows).diff() > 0).all()
        if not ascends or not torch.equal(columns, torch.repeat_interleave(offsets.diff())):
            raise ValueError(
                f"{_OP}: block_offsets_t must name each block once, column by column as offsets_t counts them, from "
                f"the first row to the last."
            )
        if not torch.equal(rows, indices.long()):
            raise ValueError(f"{_OP}: column_indices_t must be the rows of the blocks that block_offsets_t names.")
    topology.use_columns(offsets, indices, positions)
