# SPDX-License-Identifier: Apache-2.0
"""How gradients travel between processes, in float32 or as codes, and what that costs in bytes."""

# No `from __future__ import annotations`: DDP compares the annotation of `bucket` with dist.GradBucket itself.
import itertools
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fmkernels import block_codec
from fmkernels.fsdp import quantize_communication
from fmkernels.hooks import QuantizedAllReduce

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"bits": 8},
    "int8+ef": {"bits": 8, "error_feedback": True},
    "int4": {"bits": 4},
    "int4+ef": {"bits": 4, "error_feedback": True},
}
GOALS = {"int8": 0.01, "int8+ef": 0.01, "int4+ef": 0.03}  # how far a loss may be from that of fp32, as a part of it
BLOCK = 128
MIN_PIECE = 4096  # elements; of a parameter that has less for each rank, fewer ranks sum a piece
MAX_STRIP = 1 << 22  # elements; with more for all ranks together, a wire is cut in several


class CountingGroup:
    """The default group, on the CPU, counting the bytes that are handed to it for other ranks."""

    def __init__(self) -> None:
        group = dist.group.WORLD
        self.rank, self.size, self.recv = group.rank, group.size, group.recv
        self.num_bytes = 0
        self._send, self._lock = group.send, threading.Lock()  # two threads send

    def name(self) -> str:
        return "gloo"

    def send(self, tensors: list[Tensor], peer: int, tag: int) -> Any:
        with self._lock:
            self.num_bytes += sum(tensor.nbytes for tensor in tensors)
        return self._send(tensors, peer, tag)


class Compression:
    """What a model of DDP or FSDP2 sends as gradients, in one of FORMS other than fp32.

    wrapping: in words; errors are those of a run with the same one.
    group: counts what a DDP model sends. FSDP2 chooses its own, and its parameters travel in float32 as before.
    """

    def __init__(self, model: nn.Module, form: str, wrapping: str, group: CountingGroup | None) -> None:
        how = FORMS[form]
        self.wrapping = wrapping
        self.num_calls = 0
        self.has_errors = "error_feedback" in how
        if isinstance(model, DistributedDataParallel):
            self._hook = QuantizedAllReduce(model, group=group, block=BLOCK, **how)
            self._states: dict[str, Any] = {"": self._hook}  # by the names of modules
            model.register_comm_hook(self, Compression.hook)
        else:
            how = {"scatter_bits" if key == "bits" else key: value for key, value in how.items()}
            self._states = quantize_communication(model, gather_bits=None, block=BLOCK, **how)

    @staticmethod
    def hook(state: "Compression", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        state.num_calls += 1
        return QuantizedAllReduce.hook(state._hook, bucket)

    def gather(self) -> list[dict[str, Any]] | None:
        """For a checkpoint: the errors of every rank, on the first; called by all. None where there are none."""
        if not self.has_errors:
            return None
        states = {name: _on_cpu(holder.state_dict()) for name, holder in self._states.items()}
        gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object({"wrapping": self.wrapping, "states": states}, gathered)
        return gathered

    def scatter(self, gathered: list[dict[str, Any]], path: Path) -> None:
        """Takes what is this rank's of the errors in a checkpoint."""
        if not self.has_errors:
            return
        there = f"{len(gathered)} processes with {gathered[0]['wrapping']}"
        here = f"{dist.get_world_size()} processes with {self.wrapping}"
        if there != here:
            raise ValueError(f"{path} has the errors of {there}, which must be those of the run, it has {here}")
        for name, state in gathered[dist.get_rank()]["states"].items():
            self._states[name].load_state_dict(state)


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    moved: dict[str, Any] = {}
    for key, value in state.items():
        moved[key] = _on_cpu(value) if isinstance(value, dict) else value.cpu() if isinstance(value, Tensor) else value
    return moved


def interface_bytes() -> int | None:
    """What the interfaces of this process's network namespace have sent, to itself too; None where Linux is not."""
    counters = Path("/proc/self/net/dev")
    if not counters.exists():
        return None
    return sum(int(line.split(":")[1].split()[8]) for line in counters.read_text().splitlines()[2:])


def payload_bytes(numels: Iterable[int], form: str, world_size: int, num_calls: int) -> int:
    """What all ranks together hand to the group in a step of DDP: the formula of docs/quantized_collectives.md.

    Of every piece of a parameter those who do not sum it send a wire to the one who does, which sends them as many.
    fp32: as a ring. Exact for a model of up to MAX_STRIP / world_size elements; above, a wire that is cut can take 32
    bytes more for each cut.
    """
    if form == "fp32":
        return 2 * (world_size - 1) * 4 * sum(numels)
    wires = 0
    for numel in numels:
        num_blocks = -(-numel // BLOCK)
        count = max(1, min(world_size, num_blocks * BLOCK // MIN_PIECE))
        ends = [min(num_blocks * i // count * BLOCK, numel) for i in range(count + 1)]
        lengths = [end - begin for begin, end in itertools.pairwise(ends)]
        wires += sum(block_codec.wire_bytes(n, bits=FORMS[form]["bits"], block=BLOCK) for n in lengths)
    header = 8 * (16 + 2 * world_size)
    return 2 * (world_size - 1) * wires + num_calls * world_size * (world_size - 1) * header
