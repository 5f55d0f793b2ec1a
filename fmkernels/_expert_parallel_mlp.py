# SPDX-License-Identifier: Apache-2.0
"""The feed-forward layer of a mixture of experts over several ranks: `expert_parallel.moe_mlp`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._expert_parallel_exchange import not_traced, unpack
from ._expert_parallel_handle import Crossing
from ._expert_parallel_layer import run_steps
from ._expert_parallel_plan import groups_of
from ._library import autocast, needs_grad, ops
from ._moe_grouped import check_either_way, check_extents, dtypes_of_products


@not_traced
def moe_mlp(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    *,
    group: Any = None,
    max_tokens: int | None = None,
    payload: str | None = None,
    num_chunks: int = 1,
    shared: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`moe.moe_mlp` over a group: every rank has its own tokens and num_experts / ranks of the experts.

    Args:
        x: [num_tokens, hidden], as of `moe.moe_mlp`; num_tokens is each rank's own.
        w_gate_up: [local experts, 2 * width, hidden], gate then up, dtype of x.
        w_down: [local experts, hidden, width], dtype of x.
        topk_weights: [num_tokens, num_topk], float32.
        topk_idx: [num_tokens, num_topk], int32 or int64: counted over all ranks, -1 for none.
        group, max_tokens, payload, num_chunks, shared: as of `run`.

    Returns:
        [num_tokens, hidden], dtype of x. Without a payload the bits of `moe.moe_mlp` with all experts.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    Deterministic. Differentiable once in x, both weights and topk_weights, as `run` says. Under autocast x and both
    weights take the autocast dtype, and travel in it.
    """
    x, w_gate_up, w_down = autocast(3, x, w_gate_up, w_down)
    out, extra = moe_mlp_parts(
        x,
        w_gate_up,
        w_down,
        topk_weights,
        topk_idx,
        group=group,
        max_tokens=max_tokens,
        payload=payload,
        num_chunks=num_chunks,
        shared=shared,
    )
    return out if extra is None else out + extra


def moe_mlp_parts(
    x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_weights: Tensor, topk_idx: Tensor, *, group: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """(what the experts give, what `shared` gives)."""
    op = "expert_parallel.moe_mlp"
    groups = groups_of(op, group)
    keeps = needs_grad(x, w_gate_up, w_down, topk_weights)

    def count_experts() -> int:
        check.is_tensor(op, "w_gate_up", w_gate_up)
        check.rank(op, "w_gate_up", w_gate_up, 3, "[local experts, 2 * width, hidden]")
        return w_gate_up.shape[0] * math.prod(dist.get_world_size(member) for member in groups)

    def step(ticket: Tensor, there: Crossing, weights: Tensor, back: Crossing) -> Tensor:
        return _Mlp.apply(ticket, w_gate_up, w_down, weights, there, back, keeps)

    return run_steps(
        op,
        step,
        x,
        topk_weights,
        topk_idx,
        count_experts,
        requires_grad=needs_grad(w_gate_up, w_down),
        check_more=lambda: _check_experts(op, x, w_gate_up, w_down),
        group=groups,
        **options,
    )


def _check_experts(op: str, x: Tensor, w_gate_up: Tensor, w_down: Any) -> None:
    check.dtype(op, "x", x, dtypes_of_products(x))
    check.kernel_exists(op, "moe_gated_mm", x)
    check.is_tensor(op, "w_down", w_down)
    for name, t in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        check.same_dtype(op, name, t, "x", x)
        check.same_device(op, name, t, "x", x)
        check_either_way(op, name, t)
        check_extents(op, name, t)
    num_local, two_widths, hidden = w_gate_up.shape
    check.size(op, "w_gate_up", w_gate_up, 2, "for this x hidden =", x.shape[1])
    if two_widths % 2:
        raise ValueError(f"{op}: w_gate_up must have an even number of rows an expert, got {two_widths}.")
    if tuple(w_down.shape) != (num_local, hidden, two_widths // 2):
        expected = [num_local, hidden, two_widths // 2]
        raise ValueError(f"{op}: w_down must be {expected} for this w_gate_up, got {list(w_down.shape)}.")


class _Mlp(torch.autograd.Function):
    """Tokens arrive, results leave; the products are those of `moe.moe_mlp` in its order, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        _ticket: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        topk_weights: Tensor,
        there: Crossing,
        back: Crossing,
        keeps: bool,
    ) -> Tensor:
        x = there.handle.receive(there.take("forward"))
        pos_to_token, _, (offsets, _) = there.handle.mapping
        inner, gate_up = ops.moe_gated_mm(x, w_gate_up.transpose(1, 2), offsets, pos_to_token, False, keeps)
        back.forward = back.handle.back(ops.moe_grouped_mm(inner, w_down.transpose(1, 2), offsets, None))
        ctx.save_for_backward(x, w_gate_up, w_down, gate_up)
        ctx.there, ctx.back = there, back
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_gate_up, w_down, gate_up = ctx.saved_tensors
        handle, needs = ctx.there.handle, ctx.needs_input_grad
        pos_to_token, slot_to_pos, (offsets, _) = handle.mapping
        packed = handle.there(ctx.back.take("backward"))
        grad, topk_weights = unpack(packed, (x.shape[1], x.dtype), (handle.num_topk, torch.float32))
        rows = ops.moe_permute(grad, pos_to_token)
        grad_gate_up, inner, grad_weights = ops.moe_gated_backward(
            ops.moe_grouped_mm(rows, w_down, offsets, None), gate_up, pos_to_token, slot_to_pos, topk_weights, False
        )
        ticket = grad_first = grad_last = None
        if needs[0]:  # leaves before the gradients of the weights are computed, for which nobody waits
            ctx.there.backward = handle.back(ops.moe_grouped_mm(grad_gate_up, w_gate_up, offsets, None))
            ticket = x.new_empty(0)
        if needs[1]:
            grad_first = ops.moe_grouped_mm_inner(grad_gate_up, ops.moe_permute(x, pos_to_token), offsets)
        if needs[2]:
            grad_last = ops.moe_grouped_mm_inner(rows, inner, offsets)
        return ticket, grad_first, grad_last, handle.weights_back(grad_weights) if needs[3] else None, None, None, None
