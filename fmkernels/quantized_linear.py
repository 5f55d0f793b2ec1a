# SPDX-License-Identifier: Apache-2.0
"""Linear layers over weights of 8 and 4 bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import autocast, call, needs_grad, ops, register_fake, register_flop_formula
from .quantized_weight import QuantizedWeight


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x times the transpose of a quantised weight, which is read as it is stored.

        y[..., n] = bias[n] + sum_k x[..., k] scale[n, k // group_size] (q[n, k] - zero[n, k // group_size])

    Made for decoding, whose time is that of reading the weights: 8 bits are a quarter of float32's, 4 bits an eighth.

    Args:
        x: [..., in_features], float32, bfloat16 or float16; any strides with a contiguous last dimension.
        weight: of `quantize_weight`, on the device of x.
        bias: [out_features], float32 or the dtype of x, contiguous.

    Returns:
        [..., out_features], dtype of x, contiguous.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Accumulates in float32. Differentiable once in x and bias; the weight is constant.
    Deterministic, and a row has the same bits whatever the other rows are and however many. FLOPs are counted; under
    autocast x takes the autocast dtype, and a half bias too.
    """
    op = "quantized_linear"
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{op}: weight must be a QuantizedWeight, got {type(weight).__name__}.")
    tensors, sizes = (weight.values, weight.scales, weight.zeros), (weight.bits, weight.group_size or 0, *weight.shape)
    return multiply(x, *tensors, bias, *sizes)


def multiply(
    x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *sizes: int
) -> Tensor:
    """`quantized_linear` of the fields of a weight; sizes: bits, group_size or 0, out_features, in_features."""
    if isinstance(x, Tensor) and x.dim() > 3:  # joined where strides allow it, else copied
        return multiply(x.flatten(1, -2), values, scales, zeros, bias, *sizes).unflatten(1, x.shape[1:-1])
    x, bias = autocast(1, x, bias)
    op = _QuantizedLinear.apply if needs_grad(x, bias) else ops.quantized_linear_forward
    return call(op, (x, values, scales, zeros, bias, *sizes), _check_tensors)


def dequantize_weight(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix that a quantised weight stands for.

    Args:
        weight: of `quantize_weight`.
        dtype: float32, bfloat16 or float16.

    Returns:
        [out_features, in_features], contiguous: scale * (q - zero), rounded once to float32 and once to dtype.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Deterministic.
    """
    op = "dequantize_weight"
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{op}: weight must be a QuantizedWeight, got {type(weight).__name__}.")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: dtype must be a torch.dtype, got {type(dtype).__name__}.")
    if dtype not in check.FLOAT_DTYPES:
        names = check.dtype_names(check.FLOAT_DTYPES)
        raise ValueError(f"{op}: dtype must be {names}, got {check.dtype_names((dtype,))}.")
    check.kernel_exists(op, "quantized_linear_dequantize", weight.values)
    return ops.quantized_linear_dequantize(
        weight.values, weight.scales, weight.zeros, weight.bits, weight.group_size or 0, *weight.shape, dtype
    )


def _check_tensors(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
) -> None:
    op = "quantized_linear"
    check.is_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., in_features], got 0 dimensions [].")
    check.dtype(op, "x", x, check.FLOAT_DTYPES)
    check.same_device(op, "x", x, "weight", values)
    check.size(op, "x", x, -1, "in_features", in_features)
    check.last_dim_contiguous(op, "x", x)
    if bias is not None:
        check.is_tensor(op, "bias", bias)
        check.rank(op, "bias", bias, 1, "[out_features]")
        check.size(op, "bias", bias, 0, "out_features", out_features)
        check.same_device(op, "bias", bias, "x", x)
        if bias.dtype not in (x.dtype, torch.float32):
            names = check.dtype_names(tuple(dict.fromkeys((torch.float32, x.dtype))))
            raise ValueError(f"{op}: bias must be {names}, got {check.dtype_names((bias.dtype,))}.")
        check.last_dim_contiguous(op, "bias", bias)
    check.kernel_exists(op, "quantized_linear_forward", x)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, scales: Tensor, zeros: Tensor | None, bias: Any, *sizes: int
    ) -> Tensor:
        ctx.save_for_backward(values, scales, zeros)
        ctx.sizes, ctx.x_dtype = sizes, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return ops.quantized_linear_forward(x, values, scales, zeros, bias, *sizes)

    @staticmethod
    @once_differentiable  # a second derivative would need that of the product below: an error and not a wrong number
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            # torch's product of halves is slow on a CPU without instructions for it, and rounds its sums on none.
            dtype = torch.float32 if grad.device.type == "cpu" else grad.dtype
            weight = ops.quantized_linear_dequantize(*ctx.saved_tensors, *ctx.sizes, dtype)
            grad_x = (grad.to(dtype) @ weight).to(ctx.x_dtype)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, None, None, None, grad_bias, *[None] * len(ctx.sizes)


@register_fake("quantized_linear_forward")
def _(x, values, scales, zeros, bias, bits, group_size, out_features, in_features):
    _check_tensors(x, values, scales, zeros, bias, bits, group_size, out_features, in_features)
    return x.new_empty((*x.shape[:-1], out_features))


@register_fake("quantized_linear_dequantize")
def _(values, scales, zeros, bits, group_size, out_features, in_features, dtype):
    return values.new_empty((out_features, in_features), dtype=dtype)


@register_flop_formula("quantized_linear_forward")
def _(x_shape, values_shape, scales_shape, zeros_shape, bias_shape, bits, group_size, *sizes, out_shape=None) -> int:
    """Those of the matrix product: decoding is not counted."""
    return 2 * math.prod(x_shape[:-1]) * math.prod(sizes)
