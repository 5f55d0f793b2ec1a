# SPDX-License-Identifier: Apache-2.0
"""What benchmarks of several processes share: how a rank begins, and how long a call takes the slowest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist


def begin_rank() -> int:
    """Joins the ranks of torchrun over gloo, with one thread, where that is possible on a core of its own; the rank."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    return rank


def seconds(function: Callable[[], object], calls: int = 1) -> float:
    """Of one call, of the slowest rank; measured over as many as make a time that a clock can tell."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    took = torch.tensor((time.perf_counter() - begin) / calls)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()
