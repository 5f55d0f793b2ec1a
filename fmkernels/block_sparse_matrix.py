# SPDX-License-Identifier: Apache-2.0
"""`BlockSparse`: the blocks of a topology, with values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._block_sparse_quantize import dequantize_blocks, quantize_blocks
from .block_topology import BlockTopology, _checked_block

_OP = "BlockSparse"


class BlockSparse:
    """A matrix of which only some blocks are stored. Immutable but for its values, which may be a parameter.

    `s @ dense` is `fmkernels.dsd(s, dense)`, `dense @ s` is `fmkernels.dds(dense, s)`.

    Args:
        values: [num_blocks, block rows, block columns], float32, bfloat16 or float16, contiguous, by rows of blocks; a
            block has 16, 32, 64 or 128 rows, and columns. What a block holds past the edge of the matrix is not read.
            int8 with block_scales.
        row_offsets: [rows of blocks + 1] int32, or [batch, rows of blocks + 1]; see `BlockTopology`.
        column_indices: [num_blocks] int32.
        shape: (rows, columns), or (batch, rows, columns).
        block_scales: [num_blocks] float32, constants: a block is its int8 values times its scale, as of `quantize`.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """

    values: Tensor
    block_scales: Tensor | None
    topology: BlockTopology
    is_transposed: bool

    def __init__(
        self,
        values: Tensor,
        row_offsets: Tensor,
        column_indices: Tensor,
        shape: tuple[int, ...],
        block_scales: Tensor | None = None,
    ) -> None:
        check.is_tensor(_OP, "values", values)
        check.rank(_OP, "values", values, 3, "[num_blocks, block rows, block columns]")
        topology = BlockTopology(row_offsets, column_indices, shape, (values.shape[1], values.shape[2]))
        self._set(values, topology, False, block_scales)

    @classmethod
    def of(
        cls,
        values: Tensor,
        topology: BlockTopology,
        is_transposed: bool = False,
        block_scales: Tensor | None = None,
    ) -> BlockSparse:
        """The blocks of a topology with these values; or the transpose of that matrix."""
        matrix = cls.__new__(cls)
        matrix._set(values, topology, is_transposed, block_scales)
        return matrix

    def _set(
        self, values: Tensor, topology: BlockTopology, is_transposed: bool, block_scales: Tensor | None = None
    ) -> None:
        if not isinstance(topology, BlockTopology):
            raise TypeError(f"{_OP}: topology must be a BlockTopology, got {type(topology).__name__}.")
        check.is_tensor(_OP, "values", values)
        expected = [topology.num_blocks, *topology.block]
        if list(values.shape) != expected:
            raise ValueError(f"{_OP}: values must be {expected} for this topology, got {list(values.shape)}.")
        check.same_device(_OP, "values", values, "the topology", topology.row_offsets)
        if block_scales is None:
            check.dtype(_OP, "values", values, check.FLOAT_DTYPES)
        else:
            check_block_scales(values, block_scales)
        self.values, self.topology, self.is_transposed = values, topology, bool(is_transposed)
        self.block_scales = block_scales

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        *batch, rows, columns = self.topology.shape
        return (*batch, columns, rows) if self.is_transposed else (*batch, rows, columns)

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) of a block."""
        return self.topology.block[::-1] if self.is_transposed else self.topology.block

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def num_blocks(self) -> int:
        return self.topology.num_blocks

    @property
    def is_quantized(self) -> bool:
        """Whether values are int8, with a scale for each block."""
        return self.block_scales is not None

    @property
    def density(self) -> float:
        return self.topology.density

    def __repr__(self) -> str:
        kind = ", transposed" if self.is_transposed else ""
        return (
            f"BlockSparse(shape={self.shape}, block={self.block}, num_blocks={self.num_blocks}, "
            f"density={self.density:.3g}, dtype={self.dtype}, device={self.device}{kind})"
        )

    # ---- the same in another form ------------------------------------------------------------------------------------

    def t(self) -> BlockSparse:
        """The transpose (of each matrix of a batch), over the same values: none is moved."""
        transpose = BlockSparse.__new__(BlockSparse)  # checked when it was made
        transpose.values, transpose.block_scales, transpose.topology = self.values, self.block_scales, self.topology
        transpose.is_transposed = not self.is_transposed
        return transpose

    def with_values(self, values: Tensor) -> BlockSparse:
        """The same blocks with other values, in the order of `values`; int8 ones keep the scales."""
        check.is_tensor(_OP, "values", values)
        scales = self.block_scales if values.dtype == torch.int8 else None
        return BlockSparse.of(values, self.topology, self.is_transposed, scales)

    def to(self, *args: Any, **kwargs: Any) -> BlockSparse:
        """On a device, in a dtype, or both, as `Tensor.to`; int8 values stay int8."""
        values = self.values.to(*args, **kwargs)
        topology = self.topology.to(values.device)
        scales = self.block_scales
        if scales is not None:
            if values.dtype != torch.int8:
                raise ValueError(
                    f"{_OP}.to: int8 values must be dequantized to be {check.dtype_names((values.dtype,))}."
                )
            scales = scales.to(values.device)
        return BlockSparse.of(values, topology, self.is_transposed, scales)

    def quantize(self) -> BlockSparse:
        """The same with int8 values and a float32 scale for each block: constants, for inference.

        A value is q * scale, scale = largest magnitude / 127 of its block; q is rounded half to even. A block of zeros
        has scale 1. A block with a NaN or an infinity has scale NaN: all of it, and nothing else, becomes NaN.
        """
        if self.is_quantized:
            raise ValueError(f"{_OP}.quantize: values must be {check.dtype_names(check.FLOAT_DTYPES)}, got int8.")
        values, scales = quantize_blocks(self.values, self.topology)
        return BlockSparse.of(values, self.topology, self.is_transposed, scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> BlockSparse:
        """With values q * scale in float32, rounded to `dtype`."""
        if self.block_scales is None:
            raise ValueError(f"{_OP}.dequantize: values must be int8, got {check.dtype_names((self.dtype,))}.")
        if dtype not in check.FLOAT_DTYPES:
            raise ValueError(f"{_OP}.dequantize: dtype must be {check.dtype_names(check.FLOAT_DTYPES)}, got {dtype}.")
        values = dequantize_blocks(self.values, self.block_scales, dtype)
        return BlockSparse.of(values, self.topology, self.is_transposed)

    def to_dense(self) -> Tensor:
        """[rows, columns] or [batch, rows, columns], zeros where no block is stored. Differentiable in the values.

        Of int8 values float32.
        """
        if self.is_quantized:
            return self.dequantize().to_dense()
        topology = self.topology
        (block_rows, block_columns), num_columns = topology.block, topology.num_block_columns
        num_places = topology.num_places
        blocks = self.values.new_zeros(num_places + 1, block_rows, block_columns)  # the last one is thrown away
        blocks = blocks.index_copy(0, topology.places, self.values)
        grid = blocks[:num_places].view(topology.num_lists, topology.num_block_rows, num_columns, *topology.block)
        whole = grid.transpose(2, 3).reshape(
            topology.num_lists, topology.num_block_rows * block_rows, num_columns * block_columns
        )
        dense = whole[:, : topology.shape[-2], : topology.shape[-1]]
        dense = dense.mT if self.is_transposed else dense
        return (dense if len(self.shape) == 3 else dense[0]).contiguous()

    @classmethod
    def from_dense(
        cls, dense: Tensor, block: int | tuple[int, int] = 64, mask: Tensor | BlockTopology | None = None
    ) -> BlockSparse:
        """The blocks of a dense matrix, differentiable in it.

        Args:
            dense: [rows, columns] or [batch, rows, columns].
            block: (rows, columns) of a block, or both in one number.
            mask: which blocks: a topology, or a bool tensor as of `BlockTopology.from_mask`; None: those that are not
                all zeros.
        """
        op = "BlockSparse.from_dense"
        check.is_tensor(op, "dense", dense)
        check.dtype(op, "dense", dense, check.FLOAT_DTYPES)
        if dense.dim() not in (2, 3):
            raise ValueError(f"{op}: dense must have 2 or 3 dimensions, got {list(dense.shape)}.")
        block_rows, block_columns = mask.block if isinstance(mask, BlockTopology) else _checked_block(block)
        *batch, rows, columns = dense.shape
        num_rows, num_columns = -(-rows // block_rows), -(-columns // block_columns)
        padded = torch.nn.functional.pad(
            dense, (0, num_columns * block_columns - columns, 0, num_rows * block_rows - rows)
        )
        blocks = padded.view(*batch, num_rows, block_rows, num_columns, block_columns).transpose(-2, -3)
        if mask is None:
            mask = (blocks != 0).any(-1).any(-1)
        topology = mask if isinstance(mask, BlockTopology) else BlockTopology.from_mask(mask, block, tuple(dense.shape))
        if topology.shape != tuple(dense.shape):
            raise ValueError(f"{op}: mask must be of shape {tuple(dense.shape)}, got {topology.shape}.")
        rows_of_blocks = topology.row_indices.long()
        place = (rows_of_blocks * num_columns + topology.column_indices).clamp(min=0)
        values = blocks.reshape(-1, block_rows, block_columns).index_select(0, place)
        return cls.of(torch.where((rows_of_blocks < 0)[:, None, None], 0, values), topology)

    def to_bsr(self) -> Tensor:
        """A `torch.sparse_bsr` tensor over the same values; the matrices of a batch must have as many blocks each."""
        if self.is_quantized:
            raise ValueError(f"{_OP}.to_bsr: int8 values must be dequantized: torch.sparse_bsr has no scales.")
        if self.is_transposed:
            return self.t().to_bsr().transpose(-1, -2)
        topology, num_lists = self.topology, self.topology.num_lists
        rows, columns = topology.shape[-2:]
        if rows % topology.block[0] or columns % topology.block[1]:
            raise ValueError(
                f"{_OP}.to_bsr: sizes must be multiples of the block {topology.block}, got {topology.shape}."
            )
        offsets = topology.row_offsets.view(num_lists, -1)
        offsets = offsets - offsets[:, :1]
        if len(topology.shape) == 2:
            listed = slice(int(offsets[0, -1]))
            indices, values = topology.column_indices[listed], self.values[listed]
            return torch.sparse_bsr_tensor(offsets[0], indices, values, topology.shape, check_invariants=True)
        if num_lists == 0 or (offsets[:, -1] * num_lists != topology.num_blocks).any():
            raise ValueError(f"{_OP}.to_bsr: the matrices of a batch must have as many blocks each.")
        indices, values = (t.unflatten(0, (num_lists, -1)) for t in (topology.column_indices, self.values))
        return torch.sparse_bsr_tensor(offsets, indices, values, topology.shape, check_invariants=True)

    @classmethod
    def from_bsr(cls, bsr: Tensor) -> BlockSparse:
        """Of a `torch.sparse_bsr` tensor of 2 or 3 dimensions, over its values."""
        op = "BlockSparse.from_bsr"
        if not isinstance(bsr, Tensor) or bsr.layout != torch.sparse_bsr:
            raise TypeError(
                f"{op}: bsr must be a tensor of layout torch.sparse_bsr, got {getattr(bsr, 'layout', bsr)!r}."
            )
        offsets, indices, values = bsr.crow_indices(), bsr.col_indices(), bsr.values()
        if bsr.dim() == 3:
            first = torch.arange(bsr.shape[0], device=offsets.device)[:, None] * indices.shape[1]
            offsets = offsets + first.to(offsets.dtype)
        elif bsr.dim() != 2:
            raise ValueError(f"{op}: bsr must have 2 or 3 dimensions, got {bsr.dim()}.")
        block = values.shape[-2:]
        return cls(
            values.reshape(-1, *block).contiguous(),
            offsets.int().contiguous(),
            indices.flatten().int(),
            tuple(bsr.shape),
        )

    # ---- products ----------------------------------------------------------------------------------------------------

    def __matmul__(self, dense: Tensor) -> Tensor:
        from .block_sparse import dsd

        return dsd(self, dense)

    def __rmatmul__(self, dense: Tensor) -> Tensor:
        from .block_sparse import dds

        return dds(dense, self)


def check_block_scales(values: Tensor, block_scales: Tensor) -> None:
    check.plain(_OP, "block_scales", block_scales, 1, "a vector", torch.float32, "values", values)
    check.dtype(_OP, "values", values, (torch.int8,))
    check.size(_OP, "block_scales", block_scales, 0, "one element for each block,", values.shape[0])
    if block_scales.requires_grad:
        raise ValueError(f"{_OP}: block_scales must not require a gradient: they are constants.")
