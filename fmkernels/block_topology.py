# SPDX-License-Identifier: Apache-2.0
"""`BlockTopology`: which blocks of a matrix are stored, and in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check as check

BLOCK_SIZES = (16, 32, 64, 128)
_OP = "BlockTopology"


@dataclass(frozen=True, eq=False, repr=False)
class BlockTopology:
    """Which blocks of a matrix are stored: compressed rows of blocks, and, when first asked for, columns.

    The lists are drawn in docs/layouts.md. A matrix of a batch has a list of its own; a size need not be a multiple of
    the block. Blocks that no row lists, at the end of `column_indices`, are not a part of the matrix: lists may be as
    long as a bound that the host knows.

    Args:
        row_offsets: [rows of blocks + 1] int32, or [batch, rows of blocks + 1]: the blocks of row r are those from
            row_offsets[r] to row_offsets[r + 1] - 1. With a batch they go on from one list to the next.
        column_indices: [num_blocks] int32, the column of each block; ascending within a row, without duplicates.
        shape: (rows, columns) of the matrix, or (batch, rows, columns).
        block: (rows, columns) of a block, each 16, 32, 64 or 128; an integer: both.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. On CUDA the values of the lists
            are checked under FMKERNELS_CHECK=1; otherwise entries out of range are skipped by the products.
    """

    row_offsets: Tensor
    column_indices: Tensor
    shape: tuple[int, ...]
    block: tuple[int, int]
    _made: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", _checked_block(self.block))
        object.__setattr__(self, "shape", _checked_shape(self.shape))
        dims = len(self.shape) - 1
        layout = "[rows of blocks + 1]" if dims == 1 else "[batch, rows of blocks + 1]"
        for name, t, expected, of in (
            ("row_offsets", self.row_offsets, dims, layout),
            ("column_indices", self.column_indices, 1, "[num_blocks]"),
        ):
            check.is_tensor(_OP, name, t)
            check.rank(_OP, name, t, expected, of)
            check.dtype(_OP, name, t, (torch.int32,))
            check.same_device(_OP, name, t, "row_offsets", self.row_offsets)
            if not t.is_contiguous():
                raise ValueError(f"{_OP}: {name} must be contiguous, got strides {list(t.stride())}.")
        expected, found = [*self.shape[:-2], self.num_block_rows + 1], list(self.row_offsets.shape)
        if found != expected:
            raise ValueError(
                f"{_OP}: row_offsets must be {expected} for shape {self.shape} in blocks of {self.block}, got {found}."
            )
        if check.sees_values(self.row_offsets):
            self._check_values()

    def _check_values(self) -> None:
        offsets, num_blocks = self.row_offsets.flatten().long(), self.num_blocks
        lists = self.row_offsets.view(self.num_lists, -1).long()
        steps = lists.diff(dim=-1)
        if int(offsets[0]) != 0 or (steps < 0).any() or (lists[1:, 0] != lists[:-1, -1]).any():
            raise ValueError(f"{_OP}: row_offsets must begin with 0, not decrease, and go on from list to list.")
        if int(offsets[-1]) > num_blocks:
            raise ValueError(
                f"{_OP}: row_offsets must end with at most the {num_blocks} blocks of column_indices, got "
                f"{int(offsets[-1])}."
            )
        columns = self.column_indices[: int(offsets[-1])].long()
        if columns.numel() == 0:
            return
        low, high = (int(x) for x in torch.aminmax(columns))
        if low < 0 or high >= self.num_block_columns:
            wrong = low if low < 0 else high
            raise ValueError(f"{_OP}: column_indices must be from 0 to {self.num_block_columns - 1}, got {wrong}.")
        keys = self.row_indices[: columns.numel()].long() * self.num_block_columns + columns
        is_wrong = keys.diff() <= 0
        if is_wrong.any():
            first = int(is_wrong.nonzero()[0]) + 1
            row, column = int(self.row_indices[first]) % max(1, self.num_block_rows), int(columns[first])
            kind = "twice" if int(columns[first - 1]) == column else "not in order"
            raise ValueError(
                f"{_OP}: column_indices must ascend within a row of blocks, got column {column} of row {row} {kind}."
            )

    @classmethod
    def from_mask(
        cls, mask: Tensor, block: int | tuple[int, int], shape: tuple[int, ...] | None = None
    ) -> BlockTopology:
        """Of the blocks where `mask` is true.

        Args:
            mask: [rows of blocks, columns of blocks] bool, or [batch, rows of blocks, columns of blocks].
            block: (rows, columns) of a block, or both in one number.
            shape: of the matrix; default: whole blocks.

        Waits for the device, which alone knows how many blocks there are.
        """
        op = "BlockTopology.from_mask"
        check.is_tensor(op, "mask", mask)
        check.dtype(op, "mask", mask, (torch.bool,))
        if mask.dim() not in (2, 3):
            raise ValueError(f"{op}: mask must have 2 or 3 dimensions, got {list(mask.shape)}.")
        block_rows, block_columns = _checked_block(block)
        if shape is None:
            shape = (*mask.shape[:-2], mask.shape[-2] * block_rows, mask.shape[-1] * block_columns)
        shape = _checked_shape(shape)
        expected = [*shape[:-2], -(-shape[-2] // block_rows), -(-shape[-1] // block_columns)]
        if list(mask.shape) != expected:
            raise ValueError(f"{op}: mask must be {expected} for shape {shape}, got {list(mask.shape)}.")
        offsets = F.pad(mask.sum(-1), (1, 0)).cumsum(-1)
        if mask.dim() == 3:  # a list goes on where the one before it ends
            num_blocks = offsets[:, -1:]
            offsets = offsets + num_blocks.cumsum(0) - num_blocks
        return cls(offsets.int(), mask.nonzero()[:, -1].int(), shape, (block_rows, block_columns))

    def to_mask(self) -> Tensor:
        """[rows of blocks, columns of blocks] bool, or [batch, rows of blocks, columns of blocks]: those stored."""
        mask = torch.zeros(self.num_places + 1, dtype=torch.bool, device=self.device)  # the last one is thrown away
        mask.index_fill_(0, self.places, True)
        return mask[: self.num_places].view(*self.shape[:-2], self.num_block_rows, self.num_block_columns)

    @property
    def num_blocks(self) -> int:
        return self.column_indices.shape[0]

    @property
    def num_lists(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    @property
    def num_block_rows(self) -> int:
        return -(-self.shape[-2] // self.block[0])

    @property
    def num_block_columns(self) -> int:
        return -(-self.shape[-1] // self.block[1])

    @property
    def density(self) -> float:
        """Blocks over those of a dense matrix."""
        return self.num_blocks / self.num_places if self.num_places > 0 else 0.0

    @property
    def num_places(self) -> int:
        """Blocks of a dense matrix."""
        return self.num_lists * self.num_block_rows * self.num_block_columns

    @property
    def device(self) -> torch.device:
        return self.row_offsets.device

    @property
    def row_indices(self) -> Tensor:
        """[num_blocks] int32: list * rows of blocks + row of each block; -1 of blocks that no row lists."""
        if "row_indices" not in self._made:
            ends = self.row_offsets.view(self.num_lists, -1)[:, 1:].flatten().contiguous()
            place = torch.arange(self.num_blocks, dtype=torch.int32, device=self.device)
            rows = torch.searchsorted(ends, place, right=True, out_int32=True)
            self._made["row_indices"] = torch.where(rows < ends.shape[0], rows, -1)
        return self._made["row_indices"]

    @property
    def places(self) -> Tensor:
        """[num_blocks] int64, row_indices * columns of blocks + column of each block; num_places: no row lists it."""
        rows, columns = self.row_indices.long(), self.column_indices
        is_in = (rows >= 0) & (columns >= 0) & (columns < self.num_block_columns)
        return torch.where(is_in, rows * self.num_block_columns + columns, self.num_places)

    def lists(self, transposed: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """The lists of the matrix, or of its transpose, as the products take them; made once.

        offsets [batch or 1, rows + 1], indices [num_blocks], positions [num_blocks] in the values (None: in order), and
        order [batch * rows], the rows of blocks with the longest first.
        """
        name = "columns" if transposed else "rows"
        if name not in self._made:
            self._made[name] = self._make_columns() if transposed else self._make_rows()
        return self._made[name]

    def make_lists_to_compile(self) -> None:
        """Under torch.compile, all that is kept: an autograd.Function, which asks for it, may not be who makes it."""
        if torch.compiler.is_compiling():
            self.lists(False), self.lists(True), self.row_indices

    def use_columns(self, offsets: Tensor, indices: Tensor, positions: Tensor) -> None:
        """Takes the lists of columns from one who has them, as `lists(True)` gives them, so that none are made."""
        lists = offsets.view(self.num_lists, -1)
        self._made["columns"] = lists, indices, positions, _longest_first(lists)

    def _make_rows(self) -> tuple[Tensor, Tensor, None, Tensor]:
        offsets = self.row_offsets.view(self.num_lists, -1)
        return offsets, self.column_indices, None, _longest_first(offsets)

    def _make_columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_rows, num_columns = max(1, self.num_block_rows), self.num_block_columns
        rows, unlisted = self.row_indices.long(), self.num_lists * num_columns
        keys = rows.div(num_rows, rounding_mode="floor") * num_columns + self.column_indices
        sorted_keys, positions = torch.where(rows < 0, unlisted, keys).sort(stable=True)
        lists = torch.arange(self.num_lists, device=self.device)[:, None] * num_columns
        wanted = (lists + torch.arange(num_columns + 1, device=self.device)).flatten()
        offsets = torch.searchsorted(sorted_keys, wanted, out_int32=True).view(self.num_lists, -1)
        indices = rows[positions].remainder(num_rows).int()
        return offsets, indices, positions.int(), _longest_first(offsets)

    def to(self, device: torch.device | str) -> BlockTopology:
        """The same on a device."""
        offsets = self.row_offsets.to(device)
        if offsets is self.row_offsets:
            return self
        return BlockTopology(offsets, self.column_indices.to(device), self.shape, self.block)

    def __repr__(self) -> str:
        return (
            f"BlockTopology(shape={self.shape}, block={self.block}, num_blocks={self.num_blocks}, "
            f"density={self.density:.3g}, device={self.device})"
        )


def topology_moe(expert_ends: Tensor, num_rows: int, ffn: int, block: int | tuple[int, int] = 128) -> BlockTopology:
    """The block-diagonal topology of experts: the rows of expert e meet its `ffn` columns and no others.

    Made without a sort and without waiting for the device.

    Args:
        expert_ends: [experts] int32 or int64, where the rows of each expert end: ascending multiples of a block's rows.
        num_rows: rows of the matrix, a bound of the last end that the host knows; rows past it have no blocks.
        ffn: columns of an expert, a multiple of the block's columns.
        block: (rows, columns) of a block, or both in one number.

    Returns:
        A `BlockTopology` of (num_rows, experts * ffn) with (num_rows / block rows) * (ffn / block columns) places for
        blocks, of which the last are unused where rows are.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "topology_moe"
    check.is_tensor(op, "expert_ends", expert_ends)
    check.rank(op, "expert_ends", expert_ends, 1, "[experts]")
    check.dtype(op, "expert_ends", expert_ends, (torch.int32, torch.int64))
    block_rows, block_columns = _checked_block(block)
    for name, value, of in (("num_rows", num_rows, block_rows), ("ffn", ffn, block_columns)):
        if type(value) is not int or value < 0 or value % of != 0:
            raise ValueError(f"{op}: {name} must be a multiple of {of}, got {value!r}.")
    if check.sees_values(expert_ends) and expert_ends.numel() > 0:
        steps = expert_ends.diff(prepend=expert_ends.new_zeros(1))
        if (steps < 0).any() or (expert_ends % block_rows != 0).any() or int(expert_ends[-1]) > num_rows:
            raise ValueError(
                f"{op}: expert_ends must ascend in multiples of {block_rows} to at most {num_rows}, got "
                f"{expert_ends.tolist()}."
            )
    columns, rows = ffn // block_columns, num_rows // block_rows
    ends = expert_ends.long() // block_rows
    row = torch.arange(rows, device=ends.device)
    expert = torch.searchsorted(ends, row, right=True)
    used = ends[-1].clamp(max=rows) if ends.numel() else torch.zeros((), dtype=torch.long, device=ends.device)
    offsets = torch.minimum(torch.arange(rows + 1, device=ends.device), used) * columns
    indices = expert.clamp(max=max(0, len(ends) - 1))[:, None] * columns + torch.arange(columns, device=ends.device)
    return BlockTopology(
        offsets.int(), indices.flatten().int(), (num_rows, len(ends) * ffn), (block_rows, block_columns)
    )


def _longest_first(offsets: Tensor) -> Tensor:
    return offsets.diff(dim=-1).flatten().argsort(descending=True, stable=True).int()


def _checked_block(block: int | tuple[int, int]) -> tuple[int, int]:
    sizes = (block, block) if type(block) is int else tuple(block) if isinstance(block, (tuple, list)) else ()
    if len(sizes) != 2 or any(type(size) is not int or size not in BLOCK_SIZES for size in sizes):
        raise ValueError(f"{_OP}: block must be 16, 32, 64 or 128, or two of these, got {block!r}.")
    return sizes


def _checked_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = tuple(shape)
    if len(shape) not in (2, 3) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{_OP}: shape must be 2 or 3 sizes, got {shape}.")
    if math.prod(shape) >= 1 << 62 or max(shape) >= 1 << 31:
        raise ValueError(f"{_OP}: sizes must be below 2^31, got {shape}.")
    return shape
