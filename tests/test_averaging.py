# SPDX-License-Identifier: Apache-2.0
"""fmkernels.averaging: local SGD, DiLoCo and neighbours, each beside the same computed in one process."""

import functools
import os
import time

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes, raised
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fmkernels import block_codec
from fmkernels.averaging import DiLoCo, NeighbourAveraging, PeriodicAveraging
from fmkernels.reference import quantized_collectives as reference

WORLD_SIZE = 4
INTERVAL = 3

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 130), nn.Tanh(), nn.Linear(130, 5))


def loss_of(model, rank, step):
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(100 * step + rank))
    return (model(x) - x[:, :5] + x[:, 5:10]).square().mean()


def local_step(model, optimizer, rank, step):
    optimizer.zero_grad()
    loss = loss_of(model, rank, step)
    loss.backward()
    optimizer.step()
    return loss.detach()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def assert_same(tensors, others, at=None):
    for index, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
        assert torch.equal(tensor, other), (index, at)


def gathered(x):
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x)
    return torch.stack(rows)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- now and then ----------------------------------------------------------------------------------------------------


def average_of(models, common, options, num_steps=0):
    """What all of them get, parameter by parameter; `common` is what they got before."""
    for index, parts in enumerate(zip(*(model.parameters() for model in models), strict=True)):
        a, parts = common[index], [part.detach() for part in parts]
        deltas = [(a - part).flatten() for part in parts]
        draws = {"step": num_steps, "offset": index << 40} if "seed" in options else {}
        common[index] = a - reference.all_reduce(deltas, op="avg", **options, **draws).view_as(a)


def put(model, tensors):
    with torch.no_grad():
        for p, tensor in zip(model.parameters(), tensors, strict=True):
            p.copy_(tensor)


def check_periodic(rank):
    """All ranks in one process, and this one as it is: the same bits, between the averages too."""
    nodes = {"algorithm": "hierarchical", "node_size": 2, "inter_bits": 8}
    for options in ({"bits": "float8_e4m3fn"}, {"bits": 4, "rounding": "stochastic", "seed": 5, **nodes}):
        model, whole = make(), [make() for _ in range(WORLD_SIZE)]
        common = [p.detach().clone() for p in model.parameters()]
        optimizer, optimizers = sgd(model), [sgd(each) for each in whole]
        averaging = PeriodicAveraging(model.parameters(), INTERVAL, **options)
        for step in range(1, 2 * INTERVAL + 2):
            local_step(model, optimizer, rank, step)
            assert averaging.step() == (step % INTERVAL == 0)
            for other, each in enumerate(whole):
                local_step(each, optimizers[other], other, step)
            if step % INTERVAL == 0:
                average_of(whole, common, options, step - 1)
                for each in whole:
                    put(each, common)
            assert_same(model.parameters(), whole[rank].parameters(), (options, step))


def check_exact(rank):
    """Post-local SGD: the first steps are not counted; a bfloat16 parameter is rounded once."""
    for dtype in (torch.float32, torch.bfloat16):
        model = make().to(dtype)
        optimizer = sgd(model)
        averaging = PeriodicAveraging(model.parameters(), INTERVAL, warmup_steps=2)
        for step in range(1, INTERVAL + 3):
            optimizer.zero_grad()
            loss_of(model.float(), rank, step).backward()
            model.to(dtype)
            optimizer.step()
            before = flat(model)
            is_last = averaging.step()
            assert is_last == (step == INTERVAL + 2)
            if not is_last:
                assert torch.equal(flat(model), before)
        rows = gathered(before.float()).double()
        mean, bound = rows.mean(0), WORLD_SIZE * torch.finfo(torch.float32).eps * rows.abs().sum(0)
        bound += torch.finfo(dtype).eps / 2 * rows.mean(0).abs()
        assert ((flat(model).double() - mean).abs() <= bound).all()
        assert (gathered(flat(model).float()) == flat(model).float()).all(), "the same bits on all ranks"


