# SPDX-License-Identifier: Apache-2.0
"""A small Llama over bytes: RMSNorm, rotary positions, grouped heads, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmkernels.nn import Attention, checkpoint_policy

VOCABULARY = 256


@dataclass(frozen=True)
class Config:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    seq: int


class Rope(nn.Module):
    """Rotates the halves of each head against each other, by angles that grow with the position."""

    def __init__(self, head_dim: int, max_seq: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(max_seq), frequencies)[:, None]  # [seq, 1, head_dim / 2]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotate(q), self.rotate(k)

    def rotate(self, t: Tensor) -> Tensor:
        cos, sin = (table[: t.shape[1]].to(t.dtype) for table in (self.cos, self.sin))
        a, b = t.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class TorchAttention(Attention):
    """The same parameters over torch's attention, to compare with."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rope(q, k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(o.transpose(1, 2).flatten(-2))


ATTENTIONS: dict[str, type[Attention]] = {"fmkernels": Attention, "torch": TorchAttention}


class FeedForward(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        inner = -(-8 * hidden // 3 // 64) * 64  # 8 / 3 hidden, as Llama, in whole vectors
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, attention: str, rope: Rope) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = ATTENTIONS[attention](config.hidden, config.heads, config.kv_heads, rope=rope)
        self.feed_forward_norm = nn.RMSNorm(config.hidden)
        self.feed_forward = FeedForward(config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """Gives the mean loss of predicting each byte from those before it.

    checkpoint_activations: the backward pass computes each block again, all but its attention.
    """

    def __init__(self, config: Config, attention: str, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        rope = Rope(config.hidden // config.heads, config.seq)
        self.embedding = nn.Embedding(VOCABULARY, config.hidden)
        self.blocks = nn.ModuleList(Block(config, attention, rope) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:  # what adds to the residual stream, as GPT-2
            for projection in (block.attention.o_proj, block.feed_forward.down_proj):
                nn.init.normal_(projection.weight, std=0.02 / (2 * config.layers) ** 0.5)

    def forward(self, windows: Tensor) -> Tensor:
        """windows: [batch, seq + 1] bytes, as integers."""
        x = self.embedding(windows[:, :-1])
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_policy())
            else:
                x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), windows[:, 1:].flatten())
