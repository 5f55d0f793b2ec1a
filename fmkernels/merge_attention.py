# SPDX-License-Identifier: Apache-2.0
"""Exact merge of two partial attention results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import call, needs_grad, ops, register_fake


def merge_attention(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over the union of two disjoint sets of keys, from the results over each.

        lse = log(exp(lse_a) + exp(lse_b)),    o = exp(lse_a - lse) o_a + exp(lse_b - lse) o_b

    Used for shared prefixes (cascade attention), keys split over devices (ring attention) and chunked prefill.

    Args:
        o_a: [batch, seq_q, heads, v_head_dim] or packed [total_q, heads, v_head_dim]; float32, bfloat16 or float16, any
            strides with a contiguous last dimension.
        lse_a: [batch, heads, seq_q] or [heads, total_q], float32, natural logarithm, any strides; -inf: no key was
            seen, and o_a is not read there.
        o_b, lse_b: shapes, dtypes and device of o_a and lse_a.

    Returns:
        (o, lse), shapes and dtypes of o_a and lse_a; o = 0 and lse = -inf where both sides are -inf.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Differentiable once in all four arguments. Deterministic. The merge is
    that of the online softmax: Milakov and Gimelshein 2018.
    """
    args = (o_a, lse_a, o_b, lse_b)
    return call(_MergeAttention.apply if needs_grad(*args) else ops.merge_attention_forward, args, _check_tensors)


def _check_tensors(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> None:
    op = "merge_attention"
    for name, t in (("o_a", o_a), ("lse_a", lse_a), ("o_b", o_b), ("lse_b", lse_b)):
        check.is_tensor(op, name, t)
        check.same_device(op, name, t, "o_a", o_a)
    if o_a.dim() not in (3, 4):
        raise ValueError(
            f"{op}: o_a must be [batch, seq_q, heads, v_head_dim] or [total_q, heads, v_head_dim], "
            f"got {o_a.dim()} dimensions {list(o_a.shape)}."
        )
    check.dtype(op, "o_a", o_a, check.FLOAT_DTYPES)
    check.shape(op, "o_b", o_b, "o_a", o_a)
    check.same_dtype(op, "o_b", o_b, "o_a", o_a)
    if o_a.shape[-1] < 1:
        raise ValueError(f"{op}: o_a must have a v_head_dim of at least 1, got 0.")
    lse_shape = [*o_a.shape[:-3], o_a.shape[-2], o_a.shape[-3]]
    for name, o, lse_name, lse in (("o_a", o_a, "lse_a", lse_a), ("o_b", o_b, "lse_b", lse_b)):
        check.last_dim_contiguous(op, name, o)
        check.dtype(op, lse_name, lse, (torch.float32,))
        if list(lse.shape) != lse_shape:
            raise ValueError(
                f"{op}: {lse_name} must have the shape {lse_shape} for this {name}, got {list(lse.shape)}."
            )
    check.kernel_exists(op, "merge_attention_forward", o_a)


class _MergeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(o_a, lse_a, o_b, lse_b)
        ctx.set_materialize_grads(False)
        return ops.merge_attention_forward(o_a, lse_a, o_b, lse_b)

    @staticmethod
    @once_differentiable  # the op of the gradients has none itself: a second one is an error and not a wrong number
    def backward(ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor, ...]:
        sides = ctx.saved_tensors
        grad_o = torch.zeros_like(sides[0]) if grad_o is None else grad_o
        if grad_o.stride(-1) != 1:  # an expanded gradient, as sum() gives
            grad_o = grad_o.contiguous()
        return ops.merge_attention_backward(grad_o, grad_lse, *sides)


@register_fake("merge_attention_forward")
def _(o_a, lse_a, o_b, lse_b):
    _check_tensors(o_a, lse_a, o_b, lse_b)
    return o_a.new_empty(o_a.shape), lse_a.new_empty(lse_a.shape)


@register_fake("merge_attention_backward")
def _(grad_o, grad_lse, o_a, lse_a, o_b, lse_b):
    return tuple(t.new_empty(t.shape) for t in (o_a, lse_a, o_b, lse_b))
