# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a vocabulary that keeps no softmax, and the same of a linear layer that keeps no logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import call, needs_grad, ops, register_fake

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The negative log-likelihood of a target class under the softmax of each row.

        s = softcap * tanh(logits / softcap), or logits where softcap is 0;  lse = log(sum exp(s))
        loss = lse - (1 - label_smoothing) s[target] - label_smoothing * mean(s) + z_loss * lse ** 2

    For the gradient only the logits that came in and two numbers a row are kept; it is computed from them in one pass.

    Args:
        logits: [tokens, vocab] or [batch, tokens, vocab]; float32, bfloat16 or float16, any strides with a contiguous
            last dimension, as `logits[:, :-1]`.
        target: [tokens] or [batch, tokens], int64, any strides: from 0 to vocab - 1, or ignore_index. On the CPU other
            values are an error; on CUDA with FMKERNELS_CHECK=1 too, else they count as ignored.
        ignore_index: rows with this target are not read; their loss and their gradient are 0.
        label_smoothing: share of the target that is spread over all classes, from 0 to 1.
        z_loss: coefficient of lse ** 2, not negative.
        softcap: bound of the logits, 0 for none.
        reduction: "mean" over the rows that are not ignored (NaN where there is none), "sum", or "none".

    Returns:
        float32: a scalar, or with "none" the shape of target.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Under torch.compile the kernel
            checks the values of target and raises RuntimeError.

    CPU and CUDA (sm_80 and later). Differentiable once in logits. Deterministic; a row does not depend on the others.
    A row with a NaN or +infinity has a loss of NaN and no other row has. The sum over classes is that of the online
    softmax: Milakov and Gimelshein 2018.
    """
    options = (ignore_index, label_smoothing, z_loss, softcap)
    check_options("cross_entropy", *options, reduction)
    args = (logits, target, *options)
    loss = call(_CrossEntropy.apply if needs_grad(logits) else _loss, args, _check_tensors)
    return reduced(loss, target, logits.shape[-1], ignore_index, reduction)


def reduced(loss: Tensor, target: Tensor, vocab: int, ignore_index: int, reduction: str) -> Tensor:
    """Of the losses of all rows; the ignored ones are 0."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / num_counted(target, vocab, ignore_index)


def num_counted(target: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """How many rows have a loss, without waiting for the device."""
    counted = target != ignore_index
    if target.device.type != "cpu":  # there an op has refused other targets
        counted = counted & (target >= 0) & (target < vocab)
    return counted.sum()


def check_options(
    op: str, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, reduction: str
) -> None:
    check.integer(op, "ignore_index", ignore_index, -(2**63))
    check.number(op, "label_smoothing", label_smoothing, non_negative=True)
    if label_smoothing > 1:
        raise ValueError(f"{op}: label_smoothing must be at most 1, got {label_smoothing}.")
    check.number(op, "z_loss", z_loss, non_negative=True)
    check.number(op, "softcap", softcap, non_negative=True)
    if check.vanishes(softcap):  # and 0 is no cap at all
        raise ValueError(f"{op}: softcap must be 0 or a number that is not 0 in float32, got {softcap}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be mean, sum or none, got {reduction!r}.")


def check_target(op: str, target: Tensor, like_name: str, like: Tensor, vocab: int, ignore_index: int) -> None:
    """Of the shape of `like` without its last dimension."""
    check.is_tensor(op, "target", target)
    check.same_device(op, "target", target, like_name, like)
    check.dtype(op, "target", target, (torch.int64,))
    if target.shape != like.shape[:-1]:
        raise ValueError(
            f"{op}: target must have the shape {list(like.shape[:-1])} for this {like_name}, got {list(target.shape)}."
        )
    if check.sees_values(target):
        wrong = target[((target < 0) | (target >= vocab)) & (target != ignore_index)]
        if wrong.numel() > 0:
            raise ValueError(
                f"{op}: target must be from 0 to {vocab - 1} or ignore_index, {ignore_index}, got {wrong[0].item()}."
            )


def _check_tensors(logits: Tensor, target: Tensor, ignore_index: int, *options: float) -> None:
    op = "cross_entropy"
    check.is_tensor(op, "logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"{op}: logits must be [tokens, vocab] or [batch, tokens, vocab], "
            f"got {logits.dim()} dimensions {list(logits.shape)}."
        )
    check.dtype(op, "logits", logits, check.FLOAT_DTYPES)
    if logits.shape[-1] < 1:
        raise ValueError(f"{op}: logits must have a vocabulary of at least 1, got 0.")
    check.last_dim_contiguous(op, "logits", logits)
    check_target(op, target, "logits", logits, logits.shape[-1], ignore_index)
    check.kernel_exists(op, "cross_entropy_forward", logits)


def _loss(*args: Any) -> Tensor:
    return ops.cross_entropy_forward(*args)[0]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, *options: float) -> Tensor:
        loss, largest, sum_exp = ops.cross_entropy_forward(logits, target, *options)
        ctx.save_for_backward(logits, target, largest, sum_exp)
        ctx.options = options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        return ops.cross_entropy_backward(grad_loss, *ctx.saved_tensors, *ctx.options), *[None] * 5


@register_fake("cross_entropy_forward")
def _(logits, target, *options):
    _check_tensors(logits, target, *options)
    return tuple(logits.new_empty(logits.shape[:-1], dtype=torch.float32) for _ in range(3))


@register_fake("cross_entropy_backward")
def _(grad_loss, logits, *_):
    return logits.new_empty(logits.shape)


@register_fake("cross_entropy_gradient_")
def _(logits, *_):
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)
