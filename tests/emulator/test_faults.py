# SPDX-License-Identifier: Apache-2.0
"""Each check of the emulator on CUDA C++ kernels: the faulty is reported at its line, its repaired twin is silent."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import run_quietly

import emulator

FOLDER = Path(__file__).parent / "faults"
ARCHITECTURES = {"sm80": 80, "sm90": 90, "blocks": 80}


@dataclass(frozen=True)
class Case:
    source: str
    kernel: str
    faults: tuple[str, ...]
    grid: int
    block: int
    lines: tuple[int, ...]  # where it may be reported

    def __str__(self):
        return self.kernel


def cases_of(source: str) -> list[Case]:
    """The kernels of a file: `// fault, or fault: grid x block`, then KERNEL(name), then lines marked FAULT."""
    found = []
    for number, line in enumerate((FOLDER / f"{source}.cu").read_text().splitlines(), 1):
        if heading := re.fullmatch(r"// ([a-z, ]+): (\d+) x (\d+)", line):
            faults = tuple(heading[1].split(", "))
            grid, block = int(heading[2]), int(heading[3])
        elif kernel := re.match(r"KERNEL\((\w+)\) \{", line):
            found.append([kernel[1], faults, grid, block, []])
        elif line.endswith("// FAULT"):
            found[-1][-1].append(number)
    return [Case(source, *case[:-1], tuple(case[-1])) for case in found]


CASES = [case for source in ARCHITECTURES for case in cases_of(source)]


@pytest.fixture(scope="session")
def modules(nvcc, tmp_path_factory):
    """modules(source, repaired): the compiled module."""
    loaded = {}

    def load(source: str, repaired: bool) -> emulator.Module:
        if (source, repaired) not in loaded:
            ptx = tmp_path_factory.mktemp("faults") / f"{source}.ptx"
            flags = ["-ptx", f"-arch=compute_{ARCHITECTURES[source]}", "-lineinfo", "-std=c++20"]
            emulator.configure(architecture=ARCHITECTURES[source])
            run_quietly(nvcc, *flags, *(["-DREPAIRED"] if repaired else []), FOLDER / f"{source}.cu", "-o", ptx)
            loaded[source, repaired] = emulator.Module(ptx.read_text(), f"{source}.ptx")
        return loaded[source, repaired]

    return load


def reports_of(module: emulator.Module, case: Case, checks: bool = True) -> list[emulator.Report]:
    emulator.configure(architecture=ARCHITECTURES[case.source], checks=checks, max_instructions=200_000)
    memory = np.zeros(2 * 1024 + 64, np.int32)  # aligned to 16 bytes, a gap between the two arrays
    memory = memory[-memory.ctypes.data % 64 // 4 :]
    out, source = memory[:1024], memory[1040 : 1040 + 1024]
    source[:] = np.arange(1024)
    module.launch(case.kernel, case.grid, case.block, [out, source, 0, 1])
    return emulator.take_reports()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fault_is_reported_at_its_line(case, modules):
    reports = reports_of(modules(case.source, repaired=False), case)
    assert reports, "nothing was reported"
    for report in reports:
        assert report.fault in case.faults, report
        assert Path(report.file).name == f"{case.source}.cu", report
        assert report.line in case.lines, report
        assert report.kernel == case.kernel
        assert all(t < limit for t, limit in zip(report.thread, (case.block, 1, 1), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repaired_kernel_is_silent(case, modules):
    assert reports_of(modules(case.source, repaired=True), case) == []


def test_a_race_names_both_sides(modules):
    case = next(case for case in CASES if case.kernel == "read_before_the_write")
    first = reports_of(modules("sm80", repaired=False), case)[0]
    write, read = case.lines
    assert first.line == write
    assert f"sm80.cu:{read}" in first.text


def test_equal_reports_are_one_with_a_count(modules):
    case = next(case for case in CASES if case.kernel == "overwritten_too_early")
    reports = reports_of(modules("sm80", repaired=False), case)
    assert len({(report.fault, report.line) for report in reports}) == len(reports)
    assert max(report.count for report in reports) > 1


def test_bounds_are_checked_without_checks(modules):
    for case in CASES:
        if set(case.faults) & {"out of bounds", "misaligned", "trap", "deadlock"}:
            assert reports_of(modules(case.source, repaired=False), case, checks=False), case


def test_the_shadow_alone():
    """shadow_test, the C++ tests of the shadow and of device memory."""
    run_quietly(emulator.library_dir / "shadow_test", "20")
