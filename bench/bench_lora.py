# SPDX-License-Identifier: Apache-2.0
"""`lora` beside what torch offers for many adapters in a batch: a loop over them, or a gathered batch of products."""

from __future__ import annotations

import pytest
import torch
from measure import Contender, num_sets
from torch import Tensor

import fmkernels

ADAPTERS = 8


def loop(x: Tensor, base: Tensor, a: Tensor, b: Tensor, idx: Tensor, scale: Tensor) -> Tensor:
    """Two products an adapter, with its tokens gathered and added back."""
    y = base.to(torch.float32, copy=True)
    for adapter in range(len(a)):
        tokens = (idx == adapter).nonzero().flatten()
        if len(tokens) > 0:
            delta = (x[tokens].float() @ a[adapter].float().T) @ b[adapter].float().T
            y.index_add_(0, tokens, delta * scale[adapter])
    return y.to(base.dtype)


def gathered(x: Tensor, base: Tensor, a: Tensor, b: Tensor, idx: Tensor, scale: Tensor) -> Tensor:
    """Two batches of products with the adapters of each token side by side; right while every token has one."""
    h = torch.bmm(a[idx].float(), x.float().unsqueeze(-1))
    delta = torch.bmm(b[idx].float(), h).squeeze(-1)
    return torch.addcmul(base.float(), delta, scale[idx].unsqueeze(-1)).to(base.dtype)


def inputs(num_tokens: int, rank: int, hidden: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * factor).to(dtype).to(device)

    a = normal(ADAPTERS, rank, hidden, factor=hidden**-0.5)
    b = normal(ADAPTERS, hidden, rank, factor=rank**-0.5)
    idx = torch.arange(num_tokens, dtype=torch.int32) * ADAPTERS // num_tokens  # sorted: the kind case for the peers
    scale = torch.rand(ADAPTERS, generator=generator)
    return normal(num_tokens, hidden), normal(num_tokens, hidden), a, b, idx.to(device), scale.to(device)


@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("num_tokens", [1, 8, 32, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lora(compare, device, cache_bytes, dtype, num_tokens, rank):
    """One projection of 4096 features; each token of up to eight has an adapter of its own."""
    hidden = 4096
    first = inputs(num_tokens, rank, hidden, dtype, device, 0)
    used = min(num_tokens, ADAPTERS)
    num_bytes = sum(t.nbytes for t in first[2:4]) * used // ADAPTERS + 3 * first[0].nbytes
    count = min(num_sets(num_bytes, cache_bytes), 12)
    sets = [first, *(inputs(num_tokens, rank, hidden, dtype, device, seed) for seed in range(1, count))]
    peers = [Contender("torch, loop", loop, sets)]
    if num_tokens <= 32:
        peers.append(Contender("torch, gathered", gathered, sets))
    name = f"{num_tokens} tokens, rank {rank}, {'fp32' if dtype == torch.float32 else 'bf16'}"
    group = "lora prefill" if num_tokens > 32 else "lora decode"
    work = {"flops": 4 * num_tokens * rank * hidden} if num_tokens > 32 else {"num_bytes": num_bytes}
    compare(group, name, Contender("fmkernels", fmkernels.lora, sets), peers, **work)
