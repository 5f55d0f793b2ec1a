# SPDX-License-Identifier: Apache-2.0
"""Recipes over hooks.QuantizedAllReduce: ByteGrad's compression, and 1 bit with error feedback."""

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fmkernels.hooks import QuantizedAllReduce

WORLD_SIZE = 4

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 130), nn.Tanh(), nn.Linear(130, 130), nn.Tanh(), nn.Linear(130, 5))


def loss_of(model, rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x, noise = torch.randn(16, 33, generator=generator), torch.randn(16, 5, generator=generator)
    return (model(x) - x[:, :5] + x[:, 5:10] - noise).square().mean()


def as_bytes(x):
    """What is left of a chunk when its range, from the least to the largest, is cut in 255 steps."""
    step = (x.max() - x.min() + 1e-7) / 255
    last = (x.max() / step).round()
    return (x / step).round().clamp(last - 255, last) * step


def byte_grad(gradients, node_size):
    """ByteGrad of Bagua: nodes average exactly, then a chunk of every node's bucket goes to its owner and back."""
    nodes = gradients.view(-1, node_size, gradients.shape[1]).mean(1)
    chunks = nodes.tensor_split(len(nodes), 1)
    return torch.cat([as_bytes(torch.stack([as_bytes(row) for row in chunk]).mean(0)) for chunk in chunks])


def check_byte_grad(rank):
    """8 bits in blocks lose less than bytes between the least and the largest of a chunk, in one and in two levels."""
    alone = make()
    gradients = []
    for other in range(WORLD_SIZE):
        alone.zero_grad()
        loss_of(alone, other, 0).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in alone.parameters()]))
    gradients = torch.stack(gradients)
    mean = gradients.double().mean(0)
    for node_size, options in (
        (1, {"bits": 8}),
        (2, {"bits": 8, "algorithm": "hierarchical", "node_size": 2, "inter_bits": 8}),
    ):
        model = make()
        ddp = DistributedDataParallel(model)
        QuantizedAllReduce(model, **options).register(ddp)
        loss_of(ddp, rank, 0).backward()
        results = torch.cat([p.grad.flatten() for p in model.parameters()]), byte_grad(gradients, node_size)
        errors = [(result.double() - mean).abs() for result in results]
        assert errors[0].max() <= errors[1].max(), (node_size, errors)
        assert errors[0].square().mean() <= errors[1].square().mean() / 4, (node_size, errors)


def check_one_bit(rank):
    """1 bit with error feedback learns as exact gradients do; without it does not."""
    losses = {}
    for name, options in (
        ("exact", None),
        ("1 bit", {"bits": 1, "error_feedback": True}),
        ("1 bit alone", {"bits": 1}),
    ):
        model = make()
        ddp = DistributedDataParallel(model)
        if options is not None:
            QuantizedAllReduce(model, **options).register(ddp)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(60):
            optimizer.zero_grad()
            loss_of(ddp, rank, step).backward()
            optimizer.step()
        with torch.no_grad():
            loss = torch.stack([loss_of(model, rank, step) for step in range(100, 110)]).mean()
        dist.all_reduce(loss)
        losses[name] = loss.item() / WORLD_SIZE
    assert abs(losses["1 bit"] / losses["exact"] - 1) < 0.03, losses
    assert losses["1 bit"] < losses["1 bit alone"], losses


def check_rank(rank):
    check_byte_grad(rank)
    check_one_bit(rank)


def test_recipes(tmp_path):
    as_processes(WORLD_SIZE, check_rank, tmp_path)
