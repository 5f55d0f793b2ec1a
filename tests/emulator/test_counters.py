# SPDX-License-Identifier: Apache-2.0
"""Counters: sectors, bank conflicts and distinct bytes of patterns worked out by hand, estimates, and the tables."""

from __future__ import annotations

import io
import json
import subprocess

import numpy as np
import pytest
from rich.console import Console

import emulator
from emulator import Counters
from emulator import counters as report

LANES = np.arange(32)
ALL = 0xFFFFFFFF
BASE = 1 << 32  # of global addresses: on a boundary of everything


def shared(addresses, num_bytes: int, lanes: int = ALL) -> tuple[int, int]:
    """(wavefronts, ideal wavefronts) of one access."""
    counters = Counters()
    counters.shared_access(0, lanes, np.asarray(addresses, np.uint32), num_bytes, False)
    totals = counters.totals()
    return totals["wavefronts"], totals["ideal_wavefronts"]


def matrices(rows) -> tuple[int, int]:
    """The same of an ldmatrix with these row addresses."""
    counters = Counters()
    counters.matrix_access(0, len(rows) // 8, np.asarray(rows, np.uint32), False)
    totals = counters.totals()
    return totals["wavefronts"], totals["ideal_wavefronts"]


def loaded(addresses, num_bytes: int, lanes: int = ALL) -> tuple[int, int]:
    """(sectors, ideal sectors) of one load from global memory."""
    counters = Counters()
    counters.global_access(0, lanes, np.asarray(addresses, np.uint64), num_bytes, False)
    totals = counters.totals()
    assert totals["sectors_written"] == totals["ideal_sectors_written"] == 0
    return totals["sectors_read"], totals["ideal_sectors_read"]


# ---- Shared memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "wavefronts"), [(1, 1), (2, 2), (3, 1), (4, 4), (8, 8), (16, 16), (31, 1), (32, 32), (33, 1), (64, 32)]
)
def test_words_at_a_stride(stride, wavefronts):
    assert shared(4 * stride * LANES, 4) == (wavefronts, 1)


