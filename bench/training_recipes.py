# SPDX-License-Identifier: Apache-2.0
"""What ways to train together send, and what they learn: bytes of the loopback and losses of a small model of bytes.

    unshare -rn sh -c 'ip link set lo up; exec python bench/training_recipes.py'

In a network namespace of its own nobody else's bytes are counted. Every rank is a process with one thread and learns
the sources of Python's standard library from batches of its own; `sent` is what one rank sent for all steps, headers of
TCP among it, `loss` that of the averaged model on other files, in nats a byte. Losses are the same in every run.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fmkernels.averaging import DiLoCo, NeighbourAveraging, PeriodicAveraging
from fmkernels.hooks import QuantizedAllReduce
from fmkernels.optim import QAdam

CONTEXT = 16
LEARNING_RATE = 2e-3
Way = Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer, Callable[[], object]]]


class Model(nn.Module):
    """The next byte from those before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(256, 32)
        self.layers = nn.Sequential(nn.Linear(32 * CONTEXT, 256), nn.GELU(), nn.Linear(256, 256))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(self.embedding(z).flatten(1))


def loss_of(model: nn.Module, data: Tensor, batch_size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    begins = torch.randint(data.numel() - CONTEXT, (batch_size, 1), generator=generator)
    windows = data[begins + torch.arange(CONTEXT + 1)].long()
    return nn.functional.cross_entropy(model(windows[:, :-1]), windows[:, -1])


# ---- ways: a model becomes what is called, the optimizer, and what follows its step ----------------------------------


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def hook(**options: object) -> Way:
    def make(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], object]]:
        ddp = DistributedDataParallel(model)
        if options:
            QuantizedAllReduce(model, **options).register(ddp)
        return ddp, adamw(model), lambda: None

    return make


def qadam(**options: object) -> Way:
    def make(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], object]]:
        ddp = DistributedDataParallel(model)
        optimizer = QAdam(model.parameters(), LEARNING_RATE, weight_decay=0.01, **options)
        optimizer.register(ddp)
        return ddp, optimizer, lambda: None

    return make


def after(averaging: type, *arguments: object, **options: object) -> Way:
    def make(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], object]]:
        return model, adamw(model), averaging(model.parameters(), *arguments, **options).step

    return make


WAYS = {
    "DDP, float32": hook(),
    "hook, 8 bits": hook(bits=8),
    "hook, 4 bits, error feedback": hook(bits=4, error_feedback=True),
    "hook, 1 bit, error feedback": hook(bits=1, error_feedback=True),
    "QAdam, 8 bits": qadam(warmup_steps=100),
    "QAdam, 1 bit, error feedback": qadam(warmup_steps=100, bits=1, error_feedback=True),
    "PeriodicAveraging, every 10, float32": after(PeriodicAveraging, 10),
    "PeriodicAveraging, every 10, 8 bits": after(PeriodicAveraging, 10, bits=8),
    "DiLoCo, every 25, float32": after(DiLoCo, 25, bits=None, error_feedback=False),
    "DiLoCo, every 25, 8 bits": after(DiLoCo, 25),
    "DiLoCo, every 25, 4 bits": after(DiLoCo, 25, bits=4),
    "NeighbourAveraging, ring, float32": after(NeighbourAveraging),
    "NeighbourAveraging, ring, 8 bits": after(NeighbourAveraging, bits=8),
    "NeighbourAveraging, ring, 4 bits": after(NeighbourAveraging, bits=4),
    "NeighbourAveraging, shift_one, float32": after(NeighbourAveraging, topology="shift_one"),
    "nothing sent": lambda model: (model, adamw(model), lambda: None),
}


def sent_bytes() -> int:
    """Of all ranks, by the loopback."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.split(":")[0].strip() == "lo").split()[9])


def run(rank: int, world_size: int, num_steps: int, batch_size: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [b"".join(path.read_bytes() for path in paths[first::2]) for first in (0, 1)]
    learned, other = (torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts)
    if rank == 0:
        numel = sum(p.numel() for p in Model().parameters())
        print(f"{world_size} ranks, {num_steps} steps, {numel / 1e6:.2f} M parameters\n")
        print("| | MB sent by a rank | x float32 | loss |\n|---|---|---|---|")
    most = None
    for name, make in WAYS.items():
        model = Model()
        called, optimizer, follow = make(model)
        dist.barrier()
        before = sent_bytes()
        dist.barrier()
        for step in range(num_steps):
            optimizer.zero_grad()
            loss_of(called, learned, batch_size, step * world_size + rank).backward()
            optimizer.step()
            follow()
        dist.barrier()
        sent = (sent_bytes() - before) / world_size / 1e6
        dist.barrier()
        with torch.no_grad():
            for p in model.parameters():
                dist.all_reduce(p)
                p /= world_size
            loss = loss_of(model, other, 16384, 0).item()
        most = most or sent
        if rank == 0:
            fewer = f"{most / sent:.1f}" if sent > 0.1 else "-"
            print(f"| {name} | {sent:.1f} | {fewer} | {loss:.3f} |", flush=True)
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64, help="of a rank")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options.ranks, options.steps, options.batch_size, f"{folder}/store")
        torch.multiprocessing.start_processes(run, arguments, nprocs=options.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
