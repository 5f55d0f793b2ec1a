# SPDX-License-Identifier: Apache-2.0
"""A small Llama over bytes: RMSNorm, rotary positions, grouped heads, and SwiGLU or experts of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fmkernels.nn import Attention, MoE, checkpoint_policy

VOCABULARY = 256
BIAS_RATE = 1e-2  # ten times that of DeepSeek-V3, whose runs have more steps


@dataclass(frozen=True)
class Config:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    seq: int
    experts: int = 0  # of each block; 0: no mixture
    topk: int = 0

    @property
    def inner(self) -> int:
        """Of the feed-forward layer: 8 / 3 hidden, as Llama, in whole vectors."""
        return -(-8 * self.hidden // 3 // 64) * 64


class Output(NamedTuple):
    loss: Tensor  # the mean loss of predicting each byte from those before it
    z_loss: Tensor  # of the routers, the mean over the blocks; 0 without experts
    load: Tensor  # [layers, experts], int64: how many choices of a byte each expert had


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
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def mixture(config: Config) -> MoE:
    """With as much arithmetic a byte as the FeedForward. It routes as DeepSeek-V3: by sigmoid scores, and a bias for
    choosing that keeps the loads even without a loss."""
    width = config.inner // config.topk
    return MoE(config.hidden, width, config.experts, config.topk, scoring="sigmoid", selection_bias=True)


class Block(nn.Module):
    def __init__(self, config: Config, attention: str, rope: Rope) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = ATTENTIONS[attention](config.hidden, config.heads, config.kv_heads, rope=rope)
        self.feed_forward_norm = nn.RMSNorm(config.hidden)
        self.feed_forward = mixture(config) if config.experts else FeedForward(config.hidden, config.inner)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, z loss, load)."""
        x = x + self.attention(self.attention_norm(x))
        y = self.feed_forward(self.feed_forward_norm(x))
        if isinstance(y, Tensor):
            return x + y, x.new_zeros(()), x.new_zeros(0, dtype=torch.int64)
        y, losses = y
        return x + y, losses.z_loss, losses.load


class Transformer(nn.Module):
    """Predicts each byte from those before it.

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
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:  # what adds to the residual stream, as GPT-2
            down = block.feed_forward.experts.down_proj if config.experts else block.feed_forward.down_proj.weight
            for weight in (block.attention.o_proj.weight, down):
                nn.init.normal_(weight, std=0.02 / (2 * config.layers) ** 0.5)

    def forward(self, windows: Tensor) -> Output:
        """windows: [batch, seq + 1] bytes, as integers."""
        x = self.embedding(windows[:, :-1])
        z_losses, loads = [], []
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, z_loss, load = checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_policy())
            else:
                x, z_loss, load = block(x)
            z_losses.append(z_loss)
            loads.append(load)
        loss = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), windows[:, 1:].flatten())
        return Output(loss, torch.stack(z_losses).mean(), torch.stack(loads))

    def balance(self, load: Tensor) -> None:
        """Makes experts that had more than their share of the last step less likely, others more; load as of Output."""
        for block, load_of_block in zip(self.blocks, load, strict=True):
            block.feed_forward.update_bias(load_of_block, BIAS_RATE)
