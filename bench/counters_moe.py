# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=moe` counts: routing, the mapping, rows there and back, and the gradients."""

from __future__ import annotations

import torch
from counters import Case

from fmkernels import moe
from fmkernels._library import ops

HIDDEN = 1024


def permute(x: torch.Tensor, pos_to_token: torch.Tensor) -> torch.Tensor:
    return ops.moe_permute(x, pos_to_token)


def combine(y: torch.Tensor, token_topk_to_pos: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    return ops.moe_combine(y, token_topk_to_pos, topk_weights)


def combine_backward(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return ops.moe_combine_backward(*args)


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    logits, many = normal(512, 64), normal(256, 256)
    weights, idx = moe.route(logits, 8)
    mapping = moe.build_mapping(idx, 64)
    x, y = normal(512, HIDDEN).bfloat16(), normal(len(mapping.pos_to_token), HIDDEN).bfloat16()
    groups = {"scoring": "sigmoid", "bias": normal(256), "num_groups": 8, "topk_groups": 4, "group_score": "top2"}
    return [
        Case.of("route 512 x 64, top 8", moe.route, (logits, 8)),
        Case.of("route 256 x 256, top 8, groups", moe.route, (many, 8), **groups),
        Case.of("mapping 4096 slots, 64 experts", moe.build_mapping, (idx, 64)),
        Case.of("mapping 128 slots, 64 experts", moe.build_mapping, (idx[:16], 64)),
        Case.of("permute 512 x 8 x 1024 bf16", permute, (x, mapping.pos_to_token)),
        Case.of("combine 512 x 8 x 1024 bf16", combine, (y, mapping.token_topk_to_pos, weights)),
        Case.of("combine gradients 512 x 8 x 1024 bf16", combine_backward, (x, y, *mapping[:2], weights)),
        Case.of("load balance loss 512 x 64", moe.load_balance_loss, (logits, idx)),
        Case.of("expert choice 512 x 64", moe.route_expert_choice, (logits, 64)),
    ]


CASES = cases()
