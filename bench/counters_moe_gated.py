# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=moe_gated` counts: the product with the gated unit by tiles and layouts, and its gradients."""

from __future__ import annotations

import torch
from counters import Case
from counters_moe_grouped_mm import loads_of, normal

from fmkernels import moe
from fmkernels._library import ops

INNER, WIDTH = 1024, 256


def gated_mm(*args) -> tuple[torch.Tensor, ...]:
    return ops.moe_gated_mm(*args)


def backward(*args) -> tuple[torch.Tensor, ...]:
    return ops.moe_gated_backward(*args)


def mm_case(num_rows: int, num_experts: int, layout: str, order: str, keeps: bool = False, topk: int = 2) -> Case:
    """Rows of num_rows / topk tokens, every one of which has `topk` of them, in turns."""
    offsets = loads_of("balanced", num_rows, num_experts).cumsum(0).int()
    tokens = torch.arange(num_rows, dtype=torch.int32) * 7 % (num_rows // topk)
    b = normal(num_experts, 2 * WIDTH, INNER).transpose(1, 2) if layout == "columns" else None
    b = normal(num_experts, INNER, 2 * WIDTH) if b is None else b
    name = f"mm, {num_rows} rows, {num_experts} experts, b by {layout}, {order}{', gate and up kept' if keeps else ''}"
    arguments = (normal(num_rows // topk, INNER), b, offsets, tokens, order == "in turns", keeps)
    return Case.of(name, gated_mm, arguments, 4 * num_rows * INNER * WIDTH)


def decode_case(num_tokens: int, topk: int, num_experts: int) -> Case:
    """A row or two an expert: what must be read is b, of the experts that have rows."""
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
    mapping = moe.build_mapping(moe.route(logits, topk)[1], num_experts)
    offsets = mapping.expert_offsets[0]
    used = int((offsets.diff(prepend=offsets.new_zeros(1)) > 0).sum())
    b = normal(1, 2 * WIDTH, INNER).expand(num_experts, -1, -1).contiguous().transpose(1, 2)
    arguments = (normal(num_tokens, INNER), b, offsets, mapping.pos_to_token, False, False)
    name = f"mm, {num_tokens} tokens, top {topk} of {num_experts} experts, of which {used} have rows"
    return Case.of(name, gated_mm, arguments, 4 * num_tokens * topk * INNER * WIDTH)


def backward_case(order: str) -> Case:
    weights, idx = moe.route(torch.randn(256, 64, generator=torch.Generator().manual_seed(0)), 8)
    mapping = moe.build_mapping(idx, 64)
    rows = len(mapping.pos_to_token)
    arguments = (normal(rows, 512), normal(rows, 1024), *mapping[:2], weights, order == "in turns")
    return Case.of(f"gradients, {rows} rows x 512, {order}", backward, arguments)


CASES = [
    mm_case(1024, 8, "rows", "halves"),
    mm_case(1024, 8, "columns", "halves"),
    mm_case(1024, 8, "rows", "in turns"),
    mm_case(1024, 8, "columns", "in turns"),
    mm_case(1024, 8, "columns", "halves", keeps=True),
    *[mm_case(rows * 8, 8, "columns", "halves") for rows in (64, 32, 16)],
    decode_case(1, 8, 64),
    decode_case(16, 2, 64),
    decode_case(16, 8, 64),
    backward_case("halves"),
    backward_case("in turns"),
]
