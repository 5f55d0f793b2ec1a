# SPDX-License-Identifier: Apache-2.0
"""`cross_entropy` and `linear_cross_entropy`, forward and gradients, beside torch: eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import Contender, num_sets
from torch import Tensor

import fmkernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def training(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """(loss, gradients of all inputs but the last, which is the target)"""

    def run(*args: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in args[:-1]]
            value = loss(*leaves, args[-1])
        return value.detach().to(leaves[0].dtype), *torch.autograd.grad(value, leaves)

    return run


def inputs(num_tokens: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(num_tokens, vocab, generator=generator, device=device) * 3
    return logits.to(dtype), torch.randint(vocab, (num_tokens,), generator=generator, device=device)


@pytest.mark.parametrize(("num_tokens", "vocab"), [(512, 49152), (64, 49152), (128, 128256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy(compare, device, cache_bytes, num_tokens, vocab, dtype):
    """Three times the logits are read or written: once for the loss, and once each way for the gradient."""
    first = inputs(num_tokens, vocab, DTYPES[dtype], device, 0)
    count = min(4, num_sets(first[0].nbytes, cache_bytes))
    sets = [first, *(inputs(num_tokens, vocab, DTYPES[dtype], device, seed) for seed in range(1, count))]
    torch.compiler.reset()
    peers = [
        Contender("torch", training(F.cross_entropy), sets),
        Contender("torch, float32", training(lambda x, t: F.cross_entropy(x.float(), t)), sets),
    ]
    ours = Contender("fmkernels", training(fmkernels.cross_entropy), sets)
    group = "cross-entropy" if dtype == "fp32" else "cross-entropy / bf16"
    group = "cross-entropy / few tokens" if num_tokens < 128 else group  # whose time is that of the allocator
    compare(group, f"[{num_tokens}, {vocab}] {dtype}", ours, peers, num_bytes=3 * first[0].nbytes)


def linear(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target)


@pytest.mark.parametrize(("num_tokens", "dim", "vocab"), [(512, 576, 49152)])
def test_linear_cross_entropy(compare, device, num_tokens, dim, vocab):
    """Three products of the library, and what lies between them."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_tokens, dim, generator=generator, device=device)
    weight = torch.randn(vocab, dim, generator=generator, device=device) * dim**-0.5
    sets = [(hidden, weight, torch.randint(vocab, (num_tokens,), generator=generator, device=device))]
    ours = Contender("fmkernels", training(fmkernels.linear_cross_entropy), sets)
    peer = Contender("torch", training(linear), sets)
    compare(
        "linear cross-entropy",
        f"[{num_tokens}, {dim}] x {vocab} fp32",
        ours,
        [peer],
        flops=6 * num_tokens * dim * vocab,
    )
