# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of peer_all_reduce on an emulated GPU, the ranks of a node being blocks of one launch."""

import itertools
import math
import random
import re
import threading
import time
from dataclasses import replace

import pytest
import torch
from faults import missing_synchronisations
from peer_node import BROKEN, FINEST, HEADER_BYTES, Node, inputs, normal, same, smallest_slice

from fmkernels import reference
from fmkernels.testing import assert_as_good_as_torch, backends

EMULATED = [backend for backend in backends("peer_all_reduce") if backend.name == "emulated"]
pytestmark = pytest.mark.skipif(not EMULATED, reason="the emulated backend is not built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = [None, 8, 6, 4]
ALGORITHMS = ["one_shot", "two_shot"]
EACH_ALGORITHM = pytest.mark.parametrize("algorithm", ALGORITHMS)
EACH_BITS = pytest.mark.parametrize("bits", BITS)
SIZES = [0, 1, 127, 128, 129, 4097]


def node(world_size, **options):
    return Node(EMULATED[0], world_size, **options)


def several_rounds(world_size, algorithm, lanes, bits, dtype):
    """Elements for more than two rounds of the smallest slices, the last one ragged."""
    return smallest_slice(world_size, algorithm) * lanes * 9 // 4 * 8 // (bits or 8 * dtype.itemsize) + 150


def check(ranks, xs, **options):
    """All ranks have the bits of the definition."""
    expected = reference.peer_all_reduce.all_reduce(xs, **options)
    for rank, out in enumerate(ranks.all_reduce(xs, **options)):
        assert same(out, expected), f"rank {rank} of {ranks.world_size}: {options}"


# ---- values ----------------------------------------------------------------------------------------------------------


@EACH_ALGORITHM
@pytest.mark.parametrize("world_size", range(1, 9))
def test_bits_are_those_of_the_definition(world_size, algorithm):
    """On one workspace; each node has some of the sizes, and each size another dtype, code and block."""
    lanes = 2 if world_size == 1 else 1
    ranks = node(world_size, lanes=lanes, slice_bytes=smallest_slice(world_size, algorithm))
    for i, turn in enumerate(range(world_size, world_size + 4)):
        dtype, bits = DTYPES[turn % 3], BITS[turn % 4]
        if i == 3 and world_size > 4:  # rounds of codes are long
            dtype, bits = torch.float32, None
        large = several_rounds(world_size, algorithm, lanes, bits, dtype)
        numel = large if i == 3 else SIZES[(3 * world_size + i + len(algorithm)) % len(SIZES)]
        options = {"op": ["sum", "avg"][turn % 2], "bits": bits, "block": [32, 128, 1024][turn // 4 % 3]}
        check(ranks, inputs(world_size, numel, dtype=dtype), algorithm=algorithm, **options)


@pytest.mark.slow
@EACH_BITS
@EACH_ALGORITHM
@pytest.mark.parametrize("world_size", range(1, 9))
def test_bits_are_those_of_the_definition_in_every_combination(world_size, algorithm, bits):
    ranks, blocks = node(world_size), [32, 64, 128, 256, 512, 1024, 2048] if bits else [128]
    for numel, dtype, op, block in itertools.product([*SIZES, None], DTYPES, ("sum", "avg"), blocks):
        numel = several_rounds(world_size, algorithm, 2, bits, dtype) if numel is None else numel
        check(ranks, inputs(world_size, numel, dtype=dtype), algorithm=algorithm, bits=bits, op=op, block=block)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("block", [32, 64, 256, 512, 2048])
def test_every_block(block, bits):
    check(node(2), inputs(2, 2500, dtype=torch.bfloat16), bits=bits, block=block)
    check(node(2), inputs(2, 2500), bits=bits, block=block, algorithm="one_shot")


@EACH_ALGORITHM
@EACH_BITS
def test_bits_are_those_of_the_cpu_kernels(bits, algorithm):
    from fmkernels import _library

    xs = inputs(4, 9000, dtype=torch.float16)
    xs[1][5000], xs[2][70] = math.nan, -math.inf
    outs = [torch.empty_like(x) for x in xs]
    workspaces = node(4).workspaces
    options = (0, algorithm == "one_shot", bits or 0, 128, True, 1, 60000)
    _library.ops.peer_all_reduce(xs, workspaces, outs, *options)
    actual = node(4).all_reduce(xs, op="avg", bits=bits, algorithm=algorithm)
    assert all(same(a, b) for a, b in zip(actual, outs, strict=True))


@EACH_ALGORITHM
@EACH_BITS
def test_the_largest_node(bits, algorithm):
    check(node(16, lanes=1), inputs(16, 3000, dtype=torch.bfloat16), bits=bits, algorithm=algorithm)


@EACH_ALGORITHM
@EACH_BITS
def test_the_code_for_hopper(bits, algorithm):
    ranks = Node(replace(EMULATED[0], architecture=90), 2)
    check(ranks, inputs(2, 7000, dtype=torch.bfloat16), bits=bits, algorithm=algorithm)


@EACH_BITS
def test_tensors_that_begin_anywhere_and_results_in_place(bits):
    for dtype, algorithm in itertools.product(DTYPES[:2], ALGORITHMS):
        xs = [x[1:] for x in inputs(3, 4301, dtype=dtype)]
        expected = reference.peer_all_reduce.all_reduce(xs, bits=bits, algorithm=algorithm)
        node(3).all_reduce(xs, outs=xs, bits=bits, algorithm=algorithm)
        assert all(same(x, expected) for x in xs)


@EACH_ALGORITHM
@EACH_BITS
def test_what_is_not_finite_stays_in_its_place_or_block(bits, algorithm):
    xs = inputs(3, 6000)
    xs[0][300], xs[1][4000], xs[2][-1] = math.nan, math.inf, -math.inf
    xs[1][300], xs[2][4000] = math.inf, -math.inf
    check(node(3), xs, bits=bits, algorithm=algorithm)


@EACH_BITS
def test_no_bit_depends_on_lanes_and_workspaces(bits):
    xs, length = inputs(2, 9000, dtype=torch.bfloat16), 9000
    for algorithm in ALGORITHMS:
        results = [
            node(2, lanes=lanes, slice_bytes=slice_bytes).all_reduce(xs, bits=bits, algorithm=algorithm)[0]
            for lanes, slice_bytes in ((1, 2 * FINEST), (3, 2 * FINEST + 256), (8, 1 << 18))
        ]
        assert same(results[0], results[1])
        assert same(results[0], results[2])
        half = node(2).all_reduce([x[: length // 2 // 128 * 128] for x in xs], bits=bits, algorithm=algorithm)[0]
        assert same(half, results[0][: half.numel()])


# ---- the norm --------------------------------------------------------------------------------------------------------


def check_norm(ranks, xs, residuals, weight, timeout_ms=60000, **options):
    out, residual_out = ranks.all_reduce_rms_norm(xs, residuals, weight, timeout_ms=timeout_ms, **options)
    for rank, residual in enumerate(residuals):
        _, summed = reference.peer_all_reduce.all_reduce_rms_norm(xs, residual, weight, **options)
        assert same(residual_out[rank], summed), f"rank {rank}: {options}"
        assert_as_good_as_torch(out[rank], reference.rms_norm, summed, weight)
    return out, residual_out


@EACH_BITS
@pytest.mark.parametrize(("rows", "hidden"), [(0, 128), (1, 128), (5, 1152), (7, 2560), (3, 4608)])
def test_the_norm_of_the_sum_with_a_residual(rows, hidden, bits):
    """Rows that are several to a round, and more than a block of threads reads at a time."""
    turn = rows + BITS.index(bits)
    dtype, algorithm = DTYPES[turn % 3], ALGORITHMS[turn // 2 % 2]
    weight = normal(hidden, dtype=[torch.float32, dtype][turn % 2], seed=9) + 1
    ranks = node(3, slice_bytes=max(3 * FINEST, 3 * hidden * 4))
    xs, residuals = inputs(3, rows, hidden, dtype=dtype), inputs(3, rows, hidden, dtype=dtype, seed=1)
    check_norm(ranks, xs, residuals, weight, bits=bits, algorithm=algorithm)


def test_the_norm_of_rows_of_any_length_without_codes():
    for hidden, dtype in itertools.product((1, 131, 2051), DTYPES[:2]):
        xs, residuals = inputs(2, 5, hidden, dtype=dtype), inputs(2, 5, hidden, dtype=dtype, seed=1)
        for algorithm in ALGORITHMS:
            check_norm(node(2, slice_bytes=3 * FINEST), xs, residuals, normal(hidden, seed=9), algorithm=algorithm)


@EACH_ALGORITHM
def test_the_norm_of_rows_that_are_longer_than_a_slice(algorithm):
    """Each in several rounds, the second one from the middle of one."""
    slice_bytes = smallest_slice(2, algorithm)
    ranks, hidden = node(2, lanes=1, slice_bytes=slice_bytes), slice_bytes + 64  # of codes, too
    for bits in (None, 8):
        xs, residuals = inputs(2, 2, hidden), inputs(2, 2, hidden, seed=1)
        check_norm(ranks, xs, residuals, normal(hidden, seed=9), bits=bits, block=64, algorithm=algorithm)


@EACH_BITS
def test_a_row_does_not_depend_on_the_others(bits):
    xs, residuals = inputs(2, 9, 512, dtype=torch.bfloat16), inputs(2, 9, 512, dtype=torch.bfloat16, seed=1)
    weight = normal(512, seed=9)
    whole = check_norm(node(2), xs, residuals, weight, bits=bits)
    for row in (0, 8):
        one = check_norm(node(2), [x[row] for x in xs], [r[row] for r in residuals], weight, bits=bits)
        for a, b in zip(whole, one, strict=True):
            assert same(a[0][row], b[0])


def unaligned(tensor):
    """The same values an element behind a boundary of 16 bytes."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)


@pytest.mark.parametrize(("hidden", "bits"), [(512, None), (515, None), (1152, 8)])
def test_no_bit_of_the_norm_depends_on_where_tensors_begin(hidden, bits):
    for dtype in DTYPES[:2]:
        xs, residuals = inputs(2, 3, hidden, dtype=dtype), inputs(2, 3, hidden, dtype=dtype, seed=1)
        weight, moved = normal(hidden, seed=9), [unaligned(x) for x in xs]
        expected = node(2).all_reduce_rms_norm(xs, residuals, weight, bits=bits)
        actual = [
            node(2).all_reduce_rms_norm(xs, residuals, unaligned(weight), bits=bits),
            node(2).all_reduce_rms_norm(xs, [residuals[0], unaligned(residuals[1])], weight, bits=bits),
            node(2).all_reduce_rms_norm(moved, residuals, weight, bits=bits),
            node(2).all_reduce_rms_norm(moved, residuals, weight, bits=bits, outs=(moved, residuals)),
        ]
        for results in actual:
            for a, b in zip([*results[0], *results[1]], [*expected[0], *expected[1]], strict=True):
                assert same(a, b)


@EACH_BITS
def test_the_norm_in_place(bits):
    xs, residuals = inputs(2, 6, 384), inputs(2, 6, 384, seed=1)
    weight = normal(384, seed=9)
    expected = node(2).all_reduce_rms_norm(xs, residuals, weight, bits=bits)
    node(2).all_reduce_rms_norm(xs, residuals, weight, bits=bits, outs=(xs, residuals))
    for a, b in zip([*expected[0], *expected[1]], [*xs, *residuals], strict=True):
        assert same(a, b)


# ---- many calls on one workspace -------------------------------------------------------------------------------------


def alternate(ranks, num_calls, seed, longest=6000):
    """Calls of other sizes, dtypes, codes, blocks and algorithms, with and without a norm, one after another."""
    draw = random.Random(seed)
    for turn in range(num_calls):
        dtype, bits, algorithm = draw.choice(DTYPES), draw.choice(BITS), draw.choice(ALGORITHMS)
        options = {"bits": bits, "algorithm": algorithm, "block": draw.choice([32, 128, 512])}
        if draw.random() < 0.2:
            hidden = 512 * draw.randint(1, 3)
            xs = inputs(ranks.world_size, draw.randint(1, 4), hidden, dtype=dtype, seed=turn)
            residuals = [normal(*xs[0].shape, dtype=dtype, seed=turn)] * ranks.world_size
            weight = normal(hidden, seed=turn)
            _, residual_out = ranks.all_reduce_rms_norm(xs, residuals, weight, **options)
            _, expected = reference.peer_all_reduce.all_reduce_rms_norm(xs, residuals[0], weight, **options)
            assert all(same(out, expected) for out in residual_out), f"call {turn}: {options}"
        else:
            numel = draw.choice([1, 127, 2048, draw.randint(1, longest)])
            check(
                ranks,
                inputs(ranks.world_size, numel, dtype=dtype, seed=turn),
                op=draw.choice(["sum", "avg"]),
                **options,
            )


def test_calls_of_any_kind_follow_each_other():
    alternate(node(3), 50, seed=1, longest=5000)
    alternate(node(2, lanes=1), 150, seed=2, longest=3000)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "lanes"), [(2, 1), (3, 2)])
def test_ten_thousand_calls_follow_each_other(world_size, lanes):
    alternate(node(world_size, lanes=lanes), 10000, seed=world_size)


def test_blocks_that_run_at_once():
    """On several threads of this machine, whose order is another one in every run."""
    import emulator

    before = emulator.options()["threads"]
    emulator.configure(threads=6)
    try:
        alternate(node(3), 15, seed=3, longest=12000)
    finally:
        emulator.configure(threads=before)


def test_epochs_that_wrap_around():
    ranks = node(3, lanes=1, epoch=0xFFFFFFF0)
    alternate(ranks, 20, seed=4)
    assert all(ranks.epochs(rank)[0] < 1000 for rank in range(3))


def test_lanes_that_have_nothing_to_do_count_no_steps():
    ranks = node(2, lanes=4)
    check(ranks, inputs(2, 100))
    assert [ranks.epochs(rank) for rank in range(2)] == [[2, 0, 0, 0]] * 2
    check(ranks, inputs(2, 40000), algorithm="one_shot")
    assert all(epoch > 0 for rank in range(2) for epoch in ranks.epochs(rank))


def test_ranks_meet_for_no_elements():
    ranks = node(2)
    check(ranks, inputs(2, 0), algorithm="one_shot")
    assert [ranks.epochs(rank) for rank in range(2)] == [[1, 0]] * 2
    check_norm(ranks, inputs(2, 0, 384), inputs(2, 0, 384), normal(384))
    assert [ranks.epochs(rank) for rank in range(2)] == [[3, 0]] * 2
    assert trapped(lambda: ranks.all_reduce(inputs(1, 0), timeout_ms=100))[0]
    assert ranks.broken(1) == (1, 0, 1, 0)


# ---- what orders the ranks -------------------------------------------------------------------------------------------


def run_few(bits=None, norms=((0, 4, 3584), (1, 4, 3584), (0, 1, 2048), (1, 1, 2048), (1, 1, 1024))):
    """Several rounds and calls of both algorithms: every half is written again, blocks and rows are of all warps.

    The last row of 3584 begins inside a tile and ends in the next round, which other threads write than read it.
    """
    ranks, options = node(3, lanes=1, slice_bytes=3 * FINEST), {"bits": bits, "block": 512, "timeout_ms": 300}
    for algorithm in ALGORITHMS * 2:
        ranks.all_reduce(inputs(3, 13000, dtype=torch.bfloat16), algorithm=algorithm, **options)
        for begin, count, hidden in norms:
            xs = inputs(3, 14400, dtype=torch.bfloat16)
            rows = [x[begin : begin + count * hidden].view(count, hidden) for x in xs]
            check_norm(ranks, rows, rows, rows[0][0], algorithm=algorithm, **options)


def is_noticed(old, new):
    """Whether the checks find a race between the blocks where the PTX has other instructions."""
    import emulator

    counts = []

    def edit(text):
        counts.append(text.count(old))
        return text.replace(old, new)

    try:
        with emulator.edited(edit):
            run_few(norms=())
    except emulator.FaultError as error:
        assert max(counts) > 0
        return "race of blocks" in {report.fault for report in error.reports}
    return False


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("st.release.sys", "st.relaxed.sys"),
        ("st.release.sys", "st.release.gpu"),
        ("st.release.sys.global", "st.global"),
        ("ld.acquire.sys", "ld.relaxed.sys"),
        ("ld.acquire.sys", "ld.acquire.gpu"),
    ],
)
def test_weaker_flags_are_noticed(old, new):
    run_few(norms=())
    assert is_noticed(old, new)


@pytest.mark.parametrize(
    ("instance", "bits"), [("BFloat16ELi0", None), pytest.param("BFloat16ELi8", 8, marks=pytest.mark.slow)]
)
def test_every_barrier_is_needed(instance, bits):
    """By the checks or, inside a block, by results that are wrong."""
    import emulator

    def run():
        try:
            run_few(bits)
        except AssertionError as error:
            raise emulator.FaultError([]) from error

    count, unseen = missing_synchronisations("peer_all_reduce_kernel", instance, run)
    assert count >= 6
    assert unseen == []


# ---- ranks that do not come, and calls that differ -------------------------------------------------------------------


def trapped(function):
    """Whether the launch ended by a trap and nothing else; and how many seconds it took."""
    import emulator

    begin = time.monotonic()
    with pytest.raises((emulator.FaultError, RuntimeError)) as error:
        function()
    faults = {report.fault for report in getattr(error.value, "reports", ())} or set(
        re.findall(r"^(\w+):", str(error.value), re.MULTILINE)
    )
    return faults == {"trap"}, time.monotonic() - begin


@EACH_ALGORITHM
@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_never_comes_ends_the_kernel(missing, algorithm):
    ranks, xs = node(3), inputs(3, 5000)
    first = 1 if missing == 0 else 0
    is_trap, seconds = trapped(
        lambda: ranks.all_reduce(xs[first : first + 2], rank=first, algorithm=algorithm, timeout_ms=100)
    )
    assert is_trap
    assert 0.1 <= seconds < 30
    for rank in range(3):
        is_broken, waiting, peer, lane = ranks.broken(rank)
        assert (is_broken, peer) == (1, missing)
        assert waiting != missing
        assert lane < 2
    assert trapped(lambda: ranks.all_reduce(xs, algorithm=algorithm))[0], "later calls find the workspace broken"


def test_who_waits_hears_that_others_have_given_up():
    """Here another thread, which writes to a workspace as a rank does."""
    check(node(3), inputs(3, 5000))  # the kernel is loaded
    ranks, word = node(3), 1 | 2 << 8 | 1 << 16
    timer = threading.Timer(0.5, lambda: ranks.words(0)[BROKEN].fill_(word))
    timer.start()
    is_trap, seconds = trapped(lambda: ranks.all_reduce(inputs(1, 5000), timeout_ms=120000))
    timer.join()
    assert is_trap
    assert 0.3 < seconds < 60
    assert ranks.broken(0) == (1, 2, 1, 0)
    assert ranks.broken(2)[:2] == (1, 0), "it tells the others"


def test_a_peer_that_means_another_call_is_noticed():
    """Its flags and words as it leaves them that has met, and summed other elements."""
    ranks, xs = node(2, lanes=1), inputs(2, 1000)
    ranks.flags(0)[0, 1] = 1
    assert trapped(lambda: ranks.all_reduce(xs[:1], algorithm="one_shot", timeout_ms=2000))[0]
    assert ranks.broken(0) == (1, 0, 1, 0)


def test_a_peer_that_is_a_step_ahead_has_come():
    first, second = node(2, lanes=1), inputs(2, 1000)
    expected = first.all_reduce(second, algorithm="one_shot")
    again = node(2, lanes=1)
    again.workspaces[1].copy_(first.workspaces[1])  # rank 1 has done the call
    again.flags(0)[0, 1] = 2  # and has written what comes next
    out = again.all_reduce(second[:1], algorithm="one_shot", timeout_ms=2000)
    assert same(out[0], expected[0])
    assert again.flags(1)[0, 0].item() == 1


def test_more_blocks_than_the_gpu_holds_are_a_sentence():
    ranks = node(8, lanes=64)
    with pytest.raises(RuntimeError, match=r"^peer_all_reduce: 64 lanes of 8 ranks are more blocks than the \d+ that"):
        ranks.all_reduce(inputs(8, 100))


def test_a_workspace_without_room_is_a_sentence():
    ranks = node(4, lanes=2, slice_bytes=256)
    assert ranks.workspaces[0].numel() == HEADER_BYTES + 1024
    with pytest.raises(RuntimeError, match=r"^workspaces of \d+ bytes have 256 for a lane at a time"):
        ranks.all_reduce(inputs(4, 100))
