# SPDX-License-Identifier: Apache-2.0
"""Tokens to the ranks of their experts and results back: `dispatch` and `combine` of `expert_parallel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._expert_parallel_exchange import not_traced
from ._expert_parallel_handle import Collect, Crossing, Handle, Receive, Return, Send
from ._expert_parallel_plan import plan
from ._library import needs_grad


class Pending:
    """A `dispatch` or `combine` that was begun with async_op=True."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        self._finish: Callable[[], Any] | None = finish

    @not_traced
    def wait(self) -> Any:
        """What the call would have returned. Once. On CUDA the current stream waits; the host does only for a dispatch
        over two levels without max_tokens, to learn the counts of the second one."""
        if self._finish is None:
            raise ValueError("expert_parallel: wait must be called once, it was called before.")
        finish, self._finish = self._finish, None
        return finish()


@not_traced
def dispatch(
    x: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    *,
    group: Any = None,
    max_tokens: int | None = None,
    payload: str | None = None,
    async_op: bool = False,
) -> Any:
    """Sends every token to the ranks that have its experts, once to each.

    Args:
        x: [num_tokens, hidden], float32, bfloat16 or float16, last dimension contiguous; num_tokens is each rank's own.
        topk_idx: [num_tokens, num_topk], int32 or int64: the expert of each slot, -1 for none.
        num_experts: on all ranks together; a multiple of their number, at most 1024.
        group: a process group; or two of them, or a DeviceMesh of two dimensions, across the nodes and within this one:
            then a token crosses to another node once and is passed on there, and ranks are counted node by node. None:
            the default group.
        max_tokens: at least the tokens of any rank. Then every rank receives so many rows from each, and nothing waits
            for the device: a CUDA graph can hold it. None: as many rows as there are, for which the host waits once.
        payload: "int8" or "float8_e4m3fn": tokens travel so, with a scale each. The gradient passes as if they did not.
        async_op: return a `Pending` at once, whose wait() has the result.

    Returns:
        (recv_x [received, hidden], recv_topk_idx [received, num_topk] int32, handle). The experts of recv_topk_idx are
        counted from the first of this rank, -1 for all others; handle.mapping is their `moe.build_mapping`, for
        `moe.permute` and `moe.grouped_mm`. Rows are in the order of the ranks that sent them, and of the tokens there
        (of two groups: of the ranks of this node). With max_tokens a row without a token is zeros and -1.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came, on every rank: where another rank
            refused its arguments too, or has another hidden size, num_topk, num_experts, dtype, payload, max_tokens or
            need of a gradient. On CUDA with max_tokens only under FMKERNELS_CHECK=1. Ids out of range have no expert
            where they are not checked.

    CPU and CUDA, by the group's backend. Deterministic. Every rank of the group calls it, and backward through it, in
    the same order. Differentiable once in x: a gradient comes back for each rank that a token went to, and their sum is
    rounded once (once a level of two groups). `moe_mlp` and `run` return one for each slot instead, with which the sum
    has the bits of one process.
    """
    check.flag("expert_parallel.dispatch", "async_op", async_op)
    options = {"max_tokens": max_tokens, "payload": payload, "requires_grad": (needs_grad(x),)}
    ((x, handle),) = plan("expert_parallel.dispatch", x, topk_idx, lambda: num_experts, group, **options)
    crossing = Crossing(handle)
    ticket = Send.apply(x, crossing)

    def finish() -> tuple[Tensor, Tensor, Handle]:
        recv_x = Receive.apply(ticket, crossing)
        return recv_x, handle.recv_topk_idx, handle

    return Pending(finish) if async_op else finish()


@not_traced
def combine(y: Tensor, handle: Handle, topk_weights: Tensor, *, async_op: bool = False) -> Any:
    """The weighted sum of each token's rows: out[t] = sum_k topk_weights[t, k] * y of slot (t, k), wherever that is.

    Args:
        y: [rows, hidden], float32, bfloat16 or float16, last dimension contiguous: a row for each of handle.mapping.
        handle: of `dispatch`.
        topk_weights: [num_tokens, num_topk], float32, last dimension contiguous, as this rank's tokens have them.
        async_op: return a `Pending` at once, whose wait() has the result.

    Returns:
        [num_tokens, hidden], dtype of y. Each slot's row comes back unweighted and the sum is that of `moe.combine`: in
        float32, in the order of k, rounded once. Slots without an expert are left out.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA, by the group's backend. Deterministic; the bits of one process. Nothing waits for the device.
    Differentiable once in y and topk_weights, which need gradients on all ranks or on none: the gradient of a token's
    sum goes once to each rank that has its experts.
    """
    op = "expert_parallel.combine"
    check.flag(op, "async_op", async_op)
    if not isinstance(handle, Handle):
        raise TypeError(f"{op}: handle must be a Handle of dispatch, got {type(handle).__name__}.")
    check_rows(op, y, handle)
    check_weights(op, topk_weights, handle.topk_idx, "y", y)
    crossing = Crossing(handle)
    ticket = Return.apply(y, topk_weights, None, crossing)

    def finish() -> Tensor:
        return Collect.apply(ticket, topk_weights.detach(), crossing)

    return Pending(finish) if async_op else finish()


def check_rows(op: str, y: Any, handle: Handle) -> None:
    check.is_tensor(op, "y", y)
    check.rank(op, "y", y, 2, "[rows, hidden]")
    check.dtype(op, "y", y, check.FLOAT_DTYPES)
    check.last_dim_contiguous(op, "y", y)
    check.size(op, "y", y, 0, "the rows of handle.mapping,", handle.mapping.pos_to_token.shape[0])


def check_weights(op: str, topk_weights: Any, topk_idx: Tensor, other_name: str, other: Tensor) -> None:
    check.plain(op, "topk_weights", topk_weights, 2, "[num_tokens, num_topk]", torch.float32, other_name, other)
    check.shape(op, "topk_weights", topk_weights, "topk_idx", topk_idx)
