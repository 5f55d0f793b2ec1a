# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=merge_attention` counts: a chunk of a prefill, a decode, and the gradients."""

from __future__ import annotations

import torch
from counters import Case

import fmkernels
from fmkernels._library import ops


def sides(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """o_a, lse_a, o_b, lse_b."""
    generator = torch.Generator().manual_seed(0)
    batch, seq_q, heads, _ = shape
    o_a, o_b = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(batch, heads, seq_q, generator=generator) for _ in range(2))
    return o_a, lse_a, o_b, lse_b


def backward(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ops.merge_attention_backward(*args)


def cases() -> list[Case]:
    chunk = sides(1, 512, 16, 64, dtype=torch.float32)
    half_chunk = sides(1, 512, 16, 128, dtype=torch.bfloat16)
    decode = sides(8, 1, 32, 128, dtype=torch.bfloat16)
    grads = tuple(torch.ones_like(x) for x in half_chunk[:2])
    return [
        Case.of("chunk [1, 512, 16, 64] fp32", fmkernels.merge_attention, chunk),
        Case.of("chunk [1, 512, 16, 128] bf16", fmkernels.merge_attention, half_chunk),
        Case.of("decode [8, 1, 32, 128] bf16", fmkernels.merge_attention, decode),
        Case.of("gradients [1, 512, 16, 128] bf16", backward, (*grads, *half_chunk)),
    ]


CASES = cases()
