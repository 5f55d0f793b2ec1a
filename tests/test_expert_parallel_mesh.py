# SPDX-License-Identifier: Apache-2.0
"""expert_parallel.ExpertParallel in a DeviceMesh: with FSDP2, beside tensor parallelism, over nodes; checkpoints."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from collective_ranks import as_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing import assert_close

from fmkernels.expert_parallel import ExpertParallel, clip_grad_norm_
from fmkernels.nn import MoE

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

HIDDEN, TOKENS = 32, 10  # TOKENS a rank


class Block(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm = torch.nn.RMSNorm(HIDDEN)
        self.moe = MoE(HIDDEN, 16, 8, 3, shared_width=24, return_losses=False, **options)

    def forward(self, x):
        return x + self.moe(self.norm(x))


def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(), Block(scoring="sigmoid", selection_bias=True))


def batch(num_ranks):
    return torch.randn(TOKENS * num_ranks, HIDDEN, generator=torch.Generator().manual_seed(1))


def train(model, x):
    """(output, gradient of x, gradients of the parameters) of a loss that is a mean over tokens."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), x.grad, {name: t.grad for name, t in model.named_parameters()}


def full(grads):
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in grads.items()}


def check_data_parallel(rank, mesh, expected):
    """Experts over "ep", their shards over "dp"; all else over all ranks."""
    model = make()
    whole = mesh._flatten("whole")
    parallelize_module(model, mesh["ep"], {"*.moe.experts": ExpertParallel(num_chunks=2)})
    for block in model:
        fully_shard(block.moe.experts, mesh=mesh["dp"])
        block.moe.experts.set_gradient_divide_factor(4)
        block.moe.experts.set_force_sum_reduction_for_comms(True)  # gloo has no other
        fully_shard(block, mesh=whole)
    fully_shard(model, mesh=whole)
    assert model[0].moe.experts.gate_up_proj.to_local().shape[0] == 2  # of 8
    y, grad_x, grads = train(model, batch(4).chunk(4)[rank])
    assert torch.equal(y, expected[0].chunk(4)[rank])
    assert_close(grad_x / 4, expected[1].chunk(4)[rank])
    assert_close(full(grads), expected[2])
    check_clipping(model)


def check_clipping(model):
    """Torch's own has one mesh: the rest of the model is on another than the experts."""
    alone = make()
    train(alone, batch(4))
    for max_norm, norm_type in ((100.0, 2.0), (math.inf, 2.0), (0.01, 2.0), (0.001, math.inf)):
        norm = clip_grad_norm_(model.parameters(), max_norm, norm_type)
        assert_close(norm, torch.nn.utils.clip_grad_norm_(alone.parameters(), max_norm, norm_type))
        grads = full({name: t.grad for name, t in model.named_parameters()})
        assert_close(grads, {name: t.grad for name, t in alone.named_parameters()})


def check_tensor_parallel(rank, mesh, expected):
    """Tokens are those of two ranks, and the same on the ranks of "tp"; experts are over all four, with all bits."""
    for num_tokens in (40, 38):  # 19 of a rank: 10 and 9
        model = make()
        style = ExpertParallel(split_tokens=mesh["tp"])
        parallelize_module(model, mesh["ep", "tp"]._flatten("ep_tp"), {"*.moe.experts": style})
        x = batch(4)[:num_tokens]
        y, grad_x, grads = train(model, x.chunk(2)[mesh["ep"].get_local_rank()])
        if num_tokens == 38:
            expected = train(make(), x)
        here = mesh["ep"].get_local_rank()
        assert torch.equal(y, expected[0].chunk(2)[here])
        assert torch.equal(grad_x / 2, expected[1].chunk(2)[here])
        for name, grad in full(grads).items():
            if ".experts." in name:
                assert torch.equal(grad / 2, expected[2][name]), name


def check_nodes(rank, mesh, expected):
    model = make()
    parallelize_module(model, mesh, {"*.moe.experts": ExpertParallel(max_tokens=TOKENS)})
    y, grad_x, grads = train(model, batch(4).chunk(4)[rank])
    assert torch.equal(y, expected[0].chunk(4)[rank])
    assert torch.equal(grad_x / 4, expected[1].chunk(4)[rank])
    for name, grad in full(grads).items():
        if ".experts." in name:
            assert torch.equal(grad / 4, expected[2][name]), name


def check_checkpoint(rank, whole, mesh, folder):
    """Saved from four ranks; loaded by two times two, of a model that was made without memory."""
    model = make()
    parallelize_module(model, whole, {"*.moe.experts": ExpertParallel()})
    state = model.state_dict()
    assert torch.equal(state["1.moe.experts.down_proj"].full_tensor(), make()[1].moe.experts.down_proj)
    dcp.save(state, checkpoint_id=folder)
    with torch.device("meta"):
        other = torch.nn.Sequential(Block(), Block(scoring="sigmoid", selection_bias=True))
    parallelize_module(other, mesh["ep"], {"*.moe.experts": ExpertParallel()})
    other.to_empty(device="cpu")
    loaded = other.state_dict()
    dcp.load(loaded, checkpoint_id=folder)
    other.load_state_dict(loaded)
    x = batch(4).chunk(4)[rank]
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(other)(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(other(x), make()(x))


def check_all(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    expected = train(make(), batch(4))
    check_data_parallel(rank, mesh, expected)
    check_tensor_parallel(rank, init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp")), expected)
    check_nodes(rank, init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "device")), expected)
    check_checkpoint(rank, init_device_mesh("cpu", (4,)), mesh, folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a checkpoint read by one process
def test_meshes_have_the_bits_of_one_process(tmp_path):
    as_processes(4, check_all, tmp_path, tmp_path / "checkpoint")
    plain = make()
    state = {name: torch.empty_like(t) for name, t in plain.state_dict().items()}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    assert all(torch.equal(t, state[name]) for name, t in plain.state_dict().items())
