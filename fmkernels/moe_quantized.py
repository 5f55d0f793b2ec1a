# SPDX-License-Identifier: Apache-2.0
"""Experts of 8 and 4 bits, for inference: `quantize_experts`, `quantized_grouped_mm`, `quantized_moe_mlp` of `moe`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _check as check
from ._library import autocast, call, needs_grad, ops, register_fake, register_flop_formula
from ._moe_grouped import check_offsets, dtypes_of_products
from ._moe_mapping import build_mapping, check_choices
from ._moe_permute import combine, permute
from .glu import swiglu
from .quantized_weight import PANEL, QuantizedWeight, quantize_weight

OP = "moe.quantized_grouped_mm"
MLP = "moe.quantized_moe_mlp"


def quantize_experts(
    weight: Tensor, *, bits: int = 8, group_size: int | None = None, symmetric: bool = True
) -> QuantizedWeight:
    """Rounds the weights of all experts as `quantize_weight` does, their matrices one below another.

    Args:
        weight: [num_experts, N, K], float32, bfloat16 or float16, finite, any strides: each expert as torch.nn.Linear
            has it. N is a multiple of 32.
        bits, group_size, symmetric: as those of `quantize_weight`.

    Returns:
        The weight [num_experts * N, K], on the device of `weight`. It is a constant: no gradient flows into it.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came, as those of `quantize_weight`.
    """
    op = "moe.quantize_experts"
    check.is_tensor(op, "weight", weight)
    check.rank(op, "weight", weight, 3, "[num_experts, N, K]")
    if weight.shape[1] % PANEL:
        raise ValueError(f"{op}: weight must have a multiple of {PANEL} rows an expert, got {weight.shape[1]}.")
    if weight.numel() == 0:
        raise ValueError(f"{op}: weight must have an expert, a row and a column, got {list(weight.shape)}.")
    return quantize_weight(weight.flatten(0, 1), bits=bits, group_size=group_size, symmetric=symmetric)


def quantized_grouped_mm(a: Tensor, weight: QuantizedWeight, offsets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """out[r] = a[r] w[e]^T + bias[e] for the rows r of expert e, which end at offsets[e]; rows of no expert are zeros.

    Args:
        a: [M, K], last dimension contiguous. CPU: float32, bfloat16, float16; CUDA: bfloat16, float16.
        weight: [num_experts * N, K], of `quantize_experts`, on the device of a; N is a multiple of 32.
        offsets: [num_experts], int32: where the rows of an expert end, and those of the next begin, as
            Mapping.expert_offsets[0]; the last one may be less than M.
        bias: [num_experts, N], float32 or dtype of a; None: none.

    Returns:
        [M, N], dtype of a, contiguous. Accumulated in float32, rounded once.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Offsets that decrease or pass M
            are refused on the CPU, on CUDA under FMKERNELS_CHECK=1; without it an expert ends at the largest offset up
            to its own, and at M at most.

    CPU and CUDA (sm_80 and later). For inference: a and bias that require a gradient are refused. No expert need have a
    row, and M may be 0. Nothing waits for the device, and nothing is allocated but the result. Deterministic; a row's
    bits depend on the row and on its expert's weight and bias alone. FLOPs are counted for all M rows; under autocast a
    takes the autocast dtype, and a half bias too.
    """
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(f"{OP}: weight must be a QuantizedWeight, got {type(weight).__name__}.")
    if needs_grad(a, bias):
        _refuse_gradient(OP, a=a, bias=bias)
    a, bias = autocast(1, a, bias)
    if isinstance(bias, Tensor) and isinstance(a, Tensor):
        check.float32_or_dtype_of(OP, "bias", bias, "a", a)
        bias = bias.float().contiguous()
    return _product(a, weight, offsets, bias)


def quantized_moe_mlp(
    x: Tensor, w_gate_up: QuantizedWeight, w_down: QuantizedWeight, topk_weights: Tensor, topk_idx: Tensor
) -> Tensor:
    """`moe_mlp` with experts of 8 or 4 bits: the sum over a token's experts e of topk_weights w_down[e] (silu(g) * u),
    where (g, u) = w_gate_up[e] x.

    Args:
        x: [num_tokens, hidden], last dimension contiguous. CPU: float32, bfloat16, float16; CUDA: bfloat16, float16.
        w_gate_up: [num_experts * 2 * width, hidden], of `quantize_experts`: gate then up of each expert.
        w_down: [num_experts * hidden, width], of `quantize_experts`; hidden and 2 * width are multiples of 32.
        topk_weights: [num_tokens, num_topk], float32, as of `route`.
        topk_idx: [num_tokens, num_topk], int32 or int64: the expert of each slot, -1 for none.

    Returns:
        [num_tokens, hidden], dtype of x. A token without an expert gives zeros.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came, as those of `build_mapping`,
            `permute`, `quantized_grouped_mm`, `swiglu` and `combine`, of which it is made.

    CPU and CUDA (sm_80 and later). For inference: x and topk_weights that require a gradient are refused.
    Deterministic, and a token's bits depend on the token, its choices and their weights alone. Nothing waits for the
    device. What goes from one of the five to the next is rounded to the dtype of x. At most 1024 experts.
    """
    if needs_grad(x, topk_weights):
        _refuse_gradient(MLP, x=x, topk_weights=topk_weights)
    (x,) = autocast(1, x)
    num_experts = _check_mlp(x, w_gate_up, w_down, topk_weights, topk_idx)
    mapping = build_mapping(topk_idx, num_experts)
    offsets = mapping.expert_offsets[0]
    inner = swiglu(_product(permute(x, mapping), w_gate_up, offsets, None))
    return combine(_product(inner, w_down, offsets, None), mapping, topk_weights)


def _product(a: Tensor, weight: QuantizedWeight, offsets: Tensor, bias: Tensor | None) -> Tensor:
    tensors, sizes = (weight.values, weight.scales, weight.zeros), (weight.bits, weight.group_size or 0, *weight.shape)
    return call(ops.moe_quantized_mm, (a, *tensors, offsets, bias, *sizes), _check_tensors)


def _refuse_gradient(op: str, **tensors: Any) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            continue
        if t.requires_grad:
            raise ValueError(f"{op}: {name} must not require a gradient, which products of packed experts do not give.")
        if forward_ad.unpack_dual(t).tangent is not None:
            raise ValueError(f"{op}: {name} must not have a tangent, which products of packed experts do not give.")


def _check_tensors(
    a: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
) -> None:
    check.is_tensor(OP, "a", a)
    check.rank(OP, "a", a, 2, "[M, K]")
    check.dtype(OP, "a", a, dtypes_of_products(a))
    check.same_device(OP, "a", a, "weight", values)
    check.size(OP, "a", a, 1, "for this weight K =", in_features)
    check.last_dim_contiguous(OP, "a", a)
    if a.shape[0] >= 2**31:
        raise ValueError(f"{OP}: a must have fewer than 2**31 rows, got {a.shape[0]}.")
    check_offsets(OP, offsets, a, a.shape[0])
    num_experts = offsets.shape[0]
    if num_experts == 0 or out_features % (num_experts * PANEL):
        raise ValueError(
            f"{OP}: weight must have a multiple of {PANEL} rows for each of the {num_experts} experts of offsets, "
            f"got {out_features}."
        )
    if bias is not None:
        check.plain(OP, "bias", bias, 2, "[num_experts, N]", torch.float32, "a", a)
        check.size(OP, "bias", bias, 0, "as many rows as offsets has experts,", num_experts)
        check.size(OP, "bias", bias, 1, "N =", out_features // num_experts)
    check.kernel_exists(OP, "moe_quantized_mm", a)


def _check_mlp(x: Any, w_gate_up: Any, w_down: Any, topk_weights: Any, topk_idx: Any) -> int:
    """Shapes and dtypes; what only the five can say of strides and values, they say. Returns num_experts."""
    check.is_tensor(MLP, "x", x)
    check.rank(MLP, "x", x, 2, "[num_tokens, hidden]")
    check.dtype(MLP, "x", x, dtypes_of_products(x))
    for name, weight in (("w_gate_up", w_gate_up), ("w_down", w_down)):
        if not isinstance(weight, QuantizedWeight):
            raise TypeError(f"{MLP}: {name} must be a QuantizedWeight, got {type(weight).__name__}.")
        check.same_device(MLP, name, weight.values, "x", x)
    hidden = x.shape[1]
    if w_gate_up.in_features != hidden:
        raise ValueError(f"{MLP}: w_gate_up must have for this x hidden = {hidden} columns, got {w_gate_up.shape[1]}.")
    if hidden % PANEL or w_down.out_features % hidden:
        raise ValueError(
            f"{MLP}: w_down must have for each expert hidden = {hidden} rows, a multiple of {PANEL}, "
            f"got {w_down.out_features}."
        )
    num_experts, rows = w_down.out_features // hidden, 2 * w_down.in_features
    if w_gate_up.out_features != num_experts * rows or rows % PANEL:
        raise ValueError(
            f"{MLP}: w_gate_up must have for each of the {num_experts} experts of w_down 2 * width = {rows} rows, "
            f"a multiple of {PANEL}, got {w_gate_up.out_features}."
        )
    check_choices(MLP, topk_weights, topk_idx, num_experts, x)
    return num_experts


@register_fake("moe_quantized_mm")
def _(a, values, scales, zeros, offsets, bias, bits, group_size, out_features, in_features):
    _check_tensors(a, values, scales, zeros, offsets, bias, bits, group_size, out_features, in_features)
    return a.new_empty(a.shape[0], out_features // offsets.shape[0])


@register_flop_formula("moe_quantized_mm")
def _(a_shape, values_shape, scales_shape, zeros_shape, offsets_shape, *args, out_shape=None, **kwargs) -> int:
    """Of all rows: how many belong to experts only the device knows. Decoding is not counted."""
    return 2 * a_shape[0] * a_shape[1] * (args[3] // offsets_shape[0])
