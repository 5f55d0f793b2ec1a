# SPDX-License-Identifier: Apache-2.0
"""A layer of any experts on several ranks, whole: `run` of `expert_parallel`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._expert_parallel_calls import check_rows, check_weights
from ._expert_parallel_exchange import not_traced
from ._expert_parallel_handle import Collect, Crossing, Receive, Return, Send
from ._expert_parallel_plan import plan
from ._library import needs_grad


@not_traced
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
    """A layer of any experts: dispatch, experts(rows, offsets), combine, in an order that keeps the network in use.

    Args:
        experts: called as experts(rows [rows, hidden], offsets [local experts] int32) -> [rows, out]: the rows of the
            local experts, one expert after another, and where they end, as `moe.grouped_mm` takes them.
        x: [num_tokens, hidden], as of `dispatch`.
        topk_weights: [num_tokens, num_topk], float32, last dimension contiguous.
        topk_idx: [num_tokens, num_topk], int32 or int64, -1 for none.
        num_experts: on all ranks together.
        group, max_tokens, payload: as of `dispatch`.
        num_chunks: the tokens go in so many parts of equal size, 1 to 16: the experts of one compute while the next
            travels. For all parts the host waits once, and on the second level of two once a part.
        shared: called as shared(x) while the first tokens travel; its result is added to that of the experts.
        requires_grad: whether `experts` has parameters that need a gradient.

    Returns:
        [num_tokens, out]. The bits depend neither on num_chunks nor on the number of ranks.

    Raises:
        ValueError, TypeError: as `dispatch` and `combine`.

    Deterministic. Differentiable once in x, topk_weights and what `experts` and `shared` hold. Of x a gradient comes
    back for each slot. Gradients of x and topk_weights have the bits of one process; those of the experts too, where
    num_chunks is 1 and the ranks have the tokens of one process in its order. With more chunks they are sums of sums.
    """
    out, extra = run_steps(
        "expert_parallel.run",
        _step(experts, requires_grad and torch.is_grad_enabled()),
        x,
        topk_weights,
        topk_idx,
        lambda: num_experts,
        shared=shared,
        requires_grad=requires_grad,
        check_more=lambda: None,
        group=group,
        max_tokens=max_tokens,
        payload=payload,
        num_chunks=num_chunks,
    )
    return out if extra is None else out + extra


Step = Callable[[Tensor, Crossing, Tensor, Crossing], Tensor]


def _step(experts: Callable[[Tensor, Tensor], Tensor], requires_grad: bool) -> Step:
    """From tokens that travel to results that travel; autograd records it where no row came, too."""

    def step(ticket: Tensor, there: Crossing, topk_weights: Tensor, back: Crossing) -> Tensor:
        rows = Receive.apply(ticket, there)
        y = experts(rows, there.handle.mapping.expert_offsets[0])
        check_rows("expert_parallel.run", y, there.handle)
        if requires_grad and not y.requires_grad:
            y = y.detach().requires_grad_()
        return Return.apply(y, topk_weights, rows, back)

    return step


def run_steps(
    op: str,
    step: Step,
    x: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    count_experts: Callable[[], Any],
    *,
    num_chunks: int,
    shared: Callable[[Tensor], Tensor] | None,
    requires_grad: bool,
    check_more: Callable[[], None],
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The order is that of one direction of the network after another: send a part, then compute the one before it.

    Autograd walks back by it: the gradients of a part travel while those of the one before it are computed.
    """

    def check_all() -> None:
        check_weights(op, topk_weights, topk_idx, "x", x)
        check_more()

    needs = (needs_grad(x), needs_grad(topk_weights), requires_grad and torch.is_grad_enabled())
    options |= {"num_chunks": num_chunks, "requires_grad": needs, "check_more": check_all}
    parts = plan(op, x, topk_idx, count_experts, **options)
    weights = topk_weights.split([rows.shape[0] for rows, _ in parts])
    crossings = [Crossing(handle, by_slot=True) for _, handle in parts]
    returns = [Crossing(handle) for _, handle in parts]
    leaving = Send.apply(parts[0][0], crossings[0])
    extra = None if shared is None else shared(x)
    tickets = []
    for i, crossing in enumerate(crossings):
        arriving = leaving
        if i + 1 < len(parts):
            leaving = Send.apply(parts[i + 1][0], crossings[i + 1])
        tickets.append(step(arriving, crossing, weights[i], returns[i]))
    outs = [Collect.apply(*part) for part in zip(tickets, (w.detach() for w in weights), returns, strict=True)]
    return outs[0] if len(outs) == 1 else torch.cat(outs), extra
