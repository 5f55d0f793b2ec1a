# SPDX-License-Identifier: Apache-2.0
"""The routing of `moe`, its mapping, permute and combine beside what is written with torch."""

from __future__ import annotations

import pytest
import torch
from measure import Contender, num_sets
from torch import Tensor

from fmkernels import moe


def softmax_topk(logits: Tensor, num_topk: int) -> tuple[Tensor, Tensor]:
    weights, idx = torch.softmax(logits, -1).topk(num_topk, -1)
    return weights / weights.sum(-1, keepdim=True), idx.int()


def topk_softmax(logits: Tensor, num_topk: int) -> tuple[Tensor, Tensor]:
    """The same weights from fewer exponentials."""
    values, idx = logits.topk(num_topk, -1)
    return torch.softmax(values, -1), idx.int()


def sorted_mapping(topk_idx: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = topk_idx.flatten()
    order = torch.sort(flat, stable=True).indices
    positions = torch.empty_like(flat)
    positions[order] = torch.arange(len(flat), dtype=torch.int32, device=flat.device)
    ends = torch.bincount(flat, minlength=num_experts).cumsum(0).int()
    return (order // topk_idx.shape[1]).int(), positions.view_as(topk_idx), torch.stack([ends, ends])


@pytest.mark.parametrize("num_experts", [64, 256])
def test_route(compare, device, num_experts):
    generator = torch.Generator().manual_seed(0)
    sets = [(torch.randn(4096, num_experts, generator=generator).to(device), 8)]
    peers = [Contender("torch, softmax", softmax_topk, sets), Contender("torch, topk", topk_softmax, sets)]
    num_bytes = sets[0][0].nbytes + 4096 * 8 * 8
    compare(
        "route", f"4096 x {num_experts}, top 8", Contender("fmkernels", moe.route, sets), peers, num_bytes=num_bytes
    )


@pytest.mark.parametrize("num_tokens", [128, 4096, 65536])
def test_mapping(compare, device, num_tokens):
    scores = torch.rand(num_tokens, 256, generator=torch.Generator().manual_seed(0))
    sets = [(scores.topk(8).indices.int().to(device), 256)]
    own = Contender("fmkernels", lambda *args: tuple(moe.build_mapping(*args)), sets)
    peers = [Contender("torch.sort", sorted_mapping, sets)]
    group = "moe mapping" if num_tokens > 128 else "moe mapping, few tokens"
    compare(group, f"{num_tokens} x 8, 256 experts", own, peers, num_bytes=sets[0][0].nbytes * 3)


def moved(num_tokens: int, hidden: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple:
    """(x, y, mapping, weights) of 64 experts, 8 a token."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.rand(num_tokens, 64, generator=generator).topk(8).indices.int()
    mapping = moe.Mapping(*(t.to(device) for t in moe.build_mapping(idx, 64)))
    x, y = (torch.randn(n, hidden, generator=generator).to(dtype).to(device) for n in (num_tokens, 8 * num_tokens))
    return x, y, mapping, torch.rand(num_tokens, 8, generator=generator).to(device)


SIZES = [(4096, 1024, torch.float32), (4096, 2048, torch.bfloat16), (256, 1024, torch.float32)]
NAMES = [f"{tokens} x 8, {hidden} {'fp32' if dtype == torch.float32 else 'bf16'}" for tokens, hidden, dtype in SIZES]


@pytest.mark.parametrize(("size", "name"), list(zip(SIZES, NAMES, strict=True)), ids=NAMES)
def test_permute(compare, device, cache_bytes, size, name):
    first = moved(*size, device, 0)
    sets = [(x, mapping) for x, _, mapping, _ in (first,)]
    rows = [(x, mapping.pos_to_token.long()) for x, mapping in sets]
    peers = [Contender("torch.index_select", lambda x, rows: x.index_select(0, rows), rows)]
    own = Contender("fmkernels", moe.permute, sets)
    group = "moe permute" if first[1].nbytes > cache_bytes else "moe permute, in the cache"
    compare(group, name, own, peers, num_bytes=2 * first[1].nbytes)


@pytest.mark.parametrize(("size", "name"), list(zip(SIZES, NAMES, strict=True)), ids=NAMES)
def test_combine(compare, device, cache_bytes, size, name):
    first = moved(*size, device, 0)
    count = num_sets(first[1].nbytes, cache_bytes) if first[1].nbytes > cache_bytes else 1
    sets = [first[1:], *(moved(*size, device, seed)[1:] for seed in range(1, min(count, 3)))]

    def composition(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        parts = y.index_select(0, rows).view(*weights.shape, -1)
        return (parts * weights.unsqueeze(-1)).sum(1).to(y.dtype)

    peers = [
        Contender("torch.index_select", composition, [(y, m.token_topk_to_pos.long().flatten(), w) for y, m, w in sets])
    ]
    own = Contender("fmkernels", moe.combine, sets)
    compare("moe combine", name, own, peers, num_bytes=first[1].nbytes * 9 // 8)