def check_warmup(rank):
    """What is averaged first is what came after the warm-up, and of a bfloat16 parameter no rounding of the copy."""
    outer = functools.partial(torch.optim.SGD, lr=1.0)
    for dtype in (torch.float32, torch.bfloat16):
        for make_it, options in (
            (PeriodicAveraging, {}),
            (DiLoCo, {"outer_optimizer": outer, "error_feedback": False}),
        ):
            x = torch.ones(300, dtype=dtype)
            averaging = make_it([x], 2, warmup_steps=3, bits=1, **options)
            generator = torch.Generator().manual_seed(0)
            for step in range(5):
                x += torch.randint(-8, 8, (300,), generator=generator) / 4 if step < 3 else 0.5
                before = x.clone()
                assert averaging.step() == (step == 4)
            assert torch.equal(x, before), "1 bit has the same steps of all exactly"
            x += 0.01 * (rank + 1) * torch.randn(300, generator=generator)
            averaging.step()
            averaging.step()
            (copy,) = averaging.state_dict()["copies"]
            assert torch.equal(copy, x.float()) == (dtype == torch.float32)
            averaging.step()
            averaging.step()
            assert torch.equal(averaging.state_dict()["copies"][0], copy), "where no rank has changed a thing"


def check_diloco(rank):
    """torch's optimizer on averaged differences, in one process; what rounding loses is in the errors."""
    adam = functools.partial(torch.optim.Adam, lr=0.05)
    nesterov = functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    for outer, options in ((None, {}), (adam, {"bits": 4, "block": 64})):
        model, whole = make(), [make() for _ in range(WORLD_SIZE)]
        common = make()
        expected = (outer or nesterov)(common.parameters())
        diloco = DiLoCo(model.parameters(), INTERVAL, outer_optimizer=outer, error_feedback=False, **options)
        optimizer, optimizers = sgd(model), [sgd(each) for each in whole]
        for step in range(1, 2 * INTERVAL + 1):
            local_step(model, optimizer, rank, step)
            diloco.step()
            for other, each in enumerate(whole):
                local_step(each, optimizers[other], other, step)
            if step % INTERVAL == 0:
                moved = [p.detach().clone() for p in common.parameters()]
                average_of(whole, moved, {"bits": 8} | options)
                for p, parts in zip(
                    common.parameters(), zip(*(w.parameters() for w in whole), strict=True), strict=True
                ):
                    deltas = [(p - part).detach().flatten() for part in parts]
                    p.grad = reference.all_reduce(deltas, op="avg", **{"bits": 8} | options).view_as(p)
                expected.step()
                for each in whole:
                    put(each, common.parameters())
        assert_same(model.parameters(), common.parameters(), options)
    model = make()
    diloco = DiLoCo(model.parameters(), 1, bits=1, outer_optimizer=functools.partial(torch.optim.SGD, lr=1.0))
    optimizer, given, got = sgd(model), 0, 0
    for step in range(5):
        before = flat(model)
        local_step(model, optimizer, rank, step)
        given = given + (flat(model) - before).double()
        diloco.step()
        got = got + (flat(model) - before).double()
    given = given + torch.cat([error.flatten() for error in diloco.state_dict()["errors"]]).double()
    given = gathered(given).mean(0)
    assert (given - got).abs().max() <= 1e-5 * flat(model).abs().max()


