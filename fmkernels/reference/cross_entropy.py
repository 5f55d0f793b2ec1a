# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy by its definition."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """`fmkernels.cross_entropy` in the dtype of the logits; targets that are no class count as ignored."""
    counted = (target != ignore_index) & (target >= 0) & (target < logits.shape[-1])
    s = torch.where(counted[..., None], logits, 0.0)  # an ignored row may hold anything
    s = softcap * torch.tanh(s / softcap) if softcap else s
    largest = s.amax(-1, keepdim=True).detach()
    below = s - largest
    log_sum = below.exp().sum(-1).log()
    at_target = below.gather(-1, torch.where(counted, target, 0)[..., None])[..., 0]
    loss = log_sum - (1 - label_smoothing) * at_target
    if label_smoothing:
        loss = loss - label_smoothing * below.mean(-1)
    if z_loss:
        loss = loss + z_loss * (log_sum + largest[..., 0]) ** 2
    loss = torch.where(counted, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, **options: object
) -> Tensor:
    """`fmkernels.linear_cross_entropy`, with the logits of all tokens."""
    return cross_entropy(torch.nn.functional.linear(hidden, weight, bias), target, **options)
