# SPDX-License-Identifier: Apache-2.0
"""`python -m fmkernels doctor`: its report, its exit code, and that its self-tests can fail."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from fmkernels import __version__, _library, doctor
from fmkernels.__main__ import main
from fmkernels.testing import Backend, backends


def test_every_op_has_a_self_test():
    assert set(doctor.SELF_TESTS) == set(_library.op_names)


@pytest.mark.parametrize("name", _library.op_names)
def test_self_test_fails_when_its_op_is_wrong(name, monkeypatch):
    (cpu,) = (backend for backend in doctor.BACKENDS if backend.name == "cpu")
    doctor.SELF_TESTS[name](cpu)
    right = getattr(_library.ops, name)

    def wrong(*args):
        if not right._schema.returns:
            return None  # an op that writes to its arguments, and here does not
        result = right(*args)
        first, *others = [result] if isinstance(result, torch.Tensor) else result
        first = first * 1.001 if first.is_floating_point() else first + 1
        return (first, *others) if others else first

    monkeypatch.setattr(_library.ops, name, wrong)
    with pytest.raises(AssertionError, match=r"output \d: error"):
        doctor.SELF_TESTS[name](cpu)


@pytest.mark.parametrize("name", _library.op_names)
def test_self_test_passes_on_every_backend(name):
    """What a GPU takes is not what a CPU takes: attention in float32 once failed the self-test of every GPU."""
    for backend in backends(name):
        backend.run(doctor.SELF_TESTS[name], backend)


def test_report_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == doctor.report()
    assert found["problems"] == []
    assert found["versions"]["fmkernels"] == __version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["Python"] == platform.python_version()
    assert found["machine"]["threads"] == torch.get_num_threads()
    assert list(found["ops"]) == list(_library.op_names)
    assert {outcomes["cpu"] for outcomes in found["ops"].values()} == {"passed"}
    archs = found["versions"]["architectures of _C_cuda"]
    if _library.cuda_error is None:
        assert all(arch.rstrip("af").isdigit() for arch in archs.split(","))
        assert found["machine"]["CUDA kernels"] == "loaded"
        assert found["ops"]["merge_attention_forward"]["cuda"] == (
            "passed" if torch.cuda.is_available() else "no device"
        )
    else:
        assert archs is None
        assert found["machine"]["CUDA kernels"] == _library.cuda_error


def test_failed_self_test_is_shown_and_tells_by_the_exit_code(monkeypatch, capsys):
    def fail(backend):
        raise AssertionError("output 0: error 1.5, allowed [1e-6]")

    monkeypatch.setitem(doctor.SELF_TESTS, "merge_attention_forward", fail)
    assert main(["doctor"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    sentence = "merge_attention_forward on cpu: AssertionError: output 0: error 1.5, allowed [1e-6]"
    assert sentence in shown
    assert "All self-tests passed" not in shown
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"][0] == sentence


def test_op_without_a_cpu_kernel_fails(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_outcome", lambda name, backend: "missing")
    assert main(["doctor"]) == 1
    assert "attention_forward on cpu: missing" in capsys.readouterr().out


def test_cuda_kernels_that_do_not_load_are_a_problem_and_not_only_missing(tmp_path):
    (tmp_path / "_C.abi3.so").symlink_to(_library.library_dir / "_C.abi3.so")
    (tmp_path / "_C_cuda.abi3.so").write_text("not a library")
    run = subprocess.run(
        [sys.executable, "-m", "fmkernels", "doctor", "--json"],
        env=os.environ | {"FMKERNELS_LIBRARY_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    (problem,) = json.loads(run.stdout)["problems"]
    assert problem.startswith("the CUDA kernels were built and do not load: ")


def test_backend_whose_library_is_not_there_is_missing():
    assert doctor._outcome("attention_forward", Backend("elsewhere", "cpu", "fmkernels_elsewhere")) == "missing"


@pytest.mark.parametrize("forced", ["generic", "no such set"])
def test_instruction_set_in_use_as_a_user_calls_it(forced):
    run = subprocess.run(
        [sys.executable, "-m", "fmkernels", "doctor", "--json"],
        env=os.environ | {"FMKERNELS_CPU_ISA": forced},
        capture_output=True,
        text=True,
    )
    found = json.loads(run.stdout)
    if forced == "generic":
        assert (run.returncode, found["machine"]["CPU kernels"]) == (0, "generic")
    else:
        assert run.returncode == 1
        assert found["machine"]["CPU kernels"].startswith("none")
        assert (
            "FMKERNELS_CPU_ISA must be generic, avx2 or avx512, got no such set"
            in found["ops"]["attention_forward"]["cpu"]
        )


def test_without_a_command_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as raised:
        main([])
    assert raised.value.code == 2
    assert "usage: python -m fmkernels" in capsys.readouterr().err
