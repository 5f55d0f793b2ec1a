# SPDX-License-Identifier: Apache-2.0
"""tools/cuda_report.py: budgets on made-up kernels, and what it reads from a real compilation."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_report  # noqa: E402
import device_code  # noqa: E402
from cuda_report import Budget, Compilation, Kernel, LoopBudget, check_kernel, check_report  # noqa: E402
from rich.console import Console  # noqa: E402
from sass_loop import Loop  # noqa: E402

KERNEL = Kernel(
    name="scale_kernel<float, 4>",
    room="scale",
    arch="80",
    registers=32,
    barriers=1,
    spill_bytes=0,
    stack_bytes=0,
    static_smem_bytes=1024,
    opcodes={"LDG.E.128": 2, "STG.E.128": 1, "FMUL": 4, "EXIT": 1},
)
BUDGET = Budget(
    room="scale",
    name="scale_kernel<*>",
    archs=["80"],
    threads=256,
    dynamic_smem_bytes=0,
    max_registers=32,
    max_instructions=8,
    min_blocks_per_sm=8,
    require=["LDG.E.128*"],
)


def compilation(*kernels: Kernel, **changes) -> Compilation:
    return dataclasses.replace(Compilation("csrc/scale/scale.cu", "80", 3.0, 200 << 20, list(kernels)), **changes)


# ---- Budgets ---------------------------------------------------------------------------------------------------------


def test_kernel_within_its_budget_is_silent():
    assert check_report([compilation(KERNEL)], [BUDGET]) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"registers": 33}, "uses 33 registers, over its budget of 32"),
        ({"opcodes": {**KERNEL.opcodes, "FMUL": 5}}, "has 9 instructions, over its budget of 8"),
        ({"static_smem_bytes": 30 << 10}, "has 5 blocks per multiprocessor (limited by smem), under its budget of 8"),
        ({"opcodes": {"LDG.E": 8}}, "has no instruction LDG.E.128*, which its budget requires"),
        ({"spill_bytes": 16}, "spills 16 bytes of registers"),
        ({"opcodes": {"LDG.E.128": 2, "LDL.64": 2, "STL": 1}}, "has 3 local memory instructions"),
        ({"stack_bytes": 64}, "has 64 bytes of local memory"),
    ],
)
def test_kernel_over_its_budget_fails(changes, sentence):
    found = check_kernel(dataclasses.replace(KERNEL, **changes), [BUDGET])
    assert f"scale_kernel<float, 4> for sm_80 {sentence}" in found


@pytest.mark.parametrize(
    "budgets",
    [
        [],
        [BUDGET, BUDGET],
        [dataclasses.replace(BUDGET, archs=["90a"])],
        [dataclasses.replace(BUDGET, room="other")],
    ],
    ids=["none", "two", "of another architecture", "of another room"],
)
def test_kernel_must_have_one_budget(budgets):
    count = len(budgets) if len(budgets) == 2 else 0
    sentence = "scale_kernel<float, 4> for sm_80 must have one budget in csrc/scale/budget.toml, has"
    assert check_kernel(KERNEL, budgets) == [f"{sentence} {count}"]


def test_spilling_kernel_without_budget_says_both():
    assert len(check_kernel(dataclasses.replace(KERNEL, spill_bytes=4), [])) == 2


def test_budget_without_kernel_fails():
    stale = dataclasses.replace(BUDGET, name="gone_kernel<*>")
    found = check_report([compilation(KERNEL)], [BUDGET, stale])
    assert found == ["csrc/scale/budget.toml: gone_kernel<*> matches no kernel for sm_80"]


def test_budget_of_a_room_without_sources_fails():
    found = check_report([compilation(KERNEL)], [BUDGET, dataclasses.replace(BUDGET, room="gone")])
    assert found == ["csrc/gone/budget.toml: scale_kernel<*> matches no kernel for sm_80"]


def test_source_that_does_not_compile_fails_and_makes_no_budget_stale():
    found = check_report([compilation(error="error: expected a ;")], [BUDGET])
    assert found == ["csrc/scale/scale.cu does not compile for sm_80:\nerror: expected a ;"]


def test_architecture_without_budgets_must_compile_and_no_more():
    other = dataclasses.replace(KERNEL, arch="120a", registers=255)
    assert check_report([compilation(KERNEL), compilation(other, arch="120a")], [BUDGET]) == []
    failed = check_report([compilation(KERNEL), compilation(arch="120a", error="no such instruction")], [BUDGET])
    assert failed == ["csrc/scale/scale.cu does not compile for sm_120a:\nno such instruction"]


def test_expensive_compilation_fails():
    quick = compilation(KERNEL, seconds=40.0)
    slow = compilation(dataclasses.replace(KERNEL, arch="90a"), arch="90a", seconds=70.0)
    both = dataclasses.replace(BUDGET, archs=["80", "90a"])
    assert check_report([quick, slow], [both]) == ["csrc/scale/scale.cu takes 70 s to compile, over 60"]
    also_quick = dataclasses.replace(slow, seconds=40.0)
    assert check_report([quick, also_quick], [both]) == [], "the limit holds for each architecture"
    large = check_report([compilation(KERNEL, peak_bytes=3 << 30)], [BUDGET])
    assert large == ["csrc/scale/scale.cu takes 3072 MiB to compile, over 2048"]


def test_occupancy_in_the_json_is_that_of_the_budget_of_the_architecture():
    """Two entries of one kernel may launch it with other blocks on another architecture."""
    large = dataclasses.replace(BUDGET, archs=["90a"], threads=1024)
    other = compilation(dataclasses.replace(KERNEL, arch="90a"), arch="90a")
    tools = cuda_report.Toolchain(Path("nvcc"), Path("nvdisasm"), "13.0", {})
    report = json.loads(cuda_report.as_json(tools, [compilation(KERNEL), other], [BUDGET, large], []))
    resident = [c["kernels"][0]["occupancy"]["blocks_per_sm"] for c in report["compilations"]]
    assert resident == [8, 2]


LOOP = Loop(
    address=0x100,
    units=128.0,
    is_warpgroup=False,
    num_instructions=512,
    num_all_instructions=600,
    num_spills=0,
    num_wavefronts=192,
    counts={"mma": 128, "integer": 12, "imad": 4, "fp32": 368},
)
LOOP_BUDGET = LoopBudget(
    room="scale",
    name="scale_kernel<*>",
    archs=["80"],
    max_not_mma_per_unit=3.0,
    max_int_per_unit=0.125,
    max_shared_wavefronts_per_unit=1.5,
    max_spills=0,
)


def check_loops(*loops: Loop, budgets: list[LoopBudget]) -> list[str]:
    return check_report([compilation(dataclasses.replace(KERNEL, loops=list(loops)))], [BUDGET], budgets)


def test_loop_within_its_budget_is_silent_and_so_is_one_without():
    assert check_loops(LOOP, budgets=[LOOP_BUDGET]) == []
    assert check_loops(LOOP, budgets=[]) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_instructions": 514}, "has 3.016 instructions other than mma a unit, over its budget of 3"),
        ({"counts": {"mma": 128, "integer": 17}}, "has 0.1328 integer instructions a unit, over its budget of 0.125"),
        ({"num_wavefronts": 256}, "has 2 shared wavefronts a unit, over its budget of 1.5"),
        ({"num_spills": 1}, "has 1 spill instructions, over its budget of 0"),
    ],
)
def test_loop_over_its_budget_fails(changes, sentence):
    found = check_loops(dataclasses.replace(LOOP, **changes), budgets=[LOOP_BUDGET])
    assert found == [f"main loop of scale_kernel<float, 4> for sm_80 {sentence}"]


def test_loops_beside_the_main_one_may_not_spill_either():
    masked = dataclasses.replace(LOOP, num_instructions=900, num_spills=2)
    (found,) = check_loops(LOOP, masked, budgets=[LOOP_BUDGET])
    assert "has 2 spill instructions" in found


def test_loop_budget_without_a_loop_or_a_kernel_or_beside_another_fails():
    (found,) = check_loops(budgets=[LOOP_BUDGET])
    assert found == "scale_kernel<float, 4> for sm_80 has no loop with tensor-core instructions, but a budget for one"
    (found,) = check_loops(LOOP, budgets=[LOOP_BUDGET, LOOP_BUDGET])
    assert "must have one budget in csrc/scale/budget.toml, has 2" in found
    (found,) = check_loops(LOOP, budgets=[dataclasses.replace(LOOP_BUDGET, name="gone*")])
    assert found == "csrc/scale/budget.toml: gone* matches no kernel for sm_80"


def test_source_that_the_build_does_not_know_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_report, "ROOT", tmp_path)
    known, unknown = (tmp_path / "csrc" / "scale" / name for name in ("scale.cu", "unknown.cu"))
    known.parent.mkdir(parents=True)
    known.touch()
    unknown.touch()
    tools = cuda_report.Toolchain(Path("nvcc"), Path("nvdisasm"), "13.0", {known: ["nvcc"]})
    expected = "csrc/scale/unknown.cu is not part of the CUDA build; run: python3 run.py setup"
    assert cuda_report.check_sources(tools) == [expected]


def budget_text(kind: str = "kernel", budget: Budget | LoopBudget = BUDGET, **changes) -> str:
    fields = {**dataclasses.asdict(budget), **changes}
    del fields["room"]
    return f"[[{kind}]]\n" + "".join(f"{key} = {value!r}\n" for key, value in fields.items() if value is not None)


def test_budget_file_is_read(tmp_path):
    path = tmp_path / "scale" / "budget.toml"
    path.parent.mkdir()
    path.write_text(budget_text() + budget_text("loop", LOOP_BUDGET))
    assert cuda_report.read_budgets(path) == [BUDGET]
    assert cuda_report.read_loop_budgets(path) == [LOOP_BUDGET]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"threads": None}, "has missing or unknown keys: threads"),
        ({"max_spills": 3}, "has missing or unknown keys: max_spills"),
        ({"archs": ["80", "75"]}, r"archs of .* must be of .*, got \['75'\]"),
    ],
)
def test_wrong_budget_file_is_named(tmp_path, changes, sentence):
    path = tmp_path / "budget.toml"
    path.write_text(budget_text(**changes))
    with pytest.raises(ValueError, match=sentence):
        cuda_report.read_budgets(path)
    path.write_text(budget_text("loop", LOOP_BUDGET, max_spills=None))
    with pytest.raises(ValueError, match=r"\[\[loop\]\] scale_kernel.* has missing or unknown keys: max_spills"):
        cuda_report.read_loop_budgets(path)


# ---- Reading the compiler --------------------------------------------------------------------------------------------


def test_instruction_mix_tells_widths_and_tensor_cores():
    opcodes = {
        "LDG.E.128.CONSTANT": 2,
        "LDG.E": 1,
        "LDG.E.U16": 3,
        "LDGSTS.E.BYPASS.128": 4,
        "HMMA.16816.F32.BF16": 8,
        "HGMMA.64x64x16.F32": 1,
        "LDSM.16.MT88.4": 5,
        "STG.E.64": 1,
        "IADD3": 9,
    }
    expected = {"HGMMA": 1, "HMMA": 8, "LDG.128": 2, "LDG.16": 3, "LDG.32": 1, "LDGSTS.128": 4, "LDSM": 5, "STG.64": 1}
    assert cuda_report.instruction_mix(opcodes) == expected


PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel_a' for 'sm_80'
ptxas info    : Function properties for kernel_a
    64 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 80 bytes cumulative stack size, 1024 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 65.848 ms
ptxas info    : Function properties for called_by_a
    16 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function 'kernel_b' for 'sm_80'
ptxas info    : Function properties for kernel_b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 368 bytes cmem[0]
"""


