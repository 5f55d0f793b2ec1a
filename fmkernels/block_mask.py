# SPDX-License-Identifier: Apache-2.0
"""`BlockMask`, which pairs of a query and a key `attention` visits, and `create_block_mask`, which makes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check as check
from ._block_mask_build import WHOLE, Mask, build
from .block_topology import BlockTopology

BLOCKS = (64, 128)
_TENSORS = (
    "row_offsets",
    "column_indices",
    "tile_idx",
    "column_offsets",
    "row_indices",
    "transposed_tile_idx",
    "tiles",
)


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Which pairs of a query and a key attention visits: whole blocks, and bits inside the others.

    Made by `create_block_mask`, `BlockMask.from_flex` or `BlockMask.from_topology`. The tensors are drawn in
    docs/layouts.md. All are int32 and contiguous; batch and heads may be 1, the mask is then shared.

    Args:
        seq_q: number of queries.
        seq_k: number of keys.
        row_offsets: [batch, heads, query blocks + 1], into the next two: the blocks of a query block.
        column_indices: [listed], key blocks, ascending within a query block.
        tile_idx: [listed], the tile of each block; -1: the whole block is visible.
        column_offsets: [batch, heads, key blocks + 1], into the next two: the same blocks by key block.
        row_indices: [listed], query blocks, ascending within a key block.
        transposed_tile_idx: [listed].
        tiles: [tiles, block, block / 32], no two alike: bit j % 32 of word [i, j // 32] says whether query i of a block
            sees its key j; 0 past the last query and the last key.
    """

    seq_q: int
    seq_k: int
    row_offsets: Tensor
    column_indices: Tensor
    tile_idx: Tensor
    column_offsets: Tensor
    row_indices: Tensor
    transposed_tile_idx: Tensor
    tiles: Tensor

    def __post_init__(self) -> None:
        for name, t in zip(_TENSORS, self.tensors, strict=True):
            check.is_tensor("BlockMask", name, t)
            is_list = name in ("column_indices", "tile_idx", "row_indices", "transposed_tile_idx")
            check.rank("BlockMask", name, t, *((1, "[listed]") if is_list else (3, "as in the docstring")))
            check.dtype("BlockMask", name, t, (torch.int32,))
            check.same_device("BlockMask", name, t, "tiles", self.tiles)
            if not t.is_contiguous():
                raise ValueError(f"BlockMask: {name} must be contiguous, got strides {list(t.stride())}.")
            if is_list:
                check.size("BlockMask", name, t, 0, "the length of column_indices,", self.column_indices.shape[0])
        if self.block not in BLOCKS or self.tiles.shape[2] * 32 != self.block:
            shape = list(self.tiles.shape)
            raise ValueError(f"BlockMask: tiles must be [tiles, 64, 2] or [tiles, 128, 4], got {shape}.")
        batch, heads, _ = self.row_offsets.shape
        for name, seq in (("row_offsets", self.seq_q), ("column_offsets", self.seq_k)):
            expected, shape = [batch, heads, -(-seq // self.block) + 1], list(getattr(self, name).shape)
            if shape != expected or 0 in expected:
                raise ValueError(
                    f"BlockMask: {name} must be [batch, heads, {expected[2]}] for {seq} positions in blocks of "
                    f"{self.block}, batch and heads those of row_offsets and at least 1, got {shape}."
                )

    def check_values(self) -> None:
        """Raises ValueError where a block or a tile is listed that does not exist; waits for the device."""
        num_listed = self.column_indices.shape[0]
        for line, index, tile, other in (
            ("row", "column_indices", "tile_idx", self.column_offsets),
            ("column", "row_indices", "transposed_tile_idx", self.row_offsets),
        ):
            offsets, indices, tile_idx = (getattr(self, name) for name in (f"{line}_offsets", index, tile))
            steps = F.pad(offsets.flatten(), (1, 0)).diff().view_as(offsets)
            rises = steps[..., 0].eq(0).all() and steps.ge(0).all()  # a head begins where the one before it ends
            if not rises or offsets[-1, -1, -1] != num_listed:
                raise ValueError(f"BlockMask: {line}_offsets must rise from 0 to {num_listed}, head after head.")
            least = F.pad(indices[:-1] + 1, (1, 0))[:num_listed]
            starts = offsets[..., :-1].flatten()  # of an empty line: where the next one starts, or the end
            least[starts[starts < num_listed]] = 0
            limits = (other.shape[2] - 1, self.tiles.shape[0])
            ascends = f"ascend within a line and lie from 0 to {limits[0] - 1}"
            _refuse(index, indices, (indices < least) | (indices >= limits[0]), ascends)
            wrong = (tile_idx < -1) | (tile_idx >= limits[1])
            _refuse(tile, tile_idx, wrong, f"be from -1 to {limits[1] - 1}")

    @property
    def tensors(self) -> list[Tensor]:
        """In the order of the fields, as the ops take them."""
        return [getattr(self, name) for name in _TENSORS]

    @property
    def block(self) -> int:
        """Queries and keys of a block."""
        return self.tiles.shape[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch or 1, heads or 1, seq_q, seq_k)"""
        return (*self.row_offsets.shape[:2], self.seq_q, self.seq_k)

    @property
    def device(self) -> torch.device:
        return self.tiles.device

    @property
    def sparsity(self) -> float:
        """The share of blocks that are not visited."""
        batch, heads, rows = self.row_offsets.shape
        num_blocks = batch * heads * (rows - 1) * (self.column_offsets.shape[2] - 1)
        return 1.0 - self.column_indices.numel() / num_blocks if num_blocks > 0 else 0.0

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on another device."""
        return BlockMask(self.seq_q, self.seq_k, *(t.to(device) for t in self.tensors))

    def to_dense(self) -> Tensor:
        """[batch or 1, heads or 1, seq_q, seq_k], bool: True where a query sees a key."""
        batch, heads, rows = self.row_offsets.shape
        rows, columns, block = rows - 1, self.column_offsets.shape[2] - 1, self.block
        bits = torch.arange(32, dtype=torch.int32, device=self.device)
        tiles = (self.tiles[..., None] >> bits & 1).bool().flatten(2)
        tiles = torch.cat([tiles, tiles.new_ones(1, block, block)])  # the last one is that of -1
        lines = torch.arange(batch * heads * rows, device=self.device)
        lines = lines.repeat_interleave(self.row_offsets.diff(dim=-1).flatten())
        blocks = tiles.new_zeros(batch * heads * rows * columns, block, block)
        blocks[lines * columns + self.column_indices] = tiles[self.tile_idx]
        dense = blocks.view(batch, heads, rows, columns, block, block).transpose(3, 4)
        return dense.reshape(batch, heads, rows * block, columns * block)[..., : self.seq_q, : self.seq_k]

    def __repr__(self) -> str:
        return (
            f"BlockMask(shape={list(self.shape)}, block={self.block}, device={str(self.device)!r}, "
            f"blocks={self.column_indices.numel()}, partial={int((self.tile_idx >= 0).sum())}, "
            f"tiles={self.tiles.shape[0]}, sparsity={self.sparsity:.1%})"
        )

    @staticmethod
    def from_flex(mask: Any) -> BlockMask:
        """The mask of a torch.nn.attention.flex_attention.BlockMask.

        Its mask_mod is evaluated as `create_block_mask` does, and counts in the partial blocks alone.

        Args:
            mask: has BLOCK_SIZE (64, 64) or (128, 128) and its mask_mod, which a slice of a mask has lost.

        Raises:
            ValueError: one sentence.
        """
        op, sizes = "BlockMask.from_flex", tuple(mask.BLOCK_SIZE)
        if sizes not in [(block, block) for block in BLOCKS]:
            raise ValueError(f"{op}: BLOCK_SIZE must be (64, 64) or (128, 128), got {sizes}.")
        partial = _block_grid(mask.kv_num_blocks, mask.kv_indices)
        whole = torch.zeros_like(partial)
        if mask.full_kv_num_blocks is not None:
            whole = _block_grid(mask.full_kv_num_blocks, mask.full_kv_indices)
        (block, _), (seq_q, seq_k) = sizes, mask.seq_lengths
        batch, heads, rows, columns = partial.shape
        if (rows, columns) != (-(-seq_q // block), -(-seq_k // block)):
            raise ValueError(
                f"{op}: seq_lengths must fill the {rows} x {columns} blocks of {block}, got {tuple(mask.seq_lengths)}."
            )
        tensors = build(mask.mask_mod, batch, heads, seq_q, seq_k, block, partial.device, (partial, whole))
        return BlockMask(seq_q, seq_k, *tensors)

    @staticmethod
    def from_topology(topology: BlockTopology, *, batch: int | None = None, heads: int | None = None) -> BlockMask:
        """The mask by which a query sees the keys of the blocks that a topology stores.

        Blocks of 64 x 64 and 128 x 128 stay as they are listed, others get bits, as `create_block_mask` makes them.

        Args:
            topology: of shape (seq_q, seq_k), or (batch * heads, seq_q, seq_k) with the heads of a batch entry one
                after another. Waits for the device, which alone knows how many blocks there are.
            batch: number of batch entries; None: they share one mask.
            heads: number of query heads; None: they share one mask.

        Raises:
            ValueError, TypeError: one sentence with the argument, its rule and what came.
        """
        op = "BlockMask.from_topology"
        if not isinstance(topology, BlockTopology):
            raise TypeError(f"{op}: topology must be a fmkernels.BlockTopology, got {type(topology).__name__}.")
        for name, count in (("batch", batch), ("heads", heads)):
            if count is not None:
                check.integer(op, name, count, 1)
        batch, heads, (seq_q, seq_k) = batch or 1, heads or 1, topology.shape[-2:]
        if topology.num_lists != batch * heads:
            raise ValueError(
                f"{op}: topology must have as many matrices as there are masks, {batch * heads} by batch and heads, "
                f"got {topology.num_lists}."
            )
        block = max(64, *topology.block)
        if topology.block != (block, block):
            grid = topology.to_mask().view(batch, heads, topology.num_block_rows, topology.num_block_columns)
            rows, columns = topology.block

            def is_stored(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return grid[b, h, i // rows, j // columns]

            tensors = build(is_stored, batch, heads, seq_q, seq_k, block, topology.device)
            return BlockMask(seq_q, seq_k, *tensors)
        whole = torch.full_like(topology.column_indices[: int(topology.row_offsets.flatten()[-1])], WHOLE)
        tensors = []
        for is_transposed in (False, True):
            offsets, indices, *_ = topology.lists(is_transposed)
            tensors += [offsets.view(batch, heads, -1), indices[: len(whole)].contiguous(), whole]
        return BlockMask(seq_q, seq_k, *tensors, whole.new_empty(0, block, block // 32))


def create_block_mask(
    mask: Mask,
    batch: int | None,
    heads: int | None,
    seq_q: int,
    seq_k: int,
    *,
    block: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The `BlockMask` of a function, as torch.nn.attention.flex_attention.create_block_mask takes it.

        mask = lambda b, h, i, j: document[i] == document[j]
        o = attention(q, k, v, block_mask=create_block_mask(mask, None, None, seq, seq))

    The function is evaluated for a strip of queries at a time, so that memory is linear in the sequence.

    Args:
        mask: mask(b, h, i, j) says whether query i of head h in batch entry b sees key j. It is given int64 tensors
            without dimensions, under torch.vmap, and returns a bool tensor without dimensions.
        batch: number of batch entries; None: they share one mask, and b is 0.
        heads: number of query heads; None: they share one mask, and h is 0.
        seq_q: number of queries.
        seq_k: number of keys.
        block: queries and keys of a block, 64 or 128.
        device: of the index tensors and of the result.

    Returns:
        The mask. It holds the values that the function had now.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "create_block_mask"
    if not callable(mask):
        raise TypeError(f"{op}: mask must be callable with (b, h, i, j), got {type(mask).__name__}.")
    for name, count, minimum in (("batch", batch, 1), ("heads", heads, 1), ("seq_q", seq_q, 0), ("seq_k", seq_k, 0)):
        if minimum == 0 or count is not None:
            check.integer(op, name, count, minimum)
    if block not in BLOCKS:
        raise ValueError(f"{op}: block must be 64 or 128, got {block}.")
    return BlockMask(seq_q, seq_k, *build(mask, batch or 1, heads or 1, seq_q, seq_k, block, torch.device(device)))


def _refuse(name: str, values: Tensor, wrong: Tensor, rule: str) -> None:
    if wrong.any():
        raise ValueError(f"BlockMask: {name} must {rule}, got {values[wrong][0].item()}.")


def _block_grid(num_blocks: Tensor, indices: Tensor) -> Tensor:
    """[batch, heads, query blocks, key blocks], bool, of the lists of torch's BlockMask."""
    indices, num_blocks = (t[(None,) * (4 - indices.dim())] for t in (indices, num_blocks))
    is_used = torch.arange(indices.shape[-1], device=indices.device) < num_blocks[..., None]
    grid = torch.zeros(indices.shape, dtype=torch.int32, device=indices.device)
    return grid.scatter_add(-1, torch.where(is_used, indices, 0).long(), is_used.int()) > 0
