# SPDX-License-Identifier: Apache-2.0
"""nn.Attention in two processes: the gradients are those of one process with the whole batch."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from fmkernels.nn import Attention

WORLD_SIZE = 2
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp": fully_shard}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def make(layout):
    """The same parameters in every process."""
    torch.manual_seed(0)
    return Attention(64, 4, 2, bias=True, layout=layout)


def train(module, x):
    y = module(x)
    y.square().mean().backward()
    return y.detach(), {name.removeprefix("module."): t.grad for name, t in module.named_parameters()}


def check_rank(rank, store):
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    try:
        batch = torch.randn(2 * WORLD_SIZE, 33, 64, generator=torch.Generator().manual_seed(1))
        for layout in ("llama", "multihead"):
            expected_y, expected = train(make(layout), batch)
            for name, wrap in WRAPPERS.items():
                y, grads = train(wrap(make(layout)), batch.chunk(WORLD_SIZE)[rank])
                if name == "fsdp":
                    assert all(t.to_local().shape[0] < t.shape[0] for t in grads.values()), "nothing was sharded"
                    grads = {key: t.full_tensor() for key, t in grads.items()}
                assert torch.equal(y, expected_y.chunk(WORLD_SIZE)[rank]), (layout, name)
                assert_close(grads, expected, msg=lambda text, at=f"{layout} {name}": f"{at}: {text}")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # DTensor's caches keep the process group, whose threads sometimes abort an ordinary exit (pytorch/pytorch#190489).
    os._exit(0)


def test_gradients_are_those_of_one_process(tmp_path):
    torch.multiprocessing.spawn(check_rank, (tmp_path / "store",), nprocs=WORLD_SIZE)