def test_resources_of_a_kernel_hold_those_of_the_functions_that_it_calls():
    names = ("registers", "barriers", "stack_bytes", "spill_bytes", "static_smem_bytes")
    found = cuda_report.parse_ptxas(PTXAS)
    assert found["kernel_a"] == dict(zip(names, (31, 1, 80, 28, 1024), strict=True))
    assert found["kernel_b"] == dict(zip(names, (8, 0, 0, 0, 0), strict=True))


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void fmkernels::(anonymous namespace)::k<float, 4>(fmkernels::Params)", "k<float, 4>"),
        ("void k<(fmkernels::Isa)1, fmkernels::Half>(int, void (*)(int))", "k<(Isa)1, Half>"),
        ("scale(float*)", "scale"),
    ],
)
def test_short_name_of_a_kernel(demangled, name):
    assert device_code.short_name(demangled) == name


def test_command_of_the_build_loses_architecture_and_output():
    command = (
        "nvcc -O3 -gencode=arch=compute_80,code=sm_80 '-Xcompiler=-Wall -g' -MD -MT a.o -MF a.d -x cu -c a.cu -o a.o"
    )
    assert device_code.strip_command(command) == ["nvcc", "-O3", "-Xcompiler=-Wall -g", "-x", "cu", "a.cu"]


