# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=attention_backward` counts: the fixed work that docs/attention.md compares kernels by."""

from __future__ import annotations

import torch
from counters import Case

from fmkernels._library import ops

BATCH, SEQ, HEADS = 1, 512, 2


def case(head_dim: int, causal: bool) -> Case:
    generator = torch.Generator().manual_seed(head_dim)
    shape = (BATCH, SEQ, HEADS, head_dim)
    q, k, v, grad_o = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(4))
    none, scale = None, head_dim**-0.5
    options = (causal, -1, -1, scale, 0.0, 0.0, None)
    o, lse = ops.attention_forward(q, k, v, none, none, none, *options)
    scores = SEQ * (SEQ + 1) // 2 if causal else SEQ * SEQ
    name = f"head_dim {head_dim} {'causal' if causal else 'full'}"
    useful_flops = 10 * head_dim * scores * HEADS * BATCH

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grad_o, q, k, v, o, lse = tensors
        return ops.attention_backward(grad_o, none, q, k, v, o, lse, none, none, none, *options, False)[:3]

    return Case.of(name, run, (grad_o, q, k, v, o, lse), useful_flops=useful_flops)


CASES = [case(head_dim, causal) for head_dim in (64, 128) for causal in (False, True)]
