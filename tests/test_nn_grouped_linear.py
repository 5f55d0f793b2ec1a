# SPDX-License-Identifier: Apache-2.0
"""nn.GroupedLinear, and the weight gradients of it and of nn.Experts that wait: the bits of an ordinary backward."""

import re

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes
from nn_layers import CountOps, assert_ddp_may_wait, assert_same_bits, gradients
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble

from fmkernels import moe, reference
from fmkernels.nn import Experts, GroupedLinear, MoE, WeightGradStore
from fmkernels.testing import assert_as_good_as_torch, backends

GROUPS, HIDDEN, WIDTH, NUM_TOPK = 4, 16, 8, 2
WORLD_SIZE, NUM_STAGES, NUM_MICROBATCHES = 2, 4, 4
ENDS = torch.tensor([3, 3, 8, 11], dtype=torch.int32)  # of 12 rows; the second group is empty


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def grouped(store=None, **options):
    torch.manual_seed(0)
    return GroupedLinear(GROUPS, HIDDEN, WIDTH, weight_grad_store=store, **options)


def layer(seed=0, store=None):
    """The same parameters in every process."""
    torch.manual_seed(seed)
    return MoE(HIDDEN, WIDTH, GROUPS, NUM_TOPK, shared_width=8, return_losses=False, weight_grad_store=store)


def inputs(name, *shape):
    """Of a module by its name, the first of which has a gradient."""
    x = torch.randn(*(shape or (12,)), HIDDEN)
    if name == "grouped":
        return x, ENDS
    return (x,) if name == "moe" else (x, torch.rand(len(x), NUM_TOPK), torch.randint(-1, GROUPS, (len(x), NUM_TOPK)))


MODULES = {
    "grouped": grouped,
    "experts": lambda store=None: (torch.manual_seed(0), Experts(GROUPS, HIDDEN, WIDTH, weight_grad_store=store))[1],
    "moe": lambda store=None: layer(store=store),
}
EVERY_MODULE = pytest.mark.parametrize("name", MODULES)
NUM_DEFERRED = {"grouped": 1, "experts": 2, "moe": 2}


# ---- GroupedLinear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", backends("moe_grouped_mm"), ids=str)
def test_a_grouped_linear_layer(bias, backend):
    dtype = torch.bfloat16 if backend.has_tensor_cores else torch.float32
    module = grouped(bias=bias, device=backend.device, dtype=dtype)
    x, ends = torch.randn(12, HIDDEN).to(dtype).to(backend.device), ENDS.to(backend.device)
    out = backend.run(module, x, ends)

    def wanted(x, weight, bias=None):
        return reference.moe.grouped_mm(x, weight, ends, bias=bias, trans_b=True)

    assert_as_good_as_torch(out, wanted, x, *module.parameters())
    assert list(module.state_dict()) == (["weight", "bias"] if bias else ["weight"])


