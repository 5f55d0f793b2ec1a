# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=speculative` counts: a chain of three drafted tokens with and without its distributions."""

from __future__ import annotations

import torch
from counters import Case

import fmkernels


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 8192, generator=generator)
    target = torch.softmax(logits, -1)
    draft = torch.softmax(logits[:, :3] + torch.randn(2, 3, 8192, generator=generator) * 0.3, -1)
    tokens = torch.multinomial(draft.flatten(0, 1), 1, generator=generator).view(2, 3)
    numbers = {"seed": torch.arange(2), "offset": torch.arange(2)}
    return [
        Case.of("chain [2, 3, 8192]", fmkernels.verify_chain, (tokens, target), **numbers, draft_probs=draft),
        Case.of("chain [2, 3, 8192], no draft probs", fmkernels.verify_chain, (tokens, target), **numbers),
    ]


CASES = cases()
