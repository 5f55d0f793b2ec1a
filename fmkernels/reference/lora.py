# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters by their definition, a token at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def lora_shrink(x: Tensor, a: Tensor, idx: Tensor) -> Tensor:
    """h of `fmkernels.lora_shrink`, in the dtype of x."""
    none = x.new_zeros(a.shape[1])
    rows = [none if adapter < 0 else a[adapter] @ token for token, adapter in zip(x, idx.tolist(), strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, a.shape[1])


def lora_expand(h: Tensor, base: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None = None) -> Tensor:
    """y of `fmkernels.lora_expand`; all in the dtype to compute in."""
    scales = base.new_ones(len(b)) if scale is None else scale
    y = base.clone()
    for token, adapter in enumerate(idx.tolist()):
        if adapter >= 0:
            y[token] += scales[adapter] * (b[adapter] @ h[token])
    return y


def lora(x: Tensor, base: Tensor, a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None = None) -> Tensor:
    """Both, one after the other."""
    return lora_expand(lora_shrink(x, a, idx), base, b, idx, scale)
