# SPDX-License-Identifier: Apache-2.0
"""Attention by its definition: the whole score matrix, in the dtype of the inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..block_mask import BlockMask
from .dropout import dropout_factors


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    first_batch: int = 0,
    block_mask: BlockMask | None = None,
) -> tuple[Tensor, Tensor]:
    """(o, lse) of `fmkernels.attention`; every tensor in the dtype to compute in. Dropout needs its generator, and what
    it counts as the first batch."""
    v = v.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores, visible = attention_scores(
        q,
        k,
        causal=causal,
        window=window,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        bias=bias,
        block_mask=block_mask,
    )
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    # A row without any finite logit: zero weights and lse = -inf; subtracting 0 keeps -inf - (-inf) out of it.
    largest = (
        logits.amax(-1, keepdim=True) if logits.shape[-1] > 0 else logits.new_full((*logits.shape[:3], 1), -math.inf)
    )
    largest = torch.where(largest == -math.inf, 0.0, largest.detach())
    total = (logits - largest).exp().sum(-1, keepdim=True)
    weights = torch.where(total == 0, 0.0, (scores - largest).exp() / torch.where(total == 0, 1.0, total))
    if dropout_p > 0.0:
        weights = weights * dropout_factors(dropout_p, dropout_rng, *weights.shape, first_batch=first_batch).to(weights)
    # A hidden key has no part in the result, whatever its value holds.
    values = torch.where(visible[..., None], v.permute(0, 2, 1, 3)[:, :, None], 0.0)
    o = torch.einsum("bhij,bhijd->bihd", weights, values)
    return o, (largest + total.log()).squeeze(-1)


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    block_mask: BlockMask | None = None,
) -> tuple[Tensor, Tensor]:
    """(scores, visible), both [batch, heads, seq_q, seq_k], -inf where hidden; of visible batch and heads may be 1."""
    seq_q, seq_k = q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    k = k.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    distance = torch.arange(seq_q, device=q.device)[:, None] + seq_k - seq_q - torch.arange(seq_k, device=q.device)
    if alibi_slopes is not None:
        slopes = alibi_slopes if alibi_slopes.dim() == 2 else alibi_slopes[None]
        scores = scores - slopes[:, :, None, None] * distance.abs()
    left, right = window[0], 0 if causal else window[1]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= distance >= -right
    visible = visible[None, None]
    if block_mask is not None:
        visible = visible & block_mask.to_dense()
    return torch.where(visible, scores, -math.inf), visible


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """(o, lse) of `fmkernels.attention_varlen`: `attention` on each sequence alone."""
    o = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_zeros(q.shape[1], q.shape[0])
    for b, (qs, qe) in enumerate(zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False)):
        ks, ke = cu_seqlens_k[b : b + 2].tolist()
        slopes = alibi_slopes[b : b + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        tensors = (q[None, qs:qe], k[None, ks:ke], v[None, ks:ke])
        o_b, lse_b = attention(*tensors, alibi_slopes=slopes, first_batch=b, **kwargs)
        o[qs:qe], lse[:, qs:qe] = o_b[0], lse_b[0]
    return o, lse
