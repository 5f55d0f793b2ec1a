# SPDX-License-Identifier: Apache-2.0
"""The feed-forward layer of a mixture of experts, whole: `moe.moe_mlp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import autocast, call, needs_grad, ops, register_fake, register_flop_formula
from ._moe_grouped import check_either_way, check_extents, dtypes_of_products
from ._moe_mapping import MAX_EXPERTS, check_choices
from ._moe_permute import MAX_TOPK

OP = "moe.moe_mlp"


def moe_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_weights: Tensor, topk_idx: Tensor) -> Tensor:
    """out[t] = sum_k topk_weights[t, k] * w_down[e] (silu(g) * u),  (g, u) = w_gate_up[e] x[t],  e = topk_idx[t, k].

    Args:
        x: [num_tokens, hidden], last dimension contiguous. CPU: float32, bfloat16, float16; CUDA: bfloat16, float16.
        w_gate_up: [num_experts, 2 * width, hidden], gate then up, dtype of x; each expert as torch.nn.Linear has it.
        w_down: [num_experts, hidden, width], dtype of x.
        topk_weights: [num_tokens, num_topk], float32, as of `route`.
        topk_idx: [num_tokens, num_topk], int32 or int64: the expert of each slot, -1 for none.

    Returns:
        [num_tokens, hidden], dtype of x. A token without an expert gives zeros.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Ids out of range are refused on
            the CPU, on CUDA under FMKERNELS_CHECK=1; without it such a slot has no expert.

    CPU and CUDA (sm_80 and later). Deterministic, and a token's bits depend on the token, its choices and their weights
    alone; with gradients they are the same. Nothing waits for the device. silu(g) * u and w_down[e] (...) are rounded
    to the dtype of x. Differentiable once in x, both weights and topk_weights: besides the inputs and the mapping
    backward keeps (g, u) [num_slots, 2 * width], and nothing of num_slots times hidden; the gradient of a weight is
    taken before w_down. FLOPs are counted for all slots; under autocast x and both weights take the autocast dtype. At
    most 1024 experts and 1024 choices. After Guo et al. 2025, SonicMoE, and Shazeer 2020.
    """
    return moe_mlp_with(x, w_gate_up, w_down, topk_weights, topk_idx)


def moe_mlp_with(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    stand_in: Tensor | None = None,
    left: list[tuple[Callable[[], Tensor], ...]] | None = None,
) -> Tensor:
    """`moe_mlp`; with a `stand_in` for both weights, which are detached then, backward leaves in `left` how their
    gradients are computed: `nn.weight_grad.stand_in`."""
    x, w_gate_up, w_down = autocast(3, x, w_gate_up, w_down)
    args = (x, w_gate_up, w_down, topk_weights, topk_idx)
    if needs_grad(x, w_gate_up, w_down, topk_weights, stand_in):
        return call(_MoeMlp.apply, (*args, stand_in, left), lambda *given: _check(*given[:5]))
    return call(ops.moe_mlp, (*args, False), _check)[0]


def _check(x: Any, w_gate_up: Any, w_down: Any, topk_weights: Any, topk_idx: Any, keeps: bool = False) -> None:
    check.is_tensor(OP, "x", x)
    check.rank(OP, "x", x, 2, "[num_tokens, hidden]")
    check.dtype(OP, "x", x, dtypes_of_products(x))
    check.last_dim_contiguous(OP, "x", x)
    check_extents(OP, "x", x)
    for name, t, layout in (
        ("w_gate_up", w_gate_up, "[num_experts, 2 * width, hidden]"),
        ("w_down", w_down, "[num_experts, hidden, width]"),
    ):
        check.is_tensor(OP, name, t)
        check.rank(OP, name, t, 3, layout)
        check.same_dtype(OP, name, t, "x", x)
        check.same_device(OP, name, t, "x", x)
        check_either_way(OP, name, t)
        check_extents(OP, name, t)
    num_experts, two_widths, hidden = w_gate_up.shape
    check.size(OP, "w_gate_up", w_gate_up, 2, "for this x hidden =", x.shape[1])
    if not 1 <= num_experts <= MAX_EXPERTS or two_widths % 2:
        raise ValueError(
            f"{OP}: w_gate_up must have from 1 to {MAX_EXPERTS} experts and an even number of rows each, "
            f"got {list(w_gate_up.shape)}."
        )
    if tuple(w_down.shape) != (num_experts, hidden, two_widths // 2):
        expected = [num_experts, hidden, two_widths // 2]
        raise ValueError(f"{OP}: w_down must be {expected} for this w_gate_up, got {list(w_down.shape)}.")
    check_choices(OP, topk_weights, topk_idx, num_experts, x)
    if topk_idx.shape[1] > MAX_TOPK:
        raise ValueError(f"{OP}: topk_idx must have at most {MAX_TOPK} columns, got {topk_idx.shape[1]}.")
    check.kernel_exists(OP, "moe_mlp", x)


class _MoeMlp(torch.autograd.Function):
    """`left`: where the two products that give the gradients of the weights are put, to be computed later."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_gate_up: Tensor,
        w_down: Tensor,
        topk_weights: Tensor,
        topk_idx: Tensor,
        stand_in: Tensor | None,
        left: list[tuple[Callable[[], Tensor], ...]] | None,
    ) -> Tensor:
        out, *kept = ops.moe_mlp(x, w_gate_up, w_down, topk_weights, topk_idx, True)
        ctx.save_for_backward(x, w_gate_up, w_down, topk_weights, stand_in, *kept)
        ctx.left = left
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_gate_up, w_down, topk_weights, stand_in, gate_up, pos_to_token, positions, ends = ctx.saved_tensors
        offsets, needs = ends[0], ctx.needs_input_grad
        rows = ops.moe_permute(check.rows_of_gradient(grad), pos_to_token)
        grad_inner = ops.moe_grouped_mm(rows, w_down, offsets, None)
        grad_gate_up, inner, grad_topk_weights = ops.moe_gated_backward(
            grad_inner, gate_up, pos_to_token, positions, topk_weights, False
        )

        def of_gate_up() -> Tensor:
            return ops.moe_grouped_mm_inner(grad_gate_up, ops.moe_permute(x, pos_to_token), offsets)

        def of_down() -> Tensor:
            return ops.moe_grouped_mm_inner(rows, inner, offsets)

        if ctx.left is not None:
            ctx.left[:] = [(of_gate_up, of_down)]
        grad_down = of_down() if needs[2] else None
        grad_weight = of_gate_up() if needs[1] else None
        grad_x = None
        if needs[0]:
            grad_x = ops.moe_combine(ops.moe_grouped_mm(grad_gate_up, w_gate_up, offsets, None), positions, None)
        grad_stand_in = None if stand_in is None else torch.empty_like(stand_in)
        return grad_x, grad_weight, grad_down, grad_topk_weights if needs[3] else None, None, grad_stand_in, None


@register_fake("moe_mlp")
def _(x, w_gate_up, w_down, topk_weights, topk_idx, keeps):
    _check(x, w_gate_up, w_down, topk_weights, topk_idx)
    num_rows, integers = topk_idx.numel(), torch.int32
    return (
        x.new_empty(x.shape),
        x.new_empty((num_rows, w_gate_up.shape[1]) if keeps else (0, 0)),
        topk_idx.new_empty(num_rows, dtype=integers),
        topk_idx.new_empty(topk_idx.shape, dtype=integers),
        topk_idx.new_empty((2, w_gate_up.shape[0]), dtype=integers),
    )


@register_flop_formula("moe_mlp")
def _(x_shape, gate_up_shape, down_shape, weights_shape, *args, out_shape=None, **kwargs) -> int:
    """Of the products, for all slots."""
    return 2 * weights_shape[0] * weights_shape[1] * x_shape[1] * (gate_up_shape[1] + down_shape[2])