def test_a_grouped_linear_layer_on_meta_and_compiled():
    module = GroupedLinear(GROUPS, HIDDEN, WIDTH, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    assert all(0.2 < p.abs().max() <= HIDDEN**-0.5 for p in module.parameters())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(12, HIDDEN)
    assert torch.equal(compiled(x, ENDS), module(x, ENDS))


# ---- gradients that wait ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_needs_grad", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@EVERY_MODULE
def test_the_gradients_have_the_same_bits(name, autocast, x_needs_grad):
    store = WeightGradStore()
    plain, waiting = MODULES[name](), MODULES[name](store)
    for _ in range(3):
        x, *others = inputs(name)
        xs = [x.clone().requires_grad_(x_needs_grad) for _ in range(2)]
        for module, leaf in zip((plain, waiting), xs, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = module(leaf, *others)
            y.float().square().sum().backward()
        assert not x_needs_grad or torch.equal(xs[0].grad, xs[1].grad)
    assert len(store) == 3 * NUM_DEFERRED[name]
    assert sum(p.grad is None for p in waiting.parameters()) == NUM_DEFERRED[name]
    waiting.backward_dw()
    assert len(store) == 0
    assert_same_bits(gradients(waiting), gradients(plain))
    plain.backward_dw()  # nothing waits


@EVERY_MODULE
def test_each_product_runs_once_and_where_it_belongs(name):
    plain, waiting = MODULES[name](), MODULES[name](WeightGradStore())
    args = inputs(name)
    with CountOps() as ordinary:
        plain(*args).sum().backward()
    with CountOps() as first:
        waiting(*args).sum().backward()
    with CountOps() as second:
        waiting.backward_dw()
    assert second.counts["moe_grouped_mm_inner"] == NUM_DEFERRED[name]
    assert first.counts + second.counts == ordinary.counts


@EVERY_MODULE
def test_a_backward_for_inputs_alone_leaves_nothing(name):
    """A pipeline infers shapes with a backward of made-up inputs."""
    store = WeightGradStore()
    module = MODULES[name](store)
    x, *others = inputs(name)
    x.requires_grad_()
    y = module(x, *others).sum()
    torch.autograd.grad(y, x, retain_graph=True)
    assert len(store) == 0
    y.backward()
    assert len(store) == NUM_DEFERRED[name]


@EVERY_MODULE
def test_without_gradients_nothing_waits(name):
    store = WeightGradStore()
    module = MODULES[name](store)
    x, *others = inputs(name)
    with torch.no_grad():
        module(x, *others)
    module.requires_grad_(False)
    module(x.requires_grad_(), *others).sum().backward()
    assert len(store) == 0


def test_of_two_weights_one_may_be_frozen():
    store = WeightGradStore()
    plain, waiting = MODULES["experts"](), MODULES["experts"](store)
    args = inputs("experts")
    for module in (plain, waiting):
        module.gate_up_proj.requires_grad_(False)
        module(*args).sum().backward()
    assert len(store) == 1
    waiting.backward_dw()
    assert_same_bits({"down": waiting.down_proj.grad}, {"down": plain.down_proj.grad})


def test_hooks_of_the_parameter_run_with_the_gradient():
    module = MODULES["experts"](WeightGradStore())
    seen = []
    module.down_proj.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    module(*inputs("experts")).sum().backward()
    assert seen == []
    module.backward_dw()
    assert len(seen) == 1
    assert torch.equal(seen[0], module.down_proj.grad)


# ---- more than one process -------------------------------------------------------------------------------------------


def check_pipeline(rank):
    """Two stages a rank, with the gradients of the whole model in one process."""
    torch.manual_seed(1)
    x, target = torch.randn(2, NUM_MICROBATCHES * 3, 5, HIDDEN)
    whole = nn.Sequential(*(layer(seed) for seed in range(NUM_STAGES)))
    for part, wanted in zip(x.chunk(NUM_MICROBATCHES), target.chunk(NUM_MICROBATCHES), strict=True):
        (nn.functional.mse_loss(whole(part), wanted) / NUM_MICROBATCHES).backward()
    for schedule_type, places, is_deferred in (
        (ScheduleInterleavedZeroBubble, ((0, 2), (1, 3)), True),
        (ScheduleZBVZeroBubble, ((0, 3), (1, 2)), True),
        (ScheduleInterleavedZeroBubble, ((0, 2), (1, 3)), False),
    ):
        modules, stages = [], []
        for index in places[rank]:
            store = WeightGradStore() if is_deferred else None
            modules.append(layer(index, store))
            builder = store.pop if is_deferred else None
            stages.append(PipelineStage(modules[-1], index, NUM_STAGES, torch.device("cpu"), dw_builder=builder))
        schedule = schedule_type(stages, NUM_MICROBATCHES, loss_fn=nn.functional.mse_loss)
        arguments = {"target": target} if NUM_STAGES - 1 in places[rank] else {}
        for _ in range(2):  # the first step also infers shapes, with a forward and backward of its own
            for module in modules:
                module.zero_grad()
            with CountOps() as counter:
                schedule.step(*((x,) if rank == 0 else ()), **arguments)
            for index, module in zip(places[rank], modules, strict=True):
                assert_same_bits(gradients(module), gradients(whole[index]))
        if is_deferred:  # of two stages: both stacks, and the router at once
            assert counter.counts["moe_grouped_mm_inner"] == 2 * 3 * NUM_MICROBATCHES, counter.counts


def check_ddp(rank):
    torch.manual_seed(1)
    batch = torch.randn(2 * WORLD_SIZE, 5, HIDDEN).chunk(WORLD_SIZE)[rank]
    assert_ddp_may_wait(lambda store: nn.Sequential(layer(0, store), layer(1, store)), batch)


def check_fsdp(rank):
    """Sharded parameters, among them stacks that do not divide by the ranks, give the gradients of whole ones."""
    torch.manual_seed(1)
    batch = torch.randn(WORLD_SIZE, 7, HIDDEN)
    whole, sharded = ((torch.manual_seed(0), MoE(HIDDEN, WIDTH, 3, NUM_TOPK, shared_width=8))[1] for _ in range(2))
    fully_shard(sharded)
    for module, parts in ((whole, batch), (sharded, batch[rank : rank + 1])):
        for x in parts:
            out, losses = module(x)
            (out.square().mean() + losses.load_balance).backward()
    for (name, p), ours in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(ours.grad.full_tensor(), p.grad / WORLD_SIZE), name  # halves are exact


def check_update_bias(rank):
    module = MoE(HIDDEN, WIDTH, 4, 2, selection_bias=True)
    load = torch.tensor([[9, 1, 3, 5], [0, 1, 9, 5]][rank])
    before = load.clone()
    module.update_bias(load, 0.25, dist.group.WORLD)
    assert module.gate.e_score_correction_bias.tolist() == [-0.25, 0.25, -0.25, -0.25]  # of 9, 2, 12, 10
    assert torch.equal(load, before)


def check_rank(rank):
    for check in (check_pipeline, check_ddp, check_fsdp, check_update_bias):
        check(rank)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_in_two_processes(tmp_path):
    as_processes(WORLD_SIZE, check_rank, tmp_path)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_replaced_before_its_gradient_is_computed():
    module = MODULES["experts"](WeightGradStore())
    module(*inputs("experts")).sum().backward()
    module.down_proj = nn.Parameter(module.down_proj.detach().clone())
    sentence = "nn.Experts: the down_proj must stay until its gradient is computed, it was replaced."
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        module.backward_dw()


@pytest.mark.parametrize("store", [None, WeightGradStore()], ids=["at once", "later"])
@EVERY_MODULE
def test_inputs_are_refused_with_and_without_a_store(name, store):
    x, *others = inputs(name)
    with pytest.raises(ValueError, match=r"must have the dtype of"):
        MODULES[name](store)(x.bfloat16(), *others)
    with pytest.raises(TypeError, match=r"(x|a) must be a tensor, got NoneType\."):
        MODULES[name](store)(None, *others)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((0, 8, 8), ValueError, "num_groups must be at least 1, got 0."),
        ((2, 8.0, 8), TypeError, "in_features must be an integer, got float."),
        ((2, 8, 8, None), TypeError, "bias must be True or False, got NoneType."),
    ],
)
def test_arguments_that_are_refused(arguments, error, sentence):
    with pytest.raises(error, match=rf"^nn.GroupedLinear: {re.escape(sentence)}$"):
        GroupedLinear(*arguments)
    with pytest.raises(TypeError, match=r"^nn.GroupedLinear: weight_grad_store must be a WeightGradStore, got int\.$"):
        GroupedLinear(2, 8, 8, weight_grad_store=3)


def test_offsets_and_rows_are_checked():
    module = grouped()
    with pytest.raises(ValueError, match=r"^moe.grouped_mm: offsets must not decrease and be at most M, 12, got 13"):
        module(torch.zeros(12, HIDDEN), torch.tensor([3, 3, 8, 13], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^moe.grouped_mm: offsets must have as many elements as b has experts, 4"):
        module(torch.zeros(12, HIDDEN), ENDS[1:])
    assert moe.grouped_mm(torch.zeros(0, HIDDEN), module.weight, ENDS * 0, trans_b=True).shape == (0, WIDTH)
