# SPDX-License-Identifier: Apache-2.0
"""What orders the accesses of two blocks, where it is another GPU's memory too; and what a report of a race says."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest
from conftest import run_quietly

import emulator

SOURCE = """
#define REACHES(name, fence, store, load)                                                              \\
  extern "C" __global__ void name(int* out, int* flag) {                                               \\
    if (blockIdx.x == 0) {                                                                             \\
      out[threadIdx.x] = threadIdx.x;                                                                  \\
      __syncwarp();                                                                                    \\
      if (threadIdx.x == 0) {                                                                          \\
        asm volatile(fence ::: "memory");                                                              \\
        asm volatile(store " [%0], 1;" ::"l"(flag) : "memory");                                        \\
      }                                                                                                \\
    } else {                                                                                           \\
      for (int value = 0; threadIdx.x == 0 && value == 0;)                                             \\
        asm volatile(load " %0, [%1];" : "=r"(value) : "l"(flag) : "memory");                          \\
      asm volatile(fence ::: "memory");                                                                \\
      __syncwarp();                                                                                    \\
      out[64 + threadIdx.x] = out[threadIdx.x];                                                        \\
    }                                                                                                  \\
  }
REACHES(system_release, "", "st.release.sys.global.u32", "ld.acquire.sys.global.u32")
REACHES(gpu_release, "", "st.release.gpu.global.u32", "ld.acquire.gpu.global.u32")
REACHES(gpu_acquire, "", "st.release.sys.global.u32", "ld.acquire.gpu.global.u32")
REACHES(system_fence, "fence.acq_rel.sys;", "st.volatile.global.u32", "ld.volatile.global.u32")
REACHES(gpu_fence, "fence.acq_rel.gpu;", "st.volatile.global.u32", "ld.volatile.global.u32")
REACHES(gpu_flag, "fence.acq_rel.sys;", "st.relaxed.gpu.global.u32", "ld.relaxed.gpu.global.u32")
"""
KERNELS = re.findall(r"^REACHES\((\w+)", SOURCE, re.M)


@pytest.fixture(scope="module")
def module(nvcc, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "reaches.cu").write_text(SOURCE)
    run_quietly(nvcc, "-ptx", "-arch=compute_80", "-lineinfo", folder / "reaches.cu", "-o", folder / "reaches.ptx")
    return emulator.Module((folder / "reaches.ptx").read_text(), "reaches.ptx")


@pytest.fixture
def peers():
    """peers(array): it is memory that another GPU touches too, until the test ends."""
    library = ctypes.CDLL(str(emulator.library_dir / "libemulator.so"))
    ranges = []

    def register(array):
        ranges.append((ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(array.nbytes)))
        library.emulator_register_peer_memory(*ranges[-1])

    yield register
    for begin, num_bytes in ranges:
        library.emulator_unregister_peer_memory(begin, num_bytes)


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_of_one_gpu_is_ordered_by_every_reach(kernel, module):
    out, flag = np.zeros(128, np.int32), np.zeros(4, np.int32)
    module.launch(kernel, 2, 32, [out, flag])
    assert emulator.take_reports() == []
    assert (out[64:96] == np.arange(32)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_of_peers_is_ordered_by_the_system_alone(kernel, module, peers):
    out, flag = np.zeros(128, np.int32), np.zeros(4, np.int32)
    peers(out)
    peers(flag)
    module.launch(kernel, 2, 32, [out, flag])
    assert (emulator.take_reports() == []) == kernel.startswith("system")


def test_a_race_of_blocks_names_both_sides(module, peers):
    out, flag = np.zeros(128, np.int32), np.zeros(4, np.int32)
    peers(out)
    module.launch("gpu_fence", 2, 32, [out, flag])
    (report,) = emulator.take_reports()
    assert report.fault == "race of blocks"
    assert re.fullmatch(
        r"reads 4 bytes at 0x\w+, at byte 0 of '.*' \(.*\), which thread \(0, 0, 0\) of block 0 wrote by "
        r"st\.global\.u32 at reaches\.cu:\d+ in this launch, and nothing orders the two",
        report.text,
    ), report.text


def test_values_that_several_blocks_read_are_named_so(nvcc, tmp_path):
    source = 'extern "C" __global__ void f(int* x, int* y) { y[blockIdx.x] = x[0]; if (blockIdx.x == 2) x[0] = 7; }'
    (tmp_path / "several.cu").write_text(source)
    run_quietly(nvcc, "-ptx", "-arch=compute_80", tmp_path / "several.cu", "-o", tmp_path / "several.ptx")
    x, y = np.zeros(4, np.int32), np.zeros(4, np.int32)
    emulator.Module((tmp_path / "several.ptx").read_text()).launch("f", 3, 1, [x, y])
    (report,) = emulator.take_reports()
    assert "writes 4 bytes" in report.text
    assert "which other blocks read in this launch" in report.text


# Block 0 writes some lanes' elements, block 1 those of its whole warp.
ELEMENTS = """
extern "C" __global__ void elements(TYPE* out, const TYPE* values, int shared) {
  if (blockIdx.x == 1 || (shared >> threadIdx.x & 1)) out[threadIdx.x] = values[32 * blockIdx.x + threadIdx.x];
}
"""


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_elements_below_a_word_are_told_apart(dtype, nvcc, tmp_path):
    (tmp_path / "elements.cu").write_text(ELEMENTS)
    c_type = {1: "unsigned char", 2: "unsigned short", 4: "unsigned"}[np.dtype(dtype).itemsize]
    flags = ["-ptx", "-arch=compute_80", f"-DTYPE={c_type}"]
    run_quietly(nvcc, *flags, tmp_path / "elements.cu", "-o", tmp_path / "elements.ptx")
    module = emulator.Module((tmp_path / "elements.ptx").read_text())
    for lane in (1, 6, 31):
        for same in (False, True):
            values = np.zeros((2, 32), dtype)  # what memory holds; and it does not matter who writes that last
            values[0, lane] = 7
            values[1] = 5 if same else 0
            values[1, lane] = 7 if same else 9
            module.launch("elements", 2, 32, [np.zeros(32, dtype), values, 1 << lane if lane < 31 else -(1 << 31)])
            reports = emulator.take_reports()
            where = [] if same else [((1, 0, 0), (lane, 0, 0))]
            assert [(report.block, report.thread) for report in reports] == where, (lane, same, reports)


WIDE = """
.version 8.4
.target sm_90
.address_size 64
.visible .entry wide(.param .u64 flag) {
  .reg .b128 %q<4>;
  .reg .b64 %rd<6>;
  .reg .b32 %r<2>;
  .reg .pred %p<2>;
  ld.param.u64 %rd0, [flag];
  mov.u64 %rd1, 0;
  mov.u64 %rd2, 1;
  mov.u64 %rd3, 2;
  mov.b128 %q0, {%rd2, %rd1};
  mov.b128 %q1, {%rd3, %rd1};
  mov.u32 %r0, %ctaid.x;
  setp.ne.u32 %p0, %r0, 0;
  @%p0 bra TELL;
POLL:
  atom.relaxed.gpu.global.cas.b128 %q2, [%rd0], %q0, %q1;
  mov.b128 {%rd4, %rd5}, %q2;
  setp.ne.u64 %p1, %rd4, 1;
  @%p1 bra POLL;
  ret;
TELL:
  atom.relaxed.gpu.global.exch.b128 %q3, [%rd0], %q0;
  ret;
}
"""


def test_a_block_that_polls_by_a_wide_compare_and_swap_hands_its_turn_on():
    emulator.configure(architecture=90, max_instructions=20_000)
    flag = np.zeros(8, np.uint64)
    flag = flag[flag.ctypes.data % 16 // 8 :]
    emulator.Module(WIDE).launch("wide", 2, 1, [flag])
    assert emulator.take_reports() == []
    assert flag.tolist()[:2] == [2, 0]