def test_report_without_a_cuda_build_says_how_to_get_a_compiler(tmp_path):
    assert cuda_report.Toolchain.of_build(tmp_path) is None
    assert "FMKERNELS_CUDA=pip python3 run.py setup" in cuda_report.NO_COMPILER


def toolchain():
    tools = cuda_report.Toolchain.of_build(ROOT / "build" / "cuda")
    if tools is None:
        pytest.skip("no nvcc here")
    return tools


SOURCE = """
#include "helper.h"
__device__ __noinline__ float gather(const float* table, float x) {
  float local[32];
  for (int i = 0; i < 32; ++i) local[i] = table[i] * x;
  return local[int(x) & 31];
}
template <int kStep>
__global__ void __launch_bounds__(64) spilling_kernel(float* p) { p[threadIdx.x * kStep] = gather(p, p[threadIdx.x]); }
template __global__ void spilling_kernel<3>(float*);
__global__ void copy_kernel(float4* to, const float4* from) {
  __shared__ float4 tile[64];
  tile[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = tile[threadIdx.x ^ 1];
}
"""


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A source file of its own, and the build's compiler and flags for it."""
    source = tmp_path / "csrc" / "scale" / "scale.cu"
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE)
    (source.parent / "helper.h").write_text("#pragma once\n")
    built = toolchain()
    flags = next(iter(built.commands.values()))[:-1]
    monkeypatch.setattr(cuda_report, "ROOT", tmp_path)
    return dataclasses.replace(built, commands={source: [*flags, str(source)]}), source


