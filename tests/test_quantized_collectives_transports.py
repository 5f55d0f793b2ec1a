# SPDX-License-Identifier: Apache-2.0
"""fmkernels.quantized_collectives through collectives of torch, as on NCCL, and in groups with a backend a device."""

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes, raised

from fmkernels import _collectives_call
from fmkernels import quantized_collectives as collectives
from fmkernels._collectives_transport import CollectiveTransport, channel_of, resolve_group

WORLD_SIZE = 4

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def check_bits(rank):
    """What goes through collectives of torch has the bits of what goes as messages."""
    x = torch.randn(5001, generator=torch.Generator().manual_seed(rank))
    splits = [2000, 0, 3001, 0]
    sends = [[(3 * i + 5 * j) % 4 * 400 for j in range(WORLD_SIZE)] for i in range(WORLD_SIZE)]
    sends[1] = [0, 0, 0, 4000]  # the chunks of ranks 1 and 3 are more than those of the others
    gets = [row[rank] for row in sends]

    def run():
        results = [x.clone() for _ in range(4)]
        results += [torch.empty(n) for n in (splits[rank], splits[rank], 5001, sum(gets))]
        two_shot, whole, nodes, alone, scattered, over_nodes, gathered, sent = results
        collectives.all_reduce(two_shot, chunk_numel=1000)
        collectives.all_reduce(whole, algorithm="one_shot", bits=4)
        collectives.all_reduce(nodes, algorithm="hierarchical", node_size=2, chunk_numel=1000)
        collectives.all_reduce(alone, algorithm="hierarchical", node_size=1, rounding="stochastic", seed=1)
        collectives.reduce_scatter(scattered, x, input_splits=splits, bits="float8_e4m3fn")
        collectives.reduce_scatter(over_nodes, x, input_splits=splits, algorithm="hierarchical", node_size=2)
        collectives.all_gather(gathered, x[: splits[rank]], output_splits=splits)
        collectives.all_to_all(
            sent, x[: sum(sends[rank])], input_splits=sends[rank], output_splits=gets, chunk_numel=1000
        )
        return results

    messages = run()
    make_transport = _collectives_call.make_transport
    _collectives_call.make_transport = lambda name, group, device: CollectiveTransport(name, group)
    try:
        by_order = run()
    finally:
        _collectives_call.make_transport = make_transport
    for a, b in zip(messages, by_order, strict=True):
        assert torch.equal(a, b)


def check_groups(rank):
    """A group has a backend for each device, and may have none for one."""
    del rank
    cuda = torch.device("cuda", 0)
    both = dist.new_group(backend="cpu:gloo,cuda:gloo")
    assert raised(resolve_group, "all_reduce", both, cuda) == (
        "ValueError: all_reduce: tensor must be on a device of the group's backend gloo, it is on cuda."
    )
    only = dist.new_group(backend="cpu:gloo")
    assert raised(resolve_group, "all_reduce", only, cuda) == (
        "ValueError: all_reduce: tensor must be on a device for which the group has a backend, it is on cuda."
    )
    channel_of(both).finishers[cuda] = None  # where calls on CUDA tensors came first
    x = torch.ones(100)
    collectives.all_reduce(x, group=both, async_op=True).wait()
    assert (x == WORLD_SIZE).all()


def check_rank(rank):
    for check in (check_bits, check_groups):
        check(rank)


def test_transports_of_four_processes(tmp_path):
    as_processes(WORLD_SIZE, check_rank, tmp_path, seconds=20)
