# SPDX-License-Identifier: Apache-2.0
"""The routers of vLLM, for `integrations.vllm`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check as check
from ..moe import route

IDS = (torch.int32, torch.int64)


def topk_softmax(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    e_score_correction_bias: Tensor | None = None,
    is_padding: Tensor | None = None,
) -> None:
    """`fmkernels.moe.route` by softmax, written to three tensors, under the name and with the arguments of vLLM.

    Args:
        topk_weights: [num_tokens, num_topk], float32, written.
        topk_ids: [num_tokens, num_topk], int32 or int64, written. A token that has NaN has -1, with the weight 0.
        token_expert_indices: [num_tokens, num_topk], int32, written: k * num_tokens + token.
        gating_output: [num_tokens, num_experts], float32, bfloat16 or float16.
        renormalize: the weights of a token have the sum 1.
        e_score_correction_bias: [num_experts], float32: added to the scores that choose.
        is_padding: must be None.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    check.unsupported("topk_softmax", is_padding=is_padding)
    outputs = topk_weights, topk_ids, token_expert_indices
    _topk("topk_softmax", *outputs, gating_output, "softmax", renormalize, e_score_correction_bias, 1.0)


def topk_sigmoid(
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    e_score_correction_bias: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    is_padding: Tensor | None = None,
) -> None:
    """As `topk_softmax`, by the sigmoid of each logit; routed_scaling_factor is a factor of the weights."""
    check.unsupported("topk_sigmoid", is_padding=is_padding)
    check.number("topk_sigmoid", "routed_scaling_factor", routed_scaling_factor)
    outputs = topk_weights, topk_ids, token_expert_indices
    bias = e_score_correction_bias
    _topk("topk_sigmoid", *outputs, gating_output, "sigmoid", renormalize, bias, routed_scaling_factor)


def fused_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    indices_type: torch.dtype | None = None,
    scoring_func: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """`fmkernels.moe.route` under the name and with the arguments of vLLM.

    Args:
        hidden_states: [num_tokens, hidden]: only their number is read.
        gating_output, topk, renormalize: logits, num_topk and renormalize of `route`.
        indices_type: of topk_ids: int32, which None is, or int64.
        scoring_func: "softmax" or "sigmoid".

    Returns:
        (topk_weights, topk_ids, token_expert_indices), as `topk_softmax` writes them.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "fused_topk"
    _check_router(op, hidden_states, gating_output, scoring_func)
    if indices_type not in (None, *IDS):
        raise ValueError(f"{op}: indices_type must be None or int32 or int64, got {indices_type}.")
    weights, ids = route(gating_output, topk, scoring=scoring_func, renormalize=renormalize)
    return weights, ids if indices_type is None else ids.to(indices_type), _token_expert_indices(ids)


def grouped_topk(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    num_expert_group: int = 0,
    topk_group: int = 0,
    scoring_func: str = "softmax",
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fmkernels.moe.route` with groups, under the name and with the arguments of vLLM's router.

    Args:
        hidden_states: [num_tokens, hidden]: only their number is read.
        gating_output, topk, renormalize: logits, num_topk and renormalize of `route`.
        num_expert_group, topk_group: num_groups and topk_groups, from 1.
        scoring_func: "softmax" or "sigmoid".
        routed_scaling_factor: a factor of the weights.
        e_score_correction_bias: [num_experts], float32. With it a group is worth its two largest scores, bias
            included, without it the largest one.

    Returns:
        (topk_weights float32, topk_ids int32), each [num_tokens, topk], the best first.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "grouped_topk"
    _check_router(op, hidden_states, gating_output, scoring_func)
    for name, number in (("num_expert_group", num_expert_group), ("topk_group", topk_group)):
        check.integer(op, name, number, 1)
    check.number(op, "routed_scaling_factor", routed_scaling_factor)
    weights, ids = route(
        gating_output,
        topk,
        scoring=scoring_func,
        renormalize=renormalize,
        bias=e_score_correction_bias,
        num_groups=num_expert_group,
        topk_groups=topk_group,
        group_score="max" if e_score_correction_bias is None else "top2",
    )
    return weights if routed_scaling_factor == 1.0 else weights * routed_scaling_factor, ids


def _topk(
    op: str,
    topk_weights: Tensor,
    topk_ids: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    scoring: str,
    renormalize: bool,
    bias: Tensor | None,
    scale: float,
) -> None:
    check_ids(op, topk_ids)
    weights, ids = route(gating_output, topk_ids.shape[1], scoring=scoring, renormalize=renormalize, bias=bias)
    check.copied(op, "topk_weights", topk_weights, weights if scale == 1.0 else weights * scale)
    check.copied(op, "topk_ids", topk_ids, ids.to(topk_ids.dtype))
    check.copied(op, "token_expert_indices", token_expert_indices, _token_expert_indices(ids))


def _token_expert_indices(ids: Tensor) -> Tensor:
    """Where a slot lies in a list by k and then by token."""
    num_tokens, num_topk = ids.shape
    return (
        torch.arange(num_tokens * num_topk, dtype=torch.int32, device=ids.device)
        .view(num_topk, num_tokens)
        .t()
        .contiguous()
    )


def _check_router(op: str, hidden_states: Tensor, gating_output: Tensor, scoring_func: str) -> None:
    for name, t in (("hidden_states", hidden_states), ("gating_output", gating_output)):
        check.is_tensor(op, name, t)
        check.rank(op, name, t, 2, "[num_tokens, ...]")
    check.size(op, "gating_output", gating_output, 0, "the tokens of hidden_states,", hidden_states.shape[0])
    if scoring_func not in ("softmax", "sigmoid"):
        raise ValueError(f"{op}: scoring_func must be softmax or sigmoid, got {scoring_func!r}.")


def check_ids(op: str, topk_ids: Tensor) -> None:
    check.is_tensor(op, "topk_ids", topk_ids)
    check.dtype(op, "topk_ids", topk_ids, IDS)
    check.rank(op, "topk_ids", topk_ids, 2, "[num_tokens, num_topk]")
