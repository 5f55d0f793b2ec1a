# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=sampling` counts: draws from two rows, with and without filters."""

from __future__ import annotations

import torch
from counters import Case

import fmkernels


def cases() -> list[Case]:
    logits = (torch.randn(2, 8192, generator=torch.Generator().manual_seed(0)) * 2).bfloat16()
    numbers = torch.arange(2)
    options = {"plain": {}, "greedy": {"temperature": 0.0}, "top_k 50": {"top_k": 50}, "top_p 0.9": {"top_p": 0.9}}
    return [
        Case.of(f"{name} [2, 8192] bf16", fmkernels.sample, (logits,), seed=numbers, offset=numbers, **kwargs)
        for name, kwargs in options.items()
    ]


CASES = cases()
