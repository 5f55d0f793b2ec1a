# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=paged_kv_append` counts: new tokens of a prefill and of a decode step to their slots."""

from __future__ import annotations

import torch
from counters import Case

from fmkernels import paged_kv

DIM, KV_HEADS, PAGE = 128, 8, 16


def append(num_tokens: int, stored: torch.dtype = torch.bfloat16, rotary: bool = False) -> Case:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(num_tokens, KV_HEADS, DIM, generator=generator).bfloat16() for _ in "kv")
    num_pages = -(-num_tokens // PAGE)
    slots = torch.randperm(num_pages, generator=generator).repeat_interleave(PAGE)[:num_tokens] * PAGE
    slots = slots + torch.arange(num_tokens) % PAGE
    scales = {f"{x}_scale": torch.zeros(num_pages, PAGE, KV_HEADS) for x in "kv"} if stored == torch.int8 else {}
    if rotary:
        angles = torch.randn(num_tokens, DIM // 2, generator=generator)
        scales |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "positions": torch.arange(num_tokens)}

    def run(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        caches = [torch.zeros(num_pages, PAGE, KV_HEADS, DIM, dtype=stored) for _ in "kv"]
        paged_kv.append(k, v, *caches, slots, **scales)
        return tuple(caches)

    name = f"{num_tokens} tokens {str(stored)[6:]}{' rotated' if rotary else ''}"
    return Case.of(name, run, (k, v))


CASES = [append(256), append(256, rotary=True), append(256, torch.int8), append(16)]
