# SPDX-License-Identifier: Apache-2.0
"""Sampling by its definition: penalties, sorted sets, and a draw by the integers of the kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dropout import philox

_LOW = 0xFFFFFFFF
_ONE = 1 << 40


def random_bits(seed: int, offset: int, index: int, stream: int) -> int:
    """64 bits, from 0 to 2^64 - 1."""
    counter = tuple(torch.tensor(word) for word in (offset & _LOW, offset >> 32 & _LOW, index, stream))
    key = (torch.tensor(seed & _LOW), torch.tensor(seed >> 32 & _LOW))
    low, high, *_ = philox(counter, key)
    return int(high) << 32 | int(low)


def share_of(share: float, total: int) -> int:
    """ceil(share * total) in float64, from 1 to total; share is that of float32."""
    exact = math.ceil(torch.tensor(share, dtype=torch.float32).double().item() * float(total))
    return min(max(exact, 1), total)


def adjusted_logits(
    logits: Tensor,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    output_counts: Tensor | None = None,
    prompt_mask: Tensor | None = None,
) -> Tensor:
    """x of one row [vocab]."""
    counts = torch.zeros_like(logits) if output_counts is None else output_counts.to(logits.dtype)
    old = counts > 0 if prompt_mask is None else (counts > 0) | prompt_mask
    x = torch.where(old, torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty), logits)
    return x - frequency_penalty * counts - presence_penalty * (counts > 0)


def sampling_weights(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, **penalties
) -> Tensor:
    """int64 [vocab]: the weights of one row from which a token is drawn, 0 outside S3; the largest is 2^40.

    In float32 the weights of the kernels may differ in their last bits; sets and draws follow from these.
    """
    x = adjusted_logits(logits, **penalties)
    exact = torch.where(x == x.max(), 0.0, x - x.max()) / temperature
    weights = (exact.double().exp() * _ONE).floor().long()
    least = share_of(min(min_p, 1.0), _ONE) if min_p > 0 else 0
    order = torch.sort(x, descending=True, stable=True).indices
    order = order[weights[order] >= least]
    order = order[:top_k] if top_k > 0 else order
    sums = weights[order].cumsum(0)
    if top_p < 1:
        order = order[: int((sums < share_of(top_p, int(sums[-1]))).sum()) + 1]
    return torch.zeros_like(weights).index_put((order,), weights[order])


def sample(logits: Tensor, *, seed: Tensor, offset: Tensor, temperature: float = 1.0, **options) -> Tensor:
    """int64 [batch]; options are numbers, or tensors of [batch] or [batch, vocab]."""
    tokens = []
    for row, (x, s, o) in enumerate(zip(logits, seed.tolist(), offset.tolist(), strict=True)):
        of_row = {name: value[row] if isinstance(value, Tensor) else value for name, value in options.items()}
        of_row = {k: v.item() if isinstance(v, Tensor) and v.dim() == 0 else v for k, v in of_row.items()}
        warmth = temperature[row].item() if isinstance(temperature, Tensor) else temperature
        penalties = {k: v for k, v in of_row.items() if k not in ("top_k", "top_p", "min_p")}
        adjusted = adjusted_logits(x, **penalties)
        if adjusted.isnan().any() or adjusted.max() == -math.inf:
            tokens.append(-1)
        elif warmth == 0:
            tokens.append(int((adjusted == adjusted.max()).nonzero()[0]))
        else:
            sums = sampling_weights(x, warmth, **of_row).cumsum(0)
            number = int(sums[-1]) * random_bits(s, o, 0, 1) >> 64
            tokens.append(int((sums <= number).sum()))
    return torch.tensor(tokens, dtype=torch.int64, device=logits.device)
