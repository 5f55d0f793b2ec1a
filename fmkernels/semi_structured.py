# SPDX-License-Identifier: Apache-2.0
"""Linear layers over 2:4 sparse weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import as_rows, autocast, call, needs_grad, no_view, ops, register_fake, register_flop_formula
from .semi_structured_matrix import COLUMN_BLOCK, ROW_TILE, TILE_WORDS, SemiStructured


def semi_structured_linear(x: Tensor, w: SemiStructured, bias: Tensor | None = None) -> Tensor:
    """x times the transpose of a 2:4 sparse matrix, which does half of the multiplications of a dense one.

        y[..., r] = bias[r] + sum_j values[r, j] x[..., columns[r, j]]

    Args:
        x: [..., columns], dtype and device of w; any strides with a contiguous last dimension. More than one leading
            dimension is joined where strides allow it, else copied.
        w: of `SemiStructured.from_dense`, [rows, columns].
        bias: [rows], float32 or the dtype of x.

    Returns:
        [..., rows], dtype of x, contiguous.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU: float32, bfloat16, float16; CUDA (sm_80 and later): bfloat16, float16, on sparse tensor cores; rows of x that
    are not on 16-byte boundaries are slow there. Accumulates in float32. Differentiable once in x, where w has its
    transpose packed, and in bias; w is constant. Deterministic; a row of x has the same bits whatever the others are.
    What is not stored is not multiplied: infinity and NaN in a column reach the rows of w that store an element of it,
    a stored zero included. FLOPs are counted as they are done, half of those of a dense product. Under autocast x and
    the values of w take the autocast dtype. After Mishra et al. 2021, Accelerating sparse deep neural networks.
    """
    op = "semi_structured_linear"
    if not isinstance(w, SemiStructured):
        raise TypeError(f"{op}: w must be a SemiStructured, got {type(w).__name__}.")
    check.is_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., columns], got 0 dimensions [].")
    x, values, transposed, bias = autocast(3, x, w.values, w.transposed and w.transposed[0], bias)
    packed = (values, w.metadata, transposed, w.transposed and w.transposed[1])
    flat = as_rows(x)
    y = _multiply(flat, packed, bias)
    return y if x.dim() == 2 else no_view(y, (*x.shape[:-1], y.shape[-1]))


def _multiply(x: Tensor, packed: tuple[Any, ...], bias: Tensor | None) -> Tensor:
    if not needs_grad(x, bias):
        return _run(x, *packed[:2], bias)
    if needs_grad(x) and packed[2] is None:
        raise ValueError(
            "semi_structured_linear: w must have its transpose packed for a gradient of x: "
            "SemiStructured.from_dense(both_directions=True)."
        )
    return _SemiStructuredLinear.apply(x, bias, *packed)


def _run(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> Tensor:
    given = bias
    if isinstance(bias, Tensor) and bias.dtype != torch.float32:
        check.float32_or_dtype_of("semi_structured_linear", "bias", bias, "x", x)
        bias = bias.float()
    bias = bias.contiguous() if isinstance(bias, Tensor) else bias
    return call(ops.semi_structured_linear, (x, values, metadata, bias), lambda *args: _check_tensors(*args[:3], given))


class _SemiStructuredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Any, values: Any, metadata: Any, *transposed: Any) -> Tensor:
        ctx.save_for_backward(*transposed)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _run(x, values, metadata, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.semi_structured_linear(grad.contiguous(), *ctx.saved_tensors, None)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None, None, None


def masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in training: x [..., in] times the 2:4 form, in both directions, of a dense weight [out, in].

    The weight's gradient is that of a dense layer, also for what the mask leaves out (straight-through), so that those
    weights may come back; x has that of the masked weight.
    """
    mask = ops.semi_structured_mask(weight.detach(), True)  # of the weight itself, whatever autocast makes of it
    x, cast = autocast(2, x, weight)
    flat = as_rows(x)
    y = _MaskedLinear.apply(flat, cast, bias, mask)
    return y if x.dim() == 2 else no_view(y, (*x.shape[:-1], y.shape[-1]))


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, mask: Tensor) -> Tensor:
        values, metadata = ops.semi_structured_pack(weight, mask, False)
        transposed = ops.semi_structured_pack(weight, mask, True) if ctx.needs_input_grad[0] else (None, None)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, *transposed)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return _run(x, values, metadata, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *transposed = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.semi_structured_linear(grad.contiguous(), *transposed, None)
        if ctx.needs_input_grad[1]:
            # torch's product of halves is slow on a CPU without instructions for it, and rounds its sums on none.
            dtype = torch.float32 if grad.device.type == "cpu" else grad.dtype
            grad_weight = (grad.to(dtype).mT @ x.to(dtype)).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


# ---- checks, fake kernel, FLOPs --------------------------------------------------------------------------------------


def _check_tensors(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> None:
    op = "semi_structured_linear"
    check.is_tensor(op, "x", x)
    check.dtype(op, "x", x, (torch.bfloat16, torch.float16) if x.device.type == "cuda" else check.FLOAT_DTYPES)
    check.same_device(op, "x", x, "w", values)
    check.same_dtype(op, "x", x, "w", values)
    check.size(op, "x", x, -1, "as many columns as w,", 2 * values.shape[1])
    check.last_dim_contiguous(op, "x", x)
    if bias is not None:
        check.is_tensor(op, "bias", bias)
        check.rank(op, "bias", bias, 1, "[rows]")
        check.size(op, "bias", bias, 0, "as many elements as w has rows,", values.shape[0])
        check.same_device(op, "bias", bias, "x", x)
        check.float32_or_dtype_of(op, "bias", bias, "x", x)
    check.kernel_exists(op, "semi_structured_linear", x)


@register_fake("semi_structured_linear")
def _(x, values, metadata, bias):
    _check_tensors(x, values, metadata, bias)
    check.same_device("semi_structured_linear", "metadata", metadata, "x", x)
    tiles = (values.shape[0] // ROW_TILE, (2 * values.shape[1] + COLUMN_BLOCK - 1) // COLUMN_BLOCK, TILE_WORDS)
    if tuple(metadata.shape) != tiles:
        raise ValueError(f"semi_structured_linear: metadata must be {list(tiles)}, got {list(metadata.shape)}.")
    return x.new_empty((x.shape[0], values.shape[0]))


@register_flop_formula("semi_structured_linear")
def _(x_shape, values_shape, metadata_shape, bias_shape, out_shape=None) -> int:
    """Those that are done: half of those of a dense product."""
    return 2 * x_shape[0] * values_shape[0] * values_shape[1]
