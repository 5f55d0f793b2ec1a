# SPDX-License-Identifier: Apache-2.0
"""Experts that live on the ranks of a `torch.distributed` group: tokens to them and results back.

Expert e is on rank e // (num_experts / ranks). A token goes once to each rank that has an expert of it; of each of its
slots a row comes back, and the sum is taken at home in the order of one process: results have the bits of `moe.moe_mlp`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._expert_parallel_handle import Collect, Crossing, Handle, Receive, Return, Send
from ._expert_parallel_plan import plan
from ._expert_parallel_style import ExpertParallel
from ._library import autocast
from ._moe_grouped import grouped_mm
from .glu import swiglu

__all__ = ["ExpertParallel", "Handle", "Pending", "combine", "dispatch", "moe_mlp", "run"]


class Pending:
    """A `dispatch` or `combine` that was begun with async_op=True."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        self._finish: Callable[[], Any] | None = finish

    def wait(self) -> Any:
        """What the call would have returned. Once; on CUDA the current stream waits, and not the host."""
        if self._finish is None:
            raise ValueError("expert_parallel: wait must be called once, it was called before.")
        finish, self._finish = self._finish, None
        return finish()


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
    requires_grad = isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()
    options = {"max_tokens": max_tokens, "payload": payload, "requires_grad": requires_grad}
    ((x, handle),) = plan("expert_parallel.dispatch", x, topk_idx, num_experts, group, **options)
    crossing = Crossing(handle)
    ticket = Send.apply(x, crossing)

    def finish() -> tuple[Tensor, Tensor, Handle]:
        recv_x = Receive.apply(ticket, crossing)
        return recv_x, handle.recv_topk_idx, handle

    return Pending(finish) if async_op else finish()


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
    check.is_tensor(op, "y", y)
    check.rank(op, "y", y, 2, "[rows, hidden]")
    check.dtype(op, "y", y, check.FLOAT_DTYPES)
    check.last_dim_contiguous(op, "y", y)
    if not hasattr(handle, "mapping"):
        raise ValueError(f"{op}: handle must be of a dispatch whose tokens have arrived, got one before its wait().")
    check.size(op, "y", y, 0, "the rows of handle.mapping,", handle.mapping.pos_to_token.shape[0])
    check_weights(op, topk_weights, handle.topk_idx, y)
    crossing = Crossing(handle)
    ticket = Return.apply(y, topk_weights, crossing)

    def finish() -> Tensor:
        return Collect.apply(ticket, topk_weights.detach(), crossing)

    return Pending(finish) if async_op else finish()


def run(
    experts: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    *,
    group: Any = None,
    max_tokens: int | None = None,
    payload: str | None = None,
    num_chunks: int = 1,
    shared: Callable[[Tensor], Tensor] | None = None,
    requires_grad: bool = False,
) -> Tensor:
    """A layer of any experts: dispatch, experts(rows, offsets), combine, in an order in which the network is in use.

    Args:
        experts: called as experts(rows [rows, hidden], offsets [local experts] int32) -> [rows, out]: the rows of the
            local experts, one expert after another, and where they end, as `moe.grouped_mm` takes them.
        x: [num_tokens, hidden], as of `dispatch`.
        topk_weights: [num_tokens, num_topk], float32.
        topk_idx: [num_tokens, num_topk], int32 or int64, -1 for none.
        num_experts: on all ranks together.
        group: as of `dispatch`; None: the default group.
        max_tokens: as of `dispatch`.
        payload: as of `dispatch`.
        num_chunks: the tokens go in so many parts of equal size, 1 to 16: the experts of one compute while the next
            travels. For all parts the host waits once.
        shared: called as shared(x) while the tokens travel; its result is added to that of the experts.
        requires_grad: whether `experts` has parameters that need a gradient.

    Returns:
        [num_tokens, out]. The bits do not depend on num_chunks, nor on the number of ranks.

    Raises:
        ValueError, TypeError: as `dispatch` and `combine`.

    Differentiable once in x, topk_weights and what `experts` and `shared` hold. Gradients of x and topk_weights have
    the bits of one process, and so do those of the experts where num_chunks is 1 and the ranks have the tokens of one
    process in its order; else their sum over the tokens is of the parts' sums.
    """
    out, extra = run_parts(
        "expert_parallel.run",
        experts,
        x,
        topk_weights,
        topk_idx,
        num_experts,
        shared=shared,
        requires_grad=requires_grad,
        group=group,
        max_tokens=max_tokens,
        payload=payload,
        num_chunks=num_chunks,
    )
    return out if extra is None else out + extra


def run_parts(
    op: str,
    experts: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    num_experts: int,
    *,
    num_chunks: int,
    shared: Callable[[], Tensor] | None,
    requires_grad: bool,
    check_more: Callable[[], None] = lambda: None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """(what the experts give, what `shared` gives)."""
    tensors = (x, topk_weights)
    requires_grad = torch.is_grad_enabled() and (requires_grad or needs_grad(*tensors))

    def check_all() -> None:
        check_weights(op, topk_weights, topk_idx, x)
        check_more()

    chunks = plan(
        op, x, topk_idx, num_experts, num_chunks=num_chunks, requires_grad=requires_grad, check_more=check_all, **options
    )
    weights = topk_weights.split([part.shape[0] for part, _ in chunks])
    crossings = [Crossing(handle, by_slot=True) for _, handle in chunks]
    pending: list[Pending] = []
    ticket, extra = Send.apply(chunks[0][0], crossings[0]), None
    for i, crossing in enumerate(crossings):
        arriving = ticket
        if i + 1 < num_chunks:
            ticket = Send.apply(chunks[i + 1][0], crossings[i + 1])
        if i == 0 and shared is not None:
            extra = shared()
        rows = Receive.apply(arriving, crossing)
        y = experts(rows, crossing.handle.mapping.expert_offsets[0])
        pending.append(combine(y, crossing.handle, weights[i], async_op=True))
    parts = [result.wait() for result in pending]
    return parts[0] if num_chunks == 1 else torch.cat(parts), extra


def moe_mlp(
    x: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    *,
    group: Any = None,
    max_tokens: int | None = None,
    payload: str | None = None,
    num_chunks: int = 1,
    shared: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`moe.moe_mlp` over a group: every rank has its own tokens and num_experts / ranks of the experts.

    Args:
        x: [num_tokens, hidden], as of `moe.moe_mlp`; num_tokens is each rank's own.
        w_gate_up: [local experts, 2 * width, hidden], gate then up, dtype of x.
        w_down: [local experts, hidden, width], dtype of x.
        topk_weights: [num_tokens, num_topk], float32.
        topk_idx: [num_tokens, num_topk], int32 or int64: counted over all ranks, -1 for none.
        group, max_tokens, payload, num_chunks, shared: as of `run`.

    Returns:
        [num_tokens, hidden], dtype of x: the bits of `moe.moe_mlp` with all experts, whatever the ranks are; without
        a payload.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    Differentiable once in x, both weights and topk_weights, as `run` says.
    """
    op = "expert_parallel.moe_mlp"
    x, w_gate_up, w_down = autocast(3, x, w_gate_up, w_down)
    raise NotImplementedError
