# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a linear layer, a chunk of tokens after another: the logits of all tokens exist at no time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import autocast, needs_grad, ops
from .cross_entropy import check_options, check_target, num_counted, reduced

CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Logits of a chunk, which is one token at least: by the device, for products of a useful size."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`cross_entropy(linear(hidden, weight, bias), target)` without the logits, which are the largest tensor of a step.

    Tokens are taken in chunks: a chunk's logits are a product of the library, a kernel turns them in place into their
    gradients, and two more products take these to the gradients of hidden and weight. The workspace is one chunk,
    whatever the number of tokens. For "mean" and "sum" the gradients are computed with the loss, so that no product is
    done twice; for "none", whose gradient of the loss comes later, the logits are computed again.

    Args:
        hidden: [tokens, dim] or [batch, tokens, dim]; float32, bfloat16 or float16, any strides.
        weight: [vocab, dim], dtype and device of hidden.
        target: [tokens] or [batch, tokens], int64: as in `cross_entropy`.
        bias: [vocab], dtype and device of hidden, or None.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as in `cross_entropy`.

    Returns:
        float32: a scalar, or with "none" the shape of target.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Under torch.compile the kernel
            checks the values of target and raises RuntimeError.

    CPU and CUDA (sm_80 and later). Differentiable once in hidden, weight and bias. Deterministic. Logits are rounded to
    the dtype of hidden as those of torch.nn.functional.linear are; gradients of weight and bias are summed over chunks
    in float32. Under autocast the products are done in its dtype. A token's bits may depend on its neighbours as far as
    those of torch.mm do.
    """
    op = "linear_cross_entropy"
    options = (ignore_index, label_smoothing, z_loss, softcap)
    check_options(op, *options, reduction)
    hidden, weight, bias = autocast(3, hidden, weight, bias)
    args = (hidden, weight, bias, target, reduction, *options)
    _check_tensors(*args)
    return (_LinearCrossEntropy.apply if needs_grad(hidden, weight, bias) else _loss)(*args)


def _check_tensors(
    hidden: Tensor, weight: Tensor, bias: Any, target: Tensor, reduction: str, ignore_index: int, *options: float
) -> None:
    op = "linear_cross_entropy"
    check.is_tensor(op, "hidden", hidden)
    if hidden.dim() not in (2, 3):
        raise ValueError(
            f"{op}: hidden must be [tokens, dim] or [batch, tokens, dim], "
            f"got {hidden.dim()} dimensions {list(hidden.shape)}."
        )
    check.dtype(op, "hidden", hidden, check.FLOAT_DTYPES)
    check.is_tensor(op, "weight", weight)
    check.same_device(op, "weight", weight, "hidden", hidden)
    check.same_dtype(op, "weight", weight, "hidden", hidden)
    check.rank(op, "weight", weight, 2, "[vocab, dim]")
    check.size(op, "weight", weight, 1, "as many columns as hidden,", hidden.shape[-1])
    if weight.shape[0] < 1:
        raise ValueError(f"{op}: weight must have a vocabulary of at least 1, got 0.")
    if bias is not None:
        check.is_tensor(op, "bias", bias)
        check.same_device(op, "bias", bias, "hidden", hidden)
        check.same_dtype(op, "bias", bias, "hidden", hidden)
        check.rank(op, "bias", bias, 1, "[vocab]")
        check.size(op, "bias", bias, 0, "as many elements as weight has rows,", weight.shape[0])
    check_target(op, target, "hidden", hidden, weight.shape[0], ignore_index)
    check.kernel_exists(op, "cross_entropy_forward", hidden)


class _Chunks:
    """The chunks of a call, and their logits in one buffer."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        vocab, num_tokens = weight.shape[0], hidden.shape[0]
        self.num_tokens = max(1, CHUNK_LOGITS["cpu" if hidden.device.type == "cpu" else "cuda"] // vocab)
        self.buffer = hidden.new_empty(min(num_tokens, self.num_tokens), vocab)
        self.is_one = num_tokens <= self.num_tokens

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(tokens, their hidden, their logits)"""
        for begin in range(0, self.hidden.shape[0], self.num_tokens):
            rows = slice(begin, min(begin + self.num_tokens, self.hidden.shape[0]))
            hidden = self.hidden[rows]
            logits = self.buffer[: hidden.shape[0]]
            if self.bias is None:  # autocast leaves products with an `out` alone
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
            yield rows, hidden, logits


def _losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: tuple) -> Tensor:
    """[tokens]"""
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    for rows, _, logits in _Chunks(hidden, weight, bias):
        loss[rows] = ops.cross_entropy_forward(logits, target[rows], *options)[0]
    return loss


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    grad_loss: Tensor,
    options: tuple,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Losses [tokens], and the gradients of hidden, weight and bias, each where wanted; the sums in float32."""
    chunks = _Chunks(hidden, weight, bias)
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if wanted[0] else None
    grad_weight = None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if wanted[2] else None
    for rows, part, logits in chunks:
        loss[rows] = ops.cross_entropy_gradient_(logits, grad_loss[rows], target[rows], *options)
        if grad_hidden is not None:
            torch.mm(logits, weight, out=grad_hidden[rows])
        if wanted[1]:
            if grad_weight is None:
                grad_weight = _weight_product(logits, part)
                grad_weight = grad_weight if chunks.is_one else grad_weight.float()
            elif logits.dtype == torch.float32:
                grad_weight.addmm_(logits.t(), part)
            else:
                grad_weight += _weight_product(logits, part)
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=torch.float32)
    if wanted[1] and grad_weight is None:  # no tokens
        grad_weight = torch.zeros_like(weight)
    return loss, [grad_hidden, grad_weight, grad_bias]


