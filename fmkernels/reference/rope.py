# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding by its definition: a product of complex numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(
    q: Tensor,
    k: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(q, k) of `fmkernels.rope`; every tensor but positions in the dtype to compute in."""
    cos, sin = (part.unsqueeze(-2) for part in cos_sin[positions.long()].chunk(2, -1))  # of every head
    sin = -sin if inverse else sin
    rotary_dim = cos_sin.shape[-1]

    def rotate(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        u, v = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        u, v = u * cos - v * sin, v * cos + u * sin
        turned = torch.stack([u, v], -1).flatten(-2) if interleaved else torch.cat([u, v], -1)
        return torch.cat([turned, rest], -1)

    return rotate(q), rotate(k)
