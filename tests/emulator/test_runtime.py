# SPDX-License-Identifier: Apache-2.0
"""The CUDA runtime as programs and their users meet it: calls, errors, architectures, `python -m emulator run`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from emulator.__main__ import main


def test_refused_launches_are_errors_of_the_runtime_and_reports(program, run):
    status, output, errors = run(program("runtime_api"), "refused")
    assert "WRONG" not in output, output
    assert status == 0
    reports = [line for line in errors.splitlines() if line.startswith("emulator: launch: ")]
    assert len(reports) == 8
    assert "blocks of 1025 x 1 x 1 threads" in reports[0]
    assert "45060 bytes of dynamic shared memory beside 4096 static ones" in errors


@pytest.mark.parametrize(
    ("architecture", "facts"),
    [
        (80, "sm_80: 108 multiprocessors, 166912 bytes a block, 167936 bytes in all"),
        (86, "sm_86: 82 multiprocessors, 101376 bytes a block, 102400 bytes in all"),
        (89, "sm_89: 128 multiprocessors, 101376 bytes a block, 102400 bytes in all"),
        (90, "sm_90: 132 multiprocessors, 232448 bytes a block, 233472 bytes in all"),
        (100, "sm_100: 148 multiprocessors, 232448 bytes a block, 233472 bytes in all"),
        (120, "sm_120: 170 multiprocessors, 101376 bytes a block, 102400 bytes in all"),
    ],
)
def test_architectures(architecture, facts, program, run):
    status, output, errors = run(program("runtime_api"), EMULATOR_ARCHITECTURE=str(architecture))
    assert facts in output
    assert (status, errors) == (0, "")


def test_a_gpu_of_few_multiprocessors(program, run):
    status, output, errors = run(program("runtime_api"), EMULATOR_NUM_SMS="3")
    assert "sm_80: 3 multiprocessors, 166912 bytes a block" in output
    assert (status, errors) == (0, "")


@pytest.mark.parametrize("value", ["75", "x"])
def test_an_architecture_that_is_not_emulated(value, program, run):
    _, _, errors = run(program("runtime_api"), EMULATOR_ARCHITECTURE=value)
    expected = {"75": "one of 80, 86, 89, 90, 100, 120, got 75", "x": "EMULATOR_ARCHITECTURE must be a number, got x"}
    assert expected[value] in errors


FAULTY = """
#include <cstdio>
__global__ void beyond(float* x) { x[threadIdx.x] = 1.0f; }
__global__ void misaligned(char* x) { *reinterpret_cast<int*>(x + 2) = 1; }
__global__ void race(int* out) {
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void stuck(volatile int* x) { while (*x == 0) {} }
__global__ void fails(int* x) { if (threadIdx.x == 3) __trap(); }
#include <cassert>
__global__ void asserts(int* x) { assert(threadIdx.x < 3 && "few threads"); }
int main(int, char** arguments) {
  void* x = nullptr;
  cudaMalloc(&x, 256);
  cudaMemset(x, 0, 256);
  switch (arguments[1][0]) {
    case 'b': beyond<<<1, 65>>>((float*)x); break;
    case 'm': misaligned<<<1, 1>>>((char*)x); break;
    case 'r': race<<<1, 64>>>((int*)x); break;
    case 's': stuck<<<1, 1>>>((int*)x); break;
    case 'f': fails<<<1, 32>>>((int*)x); break;
    case 'a': asserts<<<1, 32>>>((int*)x); break;
  }
  printf("%s\\n", cudaGetErrorName(cudaGetLastError()));
}
"""


@pytest.mark.parametrize(
    ("which", "error", "report"),
    [
        ("b", "cudaErrorIllegalAddress", "out of bounds: .*faulty.cu:3: beyond"),
        ("m", "cudaErrorMisalignedAddress", "misaligned: .*faulty.cu:4: misaligned"),
        ("r", "cudaErrorLaunchFailure", "race: .*faulty.cu:[78]: race"),
        ("s", "cudaErrorLaunchTimeout", "livelock: .*stuck"),
        ("f", "cudaErrorLaunchFailure", "trap: .*faulty.cu:11: fails"),
        ("a", "cudaErrorAssert", "trap: .*asserts"),
    ],
)
def test_faults_are_errors_of_the_launch_and_reports(which, error, report, build_program, run):
    program = build_program("faulty", FAULTY)
    status, output, errors = run(program, which, EMULATOR_MAX_INSTRUCTIONS="100000")
    assert output == f"{error}\n"
    assert status == 0
    assert re.search(report, errors), errors


WHICH = """
#include <cstdio>
__global__ void which() {
#ifdef __CUDA_ARCH__
  printf("%d ", __CUDA_ARCH__);
#endif
}
int main() {
  which<<<1, 1>>>();
  printf("%s\\n", cudaGetErrorName(cudaGetLastError()));
}
"""


def test_the_example_of_the_documentation(build_program, run):
    page = (Path(__file__).parent.parent.parent / "docs" / "emulator.md").read_text()
    text = re.search(r"```cuda\n(.*?)```", page, re.DOTALL)[1]
    assert run(build_program("sum", text)) == (0, "64 no error\n", "")
    without = text.replace("    __syncthreads();\n", "")
    assert without != text
    _, output, errors = run(build_program("sum_without_barrier", without))
    assert output.endswith("unspecified launch failure\n")
    where = r".*sum_without_barrier.cu:8: sum\(float const\*, float\*\), block \(0, 0, 0\), thread"
    assert re.search(f"^emulator: unwritten shared memory: {where}", errors, re.MULTILINE)
    assert re.search(f"^emulator: race: {where}", errors, re.MULTILINE)


def targets(*names, flags=("--no-compress",)):
    return (*(word for name in names for word in ("-gencode", f"arch=compute_{name},code=compute_{name}")), *flags)


def test_the_newest_target_that_the_architecture_runs_is_chosen(build_program, run):
    program = build_program("which_of_three", WHICH, targets=targets("80", "86", "90a"))
    for architecture, target in ((80, 800), (86, 860), (89, 860), (90, 900), (100, 860), (120, 860)):
        assert run(program, EMULATOR_ARCHITECTURE=str(architecture)) == (0, f"{target} cudaSuccess\n", "")


@pytest.mark.parametrize(
    ("name", "nvcc_targets", "architecture", "report"),
    [
        ("of_90a", targets("90a"), 80, "no PTX that sm_80 runs: there is PTX for sm_90a; compile with nvcc -gencode"),
        ("of_90a", targets("90a"), 100, "no PTX that sm_100 runs: there is PTX for sm_90a"),
        ("compressed", targets("80", flags=("--compress-mode=size",)), 80, "compile with nvcc --no-compress"),
        ("machine_code", ("-gencode", "arch=compute_80,code=sm_80"), 80, "there is machine code alone"),
    ],
)
def test_a_program_without_ptx_that_runs_says_which_option_is_missing(
    name, nvcc_targets, architecture, report, build_program, run
):
    program = build_program(f"which_{name}", WHICH, targets=nvcc_targets)
    status, output, errors = run(program, EMULATOR_ARCHITECTURE=str(architecture))
    assert (status, output) == (0, "cudaErrorNoKernelImageForDevice\n")
    assert report in errors


# ---- the command line ------------------------------------------------------------------------------------------------


def test_info_of_a_program(program, capsys):
    assert main(["info", str(program("basics"))]) == 0
    printed = capsys.readouterr().out
    assert "grid_stride(double*, long, double)" in printed
    assert "structs(Params, Point*, char, unsigned char, short, bool)" in printed


@pytest.fixture
def command(run):
    """command(*words): `python -m emulator` in a process of its own."""
    return lambda *words: run(sys.executable, "-m", "emulator", *words)


def test_run_prints_the_reports_and_its_status_tells(program, build_program, command):
    status, output, errors = command("run", program("basics"))
    assert status == 0
    assert "ok: a ragged last block" in output
    assert errors.splitlines()[-1].endswith("sm_80: no fault found")
    status, output, errors = command("run", build_program("faulty", FAULTY), "b")
    assert status == 1
    assert output == "cudaErrorIllegalAddress\n"
    assert "out of bounds: " in errors
    assert errors.splitlines()[-1] == "emulator: launches: 1, blocks: 1, sm_80: faults: 1"


def test_counters_of_a_program(program, command):
    status, output, errors = command("counters", "--architecture", "90", "--lines", "3", program("shared"))
    assert status == 0, errors
    assert "bitonic_sort" in output
    assert "hottest lines" in output


def test_run_of_a_program_that_does_not_use_the_emulator(command):
    status, _, errors = command("run", "/bin/true")
    assert status == 2
    assert "is it linked to libemulator (nvcc -cudart none)?" in errors
    assert command("run", "./no-such-program")[0] == 2


def test_output_of_a_program_as_json(program, tmp_path, run):
    file = tmp_path / "output.jsonl"
    assert run(program("tensor_cores"), EMULATOR_OUTPUT=str(file))[0] == 0
    (launch,) = [json.loads(line)["launch"] for line in file.read_text().splitlines()]
    assert launch["totals"]["mma_flops"] == 2 * 16 * 8 * 64


EDITED = """
__global__ void nothing() {}
extern "C" int go() { nothing<<<1, 1>>>(); return cudaGetLastError(); }
"""
EDITS_WHILE_OTHERS_ASK = """
import ctypes, faulthandler, sys, threading, time
import emulator

faulthandler.dump_traceback_later(20, exit=True)
started = threading.Event()

def edit(text):
    started.set()
    time.sleep(0.2)  # meanwhile the other thread asks
    return text

with emulator.edited(edit):
    launch = threading.Thread(target=ctypes.CDLL(sys.argv[1]).go)
    launch.start()
    started.wait()
    assert emulator.reports() == []
    launch.join()
assert len(emulator.launches()) == 1
"""


def test_an_edit_in_python_does_not_keep_other_threads_waiting(build_program, run):
    library = build_program("edited", EDITED, "-shared", "-Xcompiler", "-fPIC")
    status, _, errors = run(sys.executable, "-c", EDITS_WHILE_OTHERS_ASK, library, PYTHONPATH=str(ROOT))
    assert status == 0, errors