@pytest.mark.parametrize(
    ("addresses", "num_bytes", "expected"),
    [
        (0 * LANES, 4, (1, 1)),  # broadcast
        (128 * (LANES % 2), 4, (2, 1)),  # two words of one bank
        (4 * (LANES // 2), 4, (1, 1)),  # pairs share a word
        (124 - 4 * LANES, 4, (1, 1)),  # backwards
        (4 * (LANES ^ 5), 4, (1, 1)),
        (4 * LANES + 20, 4, (1, 1)),  # over the end of the banks
        (LANES, 1, (1, 1)),
        (2 * LANES, 2, (1, 1)),
        (64 * LANES, 2, (16, 1)),
        (8 * LANES, 8, (2, 2)),
        (16 * LANES, 8, (4, 2)),
        (128 * LANES, 8, (32, 2)),
        (0 * LANES, 8, (2, 2)),  # a broadcast in each half warp
        (16 * LANES, 16, (4, 4)),
        (32 * LANES, 16, (8, 4)),
        (144 * LANES, 16, (4, 4)),  # a column of padded rows
        (128 * LANES, 16, (32, 4)),  # and of rows that are not
        (128 * LANES + 16 * (LANES % 8), 16, (4, 4)),  # swizzled
        (128 * (LANES // 8) + 16 * (LANES % 8 ^ LANES // 8), 16, (4, 4)),
    ],
)
def test_patterns_of_shared_memory(addresses, num_bytes, expected):
    assert shared(addresses, num_bytes) == expected


def test_lanes_that_do_not_take_part_cost_nothing():
    assert shared(128 * LANES, 4, lanes=0b1011) == (3, 1)
    assert shared(16 * LANES, 16, lanes=0xFFFF) == (2, 2)
    assert shared(16 * LANES, 16, lanes=1 << 31) == (1, 1)
    assert shared(16 * LANES, 16, lanes=0) == (0, 0)


@pytest.mark.parametrize("num_bytes", [1, 2, 4, 8, 16])
def test_random_accesses_against_the_banks_one_by_one(num_bytes):
    rng = np.random.default_rng(num_bytes)
    for span in (64, 256, 1024, 4096):
        for _ in range(50):
            addresses = rng.integers(0, span // num_bytes, 32) * num_bytes
            lanes = int(rng.integers(0, 1 << 32)) if rng.random() < 0.5 else ALL
            group = 32 if num_bytes <= 4 else 128 // num_bytes
            expected = 0
            for first in range(0, 32, group):
                active = [int(addresses[i]) for i in range(first, first + group) if lanes >> i & 1]
                words = {a // 4 + i for a in active for i in range(max(1, num_bytes // 4))}
                expected += max((sum(word % 32 == bank for word in words) for bank in range(32)), default=0)
            assert shared(addresses, num_bytes, lanes)[0] == expected


@pytest.mark.parametrize(
    ("pitch", "wavefronts"),
    [(16, 1), (32, 2), (64, 4), (80, 1), (128, 8), (144, 1), (256, 8), (272, 1), (136, 2)],
    ids=lambda value: str(value),
)
def test_rows_of_a_matrix_at_a_pitch(pitch, wavefronts):
    # Rows 136 bytes apart begin off a 16-byte boundary; the count stands for the 16 bytes below.
    assert matrices(pitch * np.arange(8)) == (wavefronts, 1)


def test_four_swizzled_matrices():
    rows = np.arange(32)
    column = 3
    assert matrices(128 * rows + 16 * (column ^ rows % 8)) == (4, 4)
    assert matrices(128 * rows + 16 * column) == (32, 4)
    assert matrices(64 * rows + 16 * ((column ^ rows // 2) % 4)) == (4, 4)  # 64-byte rows: two in a line


# ---- Global memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offsets", "num_bytes", "expected"),
    [
        (4 * LANES, 4, (4, 4)),
        (4 * LANES + 4, 4, (5, 4)),  # misaligned
        (8 * LANES, 4, (8, 4)),
        (128 * LANES, 4, (32, 4)),
        (124 - 4 * LANES, 4, (4, 4)),  # backwards
        (4 * (LANES ^ 9), 4, (4, 4)),
        (0 * LANES, 4, (1, 1)),  # broadcast
        (32 * (LANES % 2), 4, (2, 1)),  # two words, 8 bytes
        (1000 * (LANES // 16), 16, (2, 1)),  # two broadcasts
        (LANES, 1, (1, 1)),
        (2 * LANES + 30, 2, (3, 2)),
        (8 * LANES, 8, (8, 8)),
        (16 * LANES, 16, (16, 16)),
        (32 * LANES, 16, (32, 16)),
        (16 * LANES + 16, 16, (17, 16)),
        (256 * (LANES // 8) + 16 * (LANES % 8), 16, (16, 16)),  # four rows of 128 bytes
        (-256 * (LANES // 8) + 16 * (LANES % 8), 16, (16, 16)),
        (200 * (LANES // 8) + 16 * (LANES % 8), 16, (19, 16)),  # rows that begin inside a sector
        (32 * LANES, 32, (32, 32)),
        (8 * (LANES // 2), 16, (5, 5)),  # overlapping
    ],
)
def test_patterns_of_global_memory(offsets, num_bytes, expected):
    assert loaded(BASE + offsets, num_bytes) == expected


def test_only_the_lanes_of_the_mask_are_loaded():
    assert loaded(BASE + 4 * LANES, 4, lanes=0xFF) == (1, 1)
    assert loaded(BASE + 4 * LANES, 4, lanes=0x101) == (2, 1)
    assert loaded(BASE + 4 * LANES, 4, lanes=0) == (0, 0)
    assert loaded(BASE + 0 * LANES, 4096, lanes=1) == (128, 128)  # a bulk copy


@pytest.mark.parametrize("num_bytes", [1, 2, 4, 8, 16, 32])
def test_random_accesses_against_sets_of_bytes(num_bytes):
    rng = np.random.default_rng(num_bytes)
    for span in (64, 512, 4096, 1 << 20):
        for turn in range(50):
            offsets = rng.integers(0, max(2, span // num_bytes), 32) * num_bytes
            if turn % 2:
                offsets = np.sort(offsets)
            lanes = int(rng.integers(1, 1 << 32)) if turn % 3 else ALL
            touched = {int(offsets[i]) + b for i in LANES if lanes >> int(i) & 1 for b in range(num_bytes)}
            sectors = len({byte // 32 for byte in touched})
            assert loaded(BASE + offsets, num_bytes, lanes) == (sectors, -(-len(touched) // 32))


def test_distinct_bytes_are_counted_once_and_by_direction():
    counters = Counters()
    for _ in range(3):
        counters.global_access(0, ALL, (BASE + 16 * LANES).astype(np.uint64), 16, False)
        counters.global_access(1, ALL, (BASE + 4 * LANES).astype(np.uint64), 4, True)
    totals = counters.totals()
    assert (totals["sectors_read"], totals["distinct_bytes_read"]) == (48, 512)
    assert (totals["sectors_written"], totals["distinct_bytes_written"]) == (12, 128)


def test_distinct_bytes_are_whole_sectors_over_all_of_memory():
    rng = np.random.default_rng(1)
    counters, sectors = Counters(), set()
    for _ in range(200):
        begin = int(rng.integers(0, 1 << 40)) if rng.random() < 0.5 else (1 << 16) * int(rng.integers(1, 9)) - 200
        addresses = (begin + 32 * rng.integers(0, 100, 32)) // 4 * 4
        counters.global_access(0, ALL, addresses.astype(np.uint64), 4, False)
        sectors |= set((addresses // 32).tolist())
    assert counters.totals()["distinct_bytes_read"] == 32 * len(sectors)
    counters = Counters()
    counters.global_access(0, 1, np.full(32, 12345 * 32, np.uint64), 1 << 20, False)  # over many pages at once
    assert counters.totals()["distinct_bytes_read"] == 1 << 20


# ---- The whole launch ------------------------------------------------------------------------------------------------


def work_on(counters: Counters, turns) -> None:
    for turn in turns:
        counters.instruction("global_load", 1, ALL)
        counters.global_access(1, ALL, (BASE + 8 * turn * LANES).astype(np.uint64), 4, False)
        counters.instruction("shared_store", 2, 0xFFFF)
        counters.shared_access(2, 0xFFFF, (8 * LANES).astype(np.uint32), 4, True)
        counters.instruction("mma", 70 + turn, ALL)
        counters.mma(70 + turn, 4096)
        counters.instruction("move", 4, 1)
        counters.instruction("local", 5, 0x7)
        counters.local_access(5, 0x7, 8, turn % 2 == 0)


def test_totals_of_a_launch():
    counters = Counters()
    work_on(counters, range(1, 3))
    totals = counters.totals()
    classes = {name: count for name, count in totals.pop("classes").items() if count}
    assert classes == {"global_load": 2, "shared_store": 2, "mma": 2, "move": 2, "local": 2}
    assert totals == {
        "warp_instructions": 10,
        "issue_slots": 8,  # without moves
        "lane_instructions": 2 * (32 + 16 + 32 + 1 + 3),
        "mma_flops": 8192,
        "sectors_read": 8 + 16,
        "ideal_sectors_read": 8,
        "sectors_written": 0,
        "ideal_sectors_written": 0,
        "wavefronts": 2,
        "ideal_wavefronts": 2,
        "distinct_bytes_read": 32 * (8 + 8),  # the first lies within the second
        "distinct_bytes_written": 0,
        "local_bytes_read": 24,
        "local_bytes_written": 24,
    }


def test_merged_counters_are_those_of_one_thread():
    whole, parts = Counters(), [Counters() for _ in range(3)]
    work_on(whole, range(30))
    for index, part in enumerate(parts):
        work_on(part, range(index, 30, 3))
    merged = Counters()
    for part in parts:
        merged.merge(part)
    assert merged.totals() == whole.totals()
    assert merged.json() == whole.json()


def test_json_has_stable_keys_and_the_lines():
    counters = Counters()
    work_on(counters, range(1, 3))
    launch = json.loads(counters.json("_ZN2ns12_GLOBAL__N_15scaleIfLi4EEEvPfNS_6ParamsE"))
    keys = ["kernel", "name", "grid", "block", "static_smem", "dynamic_smem", "registers"]
    assert list(launch) == [*keys, "totals", "classes", "lines", "estimates"]
    assert launch["name"] == "ns::scale<float, 4>"
    names = ["a", "void (anonymous namespace)::scale<ns::Traits<4> >(float*, int)"]  # "a" is no mangled signed char
    assert [json.loads(counters.json(name))["name"] for name in names] == ["a", "scale<ns::Traits<4> >"]
    assert [line["line"] for line in launch["lines"]] == [1, 2, 4, 5, 71, 72]
    assert launch["lines"][0] == {
        "file": "test.cu",
        "line": 1,
        "warp_instructions": 2,
        "lanes": 64,
        "mma_flops": 0,
        "sectors": 24,
        "ideal_sectors": 8,
        "wavefronts": 0,
        "ideal_wavefronts": 0,
    }
    assert list(launch["estimates"]) == ["A100", "RTX 4090", "H100"]


def test_estimate_by_hand():
    """Attention forward of FlashAttention-2, head_dim 64, whose A100 figures are known: 2427 cycles of tensor time."""
    counters = Counters()
    counters.mma(0, 4 * 64 * 1024 * 1024 * 2)
    for _ in range(108 * 8):
        counters.instruction("fma", 1, ALL)
        counters.instruction("mufu", 2, 1)
        counters.instruction("convert", 3, 1)
        counters.instruction("int_alu", 4, 1)
        counters.instruction("shuffle", 5, ALL)
        counters.instruction("move", 6, ALL)
        counters.shared_access(7, ALL, (8 * LANES).astype(np.uint32), 4, False)
    counters.global_access(8, 1, np.full(32, BASE, np.uint64), 108 << 10, False)
    estimate = json.loads(counters.json())["estimates"]["A100"]
    assert estimate["cycles"] == {
        "issue": 5 * 8 / 4,
        "tensor": pytest.approx(2427.26, abs=0.01),
        "fp32": 8 / 2,
        "int": 8 / 2,
        "mufu": 8 * 2.0,
        "convert": 8 * 2.0,
        "fp64": 0.0,
        "shared": 8 * 2 + 8.0,
        "l1": 1024 / 64,
        "l2": pytest.approx((108 << 10) / 5120, abs=0.01),
        "dram": pytest.approx((108 << 10) / 2039 * 1.41, abs=0.01),
    }
    assert estimate["binds"] == "tensor"


# ---- Tables ----------------------------------------------------------------------------------------------------------


def launch_of(name: str, turns: int) -> dict:
    counters = Counters()
    work_on(counters, range(turns))
    return json.loads(counters.json(name))


def test_equal_launches_are_summed_and_others_are_not():
    records = report.summarize([launch_of("a", 4), launch_of("b", 4), launch_of("a", 6)])
    assert [(record["name"], record["launches"]) for record in records] == [("a", 2), ("b", 1)]
    assert records[0]["totals"]["mma_flops"] == 10 * 4096
    assert records[0]["lines"][0]["warp_instructions"] == 10
    assert records[0]["per_unit"]["not_mma"] == 3.0
    assert records[0]["per_unit"]["mov"] == 1.0
    whole = report.total(records)
    assert (whole["launches"], whole["totals"]["mma_flops"]) == (3, 14 * 4096)


def test_ratios_leave_out_what_has_no_ideal():
    (record,) = report.summarize([launch_of("a", 4)])
    sectors = (1 + 8 + 16 + 24) / (1 + 4 + 4 + 4)
    assert report.ratios(record, report.Work()) == {"sectors_read": pytest.approx(sectors, abs=1e-4), "wavefronts": 1.0}
    work = report.Work(useful_flops=4 * 2048, input_bytes=256)
    assert report.ratios(record, work)["mma_over_useful"] == 2.0


def printed(entries, **options) -> str:
    console = Console(file=io.StringIO(), width=220)
    report.print_entries(console, entries, **options)
    return console.file.getvalue()


def test_tables_show_the_difference_to_the_baseline():
    before, now = (report.summarize([launch_of("scale_kernel", turns)]) for turns in (4, 5))
    text = printed([report.Entry("large", now, before=before)])
    for expected in ("per unit of 4096 mma FLOPs", "A100 (108 SMs)", "not a time", "test.cu:1", "+25.0%", "large"):
        assert expected in text
    same = printed([report.Entry("large", now, before=now)])
    assert "%" not in same.split("busy cycles")[0]


def test_kernels_of_a_call_get_a_row_for_their_sum():
    records = report.summarize([launch_of("first_kernel", 4), launch_of("second_kernel", 2)])
    work = report.Work(useful_flops=6 * 4096)
    text = printed([report.Entry("case", records, work)], num_lines=0)
    row = next(line for line in text.split("over the ideal")[1].splitlines() if "all 2 kernels" in line)
    assert "1.000" in row
    assert "hottest" not in text


def test_nothing_launched_is_said():
    assert "no kernel was launched" in printed([report.Entry("case", [])])


# ---- A compiled kernel -----------------------------------------------------------------------------------------------

PROBE = """
#include <cstdint>
extern "C" __global__ void probe(const uint4* a, const float* columns, float* out) {
  __shared__ float tile[32][32];
  __shared__ alignas(128) uint4 rows[32];
  rows[threadIdx.x] = a[threadIdx.x];
  for (int i = 0; i < 32; ++i) tile[i][threadIdx.x] = columns[i * 32 + threadIdx.x];
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += tile[threadIdx.x][i];
  uint32_t r[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((uint32_t)__cvta_generic_to_shared(&rows[threadIdx.x])));
  float d[4] = {sum, 0, 0, 0};
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(r[0]), "r"(r[1]));
  if (threadIdx.x < 8) out[threadIdx.x * 4] = d[0];
}
"""


def on_a_sector(count: int, dtype) -> np.ndarray:
    """Zeros that begin on a 64-byte boundary."""
    array = np.zeros(count + 64 // np.dtype(dtype).itemsize, dtype)
    skipped = -array.ctypes.data % 64 // array.itemsize
    return array[skipped : skipped + count]


def test_events_of_a_compiled_kernel(nvcc, tmp_path):
    (tmp_path / "probe.cu").write_text(PROBE)
    command = [nvcc, "-O3", "-arch=sm_80", "-lineinfo", "-ptx", "probe.cu"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    module = emulator.Module((tmp_path / "probe.ptx").read_text())
    arrays = [on_a_sector(128, np.uint32), on_a_sector(1024, np.float32), on_a_sector(32, np.float32)]
    with emulator.watch(counters=True) as watched:
        module.launch("probe", grid=1, block=32, args=arrays)
    (launch,) = watched.launches
    totals, classes = launch["totals"], launch["classes"]
    assert (launch["name"], launch["grid"], launch["block"]) == ("probe", [1, 1, 1], [32, 1, 1])
    assert totals["mma_flops"] == 4096
    assert (totals["sectors_read"], totals["ideal_sectors_read"]) == (16 + 128, 16 + 128)
    assert (totals["sectors_written"], totals["ideal_sectors_written"]) == (4, 1)
    assert (totals["distinct_bytes_read"], totals["distinct_bytes_written"]) == (512 + 4096, 128)
    assert (totals["wavefronts"], totals["ideal_wavefronts"]) == (4 + 32 + 1024 + 4, 4 + 32 + 32 + 4)
    expected = {"mma": 1, "matrix_load": 1, "shared_store": 33, "shared_load": 32, "global_load": 33, "barrier": 1}
    assert classes.items() >= expected.items()
    assert sum(classes.values()) == totals["warp_instructions"] > totals["issue_slots"]
    lines = {line["line"]: line for line in launch["lines"] if line["file"].endswith("probe.cu")}
    assert (lines[10]["wavefronts"], lines[10]["ideal_wavefronts"]) == (1024, 32), "a column of the tile, unpadded"
    stored = PROBE.splitlines().index("  if (threadIdx.x < 8) out[threadIdx.x * 4] = d[0];") + 1
    assert (lines[stored]["sectors"], lines[stored]["ideal_sectors"]) == (4, 1)
