# SPDX-License-Identifier: Apache-2.0
"""The rotary embedding as a module that owns its angles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check as check
from ..rope import rope
from ..rope_cache import rope_cache


class RotaryEmbedding(nn.Module):
    """Rotates q and k by their positions; `fmkernels.nn.Attention` takes it as `rope`.

    The angles are a buffer that no state dict has, as in transformers; they stay float32 when the module is cast.

    Args:
        rotary_dim: columns of a head that are rotated, the head_dim or fewer.
        num_positions: how many positions there are angles for.
        base, scaling: of the angles, as in `fmkernels.rope_cache`.
        interleaved: which columns are a pair, as in `fmkernels.rope`.
        device: of the angles.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """

    cos_sin: Tensor
    positions: Tensor

    def __init__(
        self,
        rotary_dim: int,
        num_positions: int,
        *,
        base: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check.flag("nn.RotaryEmbedding", "interleaved", interleaved)
        self.interleaved = interleaved
        cos_sin = rope_cache(rotary_dim, num_positions, base=base, scaling=scaling, device=device)
        self.register_buffer("cos_sin", cos_sin, persistent=False)
        self.register_buffer("positions", torch.arange(num_positions, device=device), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        """Moves the buffers; a change of dtype would round the angles, so it is left out."""
        before = self.cos_sin
        super()._apply(fn, recurse)
        if self.cos_sin.dtype != before.dtype:
            self.cos_sin = before.to(self.cos_sin.device)
        return self

    def forward(self, q: Tensor, k: Tensor | None, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """q [batch, seq, heads, head_dim] or [tokens, heads, head_dim]; positions count from 0 where none are given."""
        if positions is None:
            check.is_tensor("nn.RotaryEmbedding", "q", q)
            if q.dim() in (3, 4):
                num_tokens = q.shape[-3]
                if num_tokens > len(self.positions):
                    raise ValueError(
                        f"nn.RotaryEmbedding: q must have at most num_positions, {len(self.positions)}, tokens, "
                        f"got {num_tokens}."
                    )
                positions = self.positions[:num_tokens]
            else:
                positions = self.positions  # the op says what q must be
        return rope(q, k, positions, self.cos_sin, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"rotary_dim={self.cos_sin.shape[1]}, num_positions={len(self.cos_sin)}, interleaved={self.interleaved}"
