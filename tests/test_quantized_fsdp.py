# SPDX-License-Identifier: Apache-2.0
"""fmkernels.fsdp under fully_shard in four processes, which are also two nodes of two."""

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes, raised
from torch import nn
from torch.distributed.fsdp import fully_shard

import fmkernels.fsdp
from fmkernels import block_codec
from fmkernels._collectives_header import header_bytes
from fmkernels._collectives_transport import TaggedTransport
from fmkernels.fsdp import QuantizedAllGather, QuantizedReduceScatter, quantize_communication
from fmkernels.reference import quantized_collectives as reference

WORLD_SIZE = 4

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def make():
    """The same parameters in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 132), nn.Tanh(), nn.Linear(132, 8))


def shard(model, **options):
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return quantize_communication(model, **options) if options else {}


def loss_of(model, rank, step=0):
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(100 * step + rank))
    return (model(x) - x[:, :8] * x[:, 8:16]).square().mean()


def laid_out(tensors):
    """[ranks of the shard, elements]: what FSDP exchanges for a layer."""
    return torch.cat([t.reshape(WORLD_SIZE, -1) for t in tensors], 1)


def check_scatter(rank):
    """The gradients of a layer are one reduce_scatter, in parts as FSDP lays them out."""
    grads = []  # of every rank alone
    for other in range(WORLD_SIZE):
        model = make()
        loss_of(model, other).backward()
        grads.append([laid_out([layer.weight.grad, layer.bias.grad]) for layer in (model[0], model[2])])
    for options in (
        {"bits": 8},
        {"bits": 4, "hadamard": True},
        {"bits": 8, "algorithm": "hierarchical", "node_size": 2},
        {"bits": "float8_e4m3fn"},
        {"bits": 4, "rounding": "stochastic", "seed": 7},
    ):
        model = make()
        named = {f"scatter_{key}" if key in ("bits", "rounding") else key: value for key, value in options.items()}
        shard(model, gather_bits=None, **named)
        loss_of(model, rank).backward()
        for index, layer in enumerate((model[0], model[2])):
            inputs = [grad[index].flatten() for grad in grads]
            splits = [inputs[0].numel() // WORLD_SIZE] * WORLD_SIZE
            draws = {"offset": 2 * (index + 1) << 40} if "seed" in options else {}  # of the second and the third module
            expected = reference.reduce_scatter(inputs, splits, op="avg", **options, **draws)[rank]
            actual = torch.cat([p.grad.to_local().flatten() for p in (layer.weight, layer.bias)])
            assert torch.equal(actual, expected), (options, index)


def check_gather(rank):
    """Every rank computes with what all decode; the shards stay exact."""
    del rank
    model, exact = make(), make()
    shard(model, scatter_bits=None, gather_bits=4)
    for layer, whole in ((model[0], exact[0]), (model[2], exact[2])):
        shards = laid_out([whole.weight.detach(), whole.bias.detach()])
        expected = reference.all_gather(list(shards), bits=4).view(WORLD_SIZE, -1)
        layer.unshard()
        assert torch.equal(laid_out([layer.weight.detach(), layer.bias.detach()]), expected)
        layer.reshard()
        assert torch.equal(layer.weight.full_tensor(), whole.weight)


class RecordedAllGather(QuantizedAllGather):
    """Keeps the ranks and the result of each gather, and the bytes that quantised ones send to each rank."""

    gathers, num_bytes = [], torch.zeros(WORLD_SIZE, dtype=torch.int64)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        work = super().__call__(output_tensor, input_tensor, group, async_op)
        if work is not None:
            work.wait()
        self.gathers.append((dist.get_process_group_ranks(group), output_tensor.clone()))
        return work

    @classmethod
    def count(cls, transport, post, way, data, peer, message):
        if transport.name == "all_gather" and way == transport.group.send:
            cls.num_bytes[dist.get_process_group_ranks(transport.group)[peer]] += data.nbytes
        return post(transport, way, data, peer, message)


def check_secondary_shards(rank):
    """hpZ and qgZ in two nodes of two: the backward pass gathers inside the node, the weights of the forward pass.

    Every shard of a gradient has the bits of one process that computes them at the rounded weights.
    """
    model, exact = make(), make()
    for module in (model[0], model[2], model):
        fully_shard(module, reshard_after_forward=2)
    fmkernels.fsdp.QuantizedAllGather = RecordedAllGather
    options = {"algorithm": "hierarchical", "node_size": 2, "inter_bits": 4}
    quantize_communication(model, gather_bits=8, scatter_bits=8, **options)
    fmkernels.fsdp.QuantizedAllGather = QuantizedAllGather
    post = TaggedTransport._post
    TaggedTransport._post = lambda *args: RecordedAllGather.count(args[0], post, *args[1:])
    loss = loss_of(model, rank)
    forward_bytes, num_forward = RecordedAllGather.num_bytes.clone(), len(RecordedAllGather.gathers)
    loss.backward()
    TaggedTransport._post = post
    forward, backward = RecordedAllGather.gathers[:num_forward], RecordedAllGather.gathers[num_forward:]
    assert [ranks for ranks, _ in forward] == [[0, 1, 2, 3]] * 2
    assert [ranks for ranks, _ in backward] == [[rank // 2 * 2, rank // 2 * 2 + 1]] * 2
    numels = [value.numel() // WORLD_SIZE for _, value in forward]
    wires = sum(block_codec.wire_bytes(numel) + header_bytes(WORLD_SIZE) for numel in numels)
    assert forward_bytes.tolist() == [0 if peer == rank else wires for peer in range(WORLD_SIZE)]
    assert torch.equal(RecordedAllGather.num_bytes, forward_bytes), "nothing between nodes, and no codes inside"

    for layer, (_, first), (_, second) in zip((exact[0], exact[2]), forward, reversed(backward), strict=True):
        rounded = reference.all_gather(list(laid_out([layer.weight.detach(), layer.bias.detach()]))).view(
            WORLD_SIZE, -1
        )
        assert torch.equal(first.view(WORLD_SIZE, -1), rounded)
        rows = layer.weight.numel() // WORLD_SIZE
        with torch.no_grad():
            layer.weight.copy_(rounded[:, :rows].reshape(layer.weight.shape))
            layer.bias.copy_(rounded[:, rows:].flatten())
        halves = [t.detach().reshape(2, -1) for t in (layer.weight, layer.bias)]
        assert torch.equal(second.view(2, -1), torch.cat(halves, 1)), "the weights of the forward pass"
    grads = []
    for other in range(WORLD_SIZE):
        exact.zero_grad()
        loss_of(exact, other).backward()
        grads.append([laid_out([layer.weight.grad, layer.bias.grad]).flatten() for layer in (exact[0], exact[2])])
    for index, layer in enumerate((model[0], model[2])):
        inputs = [grad[index] for grad in grads]
        splits = [inputs[0].numel() // WORLD_SIZE] * WORLD_SIZE
        expected = reference.reduce_scatter(inputs, splits, op="avg", **options)[rank]
        actual = torch.cat([p.grad.to_local().flatten() for p in (layer.weight, layer.bias)])
        assert torch.equal(actual, expected), index


def check_drawn_gather(rank):
    """A backward pass has the parameters of its forward pass, the next step has others, and all ranks the same."""
    model, whole = make(), make()
    drawn = {"gather_bits": 4, "gather_rounding": "stochastic", "seed": 5}
    scatters = shard(model, **drawn)
    shards = laid_out([whole[0].weight.detach(), whole[0].bias.detach()])
    for step in range(2):
        draws = {"rounding": "stochastic", "seed": 5, "step": step, "offset": 3 << 40}
        expected = reference.all_gather(list(shards), bits=4, **draws).view(WORLD_SIZE, -1)
        for _ in range(2):
            model[0].unshard()
            assert torch.equal(laid_out([model[0].weight.detach(), model[0].bias.detach()]), expected), step
            model[0].reshard()
        loss_of(model, rank).backward()
    assert scatters["0"].num_steps == 2


def train(options, rank, num_steps, state=None, first=0):
    model = make()
    if state is not None:
        model.load_state_dict(state["model"])
    scatters = shard(model, **options)
    for name, scatter in scatters.items():
        if state is not None:
            scatter.load_state_dict(state["scatters"][name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    losses = []
    for step in range(first, first + num_steps):
        optimizer.zero_grad()
        loss = loss_of(model, rank, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses[-6:]).mean()
    dist.all_reduce(mean)
    whole = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    return mean.item(), {"model": whole, "scatters": {name: s.state_dict() for name, s in scatters.items()}}


def check_training(rank):
    exact, _ = train({}, rank, 12)
    for options, allowed in (({"scatter_bits": 8}, 0.01), ({"scatter_bits": 4, "error_feedback": True}, 0.03)):
        loss, state = train(options, rank, 12)
        assert abs(loss / exact - 1) <= allowed, (options, loss, exact)
    options = options | {"scatter_rounding": "stochastic", "gather_rounding": "stochastic", "seed": 11}
    _, state = train(options, rank, 12)
    _, half = train(options, rank, 5)
    _, resumed = train(options, rank, 7, state=half, first=5)
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    for name in ("0", "2"):
        error = state["scatters"][name]["error"]
        assert error.any()
        assert torch.equal(error, resumed["scatters"][name]["error"]), name
    assert state["scatters"][""]["error"] is None, "the root has no parameters of its own"


class Switched(nn.Module):
    """Two matrices of one size, of which a step may leave out the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Parameter(torch.randn(24, 20)) for _ in range(2))

    def forward(self, x, uses_first):
        y = x @ self.second.t()
        return y * (x @ self.first.t()) if uses_first else y


