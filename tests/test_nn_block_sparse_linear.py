# SPDX-License-Identifier: Apache-2.0
"""fmkernels.nn.BlockSparseLinear: what it computes, its state, how its blocks change."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fmkernels import BlockSparse, BlockTopology, dds, dsd, random_blocks, sdd
from fmkernels.nn import BlockSparseLinear, QuantizedBlockSparseLinear
from fmkernels.testing import assert_as_good_as_torch

OUT, IN = 150, 200  # neither a multiple of a block


def topology_of(density=0.5, block=32, seed=0):
    rows, columns = -(-OUT // block), -(-IN // block)
    mask = random_blocks(rows, columns, density, generator=torch.Generator().manual_seed(seed))
    return BlockTopology.from_mask(mask, block, (OUT, IN))


def layer_of(density=0.5, bias=True, **options):
    return BlockSparseLinear(IN, OUT, bias, topology=topology_of(density), **options)


def dense_of(module):
    """The layer as a function of x, the dense weight and the bias, in torch."""
    mask = BlockSparse.of(torch.ones_like(module.weight), module.topology).to_dense().bool()
    return lambda x, weight, *bias: F.linear(x, torch.where(mask, weight, 0), *bias)


def with_gradients(function, x, *parameters):
    leaves = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y.square().sum(), leaves))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 3, IN), (0, IN)], ids=str)
def test_it_computes_what_the_dense_layer_with_its_zeros_does(shape, bias):
    module = layer_of(bias=bias)
    x = torch.randn(shape, requires_grad=True)
    y = module(x)
    y.square().sum().backward()
    weight_grad = BlockSparse.of(module.weight.grad, module.topology).to_dense()
    found = (y, x.grad, weight_grad, *(p.grad for p in [module.bias] if bias))
    dense, linear = dense_of(module), module.to_linear()
    assert_as_good_as_torch(found, lambda *t: with_gradients(dense, *t), x, *linear.parameters())
    assert_as_good_as_torch(linear(x), dense, x, *linear.parameters())


def test_an_empty_layer_is_its_bias():
    module = layer_of(0.0)
    y = module(torch.randn(3, IN))
    assert torch.equal(y, module.bias.expand(3, OUT))
    y.sum().backward()
    assert module.weight.grad.shape == module.weight.shape == (0, 32, 32)


@pytest.mark.parametrize("function", ["module", "dsd", "dds", "sdd"])
def test_gradients_compile_to_one_graph(function):
    """A backward that made a BlockSparse looked at what torch.compile forbids there."""
    module = layer_of()
    x, w, left = (torch.randn(n, IN if n != OUT else 5, requires_grad=True) for n in (4, 5, OUT))
    calls = {
        "module": (module, x),
        "dsd": (lambda x: dsd(module.matrix, x.mT), x),
        "dds": (lambda x: dds(x, module.matrix.t()), x),
        "sdd": (lambda left: sdd(left, w, module.topology).values, left),
    }
    call, argument = calls[function]
    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        module.zero_grad()
        argument.grad = None
        y = run(argument)
        y.square().sum().backward()
        results.append([y.detach(), argument.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    assert all(map(torch.equal, *results))


def test_autocast_computes_in_half():
    module = layer_of(bias=False)
    x = torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, module.bfloat16()(x.bfloat16()))


# ---- its state -------------------------------------------------------------------------------------------------------


def test_a_state_dict_brings_its_topology():
    module, other = layer_of(0.5), layer_of(0.25)
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, IN)
    assert other.topology.num_blocks == module.topology.num_blocks
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(other).double().float()(x), module(x))


def test_a_dense_state_dict_gives_the_blocks_of_the_topology():
    linear, module = torch.nn.Linear(IN, OUT), layer_of()
    module.load_state_dict(linear.state_dict())
    assert torch.equal(module.weight, BlockSparse.from_dense(linear.weight, mask=module.topology).values)
    assert torch.equal(module(torch.zeros(1, IN))[0], linear.bias)
    made = BlockSparseLinear.from_linear(linear, module.topology)
    assert torch.equal(made.weight, module.weight)
    assert made.bias is linear.bias


def test_a_state_dict_that_lies_is_refused():
    module = layer_of()
    before = module.weight.clone()
    state = module.state_dict()
    state["column_indices"] = state["column_indices"] + 100
    with pytest.raises(RuntimeError, match=r"BlockTopology: column_indices must be from 0 to 6, got 10\d"):
        module.load_state_dict(state)
    state = module.state_dict()
    del state["row_offsets"]
    state["column_indices"] = state["column_indices"] + 1000
    with pytest.raises(RuntimeError, match=r"Missing key.*row_offsets"):
        module.load_state_dict(state)
    module.load_state_dict(state, strict=False)
    assert torch.equal(module.topology.column_indices, topology_of().column_indices)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        module.load_state_dict(torch.nn.Linear(IN + 1, OUT).state_dict())
    assert torch.equal(module.weight, before)


def test_it_is_made_on_the_meta_device_with_a_topology_that_is_not():
    module = layer_of(device="meta")
    assert module.weight.is_meta
    assert module.bias.is_meta
    real = layer_of()
    module.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = torch.randn(2, IN)
    assert torch.equal(module(x), real(x))


def test_new_values_are_uniform_for_the_inputs_of_a_row():
    torch.manual_seed(0)
    module = layer_of(0.25)
    bound = (IN * module.topology.density) ** -0.5
    assert 0.99 * bound < module.weight.abs().max() <= bound
    assert module.bias.abs().max() <= bound


# ---- its blocks change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.25, 0.5, 1.0])
def test_blocks_that_stay_keep_their_values_and_optimizer_state(density):
    module = layer_of()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(8, IN)).square().sum().backward()
    optimizer.step()
    moments = ("exp_avg", "exp_avg_sq")
    old = {name: BlockSparse.of(optimizer.state[module.weight][name], module.topology).to_dense() for name in moments}
    old["weight"] = module.matrix.to_dense().detach()
    was = BlockSparse.of(torch.ones_like(module.weight), module.topology).to_dense()
    module.set_topology(topology_of(density, seed=1), optimizer)
    assert module.weight.grad is None
    assert optimizer.param_groups[0]["params"][0] is module.weight
    state = optimizer.state[module.weight]
    assert state["step"] == 1
    now = BlockSparse.of(torch.ones_like(module.weight), module.topology).to_dense()
    for name, blocks in (("weight", module.weight), *((name, state[name]) for name in moments)):
        assert torch.equal(BlockSparse.of(blocks.detach(), module.topology).to_dense(), old[name] * was * now)
    module(torch.randn(8, IN)).square().sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 2  # nothing is left of the old weight


def test_as_many_blocks_change_in_place():
    module = layer_of()
    weight, address = module.weight, module.weight.data_ptr()
    module.set_topology(topology_of(seed=1))
    assert module.weight is weight
    assert weight.data_ptr() == address


def test_a_change_of_blocks_while_an_old_graph_lives():
    """The old parameter was given a new shape; what autograd knew of it then refused the gradient."""
    module = layer_of()
    old = module(torch.randn(2, IN)).sum()
    module.set_topology(topology_of(0.25, seed=1))
    module(torch.randn(2, IN)).sum().backward()
    assert module.weight.grad.shape == module.weight.shape
    old.backward()


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_blocks_that_no_row_lists_are_no_part_of_it():
    """Their places wrapped to the last ones, and blocks that are listed lost their values."""
    whole = topology_of(0.5)
    lists = (whole.row_offsets, torch.cat([whole.column_indices, torch.tensor([6, 0], dtype=torch.int32)]))
    module = BlockSparseLinear(IN, OUT, topology=BlockTopology(*lists, (OUT, IN), 32))
    before = module.matrix.to_dense()
    module.set_topology(BlockTopology.from_mask(torch.ones(5, 7, dtype=torch.bool), 32, (OUT, IN)))
    assert torch.equal(module.matrix.to_dense(), before)


def test_a_meta_layer_keeps_its_topology():
    module = BlockSparseLinear.from_linear(torch.nn.Linear(IN, OUT, device="meta"), topology_of())
    real = layer_of()
    module.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = torch.randn(2, IN)
    assert torch.equal(module(x), real(x))


def test_errors():
    topology = topology_of()
    with pytest.raises(TypeError, match=r"nn.BlockSparseLinear: topology must be a BlockTopology, got int\."):
        BlockSparseLinear(IN, OUT, topology=3)
    with pytest.raises(ValueError, match=r"topology must be of shape \(150, 100\), got \(150, 200\)\."):
        BlockSparseLinear(100, OUT, topology=topology)
    with pytest.raises(ValueError, match=r"in_features must be at least 1, got 0\."):
        BlockSparseLinear(0, OUT, topology=topology)
    with pytest.raises(TypeError, match=r"weight_grad_store must be a WeightGradStore, got list\."):
        BlockSparseLinear(IN, OUT, topology=topology, weight_grad_store=[])
    with pytest.raises(TypeError, match=r"from_linear: module must be a torch.nn.Linear, got ReLU\."):
        BlockSparseLinear.from_linear(torch.nn.ReLU(), topology)
    with pytest.raises(ValueError, match=r"topology must have blocks of \(32, 32\), got \(16, 16\)\."):
        BlockSparseLinear(IN, OUT, topology=topology).set_topology(topology_of(block=16))
    with pytest.raises(ValueError, match=r"dds: a must have for this s, of shape .*, size 200, got 100"):
        BlockSparseLinear(IN, OUT, topology=topology)(torch.randn(2, 100))


def test_repr():
    assert repr(layer_of(1.0)) == (
        "BlockSparseLinear(in_features=200, out_features=150, bias=True, block=(32, 32), density=1)"
    )


# ---- int8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_quantized_layer_is_the_product_with_the_quantized_matrix(bias):
    module = layer_of(bias=bias)
    quantized = QuantizedBlockSparseLinear.from_block_sparse(module)
    x = torch.randn(2, 3, IN)
    expected = dds(x, module.matrix.quantize().t(), bias=module.bias)
    assert torch.equal(quantized(x), expected)
    other = QuantizedBlockSparseLinear(IN, OUT, bias, topology=topology_of(0.25))
    other.load_state_dict(quantized.state_dict())  # which brings its topology
    assert torch.equal(copy.deepcopy(other)(x), expected)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    halves = other.bfloat16()
    assert halves.block_scales.dtype == torch.float32
    assert halves.weight.dtype == torch.int8
    half_bias = module.bias.bfloat16() if bias else None
    halves_expected = dds(x.bfloat16(), module.matrix.quantize().t(), bias=half_bias)
    assert torch.equal(halves(x.bfloat16()), halves_expected)
    x.requires_grad_()
    quantized(x).sum().backward()
    assert x.grad is not None
    assert quantized.bias is module.bias


def test_the_quantized_layer_is_made_on_the_meta_device():
    module = QuantizedBlockSparseLinear(IN, OUT, topology=topology_of(), device="meta")
    assert module.weight.is_meta
    real = QuantizedBlockSparseLinear.from_block_sparse(layer_of())
    module.to_empty(device="cpu").load_state_dict(real.state_dict())
    x = torch.randn(2, IN)
    assert torch.equal(module(x), real(x))
    with pytest.raises(TypeError, match=r"from_block_sparse: module must be a fmkernels.nn.BlockSparseLinear, got Lin"):
        QuantizedBlockSparseLinear.from_block_sparse(torch.nn.Linear(2, 2))
