# SPDX-License-Identifier: Apache-2.0
"""ldmatrix, stmatrix and movmatrix, executed as PTX by one warp; and their checks, each on a kernel that is wrong."""

import numpy as np
import pytest

import emulator

HEAD = """.version 9.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 rows, .param .u64 source, .param .u64 result) {
  .shared .align 16 .b8 tile[4096];
  .reg .b64 %at, %base, %lane, %s; .reg .b32 %tid, %row, %r<4>, %v, %i; .reg .pred %p;
  mov.u32 %tid, %tid.x; cvt.u64.u32 %lane, %tid;
  ld.param.u64 %base, [rows]; mad.lo.u64 %at, %lane, 4, %base; ld.global.u32 %row, [%at];
"""
# Where a thread's 64 bytes of the tile stand; copying them from `source`, and to `result`.
PLACE = "; mad.lo.u64 %at, %lane, 64, %base; mov.u32 %v, tile; mad.lo.u32 %v, %tid, 64, %v;\n"
WORDS = range(16)
FILL = "  ld.param.u64 %base, [source]" + PLACE
FILL += "\n".join(f"  ld.global.u32 %i, [%at+{4 * w}]; st.shared.u32 [%v+{4 * w}], %i;" for w in WORDS)
SYNC = "\n  bar.sync 0;\n"
STORE = "  ld.param.u64 %base, [result]; mad.lo.u64 %at, %lane, 4, %base;\n"
STORE += "\n".join(f"  st.global.u32 [%at+{128 * r}], %r{r};" for r in range(4))
DUMP = SYNC + "  ld.param.u64 %base, [result]" + PLACE
DUMP += "\n".join(f"  ld.shared.u32 %i, [%v+{4 * w}]; st.global.u32 [%at+{4 * w}], %i;" for w in WORDS)
ZERO = "  mov.u32 %r0, 0; mov.u32 %r1, 0; mov.u32 %r2, 0; mov.u32 %r3, 0;\n"
END = "\n  ret;\n}\n"


def launch(body: str, rows: np.ndarray, source: np.ndarray, result: np.ndarray, block: int = 32, **options):
    with emulator.watch(architecture=90, **options) as watched:
        module = emulator.Module(HEAD + body + END)
        module.launch("k", grid=1, block=block, args=[rows.astype(np.uint32), source, result])
    return watched


def matrices(source: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[matrix, row, column] of the 16-bit elements at the row addresses."""
    elements = source.view(np.uint16)
    return np.stack([elements[row // 2 : row // 2 + 8] for row in rows.tolist()]).reshape(-1, 8, 8)


def lanes_of(matrix: np.ndarray) -> np.ndarray:
    """Lane 4 g + t holds row g, columns 2 t (low half) and 2 t + 1."""
    wide = matrix.astype(np.uint32)
    return np.array([wide[lane // 4, 2 * (lane % 4)] | wide[lane // 4, 2 * (lane % 4) + 1] << 16 for lane in range(32)])


@pytest.fixture
def source():
    return np.random.default_rng(0).integers(0, 2**32, 512, dtype=np.uint64).astype(np.uint32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("space", [".shared", ".shared::cta", ""])
def test_ldmatrix(count, transposed, space, source):
    rows = np.random.default_rng(count).permutation(2048 // 16)[:32] * 16
    registers = ", ".join(f"%r{r}" for r in range(count))
    address = "  mov.u32 %v, tile; add.u32 %row, %row, %v;\n"
    if space == "":
        address = "  cvt.u64.u32 %s, %row; mov.u64 %at, tile; cvta.shared.u64 %at, %at; add.u64 %s, %s, %at;\n"
    trans = ".trans" if transposed else ""
    row = "%s" if space == "" else "%row"
    load = f"  ldmatrix.sync.aligned.m8n8.x{count}{trans}{space}.b16 {{{registers}}}, [{row}];\n"
    result = np.zeros((4, 32), np.uint32)
    watched = launch(FILL + SYNC + ZERO + address + load + STORE, rows, source, result)
    for m, matrix in enumerate(matrices(source, rows[: 8 * count])):
        assert np.array_equal(result[m], lanes_of(matrix.T if transposed else matrix))
    assert not result[count:].any()
    assert watched.launches[0]["totals"]["ideal_wavefronts"] > 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, transposed, source):
    rows = np.random.default_rng(count).permutation(2048 // 16)[:32] * 16
    load = "  ld.param.u64 %base, [source]; mad.lo.u64 %at, %lane, 4, %base;\n"
    load += "\n".join(f"  ld.global.u32 %r{r}, [%at+{128 * r}];" for r in range(4))
    registers = ", ".join(f"%r{r}" for r in range(count))
    trans = ".trans" if transposed else ""
    store = "  mov.u32 %v, tile; add.u32 %row, %row, %v;\n"
    store += f"  stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%row], {{{registers}}};\n"
    result, before = np.zeros(512, np.uint32), source.copy()
    launch(FILL + SYNC + load + store + DUMP, rows, source, result)
    for m, matrix in enumerate(matrices(result, rows[: 8 * count])):
        assert np.array_equal(lanes_of(matrix.T if transposed else matrix), before[32 * m : 32 * m + 32])
    untouched = np.ones(2048, bool)
    for row in rows[: 8 * count]:
        untouched[row : row + 16] = False
    assert np.array_equal(result.view(np.uint8)[untouched], before.view(np.uint8)[untouched])


def test_movmatrix(source):
    body = "  ld.param.u64 %base, [source]; mad.lo.u64 %at, %lane, 4, %base; ld.global.u32 %v, [%at];\n"
    body += ZERO + "  movmatrix.sync.aligned.m8n8.trans.b16 %r0, %v;\n" + STORE
    result = np.zeros((4, 32), np.uint32)
    launch(body, np.zeros(32), source, result)
    matrix = source[:32].view(np.uint16).reshape(8, 8)
    assert np.array_equal(result[0], lanes_of(matrix.T))


# ---- checks ----------------------------------------------------------------------------------------------------------

LOAD = """  mov.u32 %v, tile; add.u32 %row, %row, %v;
  ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1, %r2, %r3}, [%row];
