# SPDX-License-Identifier: Apache-2.0
"""tools/occupancy.py: blocks on a multiprocessor, against a measured kernel and the header of the toolkit."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from device_code import Toolchain  # noqa: E402
from occupancy import LIMITS, occupancy  # noqa: E402


@pytest.mark.parametrize(("arch", "blocks"), [("80", 2), ("90a", 2), ("100a", 2), ("89", 1), ("120a", 1)])
def test_occupancy_of_a_measured_kernel(arch, blocks):
    assert occupancy(arch, threads=256, registers=122, smem_bytes=60 << 10).blocks_per_sm == blocks


def test_occupancy_names_what_runs_out():
    assert occupancy("80", threads=256, registers=122, smem_bytes=0).limit == "registers"
    assert occupancy("89", threads=256, registers=122, smem_bytes=60 << 10).limit == "smem"
    assert occupancy("80", threads=1024, registers=16, smem_bytes=0).limit == "warps"
    assert occupancy("80", threads=32, registers=16, smem_bytes=0).limit == "blocks"
    assert occupancy("89", threads=128, registers=16, smem_bytes=0, barriers=8).limit == "barriers"
    full = occupancy("80", threads=256, registers=32, smem_bytes=0)
    assert (full.blocks_per_sm, full.warps) == (8, 1.0)


def test_block_that_cannot_run_has_occupancy_zero():
    assert occupancy("80", threads=1024, registers=128, smem_bytes=0).blocks_per_sm == 0
    assert occupancy("80", threads=128, registers=64, smem_bytes=164 << 10).blocks_per_sm == 0


ASK_HEADER = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int major, minor, max_threads, threads, registers;
  size_t sm_smem, smem;
  while (scanf("%d %d %d %zu", &major, &minor, &max_threads, &sm_smem) == 4 &&
         scanf("%d %d %zu", &threads, &registers, &smem) == 3) {
    cudaOccDeviceProp device{};
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = max_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    device.sharedMemPerMultiprocessor = sm_smem;
    device.sharedMemPerBlockOptin = sm_smem - 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 1;
    cudaOccFuncAttributes kernel{};
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = sm_smem - 1024;
    cudaOccDeviceState state{};
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result{};
    int status = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, smem);
    printf("%d\\n", status == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
"""


def test_occupancy_agrees_with_the_header_of_the_toolkit(tmp_path):
    """Every combination below, for every architecture, against cuda_occupancy.h, which is plain host code."""
    tools = Toolchain.of_build(ROOT / "build" / "cuda")
    if tools is None:
        pytest.skip("no nvcc here")
    places = [tools.nvcc.resolve().parent.parent / "include", Path("/usr/local/cuda/include")]
    places += sorted(Path("/usr/local").glob("cuda-*/include"))
    include = next((place for place in places if (place / "cuda_occupancy.h").exists()), None)
    if include is None:
        pytest.skip("this toolkit carries no cuda_occupancy.h")
    grid = list(
        itertools.product(LIMITS, (32, 96, 128, 256, 640, 1024), (16, 40, 65, 122, 255), (0, 5000, 60 << 10, 99 << 10))
    )
    lines = []
    for arch, threads, registers, smem_bytes in grid:
        limits, number = LIMITS[arch], int(arch)
        device = [number // 10, number % 10, limits.max_warps * 32, limits.smem_kib << 10]
        lines.append(" ".join(map(str, [*device, threads, registers, smem_bytes])))
    (tmp_path / "ask.cpp").write_text(ASK_HEADER)
    subprocess.run(["g++", f"-I{include}", "ask.cpp", "-o", "ask"], cwd=tmp_path, check=True)
    answer = subprocess.run([tmp_path / "ask"], input="\n".join(lines), capture_output=True, text=True, check=True)
    expected = [int(line) for line in answer.stdout.split()]
    assert [occupancy(*case).blocks_per_sm for case in grid] == expected
