# SPDX-License-Identifier: Apache-2.0
"""paged_kv.attend on emulated GPUs: every tile and every kind of cache, bits of a row, what only the device sees."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from faults import missing_synchronisations
from paged_cases import PagedCase, alone, options

from fmkernels import paged_kv, reference
from fmkernels.testing import assert_as_good_as_torch, backends

EMULATED = [backend for backend in backends("paged_kv_attend") if backend.name == "emulated"]
pytestmark = pytest.mark.skipif(not EMULATED, reason="the emulated backend is not built")

SMALL_SHARED_MEMORY = 86  # 99 KiB a block, where sm_80 gives 163 and more
HALVES = (torch.bfloat16, torch.float16)


def attend(args, kwargs, architecture=80):
    return replace(EMULATED[0], architecture=architecture).run(paged_kv.attend, *args, **kwargs, return_lse=True)


def assert_defined(actual, args, kwargs):
    """o may be as exact as torch in its own dtype, lse must be as exact as in float32."""
    o, lse = ((lambda *a, _i=i, **k: reference.paged_kv.attend(*a, **k)[_i]) for i in (0, 1))
    assert_as_good_as_torch(actual[0], o, *args, computed_in=args[0].dtype, **kwargs)
    assert_as_good_as_torch(actual[1], lse, *args, **kwargs)


def case(name, seqlens, head_dim=64, **fields):
    fields = {"heads": 4, "kv_heads": 2, "v_head_dim": head_dim, "dtype": torch.bfloat16, **fields}
    return PagedCase(name, seqlens=seqlens, head_dim=head_dim, **fields)


# ---- values ----------------------------------------------------------------------------------------------------------

MIXED = ((1, 40), (3, 5), (1, 0), (11, 70), (0, 3), (2, 130))  # requests of short tiles, and one of tall ones
CASES = [
    case("mixed batch", MIXED),
    case("mixed batch of float16", MIXED, dtype=torch.float16, page_size=32, hnd=True),
    case("pages of one token", ((1, 70), (9, 20)), page_size=1),
    case("odd pages", ((2, 70), (9, 90)), page_size=7, hnd=True),
    case("narrow heads", ((2, 70), (9, 20)), head_dim=24, v_head_dim=8),
    case("other values", ((2, 70), (9, 20)), head_dim=96, v_head_dim=40, page_size=64),
    case("one head each", ((1, 70), (20, 30)), heads=2),
    case("many heads of a group", ((1, 70), (2, 30)), heads=40, kv_heads=1),
    case("more queries than tokens", ((4, 2), (20, 3), (1, 1))),
    *(
        case(
            f"head_dim {head_dim} of {str(dtype)[6:]}", ((1, 70), (17, 66)), head_dim, kv_heads=1, heads=2, dtype=dtype
        )
        for head_dim, dtype in itertools.product((128, 256), HALVES)
    ),
    *(
        case(
            f"{str(stored)[6:]} by {scales or 'nothing'}, head_dim {head_dim} of {str(dtype)[6:]}",
            ((1, 70), (9, 20)),
            head_dim,
            dtype=dtype,
            cache_dtype=stored,
            scales=scales,
            page_size=page_size,
        )
        for stored, scales, head_dim, dtype, page_size in (
            (torch.int8, "tensor", 64, torch.bfloat16, 16),
            (torch.int8, "head", 128, torch.float16, 5),
            (torch.int8, "token", 128, torch.bfloat16, 16),
            (torch.int8, "token", 256, torch.float16, 64),
            (torch.float8_e4m3fn, "", 64, torch.float16, 16),
            (torch.float8_e4m3fn, "head", 256, torch.bfloat16, 16),
            (torch.float8_e4m3fn, "token", 128, torch.float16, 32),
            (torch.float8_e4m3fn, "token", 64, torch.bfloat16, 3),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_matches_its_definition(case):
    args, kwargs = case.inputs()
    every = options(case)
    for more in every if case.name == "mixed batch" else every[:2]:
        assert_defined(attend(args, {**kwargs, **more}), args, {**kwargs, **more})


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, SMALL_SHARED_MEMORY, 90])
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_tile(head_dim, dtype, stored, architecture):
    scales = "token" if stored else ""
    tile = case("tile", ((1, 600), (40, 140)), head_dim, dtype=dtype, cache_dtype=stored, scales=scales, heads=2)
    args, kwargs = tile.inputs()
    for more in options(tile)[:2]:
        assert_defined(attend(args, {**kwargs, **more}, architecture), args, {**kwargs, **more})


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_tiles_fit_into_little_shared_memory(head_dim):
    args, kwargs = case("small", ((1, 70), (9, 20)), head_dim).inputs()
    expected = attend(args, kwargs)
    assert all(map(torch.equal, attend(args, kwargs, SMALL_SHARED_MEMORY), expected))


# ---- the bits of a row -----------------------------------------------------------------------------------------------

INVARIANT = [
    case("head_dim 64", ((35, 640), (1, 1100), (9, 9)), kv_heads=1, heads=2),
    case("head_dim 128", ((35, 540), (1, 600)), 128, kv_heads=1, heads=2),
    case("head_dim 256", ((17, 530),), 256, kv_heads=1, heads=1),
    case("int8", ((35, 540), (1, 600)), kv_heads=1, heads=2, cache_dtype=torch.int8, scales="token"),
]


@pytest.mark.parametrize("modified", [False, True], ids=["plain", "modified"])
@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_chunks_of_a_prefill_and_neighbours_change_no_bits(case, modified):
    """Rows of tall tiles, which merge their chunks themselves, and of short ones, where another kernel does."""
    args, kwargs = case.inputs()
    if modified:
        together = options(case)[1]
        kwargs |= {name: together[name] for name in ("softcap", "alibi_slopes", "sinks")} | {"window": (530, 0)}
    o, lse = attend(args, kwargs)
    for request, (seq_q, _) in enumerate(case.seqlens):
        start = sum(q for q, _ in case.seqlens[:request])
        for first, last in {(0, 1), (0, min(seq_q, 3)), (min(seq_q, 3), seq_q - 1), (seq_q - 1, seq_q)}:
            if first >= last:
                continue
            part = alone(attend, args, kwargs, request, first, last)
            assert torch.equal(part[0], o[start + first : start + last]), (request, first, last)
            assert torch.equal(part[1], lse[:, start + first : start + last])


def test_page_size_and_layout_change_no_bits():
    base = case("pages", ((1, 600), (9, 90)), kv_heads=2, heads=2)
    args, kwargs = base.inputs()
    expected = attend(args, kwargs)
    lengths = args[4].tolist()
    for page_size, hnd in ((1, False), (5, True), (48, True), (64, False), (600, True)):
        other = replace(base, page_size=page_size, hnd=hnd)
        (_, *caches, table, _), _ = other.inputs()
        for b, length in enumerate(lengths):
            for t in range(length):
                for cache, source in zip(caches, args[1:3], strict=True):
                    cache[table[b, t // page_size], t % page_size] = source[args[3][b, t // 16], t % 16]
        assert all(map(torch.equal, attend((args[0], *caches, table, args[4]), kwargs), expected)), page_size


def test_one_query_a_request_needs_no_prefix_sums():
    args, kwargs = case("decode", ((1, 40), (1, 7), (1, 600)), heads=2).inputs()
    assert all(map(torch.equal, attend(args, kwargs), attend(args, {})))


def test_more_requests_than_blocks_are_merged():
    """A block merges every gridDim.y'th request: here two of the three."""
    args, kwargs = case("many heads", ((0, 0), (0, 0), (1, 520)), 8, heads=864, kv_heads=864).inputs()
    o, lse = attend(args, kwargs)
    q, k_cache, v_cache, *rest = args
    one = attend((q[:, :1].clone(), k_cache[:, :, :1].clone(), v_cache[:, :, :1].clone(), *rest), kwargs)
    assert o.isfinite().all()
    assert torch.equal(o[:, :1], one[0])
    assert torch.equal(lse[:1], one[1])


