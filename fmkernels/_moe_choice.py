# SPDX-License-Identifier: Apache-2.0
"""Where experts choose, and where they have a capacity: `moe.route_expert_choice` and `moe.apply_capacity`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import call, needs_grad, ops, register_fake
from ._moe_mapping import MAX_EXPERTS, check_ids
from ._moe_route import check_logits, scoring_code

POLICIES = ("position", "weight")


def route_expert_choice(logits: Tensor, capacity: int, *, scoring: str = "softmax") -> tuple[Tensor, Tensor]:
    """Every expert takes the `capacity` tokens of the highest scores, so that all have the same load.

    Args:
        logits: [num_tokens, num_experts], float32, bfloat16 or float16, last dimension contiguous; 1 to 1024 experts.
        capacity: how many tokens an expert takes at most, such as num_tokens * 2 // num_experts.
        scoring: the score of a logit, as of `route`; softmax is over the experts of a token.

    Returns:
        (topk_weights [num_tokens, num_experts] float32, topk_idx [num_tokens, num_experts] int32): in column e the
        expert e and its score for the tokens that it takes, else -1 and 0; of equal scores the lower token is taken.
        All that takes the result of `route` takes this one; give `build_mapping` num_rows=capacity * num_experts, the
        capacity rounded up to the alignment. A token with NaN among its logits is taken by none, and none with the
        logit -inf by that expert; +inf counts as the largest float32.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Deterministic. Scores are compared in float32. Differentiable once in logits,
    through the weights. Which tokens are taken depends on all of them, later ones too. After Zhou et al. 2022.
    """
    op = "moe.route_expert_choice"
    check.integer(op, "capacity", capacity, 0)
    args = (logits, capacity, scoring_code(op, scoring))
    return call(_Choice.apply if needs_grad(logits) else ops.moe_route_expert_choice, args, _check_choice)


def apply_capacity(
    topk_weights: Tensor, topk_idx: Tensor, num_experts: int, capacity: int, *, policy: str = "position"
) -> tuple[Tensor, Tensor]:
    """Drops the slots that are more than an expert takes: their expert becomes -1 and their weight 0.

    Args:
        topk_weights: [num_tokens, num_topk], float32, last dimension contiguous.
        topk_idx: [num_tokens, num_topk], int32 or int64, last dimension contiguous, -1 for none.
        num_experts: from 1 to 1024.
        capacity: how many slots of an expert are kept, from 0.
        policy: which: "position", the first ones in the order of the slots, or "weight", those of the largest weights,
            of equal ones the first, NaN last.

    Returns:
        (topk_weights, topk_idx int32) of the same shapes; the other weights are not changed.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Ids out of range are refused on
            the CPU, on CUDA under FMKERNELS_CHECK=1; without it they become -1.

    CPU and CUDA (sm_80 and later). Deterministic. Differentiable in topk_weights: what is dropped has no gradient.
    Capacity is after Lepikhin et al. 2020, GShard.
    """
    op = "moe.apply_capacity"
    check.integer(op, "num_experts", num_experts, 1)
    check.integer(op, "capacity", capacity, 0)
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"{op}: num_experts must be at most {MAX_EXPERTS}, got {num_experts}.")
    if policy not in POLICIES:
        raise ValueError(f"{op}: policy must be position or weight, got {policy!r}.")
    weights = topk_weights.detach() if isinstance(topk_weights, Tensor) else topk_weights
    if policy == "position" or torch.compiler.is_compiling():
        _check_capacity(topk_idx, weights, num_experts, capacity)
    given = weights if policy == "weight" else None
    kept = call(ops.moe_capacity, (topk_idx, given, num_experts, capacity), _check_capacity)
    return torch.where(kept >= 0, topk_weights, 0.0), kept


def _check_choice(logits: Tensor, capacity: int, scoring: int) -> None:
    op = "moe.route_expert_choice"
    check_logits(op, logits)
    if logits.numel() >= 2**31:
        raise ValueError(f"{op}: logits must have fewer than 2**31 elements, got {logits.numel()}.")
    check.kernel_exists(op, "moe_route_expert_choice", logits)


def _check_capacity(topk_idx: Tensor, topk_weights: Tensor | None, num_experts: int, capacity: int) -> None:
    op = "moe.apply_capacity"
    check_ids(op, topk_idx, num_experts)
    if topk_weights is not None:
        layout = "[num_tokens, num_topk]"
        check.plain(op, "topk_weights", topk_weights, 2, layout, torch.float32, "topk_idx", topk_idx)
        check.shape(op, "topk_weights", topk_weights, "topk_idx", topk_idx)
    check.kernel_exists(op, "moe_capacity", topk_idx)


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, capacity: int, scoring: int) -> tuple[Tensor, Tensor]:
        topk_weights, topk_idx = ops.moe_route_expert_choice(logits, capacity, scoring)
        ctx.save_for_backward(logits, topk_weights, topk_idx)
        ctx.mark_non_differentiable(topk_idx)
        ctx.scoring = scoring
        return topk_weights, topk_idx

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_idx: None) -> tuple[Tensor | None, ...]:
        grad = check.rows_of_gradient(grad)
        return ops.moe_route_backward(grad, *ctx.saved_tensors, ctx.scoring, False), None, None


@register_fake("moe_route_expert_choice")
def _(logits, capacity, scoring):
    _check_choice(logits, capacity, scoring)
    return logits.new_empty(logits.shape, dtype=torch.float32), logits.new_empty(logits.shape, dtype=torch.int32)


@register_fake("moe_capacity")
def _(topk_idx, topk_weights, num_experts, capacity):
    _check_capacity(topk_idx, topk_weights, num_experts, capacity)
    return topk_idx.new_empty(topk_idx.shape, dtype=torch.int32)
