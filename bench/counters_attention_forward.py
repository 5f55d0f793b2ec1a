# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=attention_forward` counts: the fixed work that docs/attention.md compares kernels by."""

from __future__ import annotations

import torch
from counters import Case

import fmkernels

BATCH, SEQ, HEADS = 1, 1024, 2


def case(head_dim: int, causal: bool) -> Case:
    generator = torch.Generator().manual_seed(head_dim)
    shape = (BATCH, SEQ, HEADS, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(3))
    scores = SEQ * (SEQ + 1) // 2 if causal else SEQ * SEQ
    name = f"head_dim {head_dim} {'causal' if causal else 'full'}"
    useful_flops = 4 * head_dim * scores * HEADS * BATCH
    return Case.of(name, fmkernels.attention, (q, k, v), useful_flops=useful_flops, causal=causal, return_lse=True)


CASES = [case(head_dim, causal) for head_dim in (64, 128) for causal in (False, True)]