@pytest.mark.slow
def test_a_batch_of_more_requests_than_a_grid_has_rows():
    """It was refused, when attention had run and its chunks were to be merged."""
    (q, k_cache, v_cache, _, _), _ = case("one", ((1, 520),), 8, heads=1, kv_heads=1, page_size=520).inputs()
    lengths = torch.zeros(65600, dtype=torch.int32)
    lengths[[7, 65590]] = 520
    args = (q.expand(65600, 1, 8), k_cache[:1].zero_(), v_cache[:1].normal_(), lengths[:, None] * 0, lengths)
    o, lse = attend(args, {})
    expected = attend((q, *args[1:3], *(t[7:8] for t in args[3:])), {})
    for request in (7, 65590):
        assert torch.equal(o[request], expected[0][0])
        assert torch.equal(lse[:, request], expected[1][:, 0])
    assert lse.isfinite().sum() == 2


def test_a_batch_of_more_requests_than_threads():
    """The work list holds 128 requests at a time; split ones stand in each part of it."""
    few = case("few", ((1, 520), (1, 9), (9, 20)), kv_heads=1, heads=2)
    args, kwargs = few.inputs()
    q, k_cache, v_cache, table, seqlens = args
    expected = attend(args, kwargs)
    many = 140  # requests between the first three and the last three
    between = (q[[1]].expand(many, -1, -1), table[[1]].expand(many, -1), seqlens[[1]].expand(many))
    q, table, seqlens = (torch.cat([x, y, x]) for x, y in zip((q, table, seqlens), between, strict=True))
    lengths = torch.tensor([1, 1, 9, *[1] * many, 1, 1, 9])
    prefix = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(torch.int32)
    o, lse = attend((q, k_cache, v_cache, table, seqlens), {"cu_seqlens_q": prefix})
    for rows in (slice(0, 11), slice(len(q) - 11, len(q))):
        assert torch.equal(o[rows], expected[0])
        assert torch.equal(lse[:, rows], expected[1])
    assert torch.equal(o[11:-11], expected[0][[1]].expand(many, -1, -1))


