# SPDX-License-Identifier: Apache-2.0
"""The first product of an expert's feed-forward layer, whole: gather, product, gated unit: `moe.grouped_mm_gated`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import autocast, call, needs_grad, ops, register_fake, register_flop_formula
from ._moe_grouped import check_offsets, check_operands
from ._moe_mapping import Mapping
from ._moe_permute import check_positions, check_topk

OP = "moe.grouped_mm_gated"


def grouped_mm_gated(
    a: Tensor, b: Tensor, offsets: Tensor | Mapping, *, interleaved: bool = False, trans_b: bool = False
) -> Tensor:
    """out[r] = silu(g) * u, (g | u) = a[t] b[e] for the rows r of expert e: `grouped_mm` and a gated unit behind it.

    With a Mapping a has the tokens, t = pos_to_token[r], and no rows are made: each is read where its token lies. With
    offsets a has the rows, t = r. Rows of no expert, and rows that are padding, are zeros.

    Args:
        a: [num_tokens, K] with a Mapping, [M, K] with offsets; last dimension contiguous. CPU: float32, bfloat16,
            float16; CUDA: bfloat16, float16.
        b: [num_experts, K, 2 * N], dtype of a, contiguous in its rows or in its columns: N columns of the gate, then N
            of the other factor.
        offsets: a Mapping of `build_mapping`, or [num_experts] int32, where the rows of an expert end, as in
            `grouped_mm`.
        interleaved: the columns of b come in turns, one of the gate and then one of the other.
        trans_b: b is [num_experts, 2 * N, K] and is read transposed, as the weight of torch.nn.Linear lies.

    Returns:
        [M, N], dtype of a, contiguous, M the length of pos_to_token or the rows of a. Accumulated in float32; g and u
        are not rounded before the unit.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Offsets that decrease or pass M,
            and tokens out of range, are refused on the CPU, on CUDA under FMKERNELS_CHECK=1; without it offsets are
            taken as `grouped_mm` takes them, and such a row is padding.

    CPU and CUDA (sm_80 and later). Deterministic; a row's bits depend on the row and its expert's b alone. Nothing
    waits for the device. Differentiable once in a and b: backward keeps g and u, rounded to the dtype of a, and a
    itself, gathered again where it is needed. FLOPs are counted for all M rows; under autocast a and b take the
    autocast dtype. After Tan et al. 2024, Scattered Mixture-of-Experts, and Shazeer 2020.
    """
    check.flag(OP, "interleaved", interleaved)
    check.flag(OP, "trans_b", trans_b)
    a, b = autocast(2, a, b)
    if trans_b and isinstance(b, Tensor) and b.dim() >= 2:
        b = b.transpose(-1, -2)
    pos_to_token = token_topk_to_pos = None
    if isinstance(offsets, Mapping):
        pos_to_token, token_topk_to_pos, ends = offsets
        check.is_tensor(OP, "mapping.expert_offsets", ends)
        check.rank(OP, "mapping.expert_offsets", ends, 2, "[2, num_experts]")
        offsets = ends[0]
    if needs_grad(a, b):
        return call(
            _GatedMm.apply, (a, b, offsets, pos_to_token, token_topk_to_pos, interleaved), _check_gated_function
        )
    return call(ops.moe_gated_mm, (a, b, offsets, pos_to_token, interleaved, False), _check_gated)[0]


def _check_gated(
    a: Tensor, b: Tensor, offsets: Tensor, pos_to_token: Tensor | None, interleaved: bool, keeps: bool
) -> None:
    check_operands(OP, a, b, "[M, K], or [num_tokens, K] with a Mapping", "[num_experts, K, 2 * N]")
    if b.shape[2] % 2 != 0:
        raise ValueError(f"{OP}: b must have an even number of columns, got {b.shape[2]}.")
    num_rows = a.shape[0]
    if pos_to_token is not None:
        check_positions(OP, "pos_to_token", pos_to_token, 1, "[num_rows]", "a", a, a.shape[0])
        num_rows = pos_to_token.shape[0]
    check_offsets(OP, offsets, a, num_rows)
    check.size(OP, "offsets", offsets, 0, "as many elements as b has experts,", b.shape[0])
    check.kernel_exists(OP, "moe_gated_mm", a)


def _check_gated_function(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    pos_to_token: Tensor | None,
    token_topk_to_pos: Tensor | None,
    interleaved: bool,
) -> None:
    _check_gated(a, b, offsets, pos_to_token, interleaved, True)
    if pos_to_token is not None:
        layout, count = "[num_tokens, num_topk]", pos_to_token.shape[0]
        check_positions(OP, "token_topk_to_pos", token_topk_to_pos, 2, layout, "a", a, count)
        check.size(OP, "mapping.token_topk_to_pos", token_topk_to_pos, 0, "the tokens of a,", a.shape[0])
        check_topk(OP, token_topk_to_pos)


class _GatedMm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        offsets: Tensor,
        pos_to_token: Tensor | None,
        token_topk_to_pos: Tensor | None,
        interleaved: bool,
    ) -> Tensor:
        needs_a, needs_b = ctx.needs_input_grad[:2]
        if needs_a and token_topk_to_pos is not None:  # by an op only backward has: what is wrong is said now
            _check_gated_function(a, b, offsets, pos_to_token, token_topk_to_pos, interleaved)
        out, gate_up = ops.moe_gated_mm(a, b, offsets, pos_to_token, interleaved, True)
        kept = (a if needs_b else None, b if needs_a else None)
        ctx.save_for_backward(*kept, offsets, pos_to_token, token_topk_to_pos, gate_up)
        ctx.interleaved, ctx.b_by_columns = interleaved, b.stride(-1) != 1
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, offsets, pos_to_token, token_topk_to_pos, gate_up = ctx.saved_tensors
        grad = check.rows_of_gradient(grad)
        grad = ops.moe_gated_backward(grad, gate_up, pos_to_token, None, None, ctx.interleaved)[0]
        grad_a = grad_b = None
        if b is not None:
            grad_a = ops.moe_grouped_mm(grad, b.transpose(1, 2), offsets, None)
            if pos_to_token is not None:
                grad_a = ops.moe_combine(grad_a, token_topk_to_pos, None)
        if a is not None:
            rows = a if pos_to_token is None else ops.moe_permute(a, pos_to_token)
            grad_b = gradient_of_weights(rows, grad, offsets, ctx.b_by_columns)
        return grad_a, grad_b, None, None, None, None


def gradient_of_weights(rows: Tensor, grad: Tensor, offsets: Tensor, by_columns: bool) -> Tensor:
    """Of b [num_experts, columns of rows, columns of grad], which lies by columns or by rows, as b does."""
    if by_columns:
        return ops.moe_grouped_mm_inner(grad, rows, offsets).transpose(1, 2)
    return ops.moe_grouped_mm_inner(rows, grad, offsets)


@register_fake("moe_gated_mm")
def _(a, b, offsets, pos_to_token, interleaved, keeps):
    _check_gated(a, b, offsets, pos_to_token, interleaved, keeps)
    num_rows = a.shape[0] if pos_to_token is None else pos_to_token.shape[0]
    return a.new_empty(num_rows, b.shape[2] // 2), a.new_empty((num_rows, b.shape[2]) if keeps else 0)


@register_fake("moe_gated_backward")
def _(grad_inner, gate_up, pos_to_token, token_topk_to_pos, topk_weights, interleaved):
    if topk_weights is None:
        return (
            grad_inner.new_empty(gate_up.shape),
            grad_inner.new_empty(0),
            grad_inner.new_empty(0, dtype=torch.float32),
        )
    return (
        grad_inner.new_empty(gate_up.shape),
        grad_inner.new_empty(grad_inner.shape),
        topk_weights.new_empty(topk_weights.shape),
    )


@register_flop_formula("moe_gated_mm")
def _(a_shape, b_shape, offsets_shape, pos_shape=None, *args, out_shape=None, **kwargs) -> int:
    """Of all rows, and of the product alone."""
    num_rows = a_shape[0] if pos_shape is None else pos_shape[0]
    return 2 * num_rows * a_shape[1] * b_shape[2]
