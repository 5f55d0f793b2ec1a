# SPDX-License-Identifier: Apache-2.0
"""The attention block of a transformer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check as check
from .._attention_checks import MAX_HEAD_DIM
from ..attention import attention
from ..block_mask import BlockMask

Rope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """Self-attention with its projections; the state dict is that of the block it replaces.

        y = o_proj(attention(rope(q_proj(x), k_proj(x)), v_proj(x)))

    Args:
        hidden: width of the input and of the output.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads, a divisor of num_heads; num_heads when None.
        head_dim: a multiple of 8, at most 256; hidden // num_heads when None.
        bias: whether the projections have a bias.
        causal: whether token i sees the tokens j <= i alone.
        window: (left, right), how many tokens before and after its own a token sees; -1: all.
        rope: called with q [batch, seq, num_heads, head_dim] and k [batch, seq, num_kv_heads, head_dim], returns both
            rotated, in their dtype. A module that is given here is a submodule, and its persistent buffers join the
            state dict.
        layout: names, shapes and first values of the parameters. "llama": four linear layers, `q_proj`, `k_proj`,
            `v_proj` and `o_proj`, as in Llama. "multihead": `in_proj_weight` and `in_proj_bias`, rows of q, k and v one
            after another, and `out_proj`, as in `torch.nn.MultiheadAttention`; q, k and v are one matrix product.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    Differentiable as `fmkernels.attention` is. Works under autocast, `torch.compile(fullgraph=True)`, forward and
    backward, DistributedDataParallel and `fully_shard`; `checkpoint_policy` says what to keep of a checkpointed block.
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
        layout: Literal["llama", "multihead"] = "llama",
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
        if layout not in ("llama", "multihead"):
            raise ValueError(f"{op}: layout must be 'llama' or 'multihead', got {layout!r}.")

        self.hidden = hidden
        self.head_dim = head_dim
        self.causal = causal
        self.window = tuple(window)
        self.rope = rope
        self.layout = layout
        width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
        self.widths = (width, kv_width, kv_width)
        if layout == "llama":
            self.q_proj = nn.Linear(hidden, width, bias, device, dtype)
            self.k_proj = nn.Linear(hidden, kv_width, bias, device, dtype)
            self.v_proj = nn.Linear(hidden, kv_width, bias, device, dtype)
            self.o_proj = nn.Linear(width, hidden, bias, device, dtype)
        else:
            rows = sum(self.widths)
            self.in_proj_weight = nn.Parameter(torch.empty(rows, hidden, device=device, dtype=dtype))
            in_proj_bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
            self.register_parameter("in_proj_bias", in_proj_bias)
            self.out_proj = nn.Linear(width, hidden, bias, device, dtype)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """First values of what is not a layer of its own, those of `torch.nn.MultiheadAttention`."""
        if self.layout == "multihead":
            nn.init.xavier_uniform_(self.in_proj_weight)
            if self.in_proj_bias is not None:
                nn.init.zeros_(self.in_proj_bias)
                nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, *, block_mask: BlockMask | None = None) -> Tensor:
        """x and the result are [batch, seq, hidden]; block_mask as of `fmkernels.attention`."""
        check.is_tensor("nn.Attention", "x", x)
        check.rank("nn.Attention", "x", x, 3, "[batch, seq, hidden]")
        check.size("nn.Attention", "x", x, -1, "hidden", self.hidden)
        if self.layout == "llama":
            projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            projected = F.linear(x, self.in_proj_weight, self.in_proj_bias).split(self.widths, -1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in projected)
        if self.rope is not None:
            q, k = self.rope(q, k)
        o = attention(q, k, v, causal=self.causal, window=self.window, block_mask=block_mask).flatten(-2)
        return self.o_proj(o) if self.layout == "llama" else self.out_proj(o)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, causal={self.causal}, window={self.window}, layout={self.layout!r}"
