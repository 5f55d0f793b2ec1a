# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=paged_kv_attend` counts: decode over pages of several kinds, a prefill, a mixed batch.

Inputs are the keys and values that are read, and little else: bytes and sectors compare with what a cache holds.
"""

from __future__ import annotations

import itertools

import torch
from counters import Case

from fmkernels import paged_kv

DECODE = ((1, 1024), (1, 777), (1, 512), (1, 2000))


def case(
    name: str,
    seqlens: tuple[tuple[int, int], ...] = DECODE,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    page_size: int = 16,
    stored: torch.dtype = torch.bfloat16,
    scales: str = "",
) -> Case:
    """(queries, tokens) of each request, bf16 queries; pages in a random order, each once."""
    generator = torch.Generator().manual_seed(0)
    num_pages = [-(-seq_k // page_size) for _, seq_k in seqlens]
    shape = (sum(num_pages), page_size, kv_heads, head_dim)
    order = torch.randperm(shape[0], generator=generator).to(torch.int32)
    table = torch.full((len(seqlens), max(num_pages)), -1, dtype=torch.int32)
    for b, pages in enumerate(order.split(num_pages)):
        table[b, : len(pages)] = pages
    rows = {torch.bfloat16: 1.0, torch.int8: 40.0, torch.float8_e4m3fn: 16.0}[stored]
    k_cache, v_cache = ((torch.randn(shape, generator=generator) * rows).to(stored) for _ in range(2))
    sizes = {"": None, "head": shape[2:3], "token": shape[:3]}[scales]
    options = {}
    if sizes is not None:
        options = {name: torch.rand(sizes, generator=generator) / rows for name in ("k_scale", "v_scale")}
    lengths = list(itertools.accumulate((seq_q for seq_q, _ in seqlens), initial=0))
    if any(seq_q != 1 for seq_q, _ in seqlens):
        options["cu_seqlens_q"] = torch.tensor(lengths, dtype=torch.int32)
    q = torch.randn(lengths[-1], heads, head_dim, generator=generator).to(torch.bfloat16)
    pairs = sum(seq_q * seq_k - seq_q * (seq_q - 1) // 2 for seq_q, seq_k in seqlens)
    seqlens_k = torch.tensor([seq_k for _, seq_k in seqlens], dtype=torch.int32)
    args = (q, k_cache, v_cache, table, seqlens_k)
    return Case.of(name, paged_kv.attend, args, 4 * head_dim * heads * pairs, **options)


def cases() -> list[Case]:
    return [
        case("decode 32/8 x 128, pages of 16"),
        case("decode 32/8 x 128, pages of 64", page_size=64),
        case("decode 32/8 x 128, pages of 7", page_size=7),
        case("decode 9/3 x 64, pages of 16", heads=9, kv_heads=3, head_dim=64),
        case("decode 8/4 x 256, pages of 16", heads=8, kv_heads=4, head_dim=256),
        case("decode 32/8 x 128, int8 by token", stored=torch.int8, scales="token"),
        case("decode 32/8 x 128, float8 by head", stored=torch.float8_e4m3fn, scales="head"),
        case("prefill 256 of 512, 8/2 x 128", ((256, 512),), heads=8, kv_heads=2),
        case("mixed: prefill 64 of 64, decode, 8/2 x 128", ((64, 64), (1, 1000), (1, 300)), heads=8, kv_heads=2),
    ]


CASES = cases()
