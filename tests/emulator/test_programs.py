# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ programs of all kinds, compiled by nvcc and run over the emulator's runtime; each compares with the host."""

from __future__ import annotations

from pathlib import Path

import pytest

PROGRAMS = sorted(path.stem for path in (Path(__file__).parent / "programs").glob("*.cu"))
FLAGS = {name: ("--extended-lambda",) for name in ("control", "simd")}
PRINTED = {"control": "-5 7  3.14|text  |z 1099511627776 ff %\n(nil) 1.235e+04 +9 no argument\n"}


@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name, threads, program, run):
    status, output, errors = run(program(name, *FLAGS.get(name, ())), EMULATOR_THREADS=threads)
    assert "WRONG" not in output, output
    assert errors == "", "reports of the emulator"
    assert status == 0
    assert "ok: " in output
    assert PRINTED.get(name, "") in output
