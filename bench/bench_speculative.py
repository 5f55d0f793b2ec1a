# SPDX-License-Identifier: Apache-2.0
"""`verify_chain` beside the vectorised text of torch: gather, compare, clamp, multinomial."""

from __future__ import annotations

import pytest
import torch
from measure import Contender
from torch import Tensor

import fmkernels


def composition(tokens: Tensor, target: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """All requests at once; the residual is computed for every place, of which one is used."""
    batch, num_draft = tokens.shape
    p, q = (probs[:, :num_draft].gather(2, tokens[..., None])[..., 0] for probs in (target, draft))
    accepted = (torch.rand_like(p) * q < p).long().cumprod(1).sum(1)
    rows = torch.arange(batch)
    last = target[rows, accepted]
    residual = (last - draft[rows, accepted.clamp(max=num_draft - 1)]).clamp(min=0)
    residual = torch.where((accepted < num_draft)[:, None], residual, last)
    bonus = torch.multinomial(residual, 1)[:, 0]
    places = torch.arange(num_draft + 1)
    padded = torch.cat([tokens, tokens[:, :1]], 1)
    result = torch.where(places < accepted[:, None], padded, -1)
    return result.scatter(1, accepted[:, None], bonus[:, None]), accepted


@pytest.mark.parametrize(("batch", "num_draft", "vocab"), [(1, 4, 49152), (16, 4, 49152)])
def test_chain(compare, device, batch, num_draft, vocab):
    """A draft that is the target but for some noise. What is kept is random: contenders agree in shape alone."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(batch, num_draft + 1, vocab, generator=generator, device=device) * 2
    noise = torch.randn(batch, num_draft, vocab, generator=generator, device=device) * 0.3
    target, draft = torch.softmax(logits, -1), torch.softmax(logits[:, :num_draft] + noise, -1)
    tokens = torch.multinomial(draft.flatten(0, 1), 1, generator=generator).view(batch, num_draft)
    numbers = torch.arange(batch, device=device)

    def ours(tokens: Tensor, target: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
        return fmkernels.verify_chain(tokens, target, seed=numbers, offset=numbers, draft_probs=draft)

    def shape(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(map(torch.zeros_like, result))

    sets = [(tokens, target, draft)]
    compare(
        "speculative",
        f"chain [{batch}, {num_draft}, {vocab}]",
        Contender("fmkernels", ours, sets, shape),
        [Contender("torch", composition, sets, shape)],
        num_bytes=target.nbytes + draft.nbytes,
    )
