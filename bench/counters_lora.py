# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=lora` counts: a decode step of tokens with adapters of their own, a short prefill."""

from __future__ import annotations

import torch
from counters import Case

from fmkernels._library import ops


def inputs(num_tokens: int, rank: int, hidden: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, base = (torch.randn(num_tokens, hidden, generator=generator).bfloat16() for _ in range(2))
    a = torch.randn(8, rank, hidden, generator=generator).bfloat16()
    b = torch.randn(8, hidden, rank, generator=generator).bfloat16()
    return x, base, a, b, torch.arange(num_tokens, dtype=torch.int32) % 8


def shrink(x: torch.Tensor, a: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    return ops.lora_shrink(x, a, idx)


def expand(base: torch.Tensor, b: torch.Tensor, h: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    return ops.lora_expand(base, b, h, idx, None)


def cases() -> list[Case]:
    result = []
    for num_tokens, rank in ((8, 16), (8, 64), (64, 16)):
        x, base, a, b, idx = inputs(num_tokens, rank, 1024)
        h, flops = ops.lora_shrink(x, a, idx), 2 * num_tokens * rank * 1024
        name = f"{num_tokens} tokens, rank {rank}, bf16"
        result += [
            Case.of(f"shrink {name}", shrink, (x, a, idx), flops),
            Case.of(f"expand {name}", expand, (base, b, h, idx), flops),
        ]
    return result


CASES = cases()
