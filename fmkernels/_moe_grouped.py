# SPDX-License-Identifier: Apache-2.0
"""Products by groups of rows, which are those of the experts: `moe.grouped_mm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import autocast, call, needs_grad, ops, register_fake, register_flop_formula

OP = "moe.grouped_mm"
MAX_GROUPS = 65536
MAX_EXTENT = 2**31


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, *, bias: Tensor | None = None, trans_b: bool = False) -> Tensor:
    """A product for each expert, whose rows stand one after another: those of expert e end at offsets[e].

    b [num_experts, K, N]:  out[r] = a[r] b[e] + bias[e] for the rows r of expert e; rows of no expert are zeros.
    b [M, N]:               out[e] = a[:, rows of e] b[rows of e]: the inner dimension is the ragged one, as in the
                            gradient of the weights, grouped_mm(x.t(), grad, offsets); zeros where e has no rows.

    Args:
        a: [M, K], last dimension contiguous; with b [M, N] it is [K, M], which is read where it lies if it is the
            transpose of rows, and copied if not. CPU: float32, bfloat16, float16; CUDA: bfloat16, float16.
        b: dtype of a; [num_experts, K, N] contiguous in its rows or in its columns, or [M, N], copied where its last
            dimension is not contiguous.
        offsets: [num_experts], int32: where the rows of an expert end, and those of the next begin, as
            Mapping.expert_offsets[0] and torch's `offs`; the last one may be less than M.
        bias: [num_experts, N], float32 or dtype of a; None: none. Not with b [M, N].
        trans_b: b is [num_experts, N, K], or [N, M], and is read transposed.

    Returns:
        [M, N], or [num_experts, K, N] for b [M, N]; dtype of a, contiguous. Accumulated in float32, rounded once.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Offsets that decrease or pass M
            are refused on the CPU, on CUDA under FMKERNELS_CHECK=1; without it an expert ends at the largest offset up
            to its own, and at M at most.

    CPU and CUDA (sm_80 and later). No expert need have a row, and M may be 0. Nothing waits for the device, and nothing
    is allocated but the result. Deterministic; a row's bits depend on the row and on its expert's b and bias alone, and
    rows are summed in their order. Differentiable once in a, b and bias, by the same kernels. FLOPs are counted for all
    M rows; under autocast a and b take the autocast dtype. After Gale et al. 2022, MegaBlocks.
    """
    check.flag(OP, "trans_b", trans_b)
    a, b, bias = autocast(2, a, b, bias)
    if trans_b and isinstance(b, Tensor) and b.dim() >= 2:
        b = b.transpose(-1, -2)
    if isinstance(b, Tensor) and b.dim() == 2:
        if bias is not None:
            raise ValueError(f"{OP}: bias must be None for b [M, N], got {type(bias).__name__}.")
        check.is_tensor(OP, "a", a)
        check.rank(OP, "a", a, 2, "[K, M] for b [M, N]")
        args: tuple[Any, ...] = (by_rows(a.t()), by_rows(b), offsets)
        return call(_GroupedMmInner.apply if needs_grad(a, b) else ops.moe_grouped_mm_inner, args, _check_inner)
    if isinstance(bias, Tensor) and isinstance(a, Tensor):
        check.float32_or_dtype_of(OP, "bias", bias, "a", a)
        bias = bias.float().contiguous()
    return call(_GroupedMm.apply if needs_grad(a, b, bias) else ops.moe_grouped_mm, (a, b, offsets, bias), _check_mm)


def by_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _either_way(t: Tensor) -> Tensor:
    """[experts, rows, columns], contiguous in rows or in columns; a gradient of sum() is neither."""
    return t if 1 in t.stride()[1:] else t.contiguous()


def check_either_way(op: str, name: str, t: Tensor) -> None:
    if t.numel() > 0 and min(t.shape[1:]) > 1 and 1 not in t.stride()[1:]:
        raise ValueError(f"{op}: {name} must be contiguous in its rows or columns, got strides {list(t.stride())}.")


def check_extents(op: str, name: str, t: Tensor) -> None:
    for size in t.shape[-2:]:
        if size >= MAX_EXTENT:
            raise ValueError(f"{op}: {name} must have sizes below 2**31, got {list(t.shape)}.")


def check_offsets(op: str, offsets: Tensor, a: Tensor, num_rows: int) -> None:
    """Not decreasing, at most M, which is num_rows."""
    check.plain(op, "offsets", offsets, 1, "[num_experts]", torch.int32, "a", a)
    if offsets.shape[0] > MAX_GROUPS:
        raise ValueError(f"{op}: offsets must have at most {MAX_GROUPS} elements, got {offsets.shape[0]}.")
    if not check.sees_values(offsets):
        return
    previous = 0
    for end in offsets.tolist():
        if end < previous or end > num_rows:
            raise ValueError(
                f"{op}: offsets must not decrease and be at most M, {num_rows}, got {end} after {previous}."
            )
        previous = end


def check_operands(op: str, a: Tensor, b: Tensor, a_layout: str, b_layout: str) -> None:
    """a [rows, K], b [num_experts, K, columns]."""
    check.is_tensor(op, "a", a)
    check.is_tensor(op, "b", b)
    check.rank(op, "a", a, 2, a_layout)
    check.dtype(op, "a", a, dtypes_of_products(a))
    check.last_dim_contiguous(op, "a", a)
    check.rank(op, "b", b, 3, b_layout)
    check.same_dtype(op, "b", b, "a", a)
    check.same_device(op, "b", b, "a", a)
    check.size(op, "b", b, 1, "for this a K =", a.shape[1])
    check_either_way(op, "b", b)
    check_extents(op, "a", a)
    check_extents(op, "b", b)


def _check_mm(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None) -> None:
    check_operands(OP, a, b, "[M, K]", "[num_experts, K, N] or [M, N]")
    check_offsets(OP, offsets, a, a.shape[0])
    check.size(OP, "offsets", offsets, 0, "as many elements as b has experts,", b.shape[0])
    if bias is not None:
        check.plain(OP, "bias", bias, 2, "[num_experts, N]", torch.float32, "a", a)
        check.size(OP, "bias", bias, 0, "as many rows as b has experts,", b.shape[0])
        check.size(OP, "bias", bias, 1, "N =", b.shape[2])
    check.kernel_exists(OP, "moe_grouped_mm", a)


def dtypes_of_products(a: Tensor) -> tuple[torch.dtype, ...]:
    """The kernels of CUDA run on tensor cores, which have no float32."""
    return check.FLOAT_DTYPES[1:] if a.device.type == "cuda" else check.FLOAT_DTYPES


def _check_inner(a: Tensor, b: Tensor, offsets: Tensor) -> None:
    """a [M, K]: the transpose of what was given."""
    check.is_tensor(OP, "b", b)
    check.dtype(OP, "a", a, dtypes_of_products(a))
    check.rank(OP, "b", b, 2, "[M, N]")
    check.same_dtype(OP, "b", b, "a", a)
    check.same_device(OP, "b", b, "a", a)
    check.size(OP, "b", b, 0, "as many rows as a has columns,", a.shape[0])
    check.last_dim_contiguous(OP, "a", a)
    check.last_dim_contiguous(OP, "b", b)
    check_extents(OP, "a", a)
    check_extents(OP, "b", b)
    check_offsets(OP, offsets, a, a.shape[0])
    check.kernel_exists(OP, "moe_grouped_mm_inner", a)


class _GroupedMm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
        needs_a, needs_b = ctx.needs_input_grad[:2]
        ctx.save_for_backward(a if needs_b else None, b if needs_a else None, offsets)
        ctx.b_by_columns = b.stride(-1) != 1
        return ops.moe_grouped_mm(a, b, offsets, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, offsets = ctx.saved_tensors
        grad = check.rows_of_gradient(grad)
        grad_a = None if b is None else ops.moe_grouped_mm(grad, b.transpose(1, 2), offsets, None)
        if a is None:
            grad_b = None
        elif ctx.b_by_columns:  # so that the gradient lies as b does
            grad_b = ops.moe_grouped_mm_inner(grad, a, offsets).transpose(1, 2)
        else:
            grad_b = ops.moe_grouped_mm_inner(a, grad, offsets)
        return grad_a, grad_b, None, ops.moe_grouped_sum(grad, offsets) if ctx.needs_input_grad[3] else None


class _GroupedMmInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
        needs_a, needs_b = ctx.needs_input_grad[:2]
        ctx.save_for_backward(a if needs_b else None, b if needs_a else None, offsets)
        return ops.moe_grouped_mm_inner(a, b, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, offsets = ctx.saved_tensors
        grad = _either_way(grad)
        grad_a = None if b is None else ops.moe_grouped_mm(b, grad.transpose(1, 2), offsets, None)
        grad_b = None if a is None else ops.moe_grouped_mm(a, grad, offsets, None)
        return grad_a, grad_b, None


@register_fake("moe_grouped_mm")
def _(a, b, offsets, bias):
    _check_mm(a, b, offsets, bias)
    return a.new_empty(a.shape[0], b.shape[2])


@register_fake("moe_grouped_mm_inner")
def _(a, b, offsets):
    _check_inner(a, b, offsets)
    return a.new_empty(offsets.shape[0], a.shape[1], b.shape[1])


@register_fake("moe_grouped_sum")
def _(x, offsets):
    return x.new_empty(offsets.shape[0], x.shape[1], dtype=torch.float32)


@register_flop_formula("moe_grouped_mm")
def _(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    """Of all rows: how many belong to experts only the device knows."""
    return 2 * a_shape[0] * a_shape[1] * b_shape[2]


@register_flop_formula("moe_grouped_mm_inner")
def _(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]
