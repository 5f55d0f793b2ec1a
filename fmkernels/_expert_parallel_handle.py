# SPDX-License-Identifier: Apache-2.0
"""Where the rows of one call of `expert_parallel` go and come from, and the steps of it that autograd records."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._expert_parallel_exchange import InFlight, Leg, pack, unpack
from ._expert_parallel_payload import decode, encode
from ._library import ops
from ._moe_mapping import Mapping, build_mapping


class Handle:
    """What `dispatch` learned and `combine` needs. Nothing in it is as large as the tokens.

    Attributes:
        recv_topk_idx: [received, num_topk] int32: experts of this rank, counted from its first one; -1 for the others.
        mapping: the rows of the received tokens by expert, as of `moe.build_mapping`; an expert's are in the order of
            the ranks that sent them, and of the tokens there.
    """

    recv_topk_idx: Tensor
    mapping: Mapping

    def __init__(
        self,
        groups: tuple[Any, ...],
        topk_idx: Tensor,
        num_experts: int,
        dtype: torch.dtype,
        payload: str | None,
        max_tokens: int | None,
    ) -> None:
        sizes = [dist.get_world_size(group) for group in groups]
        self.groups, self.max_tokens, self.payload = groups, max_tokens, payload
        self.num_topk, self.dtype = topk_idx.shape[1], dtype
        rank, self.num_ranks = 0, 1
        for group, size in zip(groups, sizes, strict=True):
            rank, self.num_ranks = rank * size + dist.get_rank(group), self.num_ranks * size
        self.rank, self.num_local = rank, num_experts // self.num_ranks
        self.topk_idx = torch.where((topk_idx >= 0) & (topk_idx < num_experts), topk_idx, -1).int()
        self.legs = [Leg(self.topk_idx, num_experts // sizes[0], groups[0], max_tokens)]

    def send(self, x: Tensor) -> InFlight:
        parts = [*encode(x, self.payload), self.topk_idx + 1]  # a row without a token is zeros: no expert
        if len(self.groups) > 1:
            parts.append(self.topk_idx.new_full((x.shape[0], 1), self.rank + 1))
        self.columns = [(part.shape[1], part.dtype) for part in parts]
        return self.legs[0].there(pack(*parts))

    def receive(self, flight: InFlight) -> Tensor:
        rows = flight.wait()
        if len(self.groups) > 1:
            rows = self._receive_in_node(rows)
        parts = unpack(rows, *self.columns)
        *payload, experts = parts[: 2 + (self.payload is not None)]
        self.recv_topk_idx = _from(experts - 1, self.rank * self.num_local, self.num_local)
        self.legs[-1].set_received(self.recv_topk_idx)
        splits = self.legs[-1].slot_splits.receive
        num_rows = None if splits is None else sum(splits)
        if len(self.groups) == 1:
            self.mapping = build_mapping(self.recv_topk_idx, self.num_local, num_rows=num_rows)
        else:
            self.mapping = self._mapping_by_source(parts[-1] - 1, num_rows)
        return decode(payload, self.dtype, self.payload)

    def _receive_in_node(self, rows: Tensor) -> Tensor:
        """From the rank of this one's place in another node to the ranks of this node that have the experts."""
        per_node = self.num_local * dist.get_world_size(self.groups[1])
        experts = unpack(rows, *self.columns)[1 + (self.payload is not None)]
        topk_idx = _from(experts - 1, dist.get_rank(self.groups[0]) * per_node, per_node)
        self.legs[0].set_received(topk_idx)
        most = None if self.max_tokens is None else self.max_tokens * self.legs[0].num_ranks
        leg = Leg(topk_idx, self.num_local, self.groups[1], most)
        if leg.counts is not None:
            received = torch.empty_like(leg.counts)
            dist.all_to_all_single(received, leg.counts.contiguous(), group=leg.group)
            leg.set_counts(*torch.stack((leg.counts, received)).tolist())
        self.legs = [self.legs[0], leg]
        return leg.there(rows).wait()

    def _mapping_by_source(self, source: Tensor, num_rows: int | None) -> Mapping:
        """Rows that came through other ranks, in the order of the ranks that have their tokens."""
        order = build_mapping(source, self.num_ranks, num_rows=source.shape[0]).pos_to_token  # -1 behind the last
        topk_idx = torch.where(order[:, None] >= 0, self.recv_topk_idx[order], -1)  # [-1] is a row, and not taken
        sorted_rows = build_mapping(topk_idx, self.num_local, num_rows=num_rows)
        pos_to_token = sorted_rows.pos_to_token
        if order.numel() > 0:
            pos_to_token = torch.where(pos_to_token >= 0, order[pos_to_token], -1)
        # Rows without a token are -1 wherever they go; one more place takes them.
        slot_to_pos = torch.full((order.shape[0] + 1, self.num_topk), -1, dtype=torch.int32, device=order.device)
        slot_to_pos[torch.where(order >= 0, order, order.shape[0]).long()] = sorted_rows.token_topk_to_pos
        return Mapping(pos_to_token, slot_to_pos[:-1], sorted_rows.expert_offsets)

    def back(self, rows: Tensor) -> InFlight:
        """Rows of the experts, as `mapping` has them -> rows of this rank's slots, at legs[0].slot_to_row."""
        places = self.mapping.token_topk_to_pos
        for leg in self.legs[:0:-1]:
            rows, places = leg.back(rows, places).wait(), leg.slot_to_row
        return self.legs[0].back(rows, places)

    def back_by_token(self, rows: Tensor) -> InFlight:
        """Rows of the received tokens -> rows of this rank's tokens, at legs[0].token_to_row."""
        for leg in self.legs[:0:-1]:
            rows = ops.moe_combine(leg.back_by_token(rows).wait(), leg.token_to_row, None)
        return self.legs[0].back_by_token(rows)

    def weights_back(self, weights: Tensor) -> Tensor:
        """[received, num_topk] -> [num_tokens, num_topk]: a number for each slot, 0 for one without an expert."""
        slot_to_pos = self.mapping.token_topk_to_pos
        slots = torch.arange(slot_to_pos.numel(), dtype=torch.int32, device=slot_to_pos.device).view_as(slot_to_pos)
        rows, places = weights.reshape(-1, 1), torch.where(slot_to_pos >= 0, slots, -1)
        for leg in self.legs[::-1]:
            rows, places = leg.back(rows, places).wait(), leg.slot_to_row
        return ops.moe_permute(rows, places.flatten()).view(places.shape)

    def there(self, flight: InFlight) -> Tensor:
        rows = flight.wait()
        for leg in self.legs[1:]:
            rows = leg.there(rows).wait()
        return rows


