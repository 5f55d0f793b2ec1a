# SPDX-License-Identifier: Apache-2.0
"""The rotary position embedding of q and k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._library import call, needs_grad, ops, register_fake


def rope(
    q: Tensor,
    k: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
    out: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotates pairs of columns of every head of q and k by angles that grow with the position of their token.

        (u, v) -> (u cos - v sin, v cos + u sin),    cos = cos_sin[position, i],  sin = cos_sin[position, half + i]

    for pair i of half = rotary_dim / 2; rotary_dim is the width of cos_sin, and columns beyond it are copied.

    Args:
        q: [batch, seq, heads, head_dim] or packed [tokens, heads, head_dim]; float32, bfloat16 or float16, any strides
            with a contiguous last dimension.
        k: the same with heads of its own, or None.
        positions: [batch, seq], or [seq] for all of a batch, or [tokens]; int32 or int64, any strides. Each at least 0
            and below the rows of cos_sin: checked on the CPU, on CUDA with FMKERNELS_CHECK=1, else taken to the nearest
            end.
        cos_sin: [positions, rotary_dim] of `rope_cache`, float32 or the dtype of q; rotary_dim is even, from 2 to
            head_dim. No gradient flows into it.
        interleaved: pair i is columns (2 i, 2 i + 1), as in GPT-J and the published Llama weights; otherwise
            (i, i + rotary_dim / 2), as in GPT-NeoX and transformers.
        inverse: the transposed map, sin with the other sign: rotates back where cos^2 + sin^2 = 1.
        out: (q, k) to write to, the inputs themselves among others. No gradient flows then.

    Returns:
        (q, k), rotated; k is None where it was.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Computed in float32. Differentiable in q and k, any number of times: the gradient is
    the inverse rotation. Deterministic. After Su et al. 2021, RoFormer.
    """
    check.flag("rope", "interleaved", interleaved)
    check.flag("rope", "inverse", inverse)
    args = (q, k, positions, cos_sin, interleaved, inverse)
    wants_grad = needs_grad(q, k, cos_sin)
    if out is None:
        q_out, k_out = call(_Rope.apply if wants_grad else ops.rope_forward, args, _check_tensors)
        return q_out, None if k is None else k_out
    if wants_grad:
        raise ValueError("rope: out cannot be given where a gradient is recorded.")
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(f"rope: out must be a pair of tensors (q, k), got {type(out).__name__}.")
    call(ops.rope_forward_out, (*args, *out), _check_tensors)
    return out[0], out[1]


def _check_tensors(
    q: Any,
    k: Any,
    positions: Any,
    cos_sin: Any,
    interleaved: bool,
    inverse: bool,
    q_out: Any = None,
    k_out: Any = None,
) -> None:
    op = "rope"
    check.is_tensor(op, "q", q)
    if q.dim() not in (3, 4):
        raise ValueError(
            f"{op}: q must be [batch, seq, heads, head_dim] or [tokens, heads, head_dim], "
            f"got {q.dim()} dimensions {list(q.shape)}."
        )
    check.dtype(op, "q", q, check.FLOAT_DTYPES)
    if k is None and k_out is not None:
        raise ValueError(f"{op}: out must have no k where there is none, got a {type(k_out).__name__}.")
    if q_out is not None and k is not None and k_out is None:
        raise ValueError(f"{op}: out must have a k where there is one, got None.")
    for name, t in (("q", q), ("k", k), ("out[0]", q_out), ("out[1]", k_out)):
        if t is None:
            continue
        check.is_tensor(op, name, t)
        check.same_device(op, name, t, "q", q)
        check.same_dtype(op, name, t, "q", q)
        if name != "k":
            check.shape(op, name, t, "k" if name == "out[1]" else "q", k if name == "out[1]" else q)
        elif t.shape[:-2] != q.shape[:-2] or t.shape[-1:] != q.shape[-1:]:
            raise ValueError(
                f"{op}: k must have the shape of q but for the heads, {list(q.shape)}, got {list(t.shape)}."
            )
        check.last_dim_contiguous(op, name, t)
        if name.startswith("out"):
            check.written(op, name, t)
    check.is_tensor(op, "positions", positions)
    check.same_device(op, "positions", positions, "q", q)
    check.dtype(op, "positions", positions, (torch.int32, torch.int64))
    wanted = [list(q.shape[:-2]), *([[q.shape[1]]] if q.dim() == 4 else [])]
    if list(positions.shape) not in wanted:
        raise ValueError(
            f"{op}: positions must be {' or '.join(map(str, wanted))} for this q, got {list(positions.shape)}."
        )
    check.is_tensor(op, "cos_sin", cos_sin)
    check.same_device(op, "cos_sin", cos_sin, "q", q)
    check.rank(op, "cos_sin", cos_sin, 2, "[positions, rotary_dim]")
    check.float32_or_dtype_of(op, "cos_sin", cos_sin, "q", q)
    check.last_dim_contiguous(op, "cos_sin", cos_sin)
    num_positions, rotary_dim = cos_sin.shape
    if rotary_dim % 2 != 0 or not 2 <= rotary_dim <= q.shape[-1]:
        raise ValueError(
            f"{op}: cos_sin must have an even rotary_dim from 2 to head_dim, {q.shape[-1]}, got {rotary_dim}."
        )
    heads = q.shape[-2] + (0 if k is None else k.shape[-2])
    if positions.numel() and heads and num_positions < 1:
        raise ValueError(f"{op}: cos_sin must have at least 1 row, got 0.")
    _check_positions(positions, num_positions)
    if cos_sin.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: cos_sin cannot have a gradient.")
    check.kernel_exists(op, "rope_forward", q)


def _check_positions(positions: Tensor, num_positions: int) -> None:
    if positions.numel() == 0 or not check.sees_values(positions):
        return
    least, largest = positions.aminmax()
    for position in (least.item(), largest.item()):
        if not 0 <= position < num_positions:
            raise ValueError(
                f"rope: positions must be at least 0 and below the {num_positions} rows of cos_sin, got {position}."
            )


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor | None, positions: Tensor, cos_sin: Tensor, interleaved: bool, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        if ctx.needs_input_grad[3]:
            raise RuntimeError("cos_sin has no gradient")  # the checks after a failed call say so
        ctx.save_for_backward(positions, cos_sin)
        ctx.interleaved, ctx.inverse, ctx.has_k = interleaved, inverse, k is not None
        q_out, k_out = ops.rope_forward(q, k, positions, cos_sin, interleaved, inverse)
        if k is None:
            ctx.mark_non_differentiable(k_out)
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        positions, cos_sin = ctx.saved_tensors
        grad_q, grad_k = (check.rows_of_gradient(g) for g in (grad_q, grad_k))
        args = (grad_q, grad_k if ctx.has_k else None, positions, cos_sin, ctx.interleaved, not ctx.inverse)
        grad_q, grad_k = (_Rope.apply if torch.is_grad_enabled() else ops.rope_forward)(*args)
        return grad_q, grad_k if ctx.has_k else None, None, None, None, None


@register_fake("rope_forward")
def _(q, k, positions, cos_sin, interleaved, inverse):
    _check_tensors(q, k, positions, cos_sin, interleaved, inverse)
    return q.new_empty(q.shape), q.new_empty((0,) if k is None else k.shape)


@register_fake("rope_forward_out")
def _(q, k, positions, cos_sin, interleaved, inverse, q_out, k_out):
    _check_tensors(q, k, positions, cos_sin, interleaved, inverse, q_out, k_out)
