# SPDX-License-Identifier: Apache-2.0
"""Deferred weight gradients: the bits of an ordinary backward, each computed once, in pipelines and under DDP."""

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes
from nn_layers import CountOps, assert_ddp_may_wait, assert_same_bits, gradients
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble

from fmkernels import BlockTopology, random_blocks
from fmkernels.nn import BlockSparseLinear, WeightGradStore

WIDTH, WORLD_SIZE, NUM_STAGES, NUM_MICROBATCHES = 64, 2, 4, 4
needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def layer(seed=0, store=None):
    """The same parameters in every process."""
    torch.manual_seed(seed)
    topology = BlockTopology.from_mask(random_blocks(WIDTH // 16, WIDTH // 16, 0.5), 16)
    return BlockSparseLinear(WIDTH, WIDTH, topology=topology, weight_grad_store=store)


@pytest.mark.parametrize("x_needs_grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_gradients_have_the_same_bits(autocast, x_needs_grad):
    store = WeightGradStore()
    plain, deferring = layer(), layer(store=store)
    batches = torch.randn(3, 2, 5, WIDTH)
    for batch in batches:
        xs = [batch.clone().requires_grad_(x_needs_grad) for _ in range(2)]
        for module, x in zip((plain, deferring), xs, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = module(x)
            y.float().square().sum().backward()
        assert not x_needs_grad or torch.equal(xs[0].grad, xs[1].grad)
    assert len(store) == len(batches)
    assert deferring.weight.grad is None
    deferring.backward_dw()
    assert len(store) == 0
    assert_same_bits(gradients(deferring), gradients(plain))
    plain.backward_dw()  # nothing waits


def test_each_product_runs_once_and_where_it_belongs():
    store = WeightGradStore()
    module = nn.Sequential(layer(store=store), layer(store=store))
    with CountOps() as counter:
        y = module(torch.randn(5, WIDTH))
        y.sum().backward()
    assert counter.counts == {"block_sparse_dsd": 3}  # two forward; of the input nobody asks the gradient
    with CountOps() as counter:
        store.pop()()
    assert counter.counts == {"block_sparse_sdd": 2}


def test_hooks_of_the_parameter_run_with_the_gradient():
    store = WeightGradStore()
    module = layer(store=store)
    seen = []
    module.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    module(torch.randn(5, WIDTH, requires_grad=True)).sum().backward()
    assert seen == []
    module.backward_dw()
    assert len(seen) == 1
    assert torch.equal(seen[0], module.weight.grad)


def test_a_backward_for_inputs_alone_leaves_nothing():
    """A pipeline infers shapes with a backward of made-up inputs, whose gradient went to the weight."""
    store = WeightGradStore()
    module = layer(store=store)
    x = torch.randn(5, WIDTH, requires_grad=True)
    y = module(x).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    assert len(store) == 0
    y.backward()
    assert len(store) == 1


def test_without_gradients_nothing_waits():
    store = WeightGradStore()
    module = layer(store=store)
    with torch.no_grad():
        module(torch.randn(5, WIDTH))
    module.weight.requires_grad_(False)
    module(torch.randn(5, WIDTH, requires_grad=True)).sum().backward()
    assert len(store) == 0


# ---- more than one process -------------------------------------------------------------------------------------------


def check_pipeline(rank):
    """Two stages a rank, with the gradients of the whole model in one process."""
    torch.manual_seed(1)
    x, target = torch.randn(2, NUM_MICROBATCHES * 3, WIDTH)
    whole = nn.Sequential(*(layer(seed) for seed in range(NUM_STAGES)))
    for part, wanted in zip(x.chunk(NUM_MICROBATCHES), target.chunk(NUM_MICROBATCHES), strict=True):
        (nn.functional.mse_loss(whole(part), wanted) / NUM_MICROBATCHES).backward()
    for schedule_type, places, is_deferred in (
        (ScheduleInterleavedZeroBubble, ((0, 2), (1, 3)), True),
        (ScheduleZBVZeroBubble, ((0, 3), (1, 2)), True),
        (ScheduleInterleavedZeroBubble, ((0, 2), (1, 3)), False),  # it detached what a stage gave, which was a view
    ):
        modules, stages = [], []
        for index in places[rank]:
            store = WeightGradStore() if is_deferred else None
            modules.append(layer(index, store))
            builder = store.pop if is_deferred else None
            stages.append(PipelineStage(modules[-1], index, NUM_STAGES, torch.device("cpu"), dw_builder=builder))
        schedule = schedule_type(stages, NUM_MICROBATCHES, loss_fn=nn.functional.mse_loss)
        inputs = (x,) if rank == 0 else ()
        arguments = {"target": target} if NUM_STAGES - 1 in places[rank] else {}
        for _ in range(2):  # the first step also infers shapes, with a forward and backward of its own
            for module in modules:
                module.zero_grad()
            with CountOps() as counter:
                schedule.step(*inputs, **arguments)
            for index, module in zip(places[rank], modules, strict=True):
                assert_same_bits(gradients(module), gradients(whole[index]))
        if is_deferred:
            assert counter.counts["block_sparse_sdd"] == 2 * NUM_MICROBATCHES, counter.counts
            num_first = NUM_MICROBATCHES if 0 in places[rank] else 0  # the first stage has no gradient to send on
            assert counter.counts["block_sparse_dsd"] == 4 * NUM_MICROBATCHES - num_first, counter.counts


def check_ddp(rank):
    torch.manual_seed(1)
    batch = torch.randn(2 * WORLD_SIZE, WIDTH).chunk(WORLD_SIZE)[rank]
    assert_ddp_may_wait(lambda store: nn.Sequential(layer(0, store), nn.ReLU(), layer(1, store)), batch)


def check_fsdp(rank):
    module = nn.Sequential(layer(store=WeightGradStore()))
    fully_shard(module)
    module(torch.randn(5, WIDTH, requires_grad=True)).sum().backward()
    with pytest.raises(RuntimeError, match=r"the weight must stay until its gradient is computed, it was replaced\."):
        module[0].backward_dw()


@needs_gloo
@pytest.mark.parametrize("check", [check_pipeline, check_ddp, check_fsdp])
def test_in_two_processes(check, tmp_path):
    as_processes(WORLD_SIZE, check, tmp_path)


def test_blocks_that_change_before_the_gradient_is_computed():
    """As many as before change in place: the gradient of the old ones went to the new ones."""
    module = layer(store=WeightGradStore())
    module(torch.randn(5, WIDTH)).sum().backward()
    module.set_topology(BlockTopology.from_mask(~module.topology.to_mask(), 16))
    with pytest.raises(RuntimeError, match=r"the weight must stay until its gradient is computed, it was replaced\."):
        module.backward_dw()


def test_inputs_are_refused_as_without_a_store():
    for module in (layer(), layer(store=WeightGradStore())):
        with pytest.raises(ValueError, match=r"dds: a must have the dtype of s, float32, got bfloat16\."):
            module(torch.randn(5, WIDTH, dtype=torch.bfloat16))
        with pytest.raises(TypeError, match=r"dds: a must be a tensor, got NoneType\."):
            module(None)


def test_errors():
    with pytest.raises(
        TypeError, match=r"nn.BlockSparseLinear: weight_grad_store must be a WeightGradStore, got bool\."
    ):
        layer(store=True)
