# SPDX-License-Identifier: Apache-2.0
"""The experts of vLLM, for `integrations.vllm`: the rows that they have, and all of the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check as check
from ..moe import build_mapping, moe_mlp
from ._vllm_route import IDS, check_ids


def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    return_scatter_idx: bool = False,
) -> tuple[Tensor, ...]:
    """`fmkernels.moe.build_mapping` under the name and with the results of vLLM.

    Args:
        topk_ids: [num_tokens, num_topk], int32 or int64. Ids that are no expert are left out, -1 too.
        block_size: rows of an expert are padded to a multiple of it.
        num_experts: from 1 to 1024; with expert_map those of all ranks.
        expert_map: [num_experts], int32: the expert's number on this rank, -1: it is on another.
        pad_sorted_ids: sorted_token_ids is as long as a multiple of block_size.
        ignore_invalid_experts: slots of experts of other ranks are left out; else they have blocks of the expert -1.
        return_scatter_idx: a fourth result is wanted; with expert_map only where slots of other ranks are left out.

    Returns:
        (sorted_token_ids, expert_ids, num_tokens_post_pad), int32. sorted_token_ids: the slots, token * num_topk + k,
        by their expert, each expert's in their order; topk_ids.numel() is padding. expert_ids: the expert of each
        block; 0, through expert_map if that is given, of blocks behind the last. num_tokens_post_pad [1]: how many
        rows there are. scatter_idx [topk_ids.numel(), 1]: of each slot its own number, -1 where it is left out.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "moe_align_block_size"
    check_ids(op, topk_ids)
    for name, number in (("block_size", block_size), ("num_experts", num_experts)):
        check.integer(op, name, number, 1)
    flags = {"pad_sorted_ids": pad_sorted_ids, "ignore_invalid_experts": ignore_invalid_experts}
    for name, flag in (flags | {"return_scatter_idx": return_scatter_idx}).items():
        check.flag(op, name, flag)
    if return_scatter_idx and expert_map is not None and not ignore_invalid_experts:
        raise ValueError(
            f"{op}: ignore_invalid_experts must be True for return_scatter_idx with expert_map, got False."
        )
    ids = _known(topk_ids, num_experts)
    if expert_map is not None:
        _check_map(op, expert_map, num_experts, topk_ids)
        if ignore_invalid_experts:
            ids, expert_map = _known(_local(ids, expert_map), num_experts), None
    num_slots = topk_ids.numel()
    mapping = build_mapping(ids.reshape(-1, 1), num_experts, alignment=block_size)
    rows, ends = mapping.pos_to_token, mapping.expert_offsets[0]

    num_rows = num_slots + num_experts * (block_size - 1)
    if pad_sorted_ids:
        num_rows = -(-num_rows // block_size) * block_size
    if num_slots < num_experts:
        num_rows = min(num_slots * block_size, num_rows)
    sorted_ids = rows.new_full((num_rows,), num_slots)
    sorted_ids[: rows.shape[0]] = torch.where(rows < 0, num_slots, rows)
    starts = torch.arange(0, num_rows, block_size, dtype=torch.int32, device=rows.device)
    expert_ids = torch.searchsorted(ends, starts, right=True, out_int32=True)
    expert_ids = torch.where(starts < ends[-1], expert_ids, 0)
    if expert_map is not None:
        expert_ids = expert_map[expert_ids.long()].int()
    result = sorted_ids, expert_ids, ends[-1:].clone()
    if not return_scatter_idx:
        return result
    slots = torch.arange(num_slots, dtype=torch.int32, device=rows.device).view(-1, 1)
    return *result, torch.where(mapping.token_topk_to_pos >= 0, slots, -1)


def fused_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    inplace: bool = False,
    activation: Any = "silu",
    apply_router_weight_on_input: bool = False,
    global_num_experts: int = -1,
    expert_map: Tensor | None = None,
    quant_config: Any = None,
) -> Tensor:
    """`fmkernels.moe.moe_mlp` under the name of vLLM; what follows topk_ids has another order in each of its releases.

    Args:
        hidden_states: [num_tokens, hidden].
        w1: [num_experts, 2 * width, hidden], gate then up.
        w2: [num_experts, hidden, width].
        topk_weights: [num_tokens, num_topk].
        topk_ids: [num_tokens, num_topk], int32 or int64. Ids that are no expert are left out, -1 too.
        inplace: hidden_states is written, and returned.
        activation: "silu", or an enumeration of that value.
        apply_router_weight_on_input: the weight is that of the token and not of the result; for num_topk 1.
        global_num_experts: those of all ranks, -1: as many as w1 has.
        expert_map: [global_num_experts], int32: the expert's place in w1, -1: it is on another rank.
        quant_config: must be None.

    Returns:
        [num_tokens, hidden]. A token without an expert here gives zeros.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "fused_experts"
    check.unsupported(op, quant_config=quant_config)
    for name, flag in (("inplace", inplace), ("apply_router_weight_on_input", apply_router_weight_on_input)):
        check.flag(op, name, flag)
    activation = getattr(activation, "value", activation)
    if activation != "silu":
        raise ValueError(f"{op}: activation must be silu: no other is supported, got {activation!r}.")
    for name, t, num_dims, layout in (
        ("hidden_states", hidden_states, 2, "[num_tokens, hidden]"),
        ("w1", w1, 3, "[num_experts, 2 * width, hidden]"),
        ("topk_weights", topk_weights, 2, "[num_tokens, num_topk]"),
    ):
        check.is_tensor(op, name, t)
        check.rank(op, name, t, num_dims, layout)
    check_ids(op, topk_ids)
    check.integer(op, "global_num_experts", global_num_experts, -1)
    num_experts = w1.shape[0] if global_num_experts == -1 else global_num_experts
    check.integer(op, "global_num_experts", num_experts, 1)
    ids = _known(topk_ids, num_experts)
    if expert_map is not None:
        _check_map(op, expert_map, num_experts, topk_ids)
        ids = _known(_local(ids, expert_map), w1.shape[0])
    elif num_experts != w1.shape[0]:
        raise ValueError(
            f"{op}: global_num_experts must be that of w1, {w1.shape[0]}, without expert_map, got {global_num_experts}."
        )
    x, weights = hidden_states, topk_weights.float()
    if apply_router_weight_on_input:
        if topk_ids.shape[1] != 1:
            raise ValueError(
                f"{op}: topk_ids must have one expert a token with apply_router_weight_on_input, "
                f"got {topk_ids.shape[1]}."
            )
        check.shape(op, "topk_weights", topk_weights, "topk_ids", topk_ids)
        check.size(op, "topk_ids", topk_ids, 0, "the tokens of hidden_states,", x.shape[0])
        x, weights = (x * weights).to(x.dtype), torch.ones_like(weights)
    out = moe_mlp(x, w1, w2, weights, ids)
    return check.copied(op, "hidden_states", hidden_states, out) if inplace else out


def _known(ids: Tensor, num_experts: int) -> Tensor:
    return torch.where((ids >= 0) & (ids < num_experts), ids, -1)


def _local(ids: Tensor, expert_map: Tensor) -> Tensor:
    return torch.where(ids < 0, -1, expert_map[ids.clamp(min=0).long()])


def _check_map(op: str, expert_map: Tensor, num_experts: int, topk_ids: Tensor) -> None:
    check.is_tensor(op, "expert_map", expert_map)
    check.dtype(op, "expert_map", expert_map, IDS)
    check.rank(op, "expert_map", expert_map, 1, "[num_experts]")
    check.size(op, "expert_map", expert_map, 0, "as many elements as there are experts,", num_experts)
    check.same_device(op, "expert_map", expert_map, "topk_ids", topk_ids)
