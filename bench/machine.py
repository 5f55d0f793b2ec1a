# SPDX-License-Identifier: Apache-2.0
"""What the numbers were measured on, and how the process is held still on it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Machine:
    device: str
    """`cpu` or `cuda`."""
    model: str
    num_cores: int
    num_threads: int
    pinned: bool
    instruction_set: str
    cache_bytes: int
    """Last-level cache; inputs that must be cold rotate through four times as much."""
    torch: str
    load_average: float
    """Of the last minute, when the run began: other people's work."""

    @property
    def slug(self) -> str:
        """Name of the files of this machine: one for each model, instruction set and number of threads."""
        parts = [self.model, self.instruction_set]
        if self.device == "cpu":
            parts.append(f"{self.num_threads}t")
        return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")

    @property
    def indication(self) -> bool:
        """Whether the figures are indications only: a neighbour stalls the barriers of more than one thread."""
        return self.device == "cpu" and self.num_threads > 1

    def heading(self) -> str:
        text = f"{self.model} ({self.instruction_set}), {self.num_cores} cores, last-level cache "
        text += f"{self.cache_bytes / 2**20:.0f} MiB, torch {self.torch}"
        if self.device == "cpu":
            held = "pinned" if self.pinned else "not pinned: this system has no sched_setaffinity"
            text += f", {self.num_threads} thread{'s' if self.num_threads > 1 else ''}, {held}"
            text += f", load average {self.load_average:.1f} before"
        return text + (" · more than one thread: INDICATIONS, not measurements" if self.indication else "")


def last_level_cache_bytes() -> int:
    """As Linux tells it for the first core; 64 MiB, above most, on systems without this table."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) << 10 for size in sizes if size.endswith("K")), default=64 << 20)


def describe(device: str, num_threads: int, cpu_info: dict) -> Machine:
    """The machine, with `cpu_info` as pytest-benchmark gathers it."""
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        model, isa, cache_bytes = gpu.name, f"sm_{gpu.major}{gpu.minor}", gpu.L2_cache_size
    else:
        model = cpu_info.get("brand_raw", "unknown processor")
        isa = os.environ.get("FMKERNELS_CPU_ISA", torch.backends.cpu.get_cpu_capability())
        cache_bytes = last_level_cache_bytes()
    return Machine(
        device=device,
        model=model,
        num_cores=os.cpu_count() or 1,
        num_threads=num_threads,
        pinned=device == "cpu" and hasattr(os, "sched_setaffinity"),
        instruction_set=isa,
        cache_bytes=cache_bytes,
        torch=torch.__version__,
        load_average=os.getloadavg()[0],
    )


@contextmanager
def held_still(machine: Machine) -> Iterator[None]:
    """On the CPU: as many threads as asked, each process thread kept on as many cores, the last ones (the first of a
    machine takes most of its interrupts)."""
    if machine.device != "cpu":
        yield
        return
    num_threads_before = torch.get_num_threads()
    torch.set_num_threads(machine.num_threads)
    cores_before = os.sched_getaffinity(0) if machine.pinned else set()
    if machine.pinned:
        os.sched_setaffinity(0, sorted(cores_before)[-machine.num_threads :])
    try:
        yield
    finally:
        torch.set_num_threads(num_threads_before)
        if machine.pinned:
            os.sched_setaffinity(0, cores_before)
