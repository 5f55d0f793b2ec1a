# SPDX-License-Identifier: Apache-2.0
"""From a mask function to the tensors of a `BlockMask`, a strip of queries at a time."""

from __future__ import annotations

import array
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check as check

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

WHOLE = -1  # tile_idx of a block that is visible as a whole
_STRIP_ELEMENTS = 1 << 23  # of the mask, evaluated at a time


def build(
    mask: Mask,
    batch: int,
    heads: int,
    seq_q: int,
    seq_k: int,
    block: int,
    device: torch.device,
    grids: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """The tensors of a `BlockMask`, in its order.

    `grids`, [batch, heads, query blocks, key blocks]: where the mask decides, and what is visible as a whole.
    """
    rows, columns = -(-seq_q // block), -(-seq_k // block)
    num_q, num_k = _lengths(seq_q, block, device), _lengths(seq_k, block, device)
    strip_rows = max(1, _STRIP_ELEMENTS // (block * max(columns * block, 1)))
    pool: dict[bytes, int] = {}  # the words of a tile, and its place
    lines, indices, tile_idx = [], [], []
    for head in range(batch * heads if columns > 0 else 0):  # of all batch entries
        b, h = divmod(head, heads)
        for first in range(0, rows, strip_rows):
            strip = slice(first, min(first + strip_rows, rows))
            queries = range(first * block, min(strip.stop * block, seq_q))
            visible = _evaluate(mask, b, h, queries, seq_k, device)
            visible = F.pad(visible, (0, columns * block - seq_k, 0, (strip.stop - first) * block - len(queries)))
            blocks = visible.view(-1, block, columns, block)
            if grids is not None:
                partial, whole = (grid[b, h, strip][:, None, :, None] for grid in grids)
                blocks = (blocks & partial) | whole
            # at most 128 in a row of a block, which uint8 holds
            num_visible = blocks.view(torch.uint8).sum(3, dtype=torch.uint8).sum(1, dtype=torch.int32)
            is_whole = num_visible >= num_q[strip, None] * num_k  # more where a whole grid block passes the ends
            is_listed = num_visible > 0
            line, index = is_listed.nonzero(as_tuple=True)
            is_tile = (is_listed & ~is_whole)[line, index]
            tiles = _pack(blocks.transpose(1, 2)[line[is_tile], index[is_tile]]).cpu()
            idx = torch.full(line.shape, WHOLE, dtype=torch.int32)
            words = (array.array("i", tile).tobytes() for tile in tiles.flatten(1).tolist())
            idx[is_tile.cpu()] = torch.tensor([pool.setdefault(key, len(pool)) for key in words], dtype=torch.int32)
            lines.append((line + (head * rows + first)).cpu())
            indices.append(index.cpu())
            tile_idx.append(idx)

    nothing = torch.empty(0, dtype=torch.int64)
    line, index = torch.cat([nothing, *lines]), torch.cat([nothing, *indices])
    tile = torch.cat([nothing.int(), *tile_idx])
    column_line = line // max(rows, 1) * columns + index
    order = column_line.argsort(stable=True)  # rows are in order before
    tiles = torch.frombuffer(bytearray(b"".join(pool)), dtype=torch.int32) if pool else nothing.int()
    tensors = (
        _offsets(line, batch, heads, rows),
        index.int(),
        tile,
        _offsets(column_line, batch, heads, columns),
        (line % max(rows, 1))[order].int(),
        tile[order],
        tiles.clone().view(-1, block, block // 32),
    )
    return [t.to(device) for t in tensors]


def _evaluate(mask: Mask, b: int, h: int, queries: range, seq_k: int, device: torch.device) -> Tensor:
    """[queries, seq_k], bool, by the rules that torch's own builder has for a mask function."""
    from torch.nn.attention.flex_attention import create_mask  # loads the compiler of torch

    def shifted(b_: Tensor, h_: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask(b_ + b, h_ + h, i + queries.start, j)

    visible = create_mask(shifted, None, None, len(queries), seq_k, device)[0, 0]
    if visible.dtype != torch.bool:
        raise ValueError(f"create_block_mask: mask must return bool, got {check.dtype_names((visible.dtype,))}.")
    return visible.contiguous()


def _pack(visible: Tensor) -> Tensor:
    """Bools [.., block] to int32 words [.., block / 32], the first one in the lowest bit."""
    eight = visible.contiguous().view(torch.int64)  # bytes of 0 or 1, the first one lowest
    gathered = eight * 0x0102040810204080 >> 56  # byte k to bit 56 + k: no two products meet in a bit
    return gathered.to(torch.uint8).view(torch.int32)


def _lengths(seq: int, block: int, device: torch.device) -> Tensor:
    """How many positions of the sequence lie in each block."""
    return (seq - torch.arange(0, seq, block, device=device)).clamp(max=block)


def _offsets(lines: Tensor, batch: int, heads: int, num_lines: int) -> Tensor:
    """[batch, heads, num_lines + 1] of the ascending lines, numbered over all heads."""
    counts = lines.bincount(minlength=batch * heads * num_lines)
    ends = F.pad(counts.cumsum(0), (1, 0))
    starts = torch.arange(batch * heads)[:, None] * num_lines
    return ends[starts + torch.arange(num_lines + 1)].int().view(batch, heads, num_lines + 1)
