# SPDX-License-Identifier: Apache-2.0
"""One run: from its folder's checkpoint, or from nothing, to the last step."""

from __future__ import annotations

import inspect
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fmkernels.expert_parallel import ExpertParallel, clip_grad_norm_

from . import checkpoints, gradients, logs, text
from .model import Config, Output, Transformer

CHECKPOINT = "checkpoint.pt"
Z_LOSS = 1e-3


@dataclass(frozen=True)
class Settings:
    """What the losses of a run follow from, but for the order of sums, which the number of processes changes."""

    attention: str
    model: Config
    steps: int
    batch_size: int  # of all processes together
    learning_rate: float
    seed: int
    bf16: bool
    gradients: str | None = None  # one of gradients.FORMS between processes; None: float32


@dataclass(frozen=True)
class Processes:
    rank: int
    world_size: int
    device: torch.device
    group: gradients.CountingGroup | None = None  # of processes on the CPU

    def sum(self, value: Tensor) -> Tensor:
        """Of all processes; in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> float:
        return self.sum(value).item() / self.world_size


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The process group that torchrun describes, or this process alone."""
    if "RANK" not in os.environ:
        yield Processes(0, 1, torch.device(device))
        return
    chosen = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        group = gradients.CountingGroup() if device == "cpu" else None
        yield Processes(dist.get_rank(), dist.get_world_size(), chosen, group)
        dist.barrier()  # nobody leaves while another still needs it
    finally:
        dist.destroy_process_group()


def learning_rate(settings: Settings, step: int) -> float:
    """Rises for a tenth of the steps, at most 100, then falls along a cosine to a tenth."""
    warmup = max(1, min(100, settings.steps // 10))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def train(
    settings: Settings,
    source: text.Text,
    folder: Path,
    here: Processes,
    *,
    resume: bool = False,
    fsdp: bool = False,
    expert_parallel: bool = False,
    checkpoint_activations: bool = False,
    save_every: int = 100,
    validate_every: int = 50,
    validation_windows: int = 32,
) -> Iterator[tuple[int, float]]:
    """Trains into `folder`: log.jsonl has a line for each step, checkpoint.pt what is needed to go on.

    Yields (step, its loss) after each, so that the steps of several runs can take turns.
    """
    config, path = settings.model, folder / CHECKPOINT
    torch.manual_seed(settings.seed)
    model = Transformer(config, settings.attention, checkpoint_activations).to(here.device)
    wrapped = wrap(model, here, fsdp, expert_parallel)
    compression = None
    if settings.gradients is not None:
        wrapping = "expert parallelism" if expert_parallel else "FSDP" if fsdp else "DDP"
        compression = gradients.Compression(wrapped, settings.gradients, wrapping, here.group)
    optimizer = torch.optim.AdamW(by_mesh(wrapped.parameters()), betas=(0.9, 0.95), weight_decay=0.1)
    saved_settings = asdict(settings) | asdict(config) | {"text": source.digest}
    del saved_settings["model"]
    first = 0
    if resume and path.exists():
        first = checkpoints.load(path, wrapped, optimizer, saved_settings, compression)
    if here.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        logs.cut(folder, first)
    held_out = text.validation_windows(source, config.seq, validation_windows).to(here.device)

    def output_of(windows: Tensor) -> Output:
        """Of this process's share."""
        precision = torch.autocast(here.device.type, torch.bfloat16) if settings.bf16 else nullcontext()
        with precision:
            return wrapped(windows.tensor_split(here.world_size)[here.rank])

    for step in range(first, settings.steps):
        traffic = Traffic(here, compression)
        begin = time.perf_counter()
        windows = text.training_windows(source, config.seq, settings.batch_size, settings.seed, step)
        out = output_of(windows.to(here.device))
        (out.loss + Z_LOSS * out.z_loss).backward()
        norm = clip_grad_norm_(wrapped.parameters(), 1.0).item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        optimizer.zero_grad()
        line: dict[str, Any] = {"step": step + 1, "loss": here.mean(out.loss.detach())}
        line |= {"learning_rate": learning_rate(settings, step), "gradient_norm": norm}
        if config.experts:
            load = here.sum(out.load)
            model.balance(load)
            line |= {"z_loss": here.mean(out.z_loss.detach()), "load": load.tolist()}
        seconds = time.perf_counter() - begin
        line |= {"seconds": seconds, "tokens_per_second": settings.batch_size * config.seq / seconds}
        line |= traffic.of_this_step()
        is_last = step + 1 == settings.steps
        if (step + 1) % validate_every == 0 or is_last:
            with torch.no_grad():
                line["validation_loss"] = here.mean(output_of(held_out).loss)
        if here.rank == 0:
            logs.append(folder, line)
        if (step + 1) % save_every == 0 or is_last:
            checkpoints.save(path, wrapped, optimizer, step + 1, saved_settings, here.rank, compression)
        yield step + 1, line["loss"]


class Traffic:
    """Bytes from here on. Made before a step."""

    def __init__(self, here: Processes, compression: gradients.Compression | None) -> None:
        self._here, self._compression = here, compression
        self._before = self._counts() if dist.is_initialized() else ()

    def _counts(self) -> tuple[int | None, int, int]:
        calls = self._compression.num_calls if self._compression else 0
        return gradients.interface_bytes(), self._here.group.num_bytes if self._here.group else 0, calls

    def of_this_step(self) -> dict[str, int]:
        """For the log; called by all processes.

        interface_bytes: of the network namespace of the first process, and so of all that share it, whoever sent them.
        payload_bytes: of all processes, as handed to their groups as gradients in num_calls calls each; with DDP.
        """
        if not self._before:
            return {}
        (interface, payload, calls), (interface_before, before, calls_before) = self._counts(), self._before
        numbers = {}
        if interface is not None and interface_before is not None:
            numbers["interface_bytes"] = interface - interface_before
        if calls > calls_before and self._here.group is not None:
            total = self._here.sum(torch.tensor(payload - before)).item()
            numbers |= {"payload_bytes": total, "num_calls": calls - calls_before}
        return numbers


def wrap(model: Transformer, here: Processes, fsdp: bool, expert_parallel: bool) -> nn.Module:
    """Under torchrun, parameters in every process (DDP) or a part of them in each (FSDP2); and of the experts some."""
    if not dist.is_initialized():
        return model
    if not fsdp and not expert_parallel:
        # All processes have the same buffers, from the same sums.
        sync = inspect.signature(DistributedDataParallel).parameters.keys() & {"forward_sync_buffers"}
        return DistributedDataParallel(model, **{"".join(sync) or "broadcast_buffers": False})
    experts: set[nn.Parameter] = set()
    if expert_parallel:
        mesh = init_device_mesh(here.device.type, (here.world_size,), mesh_dim_names=("ep",))
        parallelize_module(model, mesh, {"blocks.*.feed_forward.experts": ExpertParallel()})
        experts = {p for block in model.blocks for p in block.feed_forward.experts.parameters()}
        for parameter in experts:  # their gradients are sums over the tokens of all processes, others a mean over these
            parameter.register_hook(lambda grad: grad / here.world_size)
    for block in model.blocks:
        fully_shard(block, ignored_params=experts)
    return fully_shard(model, ignored_params=experts)


def by_mesh(parameters: Iterable[nn.Parameter]) -> list[dict[str, list[nn.Parameter]]]:
    """Groups for an optimizer, whose operations on many tensors are of one mesh, or of none."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return [{"params": group} for group in groups.values()]
