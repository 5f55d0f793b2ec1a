# SPDX-License-Identifier: Apache-2.0
"""The feed-forward layer of a mixture of experts, whole: `moe.moe_mlp`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._library import autocast
from ._moe_grouped import grouped_mm
from ._moe_mapping import build_mapping, check_ids
from ._moe_permute import combine, permute
from .glu import swiglu

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
        ValueError, TypeError: one sentence with the argument, its rule and what came, as those of `build_mapping`,
            `permute`, `grouped_mm`, `swiglu` and `combine`, of which it is made.

    CPU and CUDA (sm_80 and later). Deterministic, and a token's bits depend on the token, its choices and their weights
    alone. Nothing waits for the device. What goes from one of the five to the next is rounded to the dtype of x.
    Differentiable once in x, both weights and topk_weights. At most 1024 experts.
    """
    x, w_gate_up, w_down = autocast(3, x, w_gate_up, w_down)
    _check(x, w_gate_up, w_down, topk_weights, topk_idx)
    mapping = build_mapping(topk_idx, w_gate_up.shape[0])
    offsets = mapping.expert_offsets[0]
    inner = swiglu(grouped_mm(permute(x, mapping), w_gate_up, offsets, trans_b=True))
    return combine(grouped_mm(inner, w_down, offsets, trans_b=True), mapping, topk_weights)


def _check(x: Any, w_gate_up: Any, w_down: Any, topk_weights: Any, topk_idx: Any) -> None:
    """Shapes and dtypes; what only the five can say of strides and values, they say."""
    check.is_tensor(OP, "x", x)
    check.rank(OP, "x", x, 2, "[num_tokens, hidden]")
    check.dtype(OP, "x", x, check.FLOAT_DTYPES)
    for name, t, layout in (
        ("w_gate_up", w_gate_up, "[num_experts, 2 * width, hidden]"),
        ("w_down", w_down, "[num_experts, hidden, width]"),
    ):
        check.is_tensor(OP, name, t)
        check.rank(OP, name, t, 3, layout)
        check.same_dtype(OP, name, t, "x", x)
        check.same_device(OP, name, t, "x", x)
    num_experts, two_widths, hidden = w_gate_up.shape
    check.size(OP, "w_gate_up", w_gate_up, 2, "for this x hidden =", x.shape[1])
    if num_experts < 1 or two_widths % 2:
        raise ValueError(
            f"{OP}: w_gate_up must have an expert or more and an even number of rows each, got {list(w_gate_up.shape)}."
        )
    if tuple(w_down.shape) != (num_experts, hidden, two_widths // 2):
        expected = [num_experts, hidden, two_widths // 2]
        raise ValueError(f"{OP}: w_down must be {expected} for this w_gate_up, got {list(w_down.shape)}.")
    check_ids(OP, topk_idx, num_experts)
    check.size(OP, "topk_idx", topk_idx, 0, "the tokens of x,", x.shape[0])
    check.same_device(OP, "topk_idx", topk_idx, "x", x)
    check.plain(OP, "topk_weights", topk_weights, 2, "[num_tokens, num_topk]", torch.float32, "x", x)
    check.shape(OP, "topk_weights", topk_weights, "topk_idx", topk_idx)