"""


def faults(body: str, rows: np.ndarray, source: np.ndarray, block: int = 32) -> list[emulator.Report]:
    with pytest.raises(emulator.FaultError) as raised:
        launch(body, rows, source, np.zeros((4, block), np.uint32), block)
    return raised.value.reports


def test_a_row_outside_of_shared_memory(source):
    rows = np.arange(32) * 16
    rows[21] = 4096
    (report,) = faults(FILL + SYNC + LOAD + STORE, rows, source)
    assert (report.fault, report.thread) == ("out of bounds", (21, 0, 0))
    assert "shared memory at 0x1000" in report.text


def test_a_row_that_is_not_aligned(source):
    rows = np.arange(32) * 16
    rows[3] += 8
    (report,) = faults(FILL + SYNC + LOAD + STORE, rows, source)
    assert (report.fault, report.thread) == ("misaligned", (3, 0, 0))
    assert "multiple of 16" in report.text


def test_a_generic_row_in_global_memory(source):
    load = "  ld.param.u64 %s, [source];\n  ldmatrix.sync.aligned.m8n8.x1.b16 {%r0}, [%s];\n"
    (report,) = faults(ZERO + load + STORE, np.zeros(32), source)
    assert report.fault == "out of bounds"
    assert "not in shared memory" in report.text


def test_a_row_that_nobody_wrote(source):
    rows = np.arange(32) * 16
    rows[9] = 2048
    reports = faults(FILL + SYNC + LOAD + STORE, rows, source)
    assert [report.fault for report in reports] == ["unwritten shared memory"]
    assert reports[0].thread == (9, 0, 0)


def test_rows_that_another_warp_wrote_without_a_barrier(source):
    """Each warp fills half of the tile; without the barrier it reads the other half too early or too late."""
    fill = FILL.replace("mad.lo.u64 %at, %lane, 64, %base", "mad.lo.u64 %at, %lane, 32, %base").replace(
        "mad.lo.u32 %v, %tid, 64, %v", "mad.lo.u32 %v, %tid, 32, %v"
    )
    fill = "\n".join(line for line in fill.splitlines() if not any(f"+{4 * word}]" in line for word in range(8, 16)))
    rows = np.tile(np.concatenate([np.arange(16) * 16, 1024 + np.arange(16) * 16]), 2)
    result = np.zeros((4, 64), np.uint32)
    store = STORE.replace("+128]", "+256]").replace("+384]", "+768]").replace("+256], %r2", "+512], %r2")
    launch(fill + SYNC + LOAD + store, rows, source, result, block=64)
    kinds = {report.fault for report in faults(fill + "\n" + LOAD + store, rows, source, block=64)}
    assert "race" in kinds


def test_part_of_a_warp(source):
    body = FILL + SYNC + ZERO + "  setp.lt.u32 %p, %tid, 16;\n" + LOAD.replace("  ldmatrix", "  @%p ldmatrix") + STORE
    reports = faults(body, np.arange(32) * 16, source)
    assert "collective" in {report.fault for report in reports} or "barrier" in {report.fault for report in reports}


@pytest.mark.parametrize(
    "line",
    ["ldmatrix.sync.aligned.m8n8.x3.shared.b16 {%r0, %r1, %r2}, [%row];",
     "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0}, [%row];",
     "ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r0, %r1}, [%row];",
     "ldmatrix.m8n8.x1.shared.b16 {%r0}, [%row];", "movmatrix.sync.aligned.m8n8.b16 %r0, %r1;"],
)  # fmt: skip
def test_unknown_forms_are_errors_when_a_kernel_is_loaded(line):
    with pytest.raises(emulator.Error, match="matrix"):
        emulator.Module(HEAD + line + END).kernel("k")


def test_stmatrix_needs_sm_90():
    with emulator.watch(architecture=80), pytest.raises(emulator.Error, match="sm_90"):
        emulator.Module(HEAD + "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%row], {%r0};" + END).kernel("k")
