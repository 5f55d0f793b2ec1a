# SPDX-License-Identifier: Apache-2.0
"""From the experts of the tokens to the rows that they have: `moe.build_mapping`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _check as check
from ._library import call, ops, register_fake

MAX_EXPERTS = 1024
MAX_ALIGNMENT = 65536
MAX_ROWS = 2**31


class Mapping(NamedTuple):
    """Which row every slot has, and which token every row; int32, drawn in docs/layouts.md."""

    pos_to_token: Tensor
    """[num_rows]: the token of a row; -1 where the row is padding."""
    token_topk_to_pos: Tensor
    """[num_tokens, num_topk]: the row of a slot; -1 where it has no expert."""
    expert_offsets: Tensor
    """[2, num_experts]: where the rows of an expert end; [0] with its padding, which is where the next one begins, [1]
    without. [0] is the `offsets` of `grouped_mm`; both are equal where the alignment is 1."""


def build_mapping(topk_idx: Tensor, num_experts: int, *, alignment: int = 1, num_rows: int | None = None) -> Mapping:
    """Sorts the slots by their expert: a counting sort, stable, so an expert's rows are in the order of the tokens.

    Args:
        topk_idx: [num_tokens, num_topk], int32 or int64, last dimension contiguous: the expert of each slot, -1 for
            none. An expert may come twice in a row, and then has two rows of that token.
        num_experts: from 1 to 1024.
        alignment: the rows of every expert begin at a multiple of it, and what is missing at their end is padding.
        num_rows: the length of pos_to_token, which cannot wait for the device; default: enough for all slots, the
            largest multiple of the alignment not above num_slots + min(num_experts, num_slots) * (alignment - 1). To be
            given where fewer slots have an expert, as after `route_expert_choice`.

    Returns:
        Mapping(pos_to_token, token_topk_to_pos, expert_offsets). Rows from expert_offsets[0, -1] on are padding.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Ids out of range, and more slots
            than rows, are refused on the CPU, on CUDA under FMKERNELS_CHECK=1; without it such a slot has no row (-1).

    CPU and CUDA (sm_80 and later). Deterministic. No gradient: there is nothing to differentiate. One launch for 2048
    slots or fewer, else three. After Gale et al. 2022, MegaBlocks, with ranks in the place of a radix sort.
    """
    op = "moe.build_mapping"
    check.integer(op, "num_experts", num_experts, 1)
    check.integer(op, "alignment", alignment, 1)
    for name, value, largest in (("num_experts", num_experts, MAX_EXPERTS), ("alignment", alignment, MAX_ALIGNMENT)):
        if value > largest:
            raise ValueError(f"{op}: {name} must be at most {largest}, got {value}.")
    if num_rows is not None:
        check.integer(op, "num_rows", num_rows, 0)
    args = (topk_idx, num_experts, alignment, -1 if num_rows is None else num_rows)
    return Mapping(*call(ops.moe_build_mapping, args, _check_build_mapping))


def most_rows(num_slots: int, num_experts: int, alignment: int) -> int:
    """Enough for whatever experts so many slots have."""
    return (num_slots + torch.sym_min(num_experts, num_slots) * (alignment - 1)) // alignment * alignment


def check_ids(op: str, topk_idx: Tensor, num_experts: int) -> None:
    """[num_tokens, num_topk], each from -1 to num_experts - 1."""
    check.is_tensor(op, "topk_idx", topk_idx)
    check.rank(op, "topk_idx", topk_idx, 2, "[num_tokens, num_topk]")
    check.dtype(op, "topk_idx", topk_idx, (torch.int32, torch.int64))
    check.last_dim_contiguous(op, "topk_idx", topk_idx)
    if topk_idx.numel() >= MAX_ROWS:
        raise ValueError(f"{op}: topk_idx must have fewer than 2**31 elements, got {topk_idx.numel()}.")
    if not check.sees_values(topk_idx) or topk_idx.numel() == 0:
        return
    low, high = (int(t) for t in torch.aminmax(topk_idx))
    if low < -1 or high >= num_experts:
        wrong = low if low < -1 else high
        raise ValueError(f"{op}: topk_idx must be from -1 to {num_experts - 1}, got {wrong}.")


def check_choices(op: str, topk_weights: Tensor, topk_idx: Tensor, num_experts: int, x: Tensor) -> None:
    """Of the tokens of x: both [num_tokens, num_topk]."""
    check_ids(op, topk_idx, num_experts)
    check.size(op, "topk_idx", topk_idx, 0, "the tokens of x,", x.shape[0])
    check.same_device(op, "topk_idx", topk_idx, "x", x)
    check.plain(op, "topk_weights", topk_weights, 2, "[num_tokens, num_topk]", torch.float32, "x", x)
    check.shape(op, "topk_weights", topk_weights, "topk_idx", topk_idx)


def _check_build_mapping(topk_idx: Tensor, num_experts: int, alignment: int, num_rows: int) -> None:
    op = "moe.build_mapping"
    check_ids(op, topk_idx, num_experts)
    most = torch.sym_max(most_rows(topk_idx.numel(), num_experts, alignment), num_rows)
    if most >= MAX_ROWS:
        raise ValueError(f"{op}: topk_idx, alignment and num_rows must make fewer than 2**31 rows, got {most}.")
    if num_rows >= 0 and check.sees_values(topk_idx):
        counts = torch.bincount(topk_idx[topk_idx >= 0].flatten(), minlength=num_experts)
        needed = int(((counts + alignment - 1) // alignment * alignment).sum())
        if needed > num_rows:
            raise ValueError(f"{op}: num_rows must be at least {needed} for these topk_idx, got {num_rows}.")
    check.kernel_exists(op, "moe_build_mapping", topk_idx)


@register_fake("moe_build_mapping")
def _(topk_idx, num_experts, alignment, num_rows):
    _check_build_mapping(topk_idx, num_experts, alignment, num_rows)
    if num_rows < 0:
        num_rows = most_rows(topk_idx.numel(), num_experts, alignment)
    shapes = ((num_rows,), topk_idx.shape, (2, num_experts))
    return tuple(topk_idx.new_empty(shape, dtype=torch.int32) for shape in shapes)