def _weight_product(grad_logits: Tensor, hidden: Tensor) -> Tensor:
    """[vocab, dim]: float32 of float16, in which a sum over tokens overflows while it waits for its factor."""
    if grad_logits.dtype != torch.float16:
        return torch.mm(grad_logits.t(), hidden)
    if hidden.device.type == "cuda":
        return torch.mm(grad_logits.t(), hidden, out_dtype=torch.float32)
    product = hidden.new_empty(grad_logits.shape[1], hidden.shape[1], dtype=torch.float32)
    return torch.mm(grad_logits.t().float(), hidden.float(), out=product)  # an `out`, for autocast to leave it alone


def _flat(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)


def _loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str, *options: Any) -> Tensor:
    flat, flat_target = _flat(hidden, target)
    loss = _losses(flat, weight, bias, flat_target, options)
    return reduced(loss.view(target.shape), target, weight.shape[0], options[0], reduction)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        reduction: str,
        *options: Any,
    ) -> Tensor:
        ctx.reduction, ctx.options, ctx.dtype, ctx.shape = reduction, options, hidden.dtype, hidden.shape
        if reduction == "none":
            ctx.save_for_backward(hidden, weight, bias, target)
            return _loss(hidden, weight, bias, target, reduction, *options)
        flat, flat_target = _flat(hidden, target)
        wanted = tuple(ctx.needs_input_grad[:3])
        one = hidden.new_ones((), dtype=torch.float32).expand(flat.shape[0])
        loss, grads = _gradients(flat, weight, bias, flat_target, one, options, wanted)
        count = num_counted(target, weight.shape[0], options[0]) if reduction == "mean" else None
        ctx.save_for_backward(count, *grads)
        return loss.sum() if count is None else loss.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Any, ...]:
        if ctx.reduction == "none":
            hidden, weight, bias, target = ctx.saved_tensors
            flat, flat_target = _flat(hidden, target)
            wanted = tuple(ctx.needs_input_grad[:3])
            of_rows = grad_loss.reshape(-1)
            _, grads = _gradients(flat, weight, bias, flat_target, of_rows, ctx.options, wanted)
            grads = [g if g is None else g.to(ctx.dtype) for g in grads]
        else:  # they are those of a sum: the factor of all tokens comes last, in float32, where nothing underflows
            count, *grads = ctx.saved_tensors
            factor = grad_loss if count is None else grad_loss / count.clamp(min=1)
            grads = [g if g is None else (g.float() * factor).to(ctx.dtype) for g in grads]
        grad_hidden, *others = grads
        return (None if grad_hidden is None else grad_hidden.view(ctx.shape), *others, *[None] * 6)
