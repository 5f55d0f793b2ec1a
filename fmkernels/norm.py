# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm, with an optional residual that is added first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import call, needs_grad, ops, register_fake, under_autocast


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension, of x or of x + residual.

        s = x + residual,    y = s / sqrt(mean(s^2) + eps) * weight

    s is rounded to the dtype of x before it is normalised, as a separate addition would do; all else is float32 until
    y is rounded.

    Args:
        x: [..., hidden], float32, bfloat16 or float16; any hidden from 1 on and any strides with a contiguous last
            dimension (leading dimensions that do not merge into one stride: at most four).
        weight: [hidden], contiguous, float32 or the dtype of x; 1 when None.
        eps: added to the mean of the squares, not negative.
        residual: shape and dtype of x; under autocast both take the wider of their dtypes. None: nothing is added.
        out: a tensor like x that y is written to; it may be x itself. No gradient flows then.
        residual_out: likewise for s, where there is a residual; it may be the residual itself. With `out` only.

    Returns:
        y, shape and dtype of x; with a residual (y, s), where s is the residual of what comes next.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Differentiable once in x, weight and residual. Deterministic: a row's bits depend on
    the row alone, those of the gradient of weight on all rows and their number. After Zhang and Sennrich 2019.
    """
    return _norm("rms_norm", x, residual, weight, None, eps, False, out, residual_out)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension, of x or of x + residual.

        s = x + residual,    y = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps) * weight + bias

    Args:
        x: [..., hidden], as in `rms_norm`.
        weight: [hidden], contiguous, float32 or the dtype of x; 1 when None.
        bias: [hidden], dtype of weight; 0 when None.
        eps: added to the variance, not negative.
        residual: shape and dtype of x, or None, as in `rms_norm`.
        out, residual_out: where y and s are written to, as in `rms_norm`.

    Returns:
        y, shape and dtype of x; with a residual (y, s).

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Differentiable once in x, weight, bias and residual. Deterministic, as `rms_norm`.
    The variance is taken about the mean in a second pass over the row. After Ba, Kiros and Hinton 2016.
    """
    return _norm("layer_norm", x, residual, weight, bias, eps, True, out, residual_out)


