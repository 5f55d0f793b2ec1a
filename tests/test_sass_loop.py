# SPDX-License-Identifier: Apache-2.0
"""tools/sass_loop.py: which loop is found and what a turn of it counts, on listings by hand and on a real kernel."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import sass_loop  # noqa: E402
from device_code import Instruction, Toolchain, parse_sections  # noqa: E402


def listing(*lines: str) -> str:
    """A listing as nvdisasm prints it: labels begin with a dot, the rest are instructions."""
    text = ['\t.target\tsm_80\n\t.section\t.text.loop_kernel,"ax",@progbits\n.text.loop_kernel:']
    address = 0
    for line in lines:
        if line.startswith("."):
            text.append(line)
            continue
        text.append(f"        /*{address:04x}*/{'' if line[0] == '@' else '     '}  {line} ;")
        address += 16
    return "\n".join(text)


def loops(*lines: str) -> list[sass_loop.Loop]:
    return sass_loop.mma_loops(parse_sections(listing(*lines))["loop_kernel"])


MMA = "HMMA.16816.F32.BF16 R8, R4, R6, R8"
TF32 = "HMMA.1688.F32.TF32 R8, R4, R6, R8"

NESTED = (
    "MOV R1, c[0x0][0x28]",
    ".L_x_0:",  # outer loop
    "IADD3 R2, R2, 0x1, RZ",
    ".L_x_1:",  # main loop
    "LDSM.16.M88.4 R4, [R2]",
    MMA,
    "@!UPT UIADD3 URZ, URZ, URZ, URZ",
    "@P1 BRA `(.L_x_4)",
    ".L_x_2:",
    "FADD R3, R3, R4",
    "ISETP.NE.AND P0, PT, R2, RZ, PT",
    "@P0 BRA `(.L_x_1)",
    "@P2 BRA `(.L_x_0)",
    "EXIT",
    ".L_x_4:",  # rarely taken, out of line
    "STL [R1], R3",
    "MUFU.EX2 R3, R3",
    "BRA `(.L_x_2)",
    ".L_x_5:",
    "BRA `(.L_x_5)",
    "NOP",
)


def test_innermost_loop_is_counted_without_what_it_branches_over():
    (loop,) = loops(*NESTED)
    assert (loop.address, loop.units, loop.num_instructions, loop.num_all_instructions) == (0x20, 1.0, 7, 10)
    expected = {"matrix_load": 1, "mma": 1, "filler": 1, "control": 2, "fp32": 1, "integer": 1}
    assert loop.counts == expected
    assert (loop.num_spills, loop.num_wavefronts) == (1, 4)
    assert (loop.not_mma_per_unit, loop.int_per_unit, loop.wavefronts_per_unit) == (6.0, 1.0, 4.0)


def test_turn_passes_all_mma_even_where_a_shorter_way_skips_some():
    (loop,) = loops(".L_x_0:", MMA, "@P0 BRA `(.L_x_1)", MMA, "FADD R3, R3, R3", ".L_x_1:", "@P1 BRA `(.L_x_0)", "EXIT")
    assert (loop.units, loop.num_instructions) == (2.0, 5)


def test_turn_of_the_shorter_branch_is_taken():
    """Both sides of an if: the mask of a diagonal tile against nothing."""
    masked = ["@!P0 BRA `(.L_x_1)", *["FSEL R3, R3, R4, P2"] * 6, "BRA `(.L_x_2)", ".L_x_1:", "FADD R3, R3, R3"]
    (loop,) = loops(".L_x_0:", MMA, *masked, ".L_x_2:", "@P1 BRA `(.L_x_0)", "EXIT")
    assert (loop.num_instructions, loop.num_all_instructions) == (4, 11)
    assert "move_select" not in loop.counts


def test_main_loop_is_the_one_with_most_flops_and_then_the_least_code():
    tail = [".L_x_0:", MMA, "@P0 BRA `(.L_x_0)"]
    masked = [".L_x_1:", MMA, MMA, "@P1 BRA `(.L_x_3)", "FSEL R3, R3, R4, P2", "FADD R3, R3, R4", ".L_x_3:"]
    masked += ["@P0 BRA `(.L_x_1)"]
    main = [".L_x_2:", MMA, MMA, "FADD R3, R3, R4", "FADD R3, R3, R4", "@P0 BRA `(.L_x_2)"]
    found = loops(*tail, *masked, *main, "EXIT")
    assert [(loop.units, loop.num_instructions) for loop in found] == [(2.0, 5), (2.0, 4), (1.0, 2)]


def test_inner_loop_without_mma_belongs_to_the_turn_once():
    inner = [".L_x_1:", "LDS R3, [R2]", "@P1 BRA `(.L_x_1)"]
    (loop,) = loops(".L_x_0:", MMA, *inner, "@P0 BRA `(.L_x_0)", "EXIT")
    assert (loop.num_instructions, loop.num_wavefronts) == (4, 1)


def test_branches_of_every_form_are_followed():
    body = [".L_x_0:", MMA, "BRA.U !UP0, `(.L_x_1)", "FADD R1, R1, R1", ".L_x_1:", "BRA P0, `(.L_x_0)", "EXIT"]
    (loop,) = loops(*body)
    assert (loop.num_instructions, loop.num_all_instructions) == (3, 4)
    switch = 'BRX R2 -0x20 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)'
    cases = [".L_x_1:", "FADD R1, R1, R1", "BRA `(.L_x_0)", ".L_x_2:", "@P0 BRA `(.L_x_0)", "EXIT"]
    (loop,) = loops(".L_x_0:", MMA, switch, *cases)
    assert (loop.num_instructions, loop.num_all_instructions) == (3, 5)


def test_code_without_such_a_loop_has_none():
    assert loops(MMA, "EXIT") == []
    assert loops(".L_x_0:", "FADD R1, R1, R1", "@P0 BRA `(.L_x_0)", "EXIT") == []
    assert sass_loop.mma_loops(parse_sections(listing())["loop_kernel"]) == []


@pytest.mark.parametrize(
    ("opcode", "units"),
    [
        ("HMMA.16816.F32.BF16", 1),
        ("HMMA.1688.F32.TF32", 0.5),
        ("IMMA.16832.S8.S8", 2),
        ("IMMA.8816.S8.S8", 0.5),
        ("DMMA.884", 0.125),
        ("QMMA.16832.F32.E4M3.E4M3", 2),
        ("HGMMA.64x128x16.F32.BF16", 16),
        ("HGMMA.64x192x16.F32.BF16", 24),
        ("HFMA2.MMA", 0),
        ("LDSM.16.M88.4", 0),
    ],
)
def test_flops_of_an_opcode(opcode, units):
    assert sass_loop.mma_flops(opcode) == units * 4096


@pytest.mark.parametrize(
    ("opcode", "count"),
    [
        ("LDSM.16.M88", 1),
        ("LDSM.16.MT88.2", 2),
        ("LDSM.16.M88.4", 4),
        ("STSM.16.MT88.4", 4),
        ("LDS", 1),
        ("LDS.U.128", 4),
        ("LDS.U16", 1),
        ("STS.64", 2),
        ("LDGSTS.E.BYPASS.128", 4),
        ("LDGSTS.E.LTC128B", 1),
        ("LDG.E.128", 0),
        ("MOVM.16.MT88", 0),
    ],
)
def test_wavefronts_of_an_opcode(opcode, count):
    assert sass_loop.wavefronts(Instruction(0, "", opcode, "")) == count


@pytest.mark.parametrize(
    ("guard", "opcode", "operands", "category"),
    [
        ("", "IMAD.MOV.U32", "R4, RZ, RZ, R5", "imad_move"),
        ("", "IMAD.WIDE.U32", "R4, R5, R6, R8", "imad"),
        ("", "HFMA2.MMA", "R5, -RZ, RZ, 0, 5.9604644775390625e-08", "move_select"),
        ("", "HFMA2.BF16_V2", "R5, R6, R7, R8", "half"),
        ("!UPT", "UIADD3", "URZ, URZ, URZ, URZ", "filler"),
        ("UP0", "UIADD3", "UR4, UR4, 0x1, URZ", "uniform"),
        ("", "R2UR", "UR4, R2", "uniform"),
        ("", "FMNMX", "R4, R5, R6, !PT", "fp_max_compare"),
        ("", "F2FP.BF16.F32.PACK_AB", "R4, R5, R6", "convert"),
        ("", "UTMALDG.2D", "[UR4], [UR6]", "async_copy"),
        ("", "WONDER", "", "other"),
    ],
)
def test_category_of_an_instruction(guard, opcode, operands, category):
    assert sass_loop.category(Instruction(0, guard, opcode, operands)) == category


def test_shares_are_those_of_the_notes_formula():
    """FlashAttention-2, forward, head_dim 64 on A100, as it was counted once: 56, 52 and 63 percent of tensor time."""
    counts = {"mma": 256, "mufu": 132, "fp32": 332, "integer": 26, "imad": 6, "fp_max_compare": 144, "convert": 64}
    loop = sass_loop.Loop(0, 256.0, False, 1146, 1146, 78, 72 * 4 + 3 + 8 * 4, counts)
    shares = {pipe: round(share, 2) for pipe, share in sass_loop.pipe_shares(loop, "80").items()}
    assert shares == {"issue": 0.56, "mufu": 0.52, "fp32": 0.33, "int/max/cvt": 0.23, "shared": 0.63}
    assert sass_loop.pipe_shares(loop, "120a") == {}


def test_tf32_takes_a_tensor_core_twice_as_long():
    turns = [loops(".L_x_0:", mma, "FADD R1, R1, R1", "@P0 BRA `(.L_x_0)", "EXIT")[0] for mma in (MMA, TF32)]
    assert [turn.tf32_units for turn in turns] == [0, 0.5]
    issue = [sass_loop.pipe_shares(turn, "80")["issue"] for turn in turns]
    assert issue == [3 / 8, 3 / 8]  # half as many FLOPs at half the rate


# ---- A real kernel ---------------------------------------------------------------------------------------------------

SOURCE = """
#include <cstdint>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <int kTiles>
__global__ void product_kernel(const uint4* a, const uint2* b, float* out, int turns) {
  __shared__ uint4 sA[32];
  __shared__ uint2 sB[kTiles][32];
  float d[kTiles][4] = {};
#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    sA[threadIdx.x] = a[turn * 32 + threadIdx.x];
    for (int tile = 0; tile < kTiles; ++tile) sB[tile][threadIdx.x] = b[(turn * kTiles + tile) * 32 + threadIdx.x];
    __syncthreads();
    const uint4 x = sA[threadIdx.x ^ 1];
    const uint32_t row[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint2 y = sB[tile][threadIdx.x ^ 2];
      const uint32_t column[2] = {y.x, y.y};
      mma(d[tile], row, column);
    }
    if (__any_sync(~0u, d[0][0] > 1e30f)) {  // rare
      for (int tile = 0; tile < kTiles; ++tile) d[tile][0] = exp2f(d[tile][0]);
    }
    __syncthreads();
  }
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int i = 0; i < 4; ++i) out[(tile * 4 + i) * 32 + threadIdx.x] = d[tile][i];
  }
}
template __global__ void product_kernel<4>(const uint4*, const uint2*, float*, int);
template __global__ void product_kernel<8>(const uint4*, const uint2*, float*, int);
__global__ void other_kernel(float* p) { p[threadIdx.x] *= 2; }
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """compiled(*flags, suffix): the kernels above, as a cubin or an object."""
    folder = tmp_path_factory.mktemp("sass")
    tools = Toolchain.of_build(ROOT / "build" / "cuda")
    nvcc = tools.nvcc if tools else shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    (folder / "product.cu").write_text(SOURCE)

    def build(*flags: str, suffix: str) -> Path:
        output = folder / f"product{len(list(folder.iterdir()))}{suffix}"
        command = [nvcc, "-O3", "-std=c++20", *flags, folder / "product.cu", "-o", output]
        subprocess.run(command, check=True, capture_output=True)
        return output

    return build


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_loop_of_a_compiled_kernel(compiled, arch):
    found = sass_loop.loops_of_file(compiled(f"-arch=sm_{arch}", "-cubin", suffix=".cubin"))
    assert [(entry.kernel, entry.arch) for entry in found] == [(f"product_kernel<{n}>", arch) for n in (4, 8)]
    for tiles, entry in zip((4, 8), found, strict=True):
        (loop,) = entry.loops
        assert loop.units == loop.of("mma") == tiles
        assert loop.num_wavefronts == (4 + 2 * tiles) * 2  # stored and loaded
        assert loop.of("global") == 1 + tiles
        assert loop.of("mufu") == 0, "the rare branch is left out"
        assert loop.num_all_instructions > loop.num_instructions + tiles
        assert loop.num_spills == 0
        assert sum(loop.counts.values()) == loop.num_instructions


def test_object_with_two_architectures_and_the_command_line(compiled):
    flags = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a", "-c"]
    command = [sys.executable, ROOT / "tools" / "sass_loop.py", compiled(*flags, suffix=".o")]

    def run(*more: str) -> str:
        return subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout

    entries = json.loads(run("--kernel", "product_kernel<4>", "--json"))
    assert [(entry["kernel"], entry["arch"]) for entry in entries] == [("product_kernel<4>", a) for a in ("80", "90a")]
    loop = entries[0]["loops"][0]
    assert loop["units"] == 4
    assert loop["not_mma_per_unit"] == (loop["num_instructions"] - 4) / 4
    assert set(loop["shares"]) == {"issue", "mufu", "fp32", "int/max/cvt", "shared"}
    assert run().count("product_kernel<8>") == 4  # two tables
    assert "no kernel other_kernel has a loop" in run("--kernel", "other_kernel")
