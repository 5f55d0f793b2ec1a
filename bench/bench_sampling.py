# SPDX-License-Identifier: Apache-2.0
"""`sample` beside what is written with torch: softmax, sort or topk, multinomial."""

from __future__ import annotations

import pytest
import torch
from measure import Contender
from torch import Tensor

import fmkernels

VOCAB = 49152


def greedy(x: Tensor) -> Tensor:
    return x.argmax(-1)


def plain(x: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(x, -1), 1)[:, 0]


def gumbel(x: Tensor) -> Tensor:
    """Without a sum and without a search."""
    return (x - torch.empty_like(x).exponential_().log()).argmax(-1)


def top_k(x: Tensor) -> Tensor:
    values, ids = x.topk(50)
    return ids.gather(-1, torch.multinomial(torch.softmax(values, -1), 1))[:, 0]


def top_p(x: Tensor) -> Tensor:
    p, ids = torch.softmax(x, -1).sort(-1, descending=True)
    kept = p.masked_fill(p.cumsum(-1) - p > 0.9, 0.0)
    return ids.gather(-1, torch.multinomial(kept, 1))[:, 0]


CASES = {
    "greedy": ({"temperature": 0.0}, {"argmax": greedy}),
    "plain": ({}, {"multinomial": plain, "gumbel": gumbel}),
    "top_k 50": ({"top_k": 50}, {"topk, multinomial": top_k}),
    "top_p 0.9": ({"top_p": 0.9}, {"sort, multinomial": top_p}),
}


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("case", CASES)
def test_sampling(compare, device, case, batch):
    """Tokens are random, so contenders agree in shape alone: what is drawn is tested elsewhere."""
    options, peers = CASES[case]
    logits = torch.randn(batch, VOCAB, generator=torch.Generator(device).manual_seed(0), device=device) * 2
    numbers = torch.arange(batch, device=device)
    is_greedy = case == "greedy"

    def ours(x: Tensor) -> Tensor:
        return fmkernels.sample(x, seed=numbers, offset=numbers, **options)

    def shape(tokens: Tensor) -> Tensor:
        return tokens if is_greedy else torch.zeros_like(tokens)

    contenders = [Contender(name, run, [(logits,)], shape) for name, run in peers.items()]
    compare(
        "sampling",
        f"{case} [{batch}, {VOCAB}] fp32",
        Contender("fmkernels", ours, [(logits,)], shape),
        contenders,
        num_bytes=logits.nbytes,
    )