def check_unused_parameter(rank):
    """The error of a parameter stays its own in a step in which another has no gradient, and is what that one gets."""
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(rank))

    def step(model, uses_first):
        model.zero_grad()
        model(x, uses_first).square().mean().backward()

    model, alone = Switched(), Switched()
    fully_shard(model)
    options = {"scatter_bits": 4, "error_feedback": True}
    scatter = quantize_communication(model, gather_bits=None, **options)[""]
    step(model, True)
    errors = scatter.state_dict()["error"].view(WORLD_SIZE, 2, -1)
    assert errors[:, 0].any()
    gathered = [torch.empty_like(errors) for _ in range(WORLD_SIZE)]
    dist.all_gather(gathered, errors)
    step(alone, False)
    grads = [torch.empty(24, 20) for _ in range(WORLD_SIZE)]
    dist.all_gather(grads, alone.second.grad)
    laid = [laid_out([torch.zeros(24, 20), grad]).view(WORLD_SIZE, 2, -1) for grad in grads]
    inputs = [(error + grad).flatten() for error, grad in zip(gathered, laid, strict=True)]
    splits = [inputs[0].numel() // WORLD_SIZE] * WORLD_SIZE
    expected = reference.reduce_scatter(inputs, splits, op="avg", bits=4)[rank]
    step(model, False)
    assert model.first.grad is not None
    assert torch.equal(torch.cat([p.grad.to_local().flatten() for p in (model.first, model.second)]), expected)


def check_errors(rank):
    del rank
    x, y = torch.zeros(8), torch.zeros(2)
    group = dist.group.WORLD
    scatter = QuantizedReduceScatter(error_feedback=True)
    assert raised(scatter, y, x, group, dist.ReduceOp.MAX).startswith(
        "ValueError: QuantizedReduceScatter: op must be SUM or AVG, got "
    )
    scatter(y, x, group, dist.ReduceOp.SUM)
    assert raised(scatter, y, torch.zeros(12), group, dist.ReduceOp.SUM) == (
        "ValueError: QuantizedReduceScatter: input_tensor must have the 8 elements of the error, it has 12; with "
        "error_feedback every module needs an object of its own."
    )
    assert raised(QuantizedAllGather, bits=3) == (
        "ValueError: QuantizedAllGather: bits must be one of 8, 6, 4, 1, float8_e4m3fn, got 3."
    )
    assert raised(QuantizedReduceScatter().load_state_dict, {"error": x}) == (
        "ValueError: QuantizedReduceScatter: error must be None where error_feedback is off, it is a tensor."
    )
    assert raised(QuantizedReduceScatter().load_state_dict, {"error": None, "num_steps": -1}) == (
        "ValueError: QuantizedReduceScatter: num_steps must be at least 0, got -1."
    )
    drawn = {"rounding": "stochastic", "seed": 0}
    assert raised(QuantizedAllGather, **drawn) == (
        "ValueError: QuantizedAllGather: scatter must be given where rounding is 'stochastic': a forward pass and its "
        "backward pass need the same parameters, and its calls tell one step from the next."
    )
    assert raised(QuantizedAllGather, scatter="layer", **drawn) == (
        "TypeError: QuantizedAllGather: scatter must be a QuantizedReduceScatter, got str."
    )
    assert raised(QuantizedAllGather, hadamard=None) == (
        "TypeError: QuantizedAllGather: hadamard must be True or False, got NoneType."
    )
    assert raised(QuantizedReduceScatter, error_feedback=1) == (
        "TypeError: QuantizedReduceScatter: error_feedback must be True or False, got int."
    )
    assert raised(quantize_communication, nn.Linear(2, 2), scatter_bits=None, gather_rounding="stochastic") == (
        "ValueError: quantize_communication: gather_rounding must be 'nearest' with scatter_bits=None: a gradient that "
        "is scattered tells one step from the next, got 'stochastic'."
    )
    for value, options in ((1.5, {"error_feedback": True}), (-0.5, {})):
        assert raised(QuantizedReduceScatter, decay=value, **options) == (
            f"ValueError: QuantizedReduceScatter: decay must be at least 0 and below 1, got {value}."
        )
    assert raised(QuantizedReduceScatter, decay=0.5) == (
        "ValueError: QuantizedReduceScatter: decay must not be given without error_feedback, got 0.5."
    )
    assert raised(quantize_communication, nn.Linear(2, 2)) == (
        "ValueError: quantize_communication: model must have modules of fully_shard, it has none."
    )
    assert raised(quantize_communication, nn.Linear(2, 2), scatter_bits=None, error_feedback=True) == (
        "ValueError: quantize_communication: error_feedback must be off with scatter_bits=None, it was given."
    )


def check_rank(rank):
    for check in (
        check_scatter,
        check_gather,
        check_drawn_gather,
        check_secondary_shards,
        check_training,
        check_unused_parameter,
        check_errors,
    ):
        check(rank)


def test_fully_shard(tmp_path):
    as_processes(WORLD_SIZE, check_rank, tmp_path)
