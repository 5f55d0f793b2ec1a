# SPDX-License-Identifier: Apache-2.0
"""The losses that keep a router balanced: `moe.load_balance_loss` and `moe.z_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import call, needs_grad, ops, register_fake
from ._moe_route import check_logits, scoring_code


def load_balance_loss(logits: Tensor, topk_idx: Tensor, *, scoring: str = "softmax") -> Tensor:
    """The auxiliary loss of the Switch Transformer: num_experts * sum_e f[e] * P[e], 1 where all is even.

    f[e] is the share of the slots that have expert e, P[e] the mean over the tokens of s[t, e] / sum_e s[t, e].

    Args:
        logits: [num_tokens, num_experts], float32, bfloat16 or float16, last dimension contiguous; 1 to 1024 experts.
        topk_idx: [num_tokens, num_topk], int32, contiguous: the experts of each token as `route` gives them, and not as
            `apply_capacity` leaves them. A token without an expert (all -1, as NaN and masked tokens have it) counts in
            neither f nor P.
        scoring: the score s, as of `route`.

    Returns:
        The loss, one float32; 0 where no token counts. A coefficient is the caller's.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Ids out of range are refused on
            the CPU, on CUDA under FMKERNELS_CHECK=1; without it such a slot does not count.

    CPU and CUDA (sm_80 and later). Deterministic. Differentiable once in logits, through P. After Fedus et al. 2021; f
    is a share of all slots, so that the loss does not grow with num_topk.
    """
    args = (logits, topk_idx, scoring_code("moe.load_balance_loss", scoring))
    if needs_grad(logits):
        return call(_LoadBalance.apply, args, _check_load_balance)
    return call(ops.moe_load_balance, args, _check_load_balance)[0]


def z_loss(logits: Tensor) -> Tensor:
    """The router z-loss of ST-MoE: the mean over the tokens of logsumexp(logits[t])^2, which keeps logits small.

    Args:
        logits: [num_tokens, num_experts], float32, bfloat16 or float16, last dimension contiguous; 1 to 1024 experts.

    Returns:
        The loss, one float32; 0 where there are no tokens. A coefficient is the caller's.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Deterministic. Differentiable once in logits; a logit of +inf gets no gradient.
    After Zoph et al. 2022.
    """
    if needs_grad(logits):
        return call(_ZLoss.apply, (logits,), _check_z_loss)
    return call(ops.moe_z_loss, (logits,), _check_z_loss)[0]


def _check_load_balance(logits: Tensor, topk_idx: Tensor, scoring: int) -> None:
    op = "moe.load_balance_loss"
    check_logits(op, logits)
    check.plain(op, "topk_idx", topk_idx, 2, "[num_tokens, num_topk]", torch.int32, "logits", logits)
    check.size(op, "topk_idx", topk_idx, 0, "the tokens of logits,", logits.shape[0])
    if not topk_idx.is_contiguous():
        raise ValueError(f"{op}: topk_idx must be contiguous, got strides {list(topk_idx.stride())}.")
    check.kernel_exists(op, "moe_load_balance", logits)
    if topk_idx.numel() > 0 and check.sees_values(topk_idx):
        low, high = (int(bound) for bound in torch.aminmax(topk_idx))
        if low < -1 or high >= logits.shape[1]:
            wrong = low if low < -1 else high
            raise ValueError(f"{op}: topk_idx must be from -1 to {logits.shape[1] - 1}, got {wrong}.")


def _check_z_loss(logits: Tensor) -> None:
    check_logits("moe.z_loss", logits)
    check.kernel_exists("moe.z_loss", "moe_z_loss", logits)


class _LoadBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, topk_idx: Tensor, scoring: int) -> Tensor:
        loss, coefficients = ops.moe_load_balance(logits, topk_idx, scoring)
        ctx.save_for_backward(logits, topk_idx, coefficients)
        ctx.scoring = scoring
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ops.moe_load_balance_backward(grad, *ctx.saved_tensors, ctx.scoring), None, None


class _ZLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        loss, lse = ops.moe_z_loss(logits)
        ctx.save_for_backward(logits, lse)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ops.moe_z_loss_backward(grad, *ctx.saved_tensors)


@register_fake("moe_load_balance")
def _(logits, topk_idx, scoring):
    _check_load_balance(logits, topk_idx, scoring)
    return logits.new_empty((), dtype=torch.float32), logits.new_empty(logits.shape[1], dtype=torch.float32)


@register_fake("moe_load_balance_backward")
def _(grad, logits, topk_idx, coefficients, scoring):
    return logits.new_empty(logits.shape)


@register_fake("moe_z_loss")
def _(logits):
    _check_z_loss(logits)
    return logits.new_empty((), dtype=torch.float32), logits.new_empty(logits.shape[0], dtype=torch.float32)


@register_fake("moe_z_loss_backward")
def _(grad, logits, lse):
    return logits.new_empty(logits.shape)
