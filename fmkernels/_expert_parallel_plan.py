# SPDX-License-Identifier: Apache-2.0
"""What the ranks must know of each other before rows travel: that they agree, and how many rows to expect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import _check as check
from ._expert_parallel_handle import Handle
from ._expert_parallel_payload import PAYLOADS
from ._moe_mapping import MAX_EXPERTS, check_ids
from ._moe_permute import MAX_TOPK

MAX_CHUNKS = 16  # the message has room for so many counts, so that its size agrees where the arguments do not
NAMES = ("hidden", "num_topk", "num_experts", "dtype", "payload", "max_tokens", "num_chunks", "requires_grad")

HAVE_GRADIENTS = ("x", "topk_weights", "the experts")


def groups_of(op: str, group: Any) -> tuple[Any, ...]:
    """One group, or two: across the nodes, and within this one."""
    if isinstance(group, DeviceMesh):
        if group.ndim > 2:
            raise ValueError(f"{op}: group must be a mesh of 1 or 2 dimensions, got {group.ndim}.")
        return tuple(group.get_all_groups())
    groups = group if isinstance(group, tuple | list) else (group,)
    if len(groups) not in (1, 2) or not all(g is None or isinstance(g, dist.ProcessGroup) for g in groups):
        raise TypeError(f"{op}: group must be a process group, two of them, a DeviceMesh or None, got {group!r}.")
    if not dist.is_initialized():
        raise ValueError(f"{op}: group must exist: torch.distributed.init_process_group was not called.")
    return tuple(groups)


def plan(
    op: str,
    x: Any,
    topk_idx: Any,
    count_experts: Callable[[], Any],
    group: Any,
    *,
    max_tokens: int | None,
    payload: str | None,
    num_chunks: int = 1,
    requires_grad: tuple[bool, ...],
    check_more: Callable[[], None] = lambda: None,
) -> list[tuple[Tensor, Handle]]:
    """The tokens of each chunk, and where they go; all ranks raise where one refuses its arguments or others differ.

    A collective a group, and a wait for the device: how many rows come is known nowhere else. With max_tokens neither,
    except where values are checked (on the CPU, on CUDA under FMKERNELS_CHECK=1).
    """
    groups = groups_of(op, group)
    check.is_tensor(op, "x", x)
    failure: Exception | None = None
    signature = [0] * len(NAMES)
    chunks: list[tuple[Tensor, Handle]] = []
    try:
        num_experts = count_experts()
        _check(op, x, topk_idx, num_experts, groups, max_tokens, payload, num_chunks)
        check_more()
        signature = [
            x.shape[1],
            topk_idx.shape[1],
            num_experts,
            check.FLOAT_DTYPES.index(x.dtype),
            -1 if payload is None else list(PAYLOADS).index(payload),
            -1 if max_tokens is None else max_tokens,
            num_chunks,
            sum(needs << i for i, needs in enumerate(requires_grad)),
        ]
        most = -(-(x.shape[0] if max_tokens is None else max_tokens) // num_chunks)
        sizes = [min(most, max(x.shape[0] - i * most, 0)) for i in range(num_chunks)]
        options = (num_experts, x.dtype, payload, None if max_tokens is None else most)
        handles = [Handle(groups, part, *options) for part in topk_idx.split(sizes)]
        chunks = list(zip(x.split(sizes), handles, strict=True))
    except Exception as error:  # whatever it is, the others must hear of it
        failure = error
    if max_tokens is None or check.sees_values(x):
        counts = [handle.legs[0].counts for _, handle in chunks if handle.legs[0].counts is not None]
        sent, received = _agree(op, groups, signature, failure, counts, x.device)
        for i, _ in enumerate(counts):
            chunks[i][1].legs[0].set_counts(sent[i], received[i])
    elif failure is not None:
        raise failure
    return chunks


def _check(
    op: str,
    x: Tensor,
    topk_idx: Any,
    num_experts: Any,
    groups: tuple[Any, ...],
    max_tokens: Any,
    payload: Any,
    num_chunks: Any,
) -> None:
    check.rank(op, "x", x, 2, "[num_tokens, hidden]")
    check.dtype(op, "x", x, check.FLOAT_DTYPES)
    check.last_dim_contiguous(op, "x", x)
    check.integer(op, "num_experts", num_experts, 1)
    num_ranks = 1
    for group in groups:
        num_ranks *= dist.get_world_size(group)
    if num_experts > MAX_EXPERTS or num_experts % num_ranks:
        raise ValueError(
            f"{op}: num_experts must be at most {MAX_EXPERTS} and a multiple of the {num_ranks} ranks, "
            f"got {num_experts}."
        )
    check_ids(op, topk_idx, num_experts)
    check.same_device(op, "topk_idx", topk_idx, "x", x)
    check.size(op, "topk_idx", topk_idx, 0, "the tokens of x,", x.shape[0])
    for name, t in (("x", x), ("topk_idx", topk_idx)):
        if t.shape[1] < 1:
            raise ValueError(f"{op}: {name} must have a column or more, got {list(t.shape)}.")
    if topk_idx.shape[1] > MAX_TOPK:
        raise ValueError(f"{op}: topk_idx must have at most {MAX_TOPK} columns, got {topk_idx.shape[1]}.")
    check_options(op, max_tokens, payload, num_chunks)
    if max_tokens is not None and x.shape[0] > max_tokens:
        raise ValueError(f"{op}: x must have at most max_tokens = {max_tokens} tokens, got {x.shape[0]}.")


def check_options(op: str, max_tokens: Any, payload: Any, num_chunks: Any) -> None:
    if payload not in (None, *PAYLOADS):
        raise ValueError(f"{op}: payload must be None or {' or '.join(PAYLOADS)}, got {payload!r}.")
    check.integer(op, "num_chunks", num_chunks, 1)
    if num_chunks > MAX_CHUNKS:
        raise ValueError(f"{op}: num_chunks must be at most {MAX_CHUNKS}, got {num_chunks}.")
    if max_tokens is not None:
        check.integer(op, "max_tokens", max_tokens, 1)


def _agree(
    op: str,
    groups: tuple[Any, ...],
    signature: list[int],
    failure: Exception | None,
    counts: list[Tensor],
    device: torch.device,
) -> tuple[list[Any], list[Any]]:
    """(sent, received): of each chunk the (tokens, slots) to and from each rank of the first group.

    Of two groups the inner one compares first, and what it found is in the message to the outer one: then every rank
    has heard of any other.
    """
    for group in groups[::-1]:
        num_ranks, is_outer = dist.get_world_size(group), group is groups[0]
        head = torch.tensor([failure is not None, *signature], device=device).expand(num_ranks, -1)
        body = head.new_zeros(num_ranks, MAX_CHUNKS, 2)
        if is_outer and counts:
            body[:, : len(counts)] = torch.stack(counts, 1)
        message = torch.cat((head, body.flatten(1)), 1)
        received = torch.empty_like(message)
        dist.all_to_all_single(received, message, group=group)
        both = torch.stack((message, received)).tolist()  # the wait for the device
        failure = failure or _difference(op, signature, both[1])
    if failure is not None:
        raise failure
    skip = 1 + len(signature)
    sent, received_counts = (
        [[(row[skip + 2 * i], row[skip + 2 * i + 1]) for row in rows] for i in range(len(counts))] for rows in both
    )
    return sent, received_counts


def _difference(op: str, signature: list[int], rows: list[list[int]]) -> Exception | None:
    for rank, (failed, *theirs) in enumerate(rows):
        other = theirs[: len(signature)]
        if failed:
            return ValueError(f"{op}: every rank of the group must give valid arguments, rank {rank} refused its own.")
        for name, mine, value in zip(NAMES, signature, other, strict=True):
            if mine != value:
                return ValueError(
                    f"{op}: {name} must be the same on every rank of the group, got {_shown(name, mine)} here and "
                    f"{_shown(name, value)} on rank {rank}."
                )
    return None


def _shown(name: str, value: int) -> Any:
    if name == "dtype":
        return check.dtype_names((check.FLOAT_DTYPES[value],))
    if name == "payload":
        return None if value < 0 else list(PAYLOADS)[value]
    if name == "requires_grad":
        return " and ".join(part for i, part in enumerate(HAVE_GRADIENTS) if value >> i & 1) or "nothing"
    return None if value < 0 else value
