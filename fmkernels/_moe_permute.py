# SPDX-License-Identifier: Apache-2.0
"""Tokens to the rows of their experts and back: `moe.permute` and `moe.combine`, each the gradient of the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import call, needs_grad, ops, register_fake
from ._moe_mapping import Mapping

MAX_TOPK = 1024


def permute(x: Tensor, mapping: Mapping) -> Tensor:
    """The tokens in the rows of their experts: y[p] = x[pos_to_token[p]], and zeros where that is -1.

    Args:
        x: [num_tokens, hidden], float32, bfloat16 or float16, last dimension contiguous.
        mapping: of `build_mapping` for these tokens.

    Returns:
        [num_rows, hidden], dtype of x, contiguous. Padding is zeros.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Tokens out of range are refused
            on the CPU, on CUDA under FMKERNELS_CHECK=1; without it such a row is padding.

    CPU and CUDA (sm_80 and later). Deterministic. Differentiable once in x: the gradient is `combine` without weights,
    which takes the rows of token_topk_to_pos.
    """
    op = "moe.permute"
    _check_mapping(op, mapping)
    if needs_grad(x):
        return call(_Permute.apply, (x, mapping.pos_to_token, mapping.token_topk_to_pos), _check_permute)
    return call(ops.moe_permute, (x, mapping.pos_to_token), _check_permute)


def combine(y: Tensor, mapping: Mapping, topk_weights: Tensor | None) -> Tensor:
    """The weighted sum of each token's rows: out[t] = sum_k topk_weights[t, k] * y[token_topk_to_pos[t, k]].

    Args:
        y: [num_rows, hidden], float32, bfloat16 or float16, last dimension contiguous.
        mapping: of `build_mapping`, with as many rows.
        topk_weights: [num_tokens, num_topk], float32, last dimension contiguous; None: all are 1.

    Returns:
        [num_tokens, hidden], dtype of y, contiguous. The sum is in float32, in the order of k, and rounded once; slots
        without a row (-1) are left out, their weights too, so that padding and dropped slots may hold NaN.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Rows out of range are refused on
            the CPU, on CUDA under FMKERNELS_CHECK=1; without it such a slot is left out.

    CPU and CUDA (sm_80 and later). Deterministic, and a token's bits depend on its own rows and weights alone.
    Differentiable once in y (`permute`, each row times the weight of its slot) and in topk_weights, d w[t, k] =
    <d out[t], y[pos]> in float32. The gradient takes the slot of a row from both lists of the mapping: a row that
    several slots name, as no mapping of `build_mapping` has one, gets that of one slot.
    """
    op = "moe.combine"
    _check_mapping(op, mapping)
    if needs_grad(y, topk_weights):
        return call(_Combine.apply, (y, mapping.token_topk_to_pos, topk_weights, mapping.pos_to_token), _check_combine)
    return call(ops.moe_combine, (y, mapping.token_topk_to_pos, topk_weights), _check_combine)


def _check_mapping(op: str, mapping: Mapping) -> None:
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{op}: mapping must be a Mapping of build_mapping, got {type(mapping).__name__}.")


def check_positions(
    op: str, name: str, t: Tensor, num_dims: int, layout: str, other_name: str, other: Tensor, count: int
) -> None:
    """Contiguous int32, each from -1 to count - 1."""
    name = f"mapping.{name}"
    check.plain(op, name, t, num_dims, layout, torch.int32, other_name, other)
    if not t.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {list(t.stride())}.")
    if t.numel() > 0 and check.sees_values(t):
        low, high = (int(bound) for bound in torch.aminmax(t))
        if low < -1 or high >= count:
            raise ValueError(f"{op}: {name} must be from -1 to {count - 1}, got {low if low < -1 else high}.")


def _check_rows(op: str, name: str, t: Tensor, layout: str) -> None:
    check.is_tensor(op, name, t)
    check.rank(op, name, t, 2, layout)
    check.dtype(op, name, t, check.FLOAT_DTYPES)
    check.last_dim_contiguous(op, name, t)


def _check_permute(x: Tensor, pos_to_token: Tensor, token_topk_to_pos: Tensor | None = None) -> None:
    op = "moe.permute"
    _check_rows(op, "x", x, "[num_tokens, hidden]")
    check_positions(op, "pos_to_token", pos_to_token, 1, "[num_rows]", "x", x, x.shape[0])
    if token_topk_to_pos is not None:
        layout, count = "[num_tokens, num_topk]", pos_to_token.shape[0]
        check_positions(op, "token_topk_to_pos", token_topk_to_pos, 2, layout, "x", x, count)
        check.size(op, "mapping.token_topk_to_pos", token_topk_to_pos, 0, "the tokens of x,", x.shape[0])
        check_topk(op, token_topk_to_pos)
    check.kernel_exists(op, "moe_permute", x)


def check_topk(op: str, token_topk_to_pos: Tensor) -> None:
    if token_topk_to_pos.shape[1] > MAX_TOPK:
        raise ValueError(
            f"{op}: mapping.token_topk_to_pos must have at most {MAX_TOPK} columns, got {token_topk_to_pos.shape[1]}."
        )


def _check_combine(
    y: Tensor, token_topk_to_pos: Tensor, topk_weights: Tensor | None, pos_to_token: Tensor | None = None
) -> None:
    op = "moe.combine"
    _check_rows(op, "y", y, "[num_rows, hidden]")
    layout = "[num_tokens, num_topk]"
    check_positions(op, "token_topk_to_pos", token_topk_to_pos, 2, layout, "y", y, y.shape[0])
    check_topk(op, token_topk_to_pos)
    if topk_weights is not None:
        check.plain(op, "topk_weights", topk_weights, 2, layout, torch.float32, "y", y)
        check.shape(op, "topk_weights", topk_weights, "mapping.token_topk_to_pos", token_topk_to_pos)
    if pos_to_token is not None:
        check_positions(op, "pos_to_token", pos_to_token, 1, "[num_rows]", "y", y, token_topk_to_pos.shape[0])
        check.size(op, "mapping.pos_to_token", pos_to_token, 0, "the rows of y,", y.shape[0])
    check.kernel_exists(op, "moe_combine", y)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pos_to_token: Tensor, token_topk_to_pos: Tensor) -> Tensor:
        _check_permute(x, pos_to_token, token_topk_to_pos)  # the op sees one of the lists, and backward the other
        ctx.save_for_backward(token_topk_to_pos)
        return ops.moe_permute(x, pos_to_token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (token_topk_to_pos,) = ctx.saved_tensors
        return ops.moe_combine(check.rows_of_gradient(grad), token_topk_to_pos, None), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, token_topk_to_pos: Tensor, weights: Tensor | None, pos_to_token: Tensor) -> Tensor:
        _check_combine(y, token_topk_to_pos, weights, pos_to_token)
        ctx.save_for_backward(y if weights is not None else None, token_topk_to_pos, weights, pos_to_token)
        return ops.moe_combine(y, token_topk_to_pos, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, token_topk_to_pos, weights, pos_to_token = ctx.saved_tensors
        grad = check.rows_of_gradient(grad)
        if weights is None:
            return ops.moe_permute(grad, pos_to_token), None, None, None
        grad_y, grad_weights = ops.moe_combine_backward(grad, y, pos_to_token, token_topk_to_pos, weights)
        return grad_y, None, grad_weights, None


@register_fake("moe_permute")
def _(x, pos_to_token):
    _check_permute(x, pos_to_token)
    return x.new_empty(pos_to_token.shape[0], x.shape[1])


@register_fake("moe_combine")
def _(y, token_topk_to_pos, topk_weights):
    _check_combine(y, token_topk_to_pos, topk_weights)
    return y.new_empty(token_topk_to_pos.shape[0], y.shape[1])


@register_fake("moe_combine_backward")
def _(grad, y, pos_to_token, token_topk_to_pos, topk_weights):
    return y.new_empty(y.shape), topk_weights.new_empty(topk_weights.shape)
