# SPDX-License-Identifier: Apache-2.0
"""The gated linear units by their definition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """`fmkernels.swiglu`; every tensor in the dtype to compute in."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none") -> Tensor:
    """`fmkernels.geglu`; every tensor in the dtype to compute in."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.gelu(gate, approximate=approximate) * up
