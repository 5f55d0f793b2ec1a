# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=cross_entropy` counts: loss, gradient, and both at once, over the logits of a model."""

from __future__ import annotations

import torch
from counters import Case

import fmkernels
from fmkernels._library import ops

VOCAB = 16384
SCALARS = (-100, 0.0, 0.0, 0.0)


def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return fmkernels.cross_entropy(logits, target, reduction="none")


def backward(*args: torch.Tensor) -> torch.Tensor:
    return ops.cross_entropy_backward(*args, *SCALARS)


def both(logits: torch.Tensor, grad_loss: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    overwritten = logits.clone()
    return ops.cross_entropy_gradient_(overwritten, grad_loss, target, *SCALARS), overwritten


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, VOCAB, generator=generator) * 3
    target = torch.randint(VOCAB, (4,), generator=generator)
    half, one = logits.bfloat16(), torch.ones(4)
    _, largest, sum_exp = ops.cross_entropy_forward(half, target, *SCALARS)
    return [
        Case.of(f"loss [4, {VOCAB}] fp32", loss, (logits, target)),
        Case.of(f"loss [4, {VOCAB}] bf16", loss, (half, target)),
        Case.of(f"gradient [4, {VOCAB}] bf16", backward, (one, half, target, largest, sum_exp)),
        Case.of(f"both [4, {VOCAB}] bf16", both, (half, one, target)),
    ]


CASES = cases()
