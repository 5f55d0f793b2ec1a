# SPDX-License-Identifier: Apache-2.0
"""Ranks of a group: threads of this process with a gloo backend each, or processes."""

import datetime
import multiprocessing
import os
import sys
import threading

import torch
import torch.distributed as dist

# What the first process imports of which the ranks are forks; it has no threads, as a process of tests has.
IMPORTED_ONCE = (
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.testing",
    "fmkernels.averaging",
    "fmkernels.expert_parallel",
    "fmkernels.fsdp",
    "fmkernels.hooks",
    "fmkernels.optim",
)


def as_threads(world_size, body, *, seconds=30.0):
    """What body(rank, group) returns, or raises, for every rank; the first that was not meant to is raised here."""
    store, results = dist.HashStore(), [None] * world_size

    def run(rank):
        try:
            group = dist.ProcessGroupGloo(store, rank, world_size, datetime.timedelta(seconds=seconds))
            results[rank] = body(rank, group)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # they answer each other all the time
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def raised(function, *args, **kwargs):
    """What a call raises, as text."""
    try:
        function(*args, **kwargs)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def as_processes(world_size, body, folder, *args, seconds=60.0):
    """Runs body(rank, *args) in processes with a default group; a failure of one is raised here."""
    multiprocessing.set_forkserver_preload(list(IMPORTED_ONCE))
    torch.multiprocessing.start_processes(
        _process, (body, folder / "store", world_size, seconds, args), nprocs=world_size, start_method="forkserver"
    )


def _process(rank, body, store, world_size, seconds, args):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    if body(rank, *args) is not False:  # whose group is broken on purpose
        dist.barrier()
        dist.destroy_process_group()
    # DTensor's caches keep the process group, whose threads sometimes abort an ordinary exit (pytorch/pytorch#190489).
    os._exit(0)
