# SPDX-License-Identifier: Apache-2.0
"""fmkernels.hooks under DistributedDataParallel: the bits of each parameter's own all_reduce, whatever the buckets."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes, raised
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fmkernels import quantized_collectives
from fmkernels.hooks import QuantizedAllReduce
from fmkernels.reference import quantized_collectives as reference

WORLD_SIZE = 3

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def make(width=130):
    """The same parameters in every process; most are no multiples of a block."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))


def batch(rank, step):
    """Of a function that the model can learn."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(16, 33, generator=generator)
    return x, x[:, :5] * x[:, 5:10]


def loss_of(model, rank, step):
    x, y = batch(rank, step)
    return (model(x) - y).square().mean()


def gradients_of(model, step):
    """Of every rank alone: {name: [flat gradient of each rank]}, from what one process can compute."""
    model.load_state_dict(make().state_dict())
    result = {}
    for rank in range(WORLD_SIZE):
        grads = torch.autograd.grad(loss_of(model, rank, step), list(model.parameters()))
        for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
            result.setdefault(name, []).append(grad.flatten())
    return result


def wrap(options, bucket_cap_mb=25.0):
    model = make()
    compression = QuantizedAllReduce(model, **options)
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb)
    compression.register(ddp)
    return model, ddp, compression


def check_gradients(rank):
    """Buckets of the first step, of later ones and of other sizes; accumulated under no_sync."""
    seen = {}
    alone = [gradients_of(make(), step) for step in range(2)]
    drawn = {"bits": 4, "rounding": "stochastic", "seed": 3}
    several = ({"bits": 4, "algorithm": "one_shot"}, {"bits": 4, "error_feedback": True}, {"bits": 1}, drawn)
    places = {key: index << 40 for index, key in enumerate(sorted(alone[0]))}
    for options in ({}, {"bits": "float8_e4m3fn"}, *several):
        algorithm = {key: value for key, value in options.items() if key != "error_feedback"}
        for bucket_cap_mb in (0.01, 25.0):
            for step in range(2):
                draws = [{"step": step + 1, "offset": places[key]} if options is drawn else {} for key in places]
                expected = {
                    key: reference.all_reduce(alone[step][key], op="avg", **algorithm, **draw)
                    for key, draw in zip(places, draws, strict=True)
                }
                if step == 0:
                    model, ddp, compression = wrap(options, bucket_cap_mb)
                elif options.get("error_feedback"):
                    compression.rescale(0.0)
                model.zero_grad()
                loss_of(ddp, rank, step).backward()
                for name, parameter in model.named_parameters():
                    at = (options, bucket_cap_mb, step, name)
                    if options.get("error_feedback"):  # what a rank lost of its own shard is made up for at once
                        seen.setdefault((step, name), parameter.grad.clone())
                        assert torch.equal(parameter.grad, seen[step, name]), at
                        assert not torch.equal(parameter.grad.flatten(), expected[name]), at
                    else:
                        assert torch.equal(parameter.grad.flatten(), expected[name]), at
    model, ddp, _ = wrap({})
    with ddp.no_sync():
        loss_of(ddp, rank, 0).backward()
    loss_of(ddp, rank, 1).backward()
    for name, parameter in model.named_parameters():
        both = [a + b for a, b in zip(alone[0][name], alone[1][name], strict=True)]
        assert torch.equal(parameter.grad.flatten(), reference.all_reduce(both, op="avg")), name


def check_feedback(rank):
    """sum of the gradients = sum of the results + what the errors of all ranks hold; LoCo keeps a part of it."""
    num_steps = 6
    for bits in (4, 1):
        model, ddp, compression = wrap({"bits": bits, "error_feedback": True}, bucket_cap_mb=0.02)
        totals = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in model.named_parameters()}
        given = {name: total.clone() for name, total in totals.items()}
        for step in range(num_steps):
            model.zero_grad()
            loss_of(ddp, rank, step).backward()
            for name, parameter in model.named_parameters():
                totals[name] += parameter.grad.flatten().double() * WORLD_SIZE
            for name, grads in gradients_of(make(), step).items():
                given[name] += sum(grad.double() for grad in grads)
        for name, error in compression.errors().items():
            kept = error.double()
            dist.all_reduce(kept)
            largest = totals[name].abs().max() + kept.abs().max()
            difference = (given[name] - totals[name] - kept).abs().max()
            assert difference <= num_steps * (3 * WORLD_SIZE + 4) * torch.finfo(torch.float32).eps * largest, name
            assert (given[name] - totals[name]).abs().max() > 10 * difference, name
    errors = []
    for options in ({}, {"decay": 0.5}, {"reset_interval": 1}):
        model, ddp, compression = wrap({"bits": 4, "error_feedback": True, "algorithm": "one_shot"} | options)
        for _ in range(2 if "reset_interval" in options else 1):
            model.zero_grad()
            loss_of(ddp, rank, 0).backward()
        errors.append(compression.errors())
    for name, error in errors[0].items():
        assert torch.equal(errors[1][name], error / 2), name
        assert torch.equal(errors[2][name], error), name


def train(options, rank, num_steps, bucket_cap_mb=25.0, state=None, first=0):
    if options is None:
        model = make()
        ddp, compression = DistributedDataParallel(model), None
    else:
        model, ddp, compression = wrap(options, bucket_cap_mb)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        compression.load_state_dict(state["compression"])
    losses = []
    for step in range(first, first + num_steps):
        optimizer.zero_grad()
        loss = loss_of(ddp, rank, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses[-10:]).mean()
    dist.all_reduce(mean)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if compression is not None:
        state["compression"] = compression.state_dict()
    return mean.item() / WORLD_SIZE, state


def check_training(rank, folder):
    """Close to that of exact gradients; interrupted, it goes on with the same bits although buckets begin anew."""
    exact, _ = train(None, rank, 40)
    feedback = {"bits": 4, "error_feedback": True}
    drawn = {"rounding": "stochastic", "seed": 2}
    for options, allowed in (({}, 0.01), (feedback, 0.03), (feedback | drawn, 0.03)):
        loss, state = train(options, rank, 40, bucket_cap_mb=0.02)
        assert abs(loss / exact - 1) <= allowed, (options, loss, exact)
        for name, tensor in state["model"].items():
            of_rank_0 = tensor.clone()
            dist.broadcast(of_rank_0, 0)
            assert torch.equal(tensor, of_rank_0), name
    _, half = train(options, rank, 15, bucket_cap_mb=0.02)
    torch.save(half, folder / f"{rank}.pt")
    _, resumed = train(options, rank, 25, bucket_cap_mb=0.05, state=torch.load(folder / f"{rank}.pt"), first=15)
    for name, tensor in state["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    assert resumed["compression"]["num_steps"] == state["compression"]["num_steps"] == 40
    for name, error in state["compression"]["errors"].items():
        assert torch.equal(error, resumed["compression"]["errors"][name]), name
        assert error.any(), name


def check_errors(rank):
    def run(**options):
        _, ddp, _ = wrap(options)
        loss_of(ddp, rank, 0).backward()

    assert "bits must be the same on every rank, rank 0 has 8 and rank 2 4." in raised(run, bits=4 if rank == 2 else 8)
    text = raised(run, rounding="stochastic", seed=rank)
    assert "seed must be the same on every rank, rank 0 has 0 and rank 1 1." in text, text
    model = make()
    name = "ValueError: QuantizedAllReduce: "
    assert raised(QuantizedAllReduce, model, bits=5) == f"{name}bits must be one of 8, 6, 4, 1, float8_e4m3fn, got 5."
    assert raised(QuantizedAllReduce, model, decay=1.0, error_feedback=True) == (
        f"{name}decay must be at least 0 and below 1, got 1.0."
    )
    assert raised(QuantizedAllReduce, model, decay=0.5) == (
        f"{name}decay and reset_interval must not be given without error_feedback."
    )
    assert raised(QuantizedAllReduce, model, reset_interval=0, error_feedback=True) == (
        f"{name}reset_interval must be at least 1, got 0."
    )
    assert raised(QuantizedAllReduce, model, rounding="stochastic") == (
        f"{name}seed must be given where rounding is 'stochastic', got None."
    )
    for options, sentence in (
        ({"reset_interval": 1.5, "error_feedback": True}, "reset_interval must be an integer, got float."),
        ({"error_feedback": "yes"}, "error_feedback must be True or False, got str."),
        ({"hadamard": 1}, "hadamard must be True or False, got int."),
        ({"decay": "0.5", "error_feedback": True}, "decay must be a number, got str."),
    ):
        assert raised(QuantizedAllReduce, model, **options) == f"TypeError: QuantizedAllReduce: {sentence}"
    compression = QuantizedAllReduce(model, error_feedback=True)
    state = {"errors": {"9.weight": torch.zeros(3)}, "num_steps": 1}
    assert raised(compression.load_state_dict, state) == (
        f"{name}errors must be of parameters of the model, it has no 9.weight."
    )
    state = {"errors": {"0.bias": torch.zeros(3)}, "num_steps": 1}
    assert raised(compression.load_state_dict, state) == (
        f"{name}the error of 0.bias must be float32 with 130 elements, it is torch.float32 with 3."
    )
    assert raised(QuantizedAllReduce(model).load_state_dict, {"errors": {}, "num_steps": None}) == (
        "TypeError: QuantizedAllReduce: num_steps must be an integer, got NoneType."
    )
    assert raised(QuantizedAllReduce(model).load_state_dict, state) == (
        f"{name}errors must be empty where error_feedback is off, there are 1."
    )
    error = {"errors": {"module.bias": torch.zeros(3)}, "num_steps": 1}
    weights = {key: torch.zeros(3) for key in ("module.bias", "module.weight", "weight")}
    own = [(key, weights[key]) for key in ("module.bias", "weight")]  # of a model with a part of this name
    assert raised(QuantizedAllReduce(own, error_feedback=True).load_state_dict, error) == "nothing"
    wrapped = [(key, weights[key]) for key in ("module.bias", "module.weight")]
    error = {"errors": {"bias": torch.zeros(3)}, "num_steps": 1}
    assert raised(QuantizedAllReduce(wrapped, error_feedback=True).load_state_dict, error) == "nothing"
    ddp = DistributedDataParallel(model)
    QuantizedAllReduce([]).register(ddp)
    text = raised(lambda: loss_of(ddp, rank, 0).backward())
    assert "QuantizedAllReduce: parameters must be all those of the DDP model, one of [" in text, text


def check_rank(rank, folder):
    for check in (check_gradients, check_feedback, check_errors):
        check(rank)
    check_training(rank, folder)


def test_ddp(tmp_path):
    as_processes(WORLD_SIZE, check_rank, tmp_path, tmp_path)


# ---- a process that dies ---------------------------------------------------------------------------------------------


def check_survivor(rank):
    x = torch.ones(1 << 16)
    quantized_collectives.all_reduce(x)
    if rank == 1:
        os._exit(0)
    begin = time.monotonic()
    text = raised(lambda: [quantized_collectives.all_reduce(x) for _ in range(3)])
    assert text.startswith("RuntimeError: all_reduce: rank "), text
    assert "of the group is gone or late" in text
    assert time.monotonic() - begin < 15
    return False


def test_a_process_that_dies_raises_on_the_others(tmp_path):
    as_processes(WORLD_SIZE, check_survivor, tmp_path, seconds=10)