def _from(experts: Tensor, first: int, count: int) -> Tensor:
    """Counted from the first of `count` ones; -1 for all others."""
    experts = experts - first
    return torch.where((experts >= 0) & (experts < count), experts, -1)


@dataclass
class Crossing:
    """An exchange that one step begins and a later one waits for, in each direction.

    Between the two steps goes a tensor without elements, for which autograd keeps their order.
    """

    handle: Handle
    by_slot: bool = False
    forward: InFlight | None = field(default=None, repr=False)
    backward: InFlight | None = field(default=None, repr=False)

    def take(self, name: str) -> InFlight:
        flight = getattr(self, name)
        setattr(self, name, None)
        return flight


class Send(torch.autograd.Function):
    """Tokens leave for the experts; their gradients arrive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.forward = crossing.handle.send(x)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, leg = ctx.crossing.take("backward").wait(), ctx.crossing.handle.legs[0]
        places = leg.slot_to_row if ctx.crossing.by_slot else leg.token_to_row
        return ops.moe_combine(rows, places, None), None


class Receive(torch.autograd.Function):
    """Tokens arrive, or with `by_slot` the rows of the experts; their gradients leave."""

    @staticmethod
    def forward(ctx: Any, _ticket: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        x = crossing.handle.receive(crossing.take("forward"))
        return ops.moe_permute(x, crossing.handle.mapping.pos_to_token) if crossing.by_slot else x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        crossing = ctx.crossing
        back = crossing.handle.back if crossing.by_slot else crossing.handle.back_by_token
        crossing.backward = back(check.rows_of_gradient(grad))
        return grad.new_empty(0), None


class Return(torch.autograd.Function):
    """Results leave for the tokens; the gradients of the tokens' sums and their weights arrive.

    The rows are an input so that their gradients leave on every rank, used or not.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, topk_weights: Tensor, _rows: Tensor | None, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        ctx.save_for_backward(y)
        crossing.forward = crossing.handle.back(y)
        return y.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,), handle = ctx.saved_tensors, ctx.crossing.handle
        rows = handle.there(ctx.crossing.take("backward"))
        grad, weights = unpack(rows, (y.shape[1], y.dtype), (handle.num_topk, torch.float32))
        pos_to_token, slot_to_pos, _ = handle.mapping
        grad_y, grad_weights = ops.moe_combine_backward(grad, y, pos_to_token, slot_to_pos, weights)
        if not ctx.needs_input_grad[1]:
            return grad_y, None, None, None
        return grad_y, handle.weights_back(grad_weights), None, None


class Collect(torch.autograd.Function):
    """Results arrive and are summed; the gradient of the sum leaves, once for each rank, with the weights."""

    @staticmethod
    def forward(ctx: Any, _ticket: Tensor, topk_weights: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        ctx.save_for_backward(topk_weights)
        return ops.moe_combine(crossing.take("forward").wait(), crossing.handle.legs[0].slot_to_row, topk_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (topk_weights,), crossing = ctx.saved_tensors, ctx.crossing
        crossing.backward = crossing.handle.legs[0].there(pack(grad, topk_weights))
        return grad.new_empty(0), None, None
