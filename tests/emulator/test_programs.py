# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ programs of all kinds, compiled by nvcc and run over the emulator's runtime; each compares with the host."""

from __future__ import annotations

import subprocess

import pytest
from conftest import PROGRAMS

FLAGS = {"control": ("--extended-lambda",)}


def run(program, *arguments, **variables):
    import os

    result = subprocess.run([program, *arguments], capture_output=True, text=True, env={**os.environ, **variables})
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("name", sorted(path.stem for path in PROGRAMS.glob("*.cu")))
def test_program(name, threads, program):
    status, output, errors = run(program(name, *FLAGS.get(name, ())), EMULATOR_THREADS=threads)
    assert "WRONG" not in output, output
    assert errors == ""
    assert status == 0
    assert "ok: " in output
