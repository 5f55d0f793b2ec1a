# SPDX-License-Identifier: Apache-2.0
"""A GPU on the CPU: executes PTX, checks every access of it, and counts what it does.

    import emulator, numpy as np

    module = emulator.Module(open("scale.ptx").read())
    x = np.ones(1000, np.float32)
    with emulator.watch() as watched:                                   # raises FaultError where the kernel is wrong
        module.launch("scale", grid=4, block=256, args=[x, 1000, 2.0])
    print(watched.launches[0]["totals"]["warp_instructions"])

CUDA programs need no change: they are compiled by `nvcc -cudart none` and linked to libemulator (docs/emulator.md).
Their reports and launches are read here too, where the program is a library of this process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Where the compiled module and libemulator.so lie: beside this file, where an installation puts them, or in the build
# folder of the repository. EMULATOR_LIBRARY_DIR, read once: another build of them.
library_dir = Path(os.environ.get("EMULATOR_LIBRARY_DIR", Path(__file__).parent.parent / "build" / "emulated"))
__path__.append(str(library_dir))

try:
    from . import _emulator
except ImportError as error:
    raise ImportError(f"the emulator does not load from {library_dir}: {error}") from error
from ._emulator import Counters, Error  # noqa: E402
from .module import Kernel, Module, Parameter  # noqa: E402

__all__ = [
    "Counters",
    "Error",
    "FaultError",
    "Kernel",
    "Module",
    "Parameter",
    "Report",
    "Watch",
    "configure",
    "edited",
    "launches",
    "library_dir",
    "options",
    "reports",
    "take_launches",
    "take_reports",
    "watch",
]


@dataclass(frozen=True)
class Report:
    """A fault that the checks found; equal ones are one report with a count."""

    fault: str  # "race", "out of bounds", ...
    kernel: str
    file: str
    line: int  # 0: compiled without -lineinfo
    block: tuple[int, int, int]
    thread: tuple[int, int, int]
    text: str
    count: int
    message: str  # all of it in one line

    def __str__(self) -> str:
        return self.message


class FaultError(RuntimeError):
    """Raised where kernels were wrong: `reports` holds what the checks found, at least one."""

    def __init__(self, reports: Sequence[Report]) -> None:
        super().__init__("\n".join(map(str, reports)))
        self.reports = list(reports)


# ---- Options, and what is kept ---------------------------------------------------------------------------------------


def configure(
    *,
    architecture: int | None = None,
    num_sms: int | None = None,
    checks: bool | None = None,
    counters: bool | None = None,
    threads: int | None = None,
    max_instructions: int | None = None,
) -> None:
    """Sets options of all launches from now on; what is left out stays as it is.

    Args:
        architecture: of the GPU, 80 for sm_80 (the default), 86, 89, 90, 100 or 120.
        num_sms: multiprocessors of the GPU, for launches that fill it; 0 (the default): those of a well-known GPU of
            the architecture. Estimates in counters are of the GPUs that they name all the same.
        checks: races, unwritten reads and the like; bounds, alignment, barriers and traps are always checked.
        counters: whether launches are counted.
        threads: of the operating system, over the blocks of a launch: for kernels whose blocks do not depend on the
            order in which they run.
        max_instructions: warp-instructions of a launch; beyond them it is ended, and reported as a livelock.
    """
    _emulator.configure(architecture, num_sms, checks, counters, threads, max_instructions)


def options() -> dict[str, Any]:
    """The options in force, as `configure` takes them."""
    return _emulator.options()


@contextmanager
def edited(edit: Callable[[str], str]) -> Iterator[None]:
    """Within it, the PTX text of CUDA programs in this process goes through `edit` before it runs.

    A barrier that is taken out shows whether anything needs it.
    """
    _emulator.edit_images(edit)
    try:
        yield
    finally:
        _emulator.edit_images(None)


def reports() -> list[Report]:
    """What the checks found since `take_reports` was called last."""
    return [Report(**report) for report in _emulator.reports()]


def take_reports() -> list[Report]:
    """The same, and forgets them. Those nobody takes are printed when the process ends."""
    return [Report(**report) for report in _emulator.take_reports()]


def launches() -> list[dict[str, Any]]:
    """The launches since `take_launches` was called last, at most the last 10,000: sizes, counters, estimates."""
    return [json.loads(launch) for launch in _emulator.launches()]


def take_launches() -> list[dict[str, Any]]:
    """The same, and forgets them."""
    return [json.loads(launch) for launch in _emulator.take_launches()]


@dataclass
class Watch:
    """What happened in a `with watch()` block; filled when it ends."""

    reports: list[Report] = field(default_factory=list)
    launches: list[dict[str, Any]] = field(default_factory=list)


_open_watches: list[Watch] = []


@contextmanager
def watch(**changed: Any) -> Iterator[Watch]:
    """Raises FaultError at the end of the block for faults in it, also where the block ended by another exception.

    What was reported before and read by nobody is forgotten, except by a watch around this one, which sees the launches
    of this one too. `changed`: options for the block, as in `configure`.
    """
    before = options()
    configure(**changed)
    _hand_over()
    watched = Watch()
    _open_watches.append(watched)
    try:
        yield watched
    finally:
        configure(**before)
        _hand_over()
        _open_watches.pop()
        if _open_watches:
            _open_watches[-1].launches += watched.launches
        if watched.reports:
            raise FaultError(watched.reports)


def _hand_over() -> None:
    """What is kept goes to the innermost watch that is open, or is forgotten."""
    reports, launches = take_reports(), take_launches()
    if _open_watches:
        _open_watches[-1].reports += reports
        _open_watches[-1].launches += launches
