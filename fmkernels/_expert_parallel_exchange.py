# SPDX-License-Identifier: Apache-2.0
"""What travels between the ranks of expert parallelism: rows of tokens there, rows of slots back.

A `Leg` is one exchange within a group. Its rows go there once for each destination that has an expert of the token, and
come back once for each slot: the sum over a token's slots is taken at home, in the order of one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._library import ops
from ._moe_mapping import build_mapping

ROW_BYTES = 16  # a packed row is a multiple of it, for the 16-byte copies of the kernels


class InFlight(NamedTuple):
    """A collective that was begun. `wait` gives its result; on CUDA it is the stream that waits, not the host."""

    buffer: Tensor
    work: Any

    def wait(self) -> Tensor:
        self.work.wait()
        return self.buffer


def not_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: a compiled caller calls it as it is. torch._dynamo, which takes a second, is imported by then."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@dataclass
class Splits:
    """How many rows go to, and come from, each rank of a group; of None all get equally many."""

    send: list[int] | None
    receive: list[int] | None

    def reverse(self) -> Splits:
        return Splits(self.receive, self.send)


def exchange(rows: Tensor, splits: Splits, group: Any) -> InFlight:
    """rows [sum(send), columns], contiguous -> [sum(receive), columns], by the rank they come from."""
    received = rows.new_empty(rows.shape[0] if splits.receive is None else sum(splits.receive), rows.shape[1])
    work = dist.all_to_all_single(
        received.view(torch.uint8), rows.view(torch.uint8), splits.receive, splits.send, group=group, async_op=True
    )
    return InFlight(received, work)


class Leg:
    """One exchange within a group, planned from the experts of the tokens that this rank has.

    topk_idx [num_tokens, num_topk]: experts as the group counts them, -1 for none and for those of other groups;
    expert e is at rank e // experts_per_rank. With max_tokens every rank has so many rows for each other one, token t
    in row t: no size depends on the experts, and nothing need be known of other ranks.
    """

    def __init__(self, topk_idx: Tensor, experts_per_rank: int, group: Any, max_tokens: int | None) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        (num_tokens, num_topk), num_ranks = topk_idx.shape, self.num_ranks
        ranks = torch.div(topk_idx, experts_per_rank, rounding_mode="floor")
        goes = topk_idx.new_zeros((num_tokens, num_ranks + 1), dtype=torch.bool)
        goes = goes.scatter_(1, ranks.long() + 1, True)[:, 1:]  # [num_tokens, num_ranks]
        self.counts: Tensor | None = None
        self.token_splits = self.slot_splits = Splits(None, None)
        if max_tokens is None:
            columns = torch.arange(num_ranks, dtype=torch.int32, device=topk_idx.device)
            tokens = build_mapping(
                torch.where(goes, columns, -1), num_ranks, num_rows=num_tokens * min(num_topk, num_ranks)
            )
            slots = build_mapping(ranks, num_ranks)
            self.sent_tokens = tokens.pos_to_token
            self.token_to_row, self.slot_to_row = tokens.token_topk_to_pos, slots.token_topk_to_pos
            ends = torch.stack((tokens.expert_offsets[1], slots.expert_offsets[1]), 1)
            self.counts = torch.diff(ends, dim=0, prepend=torch.zeros_like(ends[:1]))  # [num_ranks, 2]
        else:
            token = torch.arange(num_tokens, dtype=torch.int32, device=topk_idx.device)
            rank = torch.arange(num_ranks, dtype=torch.int32, device=topk_idx.device)
            sent = token.new_full((num_ranks, max_tokens), -1)
            sent[:, :num_tokens] = torch.where(goes.t(), token, -1)
            self.sent_tokens = sent.flatten()
            self.token_to_row = torch.where(goes, rank * max_tokens + token[:, None], -1)
            slot = torch.arange(num_topk, dtype=torch.int32, device=topk_idx.device) + token[:, None] * num_topk
            self.slot_to_row = torch.where(ranks >= 0, ranks.int() * (max_tokens * num_topk) + slot, -1)

    def set_counts(self, sent: list[list[int]], received: list[list[int]]) -> None:
        """(tokens, slots) for each rank; without max_tokens."""
        self.token_splits, self.slot_splits = (
            Splits([pair[i] for pair in sent], [pair[i] for pair in received]) for i in (0, 1)
        )
        self.sent_tokens = self.sent_tokens[: sum(pair[0] for pair in sent)]

    def set_received(self, topk_idx: Tensor) -> None:
        """The experts of the tokens that came, as `back` has to know which slots have one."""
        if self.slot_splits.receive is None:
            self.received_slots = None
        else:
            slots = torch.where(topk_idx >= 0, 0, -1).view(-1, 1)
            self.received_slots = build_mapping(slots, 1, num_rows=sum(self.slot_splits.receive)).pos_to_token

    def there(self, rows: Tensor) -> InFlight:
        """[num_tokens, columns] -> [received tokens, columns], zeros in rows without a token."""
        return exchange(ops.moe_permute(rows, self.sent_tokens), self.token_splits, self.group)

    def back(self, rows: Tensor, slot_to_row: Tensor) -> InFlight:
        """The rows of the slots that came, at slot_to_row [received tokens, num_topk] -> those of this rank's slots,
        at self.slot_to_row [num_tokens, num_topk]."""
        places = slot_to_row.flatten()
        if self.received_slots is not None:
            places = places[self.received_slots]
        return exchange(ops.moe_permute(rows, places), self.slot_splits.reverse(), self.group)

    def back_by_token(self, rows: Tensor) -> InFlight:
        """[received tokens, columns] -> the rows of this rank's tokens, at self.token_to_row [num_tokens, ranks]."""
        return exchange(rows.contiguous(), self.token_splits.reverse(), self.group)


def pack(*columns: Tensor) -> Tensor:
    """Tensors [rows, ...] of any dtypes, side by side in rows of whole 16 bytes, as a float32 that nothing reads."""
    places = _places((column.shape[1], column.dtype) for column in columns)
    num_bytes = places[-1][1] + -places[-1][1] % ROW_BYTES
    rows = columns[0].new_empty((columns[0].shape[0], num_bytes), dtype=torch.uint8)
    ends = [*(begin for begin, _ in places[1:]), num_bytes]
    for column, (begin, end), next_begin in zip(columns, places, ends, strict=True):
        rows[:, begin:end].view(column.dtype).copy_(column)
        rows[:, end:next_begin].zero_()
    return rows.view(torch.float32)


def unpack(rows: Tensor, *columns: tuple[int, torch.dtype]) -> list[Tensor]:
    """What `pack` was given, as views; `columns` are the numbers of columns and their dtypes."""
    row_bytes = rows.view(torch.uint8)
    places = zip(columns, _places(columns), strict=True)
    return [row_bytes[:, begin:end].view(dtype) for (_, dtype), (begin, end) in places]


def _places(columns: Iterable[tuple[int, torch.dtype]]) -> list[tuple[int, int]]:
    """Where each begins, at a multiple of 4 bytes, and ends."""
    places, begin = [], 0
    for count, dtype in columns:
        places.append((begin, begin + count * dtype.itemsize))
        begin = places[-1][1] + -places[-1][1] % 4
    return places
