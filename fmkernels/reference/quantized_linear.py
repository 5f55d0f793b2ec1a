# SPDX-License-Identifier: Apache-2.0
"""Quantised weights by their definition: the rounding, the layout, and the product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..quantized_weight import QuantizedWeight


def quantize_weight(
    weight: Tensor, *, bits: int = 8, group_size: int | None = None, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q, scales, zeros) of `fmkernels.quantize_weight`, group after group, computed in the dtype of the weight."""
    groups = weight.split(weight.shape[1] if group_size is None else group_size, dim=1)
    integers, scales, zeros = [], [], []
    for group in groups:
        if symmetric:
            scale = group.abs().amax(1) / (127 if bits == 8 else 7.5)
            zero = torch.full_like(scale, 0 if bits == 8 else 8)
        else:
            low = group.amin(1).clamp(max=0)
            scale = (group.amax(1).clamp(min=0) - low) / 15
            zero = torch.where(scale == 0, 0, -low / scale).round()
        q = torch.where(scale[:, None] == 0, 0, group / scale[:, None]).round() + zero[:, None]
        integers.append(q.clamp(0, 15) if bits == 4 else q)
        scales.append(scale)
        zeros.append(zero)
    zero_points = None if symmetric else torch.stack(zeros, 1)
    return torch.cat(integers, 1), torch.stack(scales, 1), zero_points


def dequantize_weight(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix, read from the words as docs/layouts.md draws them, in the dtype to compute in."""
    n = torch.arange(weight.out_features, device=weight.device)[:, None]
    k = torch.arange(weight.in_features, device=weight.device)
    group = k // (weight.group_size or weight.in_features)
    words = weight.values.long()
    if weight.bits == 8:
        byte = words[n // 32, k // 4, n % 32] >> (8 * (k % 4)) & 255
        q = torch.where(byte >= 128, byte - 256, byte)
    else:
        nibble = k % 8 // 2 + k % 2 * 4
        q = words[n // 32, k // 8, n % 32] >> (4 * nibble) & 15
        q = q - (8 if weight.zeros is None else weight.zeros.long()[n // 32, group, n % 32] & 15)
    return weight.scales.to(dtype)[n // 32, group, n % 32] * q


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The product with that matrix; everything in the dtype of x."""
    y = x @ dequantize_weight(weight, x.dtype).T
    return y if bias is None else y + bias
