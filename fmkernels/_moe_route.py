# SPDX-License-Identifier: Apache-2.0
"""The experts of each token: `moe.route`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import call, needs_grad, ops, register_fake

MAX_EXPERTS = 1024
MAX_TOPK = 32
MAX_GROUPS = 32
SCORINGS = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}
GROUP_SCORES = ("max", "top2", "sum")


def route(
    logits: Tensor,
    num_topk: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    """The experts of the highest scores of each token, and their weights.

    Args:
        logits: [num_tokens, num_experts], float32, bfloat16 or float16, last dimension contiguous; 1 to 1024 experts.
        num_topk: how many experts a token has, from 1 to 32 and to those that its groups have.
        scoring: the score s of a logit x: "softmax" over the experts, "sigmoid", or "sqrt_softplus", which is
            sqrt(log(1 + e^x)).
        renormalize: weights are s over the sum of the chosen s, else s itself.
        bias: [num_experts], float32, contiguous: added to the scores that choose, and in no weight.
        num_groups: the experts are so many groups of equal size, one after another; at most 32.
        topk_groups: a token uses the experts of so many of its groups, those of the highest group scores.
        group_score: what a group is worth to a token: the "max" of its scores (with the bias) there, the sum of the
            "top2", or "sum", that of the best num_topk // topk_groups (at least one), which is "top2" for DeepSeek-V3.

    Returns:
        (topk_weights [num_tokens, num_topk] float32, topk_idx [num_tokens, num_topk] int32), the best expert first; of
        equal ones, groups too, the lower id. -1 and 0 where there is no expert: a token with NaN among its logits has
        none (and no token has, where the bias has NaN), and an expert with the logit -inf is never chosen. +inf counts
        as the largest float32.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Deterministic, and a token's result depends on its own logits alone. Without a bias,
    and without sums over groups, experts are compared by their logits, with which every score rises, and the choice has
    no rounding; else by scores in float32. Differentiable once in logits, through the weights: of softmax without
    renormalisation all experts get a gradient, else the chosen ones; a logit of +inf gets 0. Auxiliary-loss-free
    balancing by the bias is after Wang et al. 2024, groups after DeepSeek-AI 2024, DeepSeek-V2 and V3.
    """
    op = "moe.route"
    check.integer(op, "num_topk", num_topk, 1)
    check.integer(op, "num_groups", num_groups, 1)
    check.integer(op, "topk_groups", topk_groups, 1)
    check.flag(op, "renormalize", renormalize)
    code = scoring_code(op, scoring)
    if group_score not in GROUP_SCORES:
        raise ValueError(f"{op}: group_score must be max or top2 or sum, got {group_score!r}.")
    best = {"max": 1, "top2": 2, "sum": min(max(num_topk // topk_groups, 1), MAX_TOPK)}[group_score]
    args = (logits, bias, num_topk, code, renormalize, num_groups, topk_groups, best)
    return call(_Route.apply if needs_grad(logits) else ops.moe_route, args, _check_route)


def scoring_code(op: str, scoring: str) -> int:
    if scoring not in SCORINGS:
        raise ValueError(f"{op}: scoring must be softmax or sigmoid or sqrt_softplus, got {scoring!r}.")
    return SCORINGS[scoring]


def check_logits(op: str, logits: Tensor) -> None:
    check.is_tensor(op, "logits", logits)
    check.rank(op, "logits", logits, 2, "[num_tokens, num_experts]")
    check.dtype(op, "logits", logits, check.FLOAT_DTYPES)
    check.last_dim_contiguous(op, "logits", logits)
    if not 1 <= logits.shape[1] <= MAX_EXPERTS:
        raise ValueError(f"{op}: logits must have from 1 to {MAX_EXPERTS} experts, got {logits.shape[1]}.")


def _check_route(
    logits: Tensor,
    bias: Tensor | None,
    num_topk: int,
    scoring: int,
    renormalize: bool,
    num_groups: int,
    topk_groups: int,
    group_best: int,
) -> None:
    op = "moe.route"
    check_logits(op, logits)
    num_experts = logits.shape[1]
    if num_groups > MAX_GROUPS or num_experts % num_groups != 0:
        raise ValueError(
            f"{op}: num_groups must divide the {num_experts} experts and be at most {MAX_GROUPS}, got {num_groups}."
        )
    if topk_groups > num_groups:
        raise ValueError(f"{op}: topk_groups must be at most num_groups, {num_groups}, got {topk_groups}.")
    largest = min(MAX_TOPK, num_experts // num_groups * topk_groups)
    if num_topk > largest:
        raise ValueError(f"{op}: num_topk must be at most {largest} for these experts and groups, got {num_topk}.")
    if bias is not None:
        check.plain(op, "bias", bias, 1, "[num_experts]", torch.float32, "logits", logits)
        check.size(op, "bias", bias, 0, "the experts of logits,", num_experts)
    check.kernel_exists(op, "moe_route", logits)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, num_topk: int, *options: Any) -> tuple[Tensor, Tensor]:
        topk_weights, topk_idx = ops.moe_route(logits, bias, num_topk, *options)
        ctx.save_for_backward(logits, topk_weights, topk_idx)
        ctx.mark_non_differentiable(topk_idx)
        ctx.options = options[:2]
        return topk_weights, topk_idx

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_idx: None) -> tuple[Tensor | None, ...]:
        grad = check.rows_of_gradient(grad)
        return ops.moe_route_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 7


@register_fake("moe_route")
def _(logits, bias, num_topk, *options):
    _check_route(logits, bias, num_topk, *options)
    shape = (logits.shape[0], num_topk)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@register_fake("moe_route_backward")
def _(grad_weights, logits, topk_weights, topk_idx, scoring, renormalize):
    return logits.new_empty(logits.shape)
