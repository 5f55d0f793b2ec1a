# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=rope` counts: a chunk of a prefill in both layouts, a part of the columns, and a decode."""

from __future__ import annotations

import torch
from counters import Case

import fmkernels


def inputs(tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(tokens, n, head_dim, generator=generator).to(dtype) for n in (heads, kv_heads))
    return q, k, torch.arange(tokens), fmkernels.rope_cache(rotary_dim, tokens, dtype=dtype)


def cases() -> list[Case]:
    llama = inputs(64, 32, 8, 128, 128, torch.bfloat16)
    floats = inputs(64, 32, 8, 64, 64, torch.float32)
    partial = inputs(64, 32, 8, 128, 64, torch.bfloat16)
    return [
        Case.of("neox [64, 32 + 8, 128] bf16", fmkernels.rope, llama),
        Case.of("interleaved [64, 32 + 8, 128] bf16", fmkernels.rope, llama, interleaved=True),
        Case.of("neox [64, 32 + 8, 64] fp32", fmkernels.rope, floats),
        Case.of("64 of 128 columns [64, 32 + 8, 128] bf16", fmkernels.rope, partial),
        Case.of("decode [8, 32 + 8, 128] bf16", fmkernels.rope, inputs(8, 32, 8, 128, 128, torch.bfloat16)),
    ]


CASES = cases()
