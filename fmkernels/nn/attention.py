# SPDX-License-Identifier: Apache-2.0
"""The attention block of a transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import _check as check
from .._attention_checks import MAX_HEAD_DIM
from ..attention import attention

Rope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Self-attention with its four projections; the state dict is that of a Llama attention block.

        y = o_proj(attention(rope(q_proj(x), k_proj(x)), v_proj(x)))

    Args:
        hidden: width of the input and of the output.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads, a divisor of num_heads; num_heads when None.
        head_dim: a multiple of 8, at most 256; hidden // num_heads when None.
        bias: whether the four projections have a bias.
        causal: whether token i sees the tokens j <= i alone.
        window: (left, right), how many tokens before and after its own a token sees; -1: all.
        rope: called with q [batch, seq, num_heads, head_dim] and k [batch, seq, num_kv_heads, head_dim], returns both
            rotated. A module that is given here is a submodule, and its persistent buffers join the state dict.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    Works under `torch.compile(fullgraph=True)` and autocast. Not differentiable yet, as `fmkernels.attention`.
    """

    def __init__(
        self,
        hidden: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        causal: bool = True,
        window: tuple[int, int] = (-1, -1),
        rope: Rope | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "nn.Attention"
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, number in (("hidden", hidden), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            check.integer(op, name, number, 1)
        if num_heads % num_kv_heads != 0:
            raise ValueError(f"{op}: num_kv_heads must divide num_heads, {num_heads}, got {num_kv_heads}.")
        if head_dim is None:
            if hidden % num_heads != 0:
                raise ValueError(
                    f"{op}: num_heads must divide hidden, {hidden}, where head_dim is None, got {num_heads}."
                )
            head_dim = hidden // num_heads
        check.integer(op, "head_dim", head_dim, 1)
        if head_dim % 8 != 0 or head_dim > MAX_HEAD_DIM:
            raise ValueError(f"{op}: head_dim must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {head_dim}.")
        check.flag(op, "bias", bias)
        check.flag(op, "causal", causal)
        check.window(op, "window", window)
        if rope is not None and not callable(rope):
            raise TypeError(f"{op}: rope must be callable with (q, k), got {type(rope).__name__}.")

        self.head_dim = head_dim
        self.causal = causal
        self.window = tuple(window)
        self.rope = rope
        width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = nn.Linear(hidden, width, bias, device, dtype)
        self.k_proj = nn.Linear(hidden, kv_width, bias, device, dtype)
        self.v_proj = nn.Linear(hidden, kv_width, bias, device, dtype)
        self.o_proj = nn.Linear(width, hidden, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result are [batch, seq, hidden]."""
        check.is_tensor("nn.Attention", "x", x)
        check.rank("nn.Attention", "x", x, 3, "[batch, seq, hidden]")
        check.size("nn.Attention", "x", x, -1, "hidden", self.q_proj.in_features)
        heads = (-1, self.head_dim)
        q, k, v = (projection(x).unflatten(-1, heads) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope is not None:
            q, k = self.rope(q, k)
        return self.o_proj(attention(q, k, v, causal=self.causal, window=self.window).flatten(-2))

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, causal={self.causal}, window={self.window}"
