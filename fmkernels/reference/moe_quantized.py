# SPDX-License-Identifier: Apache-2.0
"""Products of experts of 8 and 4 bits by their definition: with the numbers that the integers stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .quantized_linear import dequantize_weight

if TYPE_CHECKING:
    from ..quantized_weight import QuantizedWeight


def quantized_grouped_mm(a: Tensor, weight: QuantizedWeight, offsets: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`fmkernels.moe.quantized_grouped_mm`: expert by expert; where a is less, in float32, rounded once."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    matrices = dequantize_weight(weight, dtype).unflatten(0, (len(offsets), -1))
    out = a.new_zeros(a.shape[0], matrices.shape[1], dtype=dtype)
    begin = 0
    for expert, end in enumerate(offsets.tolist()):
        out[begin:end] = a[begin:end].to(dtype) @ matrices[expert].t() + (0 if bias is None else bias[expert].to(dtype))
        begin = end
    return out.to(a.dtype)


def quantized_moe_mlp(
    x: Tensor, w_gate_up: QuantizedWeight, w_down: QuantizedWeight, topk_weights: Tensor, topk_idx: Tensor
) -> Tensor:
    """`fmkernels.moe.quantized_moe_mlp`, expert by expert and choice by choice, in the dtype of x."""
    num_experts = w_down.out_features // x.shape[1]
    gates_up = dequantize_weight(w_gate_up, x.dtype).unflatten(0, (num_experts, -1))
    downs = dequantize_weight(w_down, x.dtype).unflatten(0, (num_experts, -1))
    out = torch.zeros_like(x)
    for k in range(topk_idx.shape[1]):
        part = torch.zeros_like(x)
        for expert in range(num_experts):
            tokens = (topk_idx[:, k] == expert).nonzero().flatten()
            gate, up = (x[tokens] @ gates_up[expert].t()).chunk(2, -1)
            part[tokens] = (torch.nn.functional.silu(gate) * up) @ downs[expert].t()
        out = out + torch.where(topk_idx[:, k] >= 0, topk_weights[:, k], 0).to(x.dtype).unsqueeze(-1) * part
    return out
