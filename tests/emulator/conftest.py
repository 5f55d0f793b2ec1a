# SPDX-License-Identifier: Apache-2.0
"""The emulator's own tests: on a build without it none of them is collected, and the header of the run says so."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAMS = Path(__file__).parent / "programs"

# Under the sanitizers this process has their libraries preloaded, which is not for compilers.
PRELOADED = {"LD_PRELOAD": os.environ.pop("LD_PRELOAD")} if "LD_PRELOAD" in os.environ else {}

if importlib.util.find_spec("emulator") is None:
    sys.path.append(str(ROOT))
try:
    import emulator

    emulator_error = None
except ImportError as error:
    emulator_error = f"{error}: `run.py test` builds it, except with FMKERNELS_CUDA=off"
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header():
    return f"emulator: not tested: {emulator_error}" if emulator_error else None


@pytest.fixture(autouse=True)
def _fresh_emulator():
    """Every test begins with the default options and no reports, and leaves none behind."""
    emulator.take_reports()
    emulator.take_launches()
    before = emulator.options()
    emulator.configure(
        architecture=80, num_sms=0, checks=True, counters=True, threads=1, max_instructions=4_000_000_000
    )
    yield
    emulator.configure(**before)
    left = emulator.take_reports()
    emulator.take_launches()
    assert not left, "reports that no test has read: " + "; ".join(map(str, left))


@pytest.fixture(scope="session")
def nvcc() -> Path:
    """The compiler of the build."""
    sys.path.insert(0, str(ROOT / "tools"))
    import device_code

    toolchain = device_code.Toolchain.of_build(ROOT / "build" / "cuda")
    if toolchain is None:
        pytest.skip("no nvcc here")
    return toolchain.nvcc


def run_quietly(*command: object, **options) -> None:
    """Runs a command that must succeed; its output is the failure's text."""
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, **options)
    assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout}{result.stderr}"


TARGETS = ("-gencode", "arch=compute_80,code=compute_80", "--no-compress")
FLAGS = ("-lineinfo", "-std=c++20", "-cudart", "none", "-diag-suppress", "20054", "-I", str(PROGRAMS))


@pytest.fixture(scope="session")
def build_program(nvcc):
    """build_program(name, text, *flags, targets): compiles a CUDA program against the emulator.

    It is kept in the build folder, and made again when something changes.
    """
    header = (PROGRAMS / "program.h").read_text()

    def build(name: str, text: str, *flags: str, targets: tuple[str, ...] = TARGETS) -> Path:
        flags = (*FLAGS, *targets, *flags)
        folder = emulator.library_dir / "programs"
        folder.mkdir(exist_ok=True)
        key = hashlib.sha256("\0".join([text, header, str(nvcc), *flags]).encode()).hexdigest()[:16]
        program = folder / f"{name}-{key}"
        if not program.exists():
            source = folder / f"{name}.cu"
            source.write_text(text)
            partial = folder / f"{name}-{key}.{os.getpid()}"
            link = [f"-L{emulator.library_dir}", "-lemulator", "-Xlinker", "-rpath", "-Xlinker", emulator.library_dir]
            run_quietly(nvcc, *flags, source, "-o", partial, *link)
            for old in folder.glob(f"{name}-*"):
                if old != partial:
                    old.unlink()
            partial.rename(program)
        return program

    return build


@pytest.fixture(scope="session")
def program(build_program):
    """program("name"): the program of programs/name.cu."""
    return lambda name, *flags: build_program(name, (PROGRAMS / f"{name}.cu").read_text(), *flags)


@pytest.fixture(scope="session")
def run():
    """run(program, *arguments, **environment): (status, output, errors) of a program that uses the emulator."""

    def run_it(*command: object, **variables: str) -> tuple[int, str, str]:
        environment = {**os.environ, **PRELOADED, **variables}
        words = [str(word) for word in command]
        result = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
        return result.returncode, result.stdout, result.stderr

    return run_it