def _norm(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    out: Tensor | None,
    residual_out: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if type(eps) is not float or not 0 <= eps <= check.FLOAT32_MAX:
        check.number(op, "eps", eps, non_negative=True)
    if residual is not None:
        x, residual = _autocast(x, residual)
    wants_grad = needs_grad(x, residual, weight, bias)
    if out is None and residual_out is None:
        args = (x, residual, weight, bias, float(eps), centred)
        y, summed = call(_Norm.apply if wants_grad else ops.norm_forward, args, _CHECKS[centred])
        return y if residual is None else (y, summed)
    if wants_grad:
        raise ValueError(f"{op}: out cannot be given where a gradient is recorded.")
    if out is None:
        raise ValueError(f"{op}: out must be given with residual_out, got None.")
    if (residual_out is None) != (residual is None):
        given, missing = ("residual", "residual_out") if residual_out is None else ("residual_out", "residual")
        raise ValueError(f"{op}: {missing} must be given with {given} and out, got None.")
    call(ops.norm_forward_out, (x, residual, weight, bias, float(eps), centred, out, residual_out), _CHECKS[centred])
    return out if residual_out is None else (out, residual_out)


def _autocast(x: Any, residual: Any) -> tuple[Any, Any]:
    """Under autocast a stream of residuals in float32 meets activations in half: the sum is float32, as in torch."""
    are_two = isinstance(residual, Tensor) and isinstance(x, Tensor) and residual.dtype != x.dtype
    if are_two and {x.dtype, residual.dtype} <= set(check.FLOAT_DTYPES) and under_autocast(x):
        return x.float(), residual.float()
    return x, residual


def _check_tensors(op: str, x: Any, residual: Any, weight: Any, bias: Any, out: Any = None, summed: Any = None) -> None:
    check.is_tensor(op, "x", x)
    check.dtype(op, "x", x, check.FLOAT_DTYPES)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [..., hidden], got 0 dimensions [].")
    if x.shape[-1] < 1:
        raise ValueError(f"{op}: x must have a hidden of at least 1, got 0.")
    for name, t in (("x", x), ("residual", residual), ("out", out), ("residual_out", summed)):
        if t is not None:
            check.is_tensor(op, name, t)
            check.same_device(op, name, t, "x", x)
            check.same_dtype(op, name, t, "x", x)
            check.shape(op, name, t, "x", x)
            check.last_dim_contiguous(op, name, t)
            if name.endswith("out"):
                check.written(op, name, t)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check.is_tensor(op, name, t)
            check.same_device(op, name, t, "x", x)
            check.float32_or_dtype_of(op, name, t, "x", x)
            if list(t.shape) != [x.shape[-1]]:
                raise ValueError(f"{op}: {name} must be [hidden], {[x.shape[-1]]}, got {list(t.shape)}.")
            check.last_dim_contiguous(op, name, t)
    if weight is not None and bias is not None:
        check.same_dtype(op, "bias", bias, "weight", weight)
    check.rows_merge(op, [t for t in (x, residual, out, summed) if t is not None])
    check.kernel_exists(op, "norm_forward", x)


def _check_rms_norm(x, residual, weight, bias, eps, centred, out=None, summed=None):
    _check_tensors("rms_norm", x, residual, weight, bias, out, summed)


def _check_layer_norm(x, residual, weight, bias, eps, centred, out=None, summed=None):
    _check_tensors("layer_norm", x, residual, weight, bias, out, summed)


_CHECKS = (_check_rms_norm, _check_layer_norm)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        centred: bool,
    ) -> tuple[Tensor, Tensor]:
        y, summed = ops.norm_forward(x, residual, weight, bias, eps, centred)
        ctx.save_for_backward(x if residual is None else summed, weight, bias)
        ctx.has_residual, ctx.eps, ctx.centred = residual is not None, eps, centred
        ctx.set_materialize_grads(False)
        if residual is None:
            ctx.mark_non_differentiable(summed)
        return y, summed

    @staticmethod
    @once_differentiable  # the op of the gradients has none itself: a second one is an error and not a wrong number
    def backward(ctx: Any, grad_y: Tensor | None, grad_summed: Tensor | None) -> tuple[Tensor | None, ...]:
        summed, weight, bias = ctx.saved_tensors
        wants_x, wants_residual, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        grad_y = torch.zeros_like(summed) if grad_y is None else check.rows_of_gradient(grad_y)
        grad_summed = None if grad_summed is None or not ctx.has_residual else check.rows_of_gradient(grad_summed)
        grads = ops.norm_backward(
            grad_y, grad_summed, summed, weight, bias, ctx.eps, ctx.centred, wants_weight or wants_bias
        )
        grad_x, grad_weight, grad_bias = grads
        return (
            grad_x if wants_x else None,
            grad_x if wants_residual else None,
            grad_weight if wants_weight else None,
            grad_bias if wants_bias else None,
            None,
            None,
        )


@register_fake("norm_forward")
def _(x, residual, weight, bias, eps, centred):
    _CHECKS[centred](x, residual, weight, bias, eps, centred)
    return x.new_empty(x.shape), x.new_empty((0,) if residual is None else x.shape)


@register_fake("norm_forward_out")
def _(x, residual, weight, bias, eps, centred, y, summed):
    _CHECKS[centred](x, residual, weight, bias, eps, centred, y, summed)


@register_fake("norm_backward")
def _(grad_y, grad_summed, summed, weight, bias, eps, centred, weight_grad):
    def like(t):
        return t.new_empty(t.shape if weight_grad else (0,)) if t is not None else summed.new_empty((0,))

    return summed.new_empty(summed.shape), like(weight), like(bias)
