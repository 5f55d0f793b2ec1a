# SPDX-License-Identifier: Apache-2.0
"""fmkernels.nn.BlockPruning: the schedule, what stays and what grows, and that a run goes on where it stopped."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fmkernels import BlockSparse, BlockTopology, random_blocks
from fmkernels.nn import BlockPruning, BlockSparseLinear

SIDE, BLOCK = 8, 16
WIDTH = SIDE * BLOCK


def layer(density=1.0):
    mask = random_blocks(SIDE, SIDE, density)
    return BlockSparseLinear(WIDTH, WIDTH, topology=BlockTopology.from_mask(mask, BLOCK))


def setup(density=1.0, **options):
    torch.manual_seed(0)
    model = nn.Sequential(layer(density), nn.ReLU(), layer(density))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, BlockPruning(model, optimizer, 0.25, **{"end": 8, "every": 2, **options})


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, WIDTH, generator=generator), torch.randn(16, WIDTH, generator=generator)


def train(model, optimizer, pruning, steps):
    losses = []
    for step in steps:
        x, target = batch(step)
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruning.step()
        losses.append(loss.item())
    return losses


def places(module):
    topology = module.topology
    return set((topology.row_indices * SIDE + topology.column_indices).tolist())


def test_the_density_follows_the_schedule():
    model, optimizer, pruning = setup()
    assert [pruning.changes_at(step) for step in range(11)] == [True, False] * 4 + [True, False, False]
    assert [step for step in range(11) if setup(begin=1, end=8, every=3)[2].changes_at(step)] == [1, 4, 7, 8]
    assert [setup(begin=1, end=1)[2].density_at(step, 1.0) for step in range(3)] == [1.0, 0.25, 0.25]
    assert [pruning.density_at(step, 1.0) for step in (0, 4, 8, 100)] == [1.0, 0.25 + 0.75 / 8, 0.25, 0.25]
    for step in range(10):
        train(model, optimizer, pruning, [step])
        expected = round(pruning.density_at(step - step % 2, 1.0) * SIDE * SIDE)
        assert [len(places(module)) for module in (model[0], model[2])] == [expected] * 2


def test_the_blocks_of_largest_norm_stay_with_their_values():
    model, optimizer, pruning = setup(begin=1, end=1)
    train(model, optimizer, pruning, [0])
    assert len(places(model[0])) == SIDE * SIDE
    x, target = batch(1)
    optimizer.zero_grad()
    (model(x) - target).square().mean().backward()
    optimizer.step()
    norms = model[0].weight.detach().flatten(1).norm(dim=1)
    expected = set(norms.topk(SIDE * SIDE // 4).indices.tolist())
    before = model[0].matrix.to_dense().detach()
    assert pruning.step()
    assert places(model[0]) == expected
    after = model[0].matrix.to_dense().detach()
    assert torch.equal(after, torch.where(after != 0, before, 0))


def test_what_grows_is_where_the_dense_gradient_is_largest():
    model, optimizer, pruning = setup(0.25, regrow=1.0, begin=1, end=3)
    train(model, optimizer, pruning, [0])
    dense = [module.to_linear() for module in (model[0], model[2])]
    was = places(model[0])
    x, target = batch(1)
    (nn.Sequential(dense[0], nn.ReLU(), dense[1])(x) - target).square().mean().backward()
    norms = dense[0].weight.grad.view(SIDE, BLOCK, SIDE, BLOCK).transpose(1, 2).flatten(2).norm(dim=2).flatten()
    # Two microbatches: the gradient is the sum.
    optimizer.zero_grad()
    for part, wanted in zip(x.chunk(2), target.chunk(2), strict=True):
        ((model(part) - wanted).square().mean() / 2).backward()
    optimizer.step()
    pruning.step()
    assert places(model[0]) == set(norms.topk(SIDE * SIDE // 4).indices.tolist())
    new = BlockSparse.of(model[0].weight.detach(), model[0].topology)
    is_new = torch.tensor([place not in was for place in sorted(places(model[0]))])
    assert is_new.any()
    assert (new.values[is_new] == 0).all()


@pytest.mark.parametrize("by", ["gradient", "random"])
def test_sparse_to_sparse_keeps_the_density_and_learns(by):
    model, optimizer, pruning = setup(0.25, regrow=0.3, end=40, every=5, by=by)
    before = places(model[0])
    losses = train(model, optimizer, pruning, [step % 4 for step in range(60)])
    assert len(places(model[0])) == len(before)
    assert places(model[0]) != before
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


@pytest.mark.parametrize("by", ["gradient", "random"])
def test_a_run_that_stops_goes_on_with_the_same_bits(by):
    options = {"regrow": 0.3, "by": by, "end": 10}
    model, optimizer, pruning = setup(0.5, **options)
    train(model, optimizer, pruning, range(4))
    states = copy.deepcopy([thing.state_dict() for thing in (model, optimizer, pruning)])
    expected = train(model, optimizer, pruning, range(4, 12))
    model, optimizer, pruning = setup(0.5, **options)
    for thing, state in zip((model, optimizer, pruning), states, strict=True):
        thing.load_state_dict(state)
    assert train(model, optimizer, pruning, range(4, 12)) == expected


def test_a_step_without_gradients_is_refused():
    _, _, pruning = setup(0.25, regrow=0.3)
    with pytest.raises(RuntimeError, match=r"no layer was given a gradient in this step"):
        pruning.step()


def run_rank(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        with pytest.raises(ValueError, match=r"group must be the ranks that hold the same layers, got None"):
            setup(0.25, regrow=0.5)
        model, optimizer, pruning = setup(0.25, regrow=0.5, group=dist.group.WORLD)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for step in range(10):
            x, target = (t.chunk(2)[rank] for t in batch(step))
            optimizer.zero_grad()
            (wrapped(x) - target).square().mean().backward()
            optimizer.step()
            pruning.step()
        mine = model[0].matrix.to_dense().detach()
        others = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(others, mine)
        assert torch.equal(*others)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # see test_nn_distributed.py


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_all_ranks_choose_alike(tmp_path):
    torch.multiprocessing.spawn(run_rank, (tmp_path / "store",), nprocs=2)


def test_errors():
    model, optimizer, pruning = setup()
    with pytest.raises(ValueError, match=r"model must have a fmkernels.nn.BlockSparseLinear, got none\."):
        BlockPruning(nn.Linear(2, 2), optimizer, 0.5, end=1)
    with pytest.raises(ValueError, match=r"optimizer must hold the weights of all layers, got none of '0'\."):
        BlockPruning(model, torch.optim.SGD([torch.zeros(1)]), 0.5, end=1)
    for name, value, sentence in (
        ("density", 2, "density must be from 0 to 1, got 2"),
        ("regrow", 2, "regrow must be from 0 to 1, got 2"),
        ("end", -1, "end must be at least 0, got -1"),
        ("every", 0, "every must be at least 1, got 0"),
        ("by", "norm", "by must be 'gradient' or 'random', got 'norm'"),
    ):
        with pytest.raises(ValueError, match=rf"nn.BlockPruning: {sentence}\."):
            BlockPruning(model, optimizer, **{"density": 0.5, "end": 10, name: value})
    with pytest.raises(ValueError, match=r"load_state_dict: state must be of the layers \['0', '2'\], got \['1'\]\."):
        pruning.load_state_dict({"first_densities": {"1": 1.0}})