# ---- what reaches a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("seq_q", [2, 9])
def test_a_poisoned_token_reaches_the_rows_that_see_it(seq_q, stored):
    poisoned = case("poison", ((seq_q, 140), (1, 30)), heads=2, kv_heads=1, page_size=8, cache_dtype=stored)
    args, kwargs = poisoned.inputs()
    for more in ({}, {"window": (60, 0)}, {"tree_mask": torch.full((seq_q + 1, 1), 0x55555555, dtype=torch.int32)}):
        clean, _ = attend(args, {**kwargs, **more})
        for token in (0, 75, 79, 138, 139):
            v_cache = args[2].clone()
            v_cache[int(args[3][0, token // 8]), token % 8] = math.nan
            bad = (*args[:2], v_cache, *args[3:])
            o, _ = attend(bad, {**kwargs, **more})
            truth, _ = reference.paged_kv.attend(*bad, **kwargs, **more)
            assert torch.equal(o.isfinite(), truth.isfinite()), (more, token)
            assert torch.equal(o[o.isfinite()], clean[o.isfinite()]), (more, token)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_an_infinite_value_whose_weight_underflows_is_nan_in_every_chunk(head_dim, dtype, heads):
    """It was +inf where not all rows of a tile see the block, and 0 * inf = NaN where all do."""
    underflow = case("underflow", ((70, 70),), head_dim, heads=heads, kv_heads=1, dtype=dtype)
    args, kwargs = underflow.inputs()
    place = int(args[3][0, 0]), 3
    args[0].fill_(1.0)
    args[1][place] = -100.0
    args[2][place][:, 0] = math.inf
    o, _ = attend(args, kwargs)
    truth, _ = reference.paged_kv.attend(*args, **kwargs)
    assert truth[3:, :, 0].isnan().all()
    assert torch.equal(o.isnan(), truth.isnan())
    for first in (69, 61, 50):
        part, _ = alone(attend, args, kwargs, 0, first, 70)
        assert torch.equal(part.isnan(), o[first:].isnan())
        assert torch.equal(part.nan_to_num(), o[first:].nan_to_num())


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
def test_poisoned_keys_queries_and_scales_reach_what_depends_on_them(poison):
    poisoned = case("poison", ((9, 140), (1, 30)), heads=2, kv_heads=1, page_size=8)
    args, kwargs = poisoned.inputs()
    of_bytes, scaled = replace(poisoned, cache_dtype=torch.int8, scales="token").inputs()
    for token in (75, 135):
        place = int(args[3][0, token // 8]), token % 8
        k_cache = args[1].clone()
        k_cache[place] = poison
        calls = [((args[0], k_cache, *args[2:]), kwargs)]
        place = int(of_bytes[3][0, token // 8]), token % 8
        for name in ("k_scale", "v_scale"):
            scale = scaled[name].clone()
            scale[place] = math.nan
            calls.append((of_bytes, {**scaled, name: scale}))
        for bad, more in calls:
            actual, truth = attend(bad, more), reference.paged_kv.attend(*bad, **more)
            assert all(torch.equal(x.isfinite(), y.isfinite()) for x, y in zip(actual, truth, strict=True)), token
    q = args[0].clone()
    q[3, 1, 5] = poison
    assert attend((q, *args[1:]), kwargs)[0].isfinite().all(-1).logical_not().nonzero().tolist() == [[3, 1]]


def test_pages_behind_the_window_may_be_gone():
    args, kwargs = case("window", ((3, 700), (9, 300)), heads=2, page_size=4).inputs()
    kwargs["window"] = (50, 0)
    expected = attend(args, kwargs)
    for b, first in enumerate((700 - 3 - 50, 300 - 9 - 50)):
        args[3][b, : first // 4] = -1
    assert all(map(torch.equal, attend(args, kwargs), expected))


# ---- what the host cannot see ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [-1, 10**6, -(2**31)])
@pytest.mark.parametrize("page_size", [3, 16])
def test_keys_of_a_page_that_does_not_exist_are_zeros(page_size, page):
    args, kwargs = case("lie", ((1, 100), (9, 100)), heads=2, page_size=page_size).inputs()
    q, k_cache, v_cache, table, seqlens = args
    zeros = torch.zeros(1, *k_cache.shape[1:], dtype=k_cache.dtype)
    zero_page = torch.tensor([len(k_cache)], dtype=torch.int32)
    place = (slice(None), 1)
    table[place] = zero_page
    expected = attend((q, torch.cat([k_cache, zeros]), torch.cat([v_cache, zeros]), table.clone(), seqlens), kwargs)
    table[place] = page
    assert all(map(torch.equal, attend((q, k_cache, v_cache, table, seqlens), kwargs), expected))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (20, 1)])
@pytest.mark.parametrize("stored", [None, torch.int8], ids=str)
def test_queries_that_no_request_has_give_zeros(stored, heads, kv_heads):
    """What a graph is padded with; those rows were not written."""
    scales = "head" if stored else ""
    padded = case("padding", ((1, 520), (9, 30)), heads=heads, kv_heads=kv_heads, cache_dtype=stored, scales=scales)
    (q, *rest), kwargs = padded.inputs()
    sinks = torch.randn(heads)
    expected = attend((q, *rest), {**kwargs, "sinks": sinks})
    for before, after in ((0, 7), (3, 0), (2, 300)):
        padding = [q.new_full((n, heads, 64), math.nan) for n in (before, after)]
        prefix = kwargs["cu_seqlens_q"] + before
        inputs = (torch.cat([padding[0], q, padding[1]]), *rest)
        o, lse = attend(inputs, {**kwargs, "cu_seqlens_q": prefix, "sinks": sinks})
        own = slice(before, before + 10)
        assert torch.equal(o[own], expected[0])
        assert torch.equal(lse[:, own], expected[1])
        o[own], lse[:, own] = 0.0, -math.inf
        assert o.eq(0).all()
        assert lse.eq(-math.inf).all()
    nobody = (q, *rest[:2], rest[2][:0], rest[3][:0])
    o, lse = attend(nobody, {**kwargs, "cu_seqlens_q": torch.zeros(1, dtype=torch.int32)})
    assert o.eq(0).all()
    assert lse.eq(-math.inf).all()


@pytest.mark.parametrize("prefix", [[0, 5, 3, 12], [-7, 5, 9, 40], [0, 5, 2**31 - 1, 12], [-(2**31), 2**31 - 1, 0, 3]])
@pytest.mark.parametrize("lengths", [None, [2**31 - 1, -5, 200], [-(2**31), 0, 10**6]], ids=str)
def test_lengths_that_lie_reach_nothing_outside_the_tensors(prefix, lengths):
    import emulator

    hostile = case("hostile", ((1, 30), (9, 40), (2, 5)), heads=2, kv_heads=1)
    (q, k_cache, v_cache, table, seqlens), kwargs = hostile.inputs()
    kwargs["cu_seqlens_q"] = torch.tensor(prefix, dtype=torch.int32)
    seqlens = seqlens if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    reports = ()
    try:
        attend((q, k_cache, v_cache, table, seqlens), kwargs)
    except emulator.FaultError as error:
        reports = error.reports
    # Requests that overlap are written by several blocks, inside the tensors: that much, and nothing else, may happen.
    assert {report.fault for report in reports} <= {"race of blocks"}


def test_grids_and_memory_follow_from_shapes_alone():
    """So that a graph that was captured for one batch serves another."""
    import emulator

    args, _ = case("graph", ((1, 1100), (9, 40), (1, 5)), heads=2, kv_heads=1).inputs()
    launches = []
    for seqlens, prefix in (
        ([1100, 40, 5], [0, 1, 10, 11]),
        ([0, 0, 0], [0, 11, 11, 11]),
        ([3, 1100, 900], [0, 0, 9, 11]),
    ):
        inputs = (*args[:4], torch.tensor(seqlens, dtype=torch.int32))
        with emulator.watch(counters=True) as watched:
            attend(inputs, {"cu_seqlens_q": torch.tensor(prefix, dtype=torch.int32)})
        launches.append([(launch["name"], str(launch["grid"]), launch["dynamic_smem"]) for launch in watched.launches])
    assert launches[0] == launches[1] == launches[2]
    assert len(launches[0]) == 4


def test_what_no_copy_of_sixteen_bytes_takes_is_a_sentence():
    args, kwargs = case("aligned", ((1, 20),)).inputs()
    wide = torch.zeros(*args[1].shape[:-1], 68, dtype=args[1].dtype)[..., 1:65]
    with pytest.raises(RuntimeError, match="rows of k_cache must begin on 16-byte boundaries on CUDA"):
        attend((args[0], wide, *args[2:]), kwargs)
    args, kwargs = case("bytes", ((1, 20),), head_dim=24, cache_dtype=torch.int8, scales="head").inputs()
    with pytest.raises(RuntimeError, match="rows of k_cache must begin on 16-byte boundaries on CUDA, and end there"):
        attend(args, kwargs)


# ---- every barrier and every wait is needed, and seen to be missing --------------------------------------------------


def run_everything(seqlens, many, **fields):
    """Split and whole units, chunks, masked and plain blocks, values that are not finite; then more requests than a
    work list holds and more units than blocks, of which some see no key."""
    faulty = case("faulty", seqlens, kv_heads=1, **fields)
    args, kwargs = faulty.inputs()
    attend(args, kwargs)
    last = seqlens[0][1] - 2
    for place in ((int(args[3][0, 0]), 1), (int(args[3][0, last // 16]), last % 16)):
        args[2][place] = math.inf
    attend(args, kwargs)
    attend(*case("many", (many,) * 129, heads=16, kv_heads=16, page_size=1).inputs())
    attend(*case("late", (*((0, 3),) * 128, many), kv_heads=1, page_size=1).inputs())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("instance", "seqlens", "many", "heads", "vote"),
    [
        ("BFloat16ES3_Li64ELb0E", ((3, 1100),), (1, 3), 2, 15),
        ("BFloat16ES3_Li64ELb1E", ((67, 1100),), (17, 3), 1, 12),
    ],
    ids=["short", "tall"],
)
def test_every_barrier_and_wait_that_is_taken_out_is_reported(instance, seqlens, many, heads, vote):
    """`vote`: whether a page of the next chunk is missing. Where its rows begin is read behind the next barrier."""
    total, unseen = missing_synchronisations(
        "paged_kv_attend_kernel", instance, lambda: run_everything(seqlens, many, heads=heads)
    )
    assert total >= 12
    assert unseen == [vote]
