# SPDX-License-Identifier: Apache-2.0
"""The merge of two partial attention results by its definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge_attention(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse) of `fmkernels.merge_attention`; every tensor in the dtype to compute in."""
    largest = torch.maximum(lse_a, lse_b).detach()
    largest = torch.where(largest == -math.inf, 0.0, largest)
    exp_a, exp_b = (lse_a - largest).exp(), (lse_b - largest).exp()
    total = exp_a + exp_b
    lse = largest + total.log()

    def part(o: Tensor, lse: Tensor, exp: Tensor) -> Tensor:
        weight = torch.where(exp == 0, 0.0, exp / torch.where(total == 0, 1.0, total))
        weight, is_blind = (t.transpose(-1, -2).unsqueeze(-1) for t in (weight, lse == -math.inf))
        return torch.where(is_blind, 0.0, weight * o)  # a side without keys may hold anything

    return part(o_a, lse_a, exp_a) + part(o_b, lse_b, exp_b), lse
