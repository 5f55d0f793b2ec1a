# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts by its definition: slot by slot where order matters, in plain torch where it does not."""

from __future__ import annotations

import torch
from torch import Tensor


def build_mapping(
    topk_idx: Tensor, num_experts: int, *, alignment: int = 1, num_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`fmkernels.moe.build_mapping`: the slots of expert 0 in their order, padding, those of expert 1, ..."""
    num_tokens, num_topk = topk_idx.shape
    slots_of: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(topk_idx.flatten().tolist()):
        if 0 <= expert < num_experts:
            slots_of[expert].append(slot)
    rows: list[int] = []
    positions = [-1] * (num_tokens * num_topk)
    ends: list[list[int]] = [[], []]
    for slots in slots_of:
        for slot in slots:
            positions[slot] = len(rows)
            rows.append(slot // num_topk)
        ends[1].append(len(rows))
        rows += [-1] * (-len(rows) % alignment)
        ends[0].append(len(rows))
    if num_rows is None:
        num_slots = topk_idx.numel()
        num_rows = (num_slots + min(num_experts, num_slots) * (alignment - 1)) // alignment * alignment
    rows += [-1] * (num_rows - len(rows))
    lists = (rows, positions, ends)
    tensors = (torch.tensor(values, dtype=torch.int32, device=topk_idx.device) for values in lists)
    pos_to_token, token_topk_to_pos, expert_offsets = tensors
    return pos_to_token, token_topk_to_pos.view(num_tokens, num_topk), expert_offsets


def permute(x: Tensor, mapping: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`fmkernels.moe.permute`."""
    tokens = mapping[0].long()
    return torch.where((tokens >= 0).unsqueeze(-1), x[tokens.clamp(min=0)], 0)


def combine(y: Tensor, mapping: tuple[Tensor, Tensor, Tensor], topk_weights: Tensor | None) -> Tensor:
    """`fmkernels.moe.combine`; where y is float32 or less, a sum in float32 that is rounded once."""
    rows = mapping[1].long()
    dtype = torch.promote_types(y.dtype, torch.float32)
    total = y.new_zeros((rows.shape[0], y.shape[1]), dtype=dtype)
    for k in range(rows.shape[1]):
        chosen = (rows[:, k] >= 0).unsqueeze(-1)
        part = torch.where(chosen, y[rows[:, k].clamp(min=0)].to(dtype), 0)
        weight = 1 if topk_weights is None else torch.where(chosen[:, 0], topk_weights[:, k], 0).to(dtype).unsqueeze(-1)
        total = total + weight * part
    return total.to(y.dtype)