def check_resumed(rank, folder):
    """Interrupted between two averages, training goes on with the same bits."""

    def build():
        model = make()
        return model, torch.optim.SGD(model.parameters(), lr=0.02), DiLoCo(model.parameters(), INTERVAL, bits=4)

    def train(parts, steps):
        for step in steps:
            loss = local_step(*parts[:2], rank, step)
            parts[2].step()
        return loss

    whole = build()
    train(whole, range(20))
    half = build()
    train(half, range(11))
    torch.save([part.state_dict() for part in half], folder / f"{rank}.pt")
    resumed = build()
    for part, state in zip(resumed, torch.load(folder / f"{rank}.pt"), strict=True):
        part.load_state_dict(state)
    train(resumed, range(11, 20))
    assert_same(whole[0].parameters(), resumed[0].parameters())
    states = [parts[2].state_dict() for parts in (whole, resumed)]
    assert_same(states[0]["errors"], states[1]["errors"])
    assert all(error.any() for error in states[0]["errors"])
    assert_same(states[0]["copies"], states[1]["copies"])
    first, last = (sum(loss_of(model, rank, step) for step in range(100, 104)) for model in (make(), whole[0]))
    assert last < 0.8 * first, (first, last)


def check_fully_shard(rank):
    """Two workers of two ranks each, which have shards: the bits of the same workers without."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("worker", "shard"))
    model, worker = make(), rank // 2
    fully_shard(model, mesh=mesh["shard"])
    diloco = DiLoCo(model.parameters(), 2, group=mesh.get_group("worker"), bits=None, error_feedback=False)
    whole = [make(), make()]
    common = make()
    outer = torch.optim.SGD(common.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    optimizer, optimizers = sgd(model), [sgd(each) for each in whole]
    for step in range(4):
        local_step(model, optimizer, worker, step)  # both ranks of a worker with the same batch
        diloco.step()
        for other, each in enumerate(whole):
            local_step(each, optimizers[other], other, step)
        if step % 2:
            for p, a, b in zip(common.parameters(), *(each.parameters() for each in whole), strict=True):
                p.grad = ((p - a) + (p - b)).detach() / 2
            outer.step()
            for each in whole:
                put(each, common.parameters())
    assert_same([p.full_tensor() for p in model.parameters()], common.parameters())
    assert raised(DiLoCo, model.parameters(), 2) == (
        f"ValueError: DiLoCo: group must have no rank with another shard of a DTensor, it has rank {rank ^ 1}."
    )


# ---- neighbours ------------------------------------------------------------------------------------------------------


def mixing_matrix(topology, world_size, step):
    matrix = torch.zeros(world_size, world_size, dtype=torch.float64)
    for i in range(world_size):
        if topology == "ring":
            peers = {(i - 1) % world_size, (i + 1) % world_size} - {i}
        else:
            half = world_size // 2
            peers = {half + (i + step) % half} if i < half else {(i - half - step) % half}
        for j in peers:
            matrix[i, j] = 1 / (1 + len(peers))
        matrix[i, i] = 1 - matrix[i].sum()
    assert torch.equal(matrix, matrix.t())
    return matrix


def check_neighbours(rank):
    """A step is a product with the mixing matrix; groups of one and two ranks have other weights."""
    groups = [dist.new_group(ranks) for ranks in ([0], [0, 1], [0, 1, 2, 3])]
    for group, size in zip(groups, (1, 2, 4), strict=True):
        for topology in ("ring", "shift_one") if size > 1 and rank < size else ("ring",) * (rank < size):
            model = make(rank)
            averaging = NeighbourAveraging(model.parameters(), topology=topology, group=group)
            for step in range(4):
                before = [torch.empty_like(flat(model)) for _ in range(size)]
                dist.all_gather(before, flat(model), group=group)
                before = torch.stack(before).double()
                averaging.step()
                expected = mixing_matrix(topology, size, step)[rank] @ before
                difference = (flat(model).double() - expected).abs()
                assert (difference <= 4 * torch.finfo(torch.float32).eps * before.abs().sum(0)).all(), (size, topology)


def check_codes(rank, folder):
    """Replicas are those of one process, the same bits on both sides; the mean stays; all approach it."""
    for bits in (8, 4):
        model = make(rank)
        start = gathered(flat(model)).double()
        averaging = NeighbourAveraging(model.parameters(), bits=bits, block=64)
        x = gathered(flat(model))
        hats = x.clone()
        for step in range(30):
            if step == 10:  # interrupted
                torch.save(averaging.state_dict(), folder / f"{rank}.pt")
                averaging = NeighbourAveraging(model.parameters(), bits=bits, block=64)
                averaging.load_state_dict(torch.load(folder / f"{rank}.pt"))
            averaging.step()
            if step:
                options = {"bits": bits, "block": 64}
                wires = [block_codec.quantize(x[j] - hats[j], **options) for j in range(WORLD_SIZE)]
                hats += torch.stack([block_codec.dequantize(wire, x.shape[1], **options) for wire in wires])
            mixed = x.clone()
            for i in range(WORLD_SIZE):
                for j in sorted({(i - 1) % WORLD_SIZE, (i + 1) % WORLD_SIZE}):
                    mixed[i].add_(hats[j] - hats[i], alpha=1 / 3)
            x = mixed
            assert torch.equal(flat(model), x[rank]), (bits, step)
        replicas = averaging.state_dict()["replicas"]
        assert sorted(replicas) == sorted({(rank - 1) % WORLD_SIZE, rank, (rank + 1) % WORLD_SIZE})
        for j, replica in replicas.items():
            assert torch.equal(replica, hats[j]), (bits, j)
        spread = [(rows - rows.mean(0)).square().mean().sqrt() for rows in (start, x.double())]
        assert spread[1] < 1e-4 * spread[0], (bits, spread)
        drift = (x.double().mean(0) - start.mean(0)).abs().max()
        assert drift <= 30 * 4 * torch.finfo(torch.float32).eps * start.abs().max(), (bits, drift)


def check_decentralised_training(rank):
    """With batches of its own every rank comes to a model of all."""
    losses = {}
    for bits in (None, 8, 4):
        model = make()
        optimizer, averaging = sgd(model), NeighbourAveraging(model.parameters(), bits=bits)
        for step in range(30):
            local_step(model, optimizer, rank, step)
            averaging.step()
        loss = sum(loss_of(model, other, step) for other in range(WORLD_SIZE) for step in range(100, 102)).detach()
        dist.all_reduce(loss)
        losses[bits] = loss
    start = sum(loss_of(make(), other, step) for other in range(WORLD_SIZE) for step in range(100, 102)) * WORLD_SIZE
    assert losses[None] < 0.8 * start, (losses, start)
    for bits in (8, 4):
        assert abs(losses[bits] / losses[None] - 1) < 0.02, losses


# ---- errors ----------------------------------------------------------------------------------------------------------


def check_errors(rank):
    x = [nn.Parameter(torch.ones(4))]
    for kind, make_it, arguments, text in (
        ("Value", PeriodicAveraging, {"interval": 0}, "interval must be at least 1, got 0."),
        ("Value", PeriodicAveraging, {"warmup_steps": -1}, "warmup_steps must be at least 0, got -1."),
        ("Type", PeriodicAveraging, {"bits": 8, "error_feedback": 1}, "error_feedback must be True or False, got int."),
        (
            "Value",
            PeriodicAveraging,
            {"error_feedback": True},
            "error_feedback must not be given with bits=None, which averages exactly.",
        ),
        ("Value", PeriodicAveraging, {"block": 64}, "block must not be given with bits=None, which averages exactly."),
        ("Value", DiLoCo, {"bits": 2}, "bits must be one of 8, 6, 4, 1, float8_e4m3fn, got 2."),
        (
            "Type",
            DiLoCo,
            {"outer_optimizer": 0.7},
            "outer_optimizer must be a function from tensors to an optimizer, got float.",
        ),
        ("Type", DiLoCo, {"outer_optimizer": list}, "outer_optimizer must make an optimizer, it made list."),
        ("Value", DiLoCo, {"parameters": []}, "parameters must be at least one tensor, there are none."),
        ("Value", NeighbourAveraging, {"topology": "star"}, "topology must be one of ring, shift_one, got star."),
        ("Value", NeighbourAveraging, {"bits": 1}, "bits must be one of 8, 6, 4 or None, got 1."),
        ("Value", NeighbourAveraging, {"bits": 8.0}, "bits must be one of 8, 6, 4 or None, got 8.0."),
        ("Value", NeighbourAveraging, {"block": 48}, "block must be a power of two from 32 to 2048, got 48."),
        (
            "Value",
            NeighbourAveraging,
            {"bits": 8, "topology": "shift_one"},
            "bits must be None with shift_one, whose neighbours change, got 8.",
        ),
        ("Type", NeighbourAveraging, {"parameters": x[0]}, "parameters must be an iterable of tensors, got a tensor."),
        (
            "Value",
            NeighbourAveraging,
            {"bits": 4 if rank == 2 else 8},
            "bits must be the same on every rank, rank 0 has 8 and rank 2 4.",
        ),
        (
            "Value",
            DiLoCo,
            {"interval": 3 if rank == 1 else 2},
            "interval must be the same on every rank, rank 0 has 2 and rank 1 3.",
        ),
        (
            "Value",
            PeriodicAveraging,
            {"bits": 8, "chunk_numel": 64 if rank == 1 else 128},
            "chunk_numel must be the same on every rank, rank 0 has 128 and rank 1 64.",
        ),
        (
            "Value",
            PeriodicAveraging,
            {"parameters": [torch.ones(3 + (rank == 3))]},
            "the sizes of the parameters must be the same on every rank, rank 0 has [3] and rank 3 [4].",
        ),
    ):
        common = {"parameters": x} if make_it is NeighbourAveraging else {"parameters": x, "interval": 1}
        assert raised(make_it, **common | arguments) == f"{kind}Error: {make_it.__name__}: {text}"
    averaging = NeighbourAveraging(x, bits=8)
    state = {"num_steps": 1, "replicas": {rank: torch.ones(4)}}
    assert raised(averaging.load_state_dict, state).startswith(
        "ValueError: NeighbourAveraging: replicas must be of ranks ["
    )
    diloco = DiLoCo(x, 1)
    state = diloco.state_dict()
    assert raised(diloco.load_state_dict, state | {"copies": [torch.ones(3)]}) == (
        "ValueError: DiLoCo: copies of the state must be float32 of the shape [4], one is torch.float32 of [3]."
    )
    assert raised(DiLoCo(x, 1, error_feedback=False).load_state_dict, state) == (
        "ValueError: DiLoCo: errors of the state must be 0 tensors, there are 1."
    )
    others = "num_steps must be the same on every rank, rank 0 has 0 and rank 2 1."
    step = {"num_steps": int(rank == 2)}
    assert raised(diloco.load_state_dict, state | step) == f"ValueError: DiLoCo: {others}"
    neighbours = NeighbourAveraging(x)
    assert raised(neighbours.load_state_dict, {"replicas": {}} | step) == f"ValueError: NeighbourAveraging: {others}"


def check_rank(rank, folder):
    for check in (check_periodic, check_exact, check_warmup, check_diloco, check_fully_shard, check_neighbours):
        check(rank)
    check_errors(rank)
    check_resumed(rank, folder)
    check_codes(rank, folder)
    check_decentralised_training(rank)


def test_averaging(tmp_path):
    as_processes(WORLD_SIZE, check_rank, tmp_path, tmp_path)


def check_survivor(rank):
    averaging = NeighbourAveraging([torch.ones(1 << 12)], bits=8)
    averaging.step()
    if rank == 1:
        os._exit(0)
    begin = time.monotonic()
    text = raised(lambda: [averaging.step() for _ in range(4)])
    assert text.startswith("RuntimeError: NeighbourAveraging: rank "), text
    assert "of the group is gone or late" in text
    assert time.monotonic() - begin < 15
    return False


def test_a_rank_that_dies_raises_on_its_neighbours(tmp_path):
    as_processes(WORLD_SIZE, check_survivor, tmp_path, seconds=5)
