# SPDX-License-Identifier: Apache-2.0
"""fmkernels.optim: AdamW's bits in the warm-up, afterwards those of the momentum's own all_reduce."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes, raised
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fmkernels.optim import QAdam
from fmkernels.reference import quantized_collectives as reference

WORLD_SIZE = 3
WARMUP = 4
OPTIONS = {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": WARMUP}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


class Model(nn.Module):
    """Rows of the embedding from 20 on are of no batch; `spare` is in no loss, `odd` in that of rank 1 alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 20)
        self.first, self.second = nn.Linear(20, 330), nn.Linear(330, 5)
        self.spare, self.odd = nn.Parameter(torch.ones(40)), nn.Parameter(torch.ones(5))

    def forward(self, z, rank=0):
        y = self.second(torch.tanh(self.first(self.embedding(z))))
        return y * self.odd if rank == 1 else y


def loss_of(model, rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    z, noise = torch.randint(20, (24,), generator=generator), torch.randn(24, 5, generator=generator)
    return (model(z, rank) - torch.stack([z / (10 + i) - 1 for i in range(5)], 1) - noise).square().mean()


def train(model, optimizer, rank, steps, ddp=None):
    """The mean of the last losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(ddp or model, rank, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().float())
    return torch.stack(losses[-10:]).mean()


def as_ddp(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def assert_equal(left, right, at=None):
    for (name, tensor), other in zip(left.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(tensor, other), (name, at)


def check_bits(rank):
    """Every step is one that a single process computes from the gradients of all ranks."""
    for options in (
        {},
        {"bits": 4, "hadamard": True, "rounding": "stochastic", "seed": 3},
        {"bits": 1, "block": 64},
        {"bits": "float8_e4m3fn", "algorithm": "hierarchical", "node_size": 3},
    ):
        whole, model = Model(), Model()
        expected = torch.optim.AdamW(whole.parameters(), lr=0.01, weight_decay=0.1, foreach=True)
        optimizer = QAdam(model.parameters(), **OPTIONS, **options)
        momenta = {}
        for step in range(WARMUP + 3):
            grads = []
            for other in range(WORLD_SIZE):
                whole.zero_grad()
                loss_of(whole, other, step).backward()
                grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in whole.parameters()])
            train(model, optimizer, rank, [step])
            if step < WARMUP:
                exact = torch.cat([grad.flatten() for grad in grads[rank]])
                dist.all_reduce(exact)
                exact /= WORLD_SIZE
                for p, part in zip(
                    whole.parameters(), exact.split([p.numel() for p in whole.parameters()]), strict=True
                ):
                    p.grad = part.view_as(p)
                expected.step()
                momenta = {p: expected.state[p]["exp_avg"] for p in whole.parameters()}
            else:
                for index, p in enumerate(whole.parameters()):
                    locals_ = [momenta[p].lerp(grad[index], 0.1).flatten() for grad in grads]
                    draws = {"step": step, "offset": index << 40} if "seed" in options else {}
                    momenta[p] = reference.all_reduce(locals_, op="avg", **{"bits": 8} | options | draws).view_as(p)
                    v = expected.state[p]["exp_avg_sq"]
                    momenta[p][v == 0] = 0
                    root = v.sqrt() / (1 - 0.999**WARMUP) ** 0.5 + 1e-8
                    with torch.no_grad():
                        p.mul_(1 - 0.01 * 0.1).addcdiv_(momenta[p], root, value=-0.01 / (1 - 0.9 ** (step + 1)))
            assert_equal(model, whole, (options, step))


def check_ddp(rank):
    """The warm-up is that of DDP and AdamW, bit by bit; afterwards gradients are local, under no_sync too."""
    models = Model(), Model()
    wrapped = [as_ddp(model) for model in models]
    optimizers = [torch.optim.AdamW(models[0].parameters(), lr=0.01, weight_decay=0.1, foreach=True)]
    optimizers += [QAdam(models[1].parameters(), **OPTIONS)]
    optimizers[1].register(wrapped[1])
    for _ in range(WARMUP):
        for model, ddp, optimizer in zip(models, wrapped, optimizers, strict=True):
            optimizer.zero_grad()
            for micro in range(2):
                with contextlib.nullcontext() if micro else ddp.no_sync():
                    loss_of(ddp, rank, micro).backward()
            if model is models[0]:
                model.spare.grad = torch.zeros(40)  # so that weights decay
            optimizer.step()
        assert_equal(*models)
    alone = Model()
    alone.load_state_dict(models[1].state_dict())
    optimizers[1].zero_grad()
    for step, context in ((0, wrapped[1].no_sync()), (1, contextlib.nullcontext())):
        with context:
            loss_of(wrapped[1], rank, step).backward()
        loss_of(alone, rank, step).backward()
    assert torch.equal(models[1].first.weight.grad, alone.first.weight.grad)
    optimizers[1].step()
    for name, p in models[1].named_parameters():
        of_rank_0 = p.detach().clone()
        dist.broadcast(of_rank_0, 0)
        assert torch.equal(p, of_rank_0), name


def check_feedback(rank):
    """In every step what the ranks have in mind is what all get and what the errors hold; zeros stay zeros."""
    for bits in (1, 4):
        model = Model()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = QAdam(model.parameters(), 0.01, warmup_steps=WARMUP, bits=bits, error_feedback=True)
        train(model, optimizer, rank, range(WARMUP))
        for step in range(WARMUP, WARMUP + 6):
            states = {name: optimizer.state[p] for name, p in model.named_parameters()}
            old = {name: (state["exp_avg"].double(), state["error"].double()) for name, state in states.items()}
            train(model, optimizer, rank, [step])
            for name, p in model.named_parameters():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                m, e = old[name]
                lost = 0.9 * m + 0.1 * grad.double() + e - states[name]["error"].double()
                dist.all_reduce(lost)
                is_alive = states[name]["exp_avg_sq"] > 0
                scale = lost.abs().max() + states[name]["error"].abs().max() * WORLD_SIZE
                difference = (lost / WORLD_SIZE - states[name]["exp_avg"].double())[is_alive].abs()
                bound = (3 * WORLD_SIZE + 8) * torch.finfo(torch.float32).eps * scale
                assert not difference.numel() or difference.max() <= bound, (name, step)
                assert states[name]["error"].any() == is_alive.any(), name
        for name in ("embedding.weight", "spare"):
            kept = slice(20, None) if name == "embedding.weight" else slice(None)
            assert torch.equal(model.get_parameter(name)[kept], before[name][kept]), name
            assert not states[name]["exp_avg"][kept].any(), name
        assert not torch.equal(model.odd, before["odd"])
        assert not torch.equal(model.embedding.weight[:20], before["embedding.weight"][:20])


def check_training(rank, folder):
    """Close to AdamW; interrupted, it goes on with the same bits, whatever the dtype of the parameters."""
    losses = {}
    for bits, options in ((None, {"warmup_steps": 50}), (8, {}), (1, {"bits": 1, "error_feedback": True})):
        options = {"lr": 0.01, "warmup_steps": 10} | options
        for dtype in (torch.float32, torch.bfloat16) if bits == 1 else (torch.float32,):
            model = Model().to(dtype)
            optimizer = QAdam(model.parameters(), **options)
            ddp = as_ddp(model)
            optimizer.register(ddp)
            losses[bits, dtype] = train(model, optimizer, rank, range(40), ddp)
            dist.all_reduce(losses[bits, dtype])
    exact = losses[None, torch.float32]
    for at, loss in losses.items():
        assert loss / exact - 1 < 0.03, (at, loss, exact)

    half = Model().to(dtype)
    first = QAdam(half.parameters(), **options)
    ddp = as_ddp(half)
    first.register(ddp)
    train(half, first, rank, range(20), ddp)
    torch.save({"model": half.state_dict(), "optimizer": first.state_dict()}, folder / f"{rank}.pt")
    state = torch.load(folder / f"{rank}.pt")
    resumed = Model().to(dtype)
    second = QAdam(resumed.parameters(), **options)
    resumed.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    assert second.num_steps == 20
    train(resumed, second, rank, range(20, 40))
    assert_equal(resumed, model)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert optimizer.state[p].keys() == second.state[q].keys() == {"step", "exp_avg", "exp_avg_sq", "error"}
        for name, tensor in optimizer.state[p].items():
            assert torch.equal(tensor, second.state[q][name]), name
            assert tensor.dtype == torch.float32


def check_conventions(rank):
    """Groups with options of their own, one of them empty and one frozen; a learning rate as a tensor; NaN."""
    model = Model()
    model.spare.requires_grad_(False)
    groups = [{"params": []}, {"params": [model.first.weight], "lr": 0.0}]
    groups += [{"params": [p], "weight_decay": 0.5} for p in (model.second.weight, model.spare)]
    optimizer = QAdam(groups, lr=torch.tensor(0.1), eps=torch.tensor(1e-8), warmup_steps=1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    before = model.first.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, rank, 0)
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(3)]
    assert losses[0] == loss_of(Model(), rank, 0)
    scheduler.step()
    assert torch.equal(model.first.weight, before)
    assert torch.equal(model.spare, torch.ones(40))
    assert model.spare not in optimizer.state
    model.second.weight.grad = torch.zeros_like(model.second.weight)
    model.second.weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert model.second.weight.view(-1)[:128].isnan().all(), "the block"
    assert model.second.weight.view(-1)[128:].isfinite().all(), "no other"
    assert raised(optimizer.add_param_group, {"params": [model.odd]}) == (
        "ValueError: QAdam: a group must be added before the first step, there were 4."
    )


def check_state_of_adamw(rank):
    """It goes on from its moments, in whatever layout they are, and where the last parameter is frozen."""
    conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    conv.bias.requires_grad_(False)
    adamw = torch.optim.AdamW(conv.parameters())
    conv(torch.ones(1, 2, 3, 3)).sum().backward()
    adamw.step()
    optimizer = QAdam(conv.parameters(), warmup_steps=1)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.num_steps == 1
    before = conv.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(conv.weight, before)
    resumed = QAdam(conv.parameters(), warmup_steps=1)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.num_steps == 2


def check_errors(rank):
    x = nn.Parameter(torch.ones(4))
    name = "ValueError: QAdam: "
    for arguments, sentence in (
        ({"warmup_steps": 0}, f"{name}warmup_steps must be at least 1, got 0."),
        ({"warmup_steps": 2.0}, "TypeError: QAdam: warmup_steps must be an integer, got float."),
        ({"bits": 3}, f"{name}bits must be one of 8, 6, 4, 1, float8_e4m3fn, got 3."),
        ({"bits": None}, f"{name}bits must be one of 8, 6, 4, 1, float8_e4m3fn, got None."),
        ({"lr": -1.0}, f"{name}lr must be a number of at least 0, got -1.0."),
        ({"eps": float("nan")}, f"{name}eps must be a number of at least 0, got nan."),
        ({"weight_decay": "0"}, f"{name}weight_decay must be a number of at least 0, got 0."),
        ({"betas": 0.9}, f"{name}betas must be two numbers of at least 0 and below 1, got 0.9."),
        ({"betas": (0.9, 1.0)}, f"{name}betas must be two numbers of at least 0 and below 1, got (0.9, 1.0)."),
        (
            {"decay": 0.5},
            "TypeError: QAdam: options must be among block, algorithm, node_size, inter_bits, hadamard, chunk_numel, "
            "rounding, seed, got decay.",
        ),
        (
            {"algorithm": "hierarchical", "node_size": 2},
            f"{name}node_size must divide the 3 ranks of the group, got 2.",
        ),
        (
            {"params": [nn.Parameter(torch.ones(2, dtype=torch.float64))]},
            f"{name}parameters must be float32, bfloat16 or float16, one is torch.float64.",
        ),
        (
            {"params": [x, nn.Parameter(torch.ones(2, device="meta"))]},
            f"{name}parameters must be on one device, they are on cpu and meta.",
        ),
        (
            {"params": fully_shard(nn.Linear(6, 6)).parameters()},
            "TypeError: QAdam: parameters must be whole tensors, one is a DTensor, whose gradients are shards.",
        ),
    ):
        assert raised(QAdam, **{"params": [x], "warmup_steps": 1} | arguments) == sentence
    for options, what in (({"bits": 4 if rank == 2 else 8}, "bits"), ({"warmup_steps": 4 + 4 * (rank != 2)}, "warmup")):
        optimizer = QAdam([x], **{"warmup_steps": 1} | options)
        text = raised(optimizer.step)
        assert text.startswith(f"{name}{what}"), text
        assert text.endswith("must be the same on every rank, rank 0 has 8 and rank 2 4."), text
    groups = [dist.new_group([other]) for other in range(WORLD_SIZE)]
    ddp = DistributedDataParallel(nn.Linear(2, 2), process_group=groups[rank])
    assert raised(QAdam(ddp.parameters(), warmup_steps=1).register, ddp) == (
        f"{name}model must have the ranks of group, [0, 1, 2], its process_group has [{rank}]."
    )
    frozen = QAdam([torch.ones(4)], warmup_steps=1)
    assert raised(frozen.step) == f"{name}parameters must have one to train, all are frozen."
    assert raised(QAdam, [{"params": []}], warmup_steps=1) == (
        f"{name}parameters must be at least one tensor, there are none."
    )
    with_errors = QAdam([x], warmup_steps=1, error_feedback=True)
    with_errors.step()
    assert raised(QAdam([x], warmup_steps=1).load_state_dict, with_errors.state_dict()) == (
        f"{name}state_dict must have no errors where error_feedback is off, it has."
    )
    embedding = nn.Embedding(4, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    assert raised(QAdam(embedding.parameters(), warmup_steps=1).step) == (
        f"{name}gradients must be dense, one is sparse."
    )


def check_rank(rank, folder):
    for check in (check_bits, check_ddp, check_feedback, check_conventions, check_state_of_adamw):
        check(rank)
    check_errors(rank)
    check_training(rank, folder)


def test_qadam(tmp_path):
    as_processes(WORLD_SIZE, check_rank, tmp_path, tmp_path)
