# SPDX-License-Identifier: Apache-2.0
"""Hypothesis draws the same examples in every run, and no test leaves another thread count behind. The header of a run
says which backends it covers."""

import subprocess
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

from fmkernels import testing

ROOT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("fmkernels", derandomize=True, deadline=None, max_examples=60, database=None)
hypothesis.settings.load_profile("fmkernels")


def pytest_report_header():
    names = [backend.name for backend in testing.BACKENDS if backend.has_device]
    absent = f"; emulated is {testing.emulated_error}" if testing.emulated_error else ""
    return f"fmkernels backends: {', '.join(names)}{absent}"


@pytest.fixture(autouse=True)
def _seed(request):
    """Random numbers follow from the test's own id, whatever ran before it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _keep_num_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_cpp(tmp_path):
    """What a C++ program prints that includes headers of csrc and of the emulator, by their paths there."""

    def run(source: str) -> str:
        (tmp_path / "main.cpp").write_text(source)
        folders = [f"-I{ROOT / name}" for name in ("csrc", "emulator/src")]
        command = ["g++", "-std=c++20", "-O1", *folders, tmp_path / "main.cpp", "-o", tmp_path / "main"]
        subprocess.run(command, check=True)
        return subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout

    return run
