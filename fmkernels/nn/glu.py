# SPDX-License-Identifier: Apache-2.0
"""The feed-forward block of a transformer, gated by SiLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _check as check
from ..glu import swiglu


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)); the state dict is that of the Llama block.

    Args:
        hidden: width of the input and of the output.
        intermediate: width of the gate.
        bias: whether the projections have a bias.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    Differentiable as `fmkernels.swiglu` is; works under autocast and `torch.compile(fullgraph=True)`.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("hidden", hidden), ("intermediate", intermediate)):
            check.integer("nn.SwiGLU", name, number, 1)
        check.flag("nn.SwiGLU", "bias", bias)
        self.gate_proj = nn.Linear(hidden, intermediate, bias, device, dtype)
        self.up_proj = nn.Linear(hidden, intermediate, bias, device, dtype)
        self.down_proj = nn.Linear(intermediate, hidden, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result are [..., hidden]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