def test_real_compilation_is_taken_apart(room):
    tools, source = room
    result = cuda_report.compile_source(tools, source, "80")
    assert result.error == ""
    assert result.source == "csrc/scale/scale.cu"
    assert 0.1 < result.seconds < 60
    of_this_process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # with which a child's peak begins
    assert 10 << 20 < result.peak_bytes < of_this_process + (2 << 30)
    copy, spilling = result.kernels
    assert (copy.name, copy.room, copy.static_smem_bytes, copy.stack_bytes) == ("copy_kernel", "scale", 1024, 0)
    assert copy.barriers == 1
    assert (
        cuda_report.instruction_mix(copy.opcodes).items()
        >= {"LDG.128": 1, "STS.128": 1, "LDS.128": 1, "STG.128": 1}.items()
    )
    assert "NOP" not in copy.opcodes
    assert 4 < copy.registers < 64
    assert (spilling.name, spilling.num_local > 0) == ("spilling_kernel<3>", True)  # of the function that it calls


def test_compilation_is_cached_until_a_header_changes(room, tmp_path):
    tools, source = room
    cache = tmp_path / "cache"
    cache.mkdir()
    first, path = cuda_report.compile_cached(tools, source, "80", cache)
    assert path.exists()
    again, same_path = cuda_report.compile_cached(tools, source, "80", cache)
    assert (again, same_path) == (first, path)  # equal to the measured seconds: not compiled again
    (source.parent / "helper.h").write_text("#pragma once\n// changed\n")
    _, other_path = cuda_report.compile_cached(tools, source, "80", cache)
    assert other_path != path


def test_only_stale_compilations_for_the_same_architectures_leave_the_cache(room, tmp_path):
    tools, source = room
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("old-80-0.json", "old-86-0.json"):
        (cache / name).write_text("")
    compiled = cuda_report.compile_all(tools, ("80",), cache, Console(quiet=True))
    assert [c.arch for c in compiled] == ["80"]
    left = sorted(path.name.rsplit("-", 1)[0] for path in cache.iterdir())
    assert left == sorted([f"{source.stem}-80", "old-86"])


def test_loops_survive_the_cache(room, tmp_path, monkeypatch):
    result = compilation(dataclasses.replace(KERNEL, loops=[LOOP]))
    monkeypatch.setattr(cuda_report, "compile_source", lambda *_: result)
    assert [cuda_report.compile_cached(*room, "80", tmp_path)[0] for _ in range(2)] == [result, result]


def test_source_that_does_not_compile_shows_the_compiler(room, tmp_path):
    tools, source = room
    source.write_text("__global__ void broken_kernel() { undeclared(); }\n")
    result, path = cuda_report.compile_cached(tools, source, "80", tmp_path)
    assert '"undeclared" is undefined' in result.error
    assert not path.exists()
