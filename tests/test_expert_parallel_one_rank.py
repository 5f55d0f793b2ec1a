# SPDX-License-Identifier: Apache-2.0
"""fmkernels.expert_parallel in a group of one rank: the kernels of every backend, and a compiled caller."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from expert_parallel_ranks import Layer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from fmkernels import expert_parallel, moe
from fmkernels.integrations import transformers
from fmkernels.testing import backends

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

# gloo has the tensors of the CPU; so have the kernels of CUDA where they are emulated
BACKENDS = [backend for backend in backends("moe_permute") if backend.device == "cpu"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("one") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def twice(rows, offsets):
    return rows * 2


def alone(x, topk_weights, topk_idx):
    mapping = moe.build_mapping(topk_idx, 12)
    return moe.combine(twice(moe.permute(x, mapping), None), mapping, topk_weights)


def in_pieces(x, topk_weights, topk_idx, **options):
    recv_x, _, handle = expert_parallel.dispatch(x, topk_idx, 12, **options)
    return expert_parallel.combine(twice(moe.permute(recv_x, handle.mapping), None), handle, topk_weights)


def together(x, topk_weights, topk_idx, **options):
    return expert_parallel.run(twice, x, topk_weights, topk_idx, 12, **options)


def step(function, layer, **options):
    x, _, _, topk_weights = layer.leaves()
    out = function(x, topk_weights, layer.topk_idx, **options)
    return [out.detach(), *torch.autograd.grad(out, (x, topk_weights), layer.grad)]


@pytest.mark.parametrize("hidden", [64, 13])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_the_kernels_of_a_backend_take_rows_as_they_travel(backend, hidden, one_rank):
    """Rows beside ids, at odd places, with none in the place of a token: the bits of the kernels without them."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = Layer((9,), dtype=dtype, hidden=hidden)
        wanted = backend.run(step, alone, layer)
        for options in (
            {},
            {"max_tokens": 12},
            {"group": (None, one_rank)},
            {"group": (None, one_rank), "max_tokens": 12},
        ):
            for function in (together, in_pieces):
                actual = backend.run(step, function, layer, **options)
                assert all(map(torch.equal, actual, wanted)), (dtype, options)
        backend.run(step, together, layer, payload="int8", num_chunks=2)


def test_clipping_without_a_mesh():
    for norm_type in (2.0, 1.0, math.inf):
        parameters = [torch.nn.Parameter(torch.randn(3, n)) for n in (1, 5, 2)]
        copies = copy.deepcopy(parameters)
        for t, same in zip(parameters[:2], copies, strict=False):
            t.grad = torch.randn_like(t)
            same.grad = t.grad.clone()
        wanted = torch.nn.utils.clip_grad_norm_(copies, 0.5, norm_type)
        torch.testing.assert_close(expert_parallel.clip_grad_norm_(iter(parameters), 0.5, norm_type), wanted)
        torch.testing.assert_close([t.grad for t in parameters[:2]], [t.grad for t in copies[:2]])
    wanted, grad = torch.nn.utils.get_total_norm([t.grad for t in parameters[:2]]), parameters[0].grad.clone()
    torch.testing.assert_close(expert_parallel.clip_grad_norm_(parameters, math.inf), wanted)
    assert torch.equal(parameters[0].grad, grad)
    assert expert_parallel.clip_grad_norm_([], 1.0) == 0
    parameters[0].grad[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"the norm of the gradients must be finite, got nan\."):
        expert_parallel.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match=r"max_norm must not be negative, got -1\."):
        expert_parallel.clip_grad_norm_(parameters, -1)
    with pytest.raises(TypeError, match="parameters must be a tensor, got int"):
        expert_parallel.clip_grad_norm_([1], 1.0)


def test_experts_of_transformers(one_rank):
    """Shared out where they are called; experts that are gated otherwise are refused."""
    mixtral = pytest.importorskip("transformers.models.mixtral")
    transformers.register()
    config = mixtral.MixtralConfig(hidden_size=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "fmkernels"
    block = mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
    for t in block.parameters():
        torch.nn.init.normal_(t, std=0.2)
    x = torch.randn(2, 5, 32)
    wanted = block(x)
    parallelize_module(block, init_device_mesh("cpu", (1,)), {"experts": expert_parallel.ExpertParallel()})
    assert torch.equal(block(x), wanted)
    assert torch.equal(copy.deepcopy(block)(x), wanted)
    config.hidden_act = "gelu"
    block = mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)
    with pytest.raises(ValueError, match=r"ExpertParallel: the activation must be SiLU, got GELUActivation\."):
        parallelize_module(block, init_device_mesh("cpu", (1,)), {"experts": expert_parallel.ExpertParallel()})


def test_a_compiled_caller_has_the_same_bits(one_rank):
    """Its graph ends at the exchange and goes on behind it."""
    torch._dynamo.reset()

    def layer(x, *args, **options):
        return expert_parallel.moe_mlp(x * 2, *args, **options) * 3

    compiled = torch.compile(layer, backend="aot_eager")
    for num_tokens in (6, 9):
        *leaves, idx = (*Layer((num_tokens,)).leaves(), Layer((num_tokens,)).topk_idx)
        for options in ({}, {"max_tokens": 9}):
            outs = [function(*leaves, idx, **options) for function in (compiled, layer)]
            assert torch.equal(*outs)
            assert all(map(torch.equal, *(torch.autograd.grad(out.sum(), leaves) for out in outs)))
