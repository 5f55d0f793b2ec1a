# SPDX-License-Identifier: Apache-2.0
"""paged_kv.attend on the CPU: values against the definition, and that nothing else decides the bits of a row."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from paged_cases import PagedCase, alone, options

from fmkernels import attention, paged_kv, reference
from fmkernels.testing import assert_as_good_as_torch, backends

CPU = next(backend for backend in backends("paged_kv_attend") if backend.name == "cpu")

CASES = [
    PagedCase("mixed batch"),
    PagedCase("pages of one token", page_size=1),
    PagedCase("odd pages", page_size=7, hnd=True),
    PagedCase("long pages", page_size=64, head_dim=64, v_head_dim=64),
    PagedCase("other values", page_size=32, v_head_dim=40, kv_heads=1, heads=9),
    PagedCase("one head each", heads=3, kv_heads=3, dtype=torch.bfloat16, hnd=True),
    PagedCase("half", dtype=torch.float16, head_dim=24, heads=6),
    PagedCase("short cache of long queries", cache_dtype=torch.bfloat16),
    PagedCase("float8 without a scale", dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn),
    *(
        PagedCase(f"{str(dtype)[6:]} by {scales}", dtype=torch.bfloat16, cache_dtype=dtype, scales=scales, hnd=hnd)
        for (dtype, scales), hnd in zip(
            itertools.product((torch.float8_e4m3fn, torch.int8), ("tensor", "head", "token")),
            itertools.cycle((False, True)),
            strict=False,
        )
    ),
    PagedCase("chunks", seqlens=((1, 1100), (40, 530), (2, 512), (1, 513)), heads=3, kv_heads=1, page_size=32),
    PagedCase("nothing to ask", seqlens=((0, 20), (1, 5), (0, 0))),
    PagedCase("more queries than tokens", seqlens=((4, 2), (40, 3), (1, 1))),
    PagedCase("no requests", seqlens=()),
]


def attend(args, kwargs):
    return CPU.run(paged_kv.attend, *args, **kwargs, return_lse=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_matches_its_definition(case):
    args, kwargs = case.inputs()
    if not case.seqlens:
        assert [t.shape for t in attend(args, kwargs)] == [(0, 4, 16), (4, 0)]
        return
    every = options(case)
    for index, more in enumerate(every if case.name == "mixed batch" else every[1:2]):
        actual = attend(args, {**kwargs, **more})
        if index > 1:  # lse has few elements, for which torch's own error takes many runs to know

            def o_alone(*inputs, **options):
                return reference.paged_kv.attend(*inputs, **options)[0]

            assert_as_good_as_torch(actual[0], o_alone, *args, **kwargs, **more)
        else:
            assert_as_good_as_torch(actual, reference.paged_kv.attend, *args, **kwargs, **more)


def test_one_query_a_request_needs_no_prefix_sums():
    args, kwargs = PagedCase("decode", seqlens=((1, 40), (1, 7), (1, 600))).inputs()
    assert all(map(torch.equal, attend(args, kwargs), attend(args, {})))


def test_a_paged_cache_is_the_contiguous_one():
    """attention over what the pages hold, to its accuracy: the two add up in different orders."""
    case = PagedCase("contiguous", seqlens=((20, 150),), page_size=7)
    args, kwargs = case.inputs()
    k, v = (paged_kv.gather(cache, args[3], torch.tensor([0, 150], dtype=torch.int32), 150) for cache in args[1:3])

    def dense(q, k, v):
        return reference.attention(q[None], k[None], v[None], causal=True)[0][0]

    assert_as_good_as_torch(attend(args, kwargs)[0], dense, args[0], k, v)
    assert_as_good_as_torch(attention_of(args[0], k, v), dense, args[0], k, v)


def attention_of(q, k, v):
    try:
        return attention(q[None], k[None], v[None], causal=True)[0]
    except RuntimeError as error:  # a build without the room of attention
        pytest.skip(str(error).splitlines()[0])


# ---- the bits of a row -----------------------------------------------------------------------------------------------

INVARIANT = [
    PagedCase("fp32", seqlens=((70, 640), (1, 1500), (9, 9)), heads=6, head_dim=64, v_head_dim=64),
    PagedCase("bf16", seqlens=((70, 640), (1, 1500), (9, 9)), heads=3, kv_heads=1, dtype=torch.bfloat16, v_head_dim=24),
    PagedCase("int8", seqlens=((70, 640), (9, 130)), cache_dtype=torch.int8, scales="token"),
    PagedCase("fp8", seqlens=((70, 640), (9, 130)), cache_dtype=torch.float8_e4m3fn, scales="head", page_size=5),
]


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_chunks_of_a_prefill_and_neighbours_change_no_bits(case):
    """Token by token, in chunks of any length, by itself or among others: a row comes out the same."""
    args, kwargs = case.inputs()
    for more in options(case):
        if "tree_mask" in more or more.get("causal") is False:
            continue  # there a query sees tokens after its own
        both = {**kwargs, **more}
        o, lse = attend(args, both)
        for request, (seq_q, _) in enumerate(case.seqlens):
            start = sum(q for q, _ in case.seqlens[:request])
            cuts = sorted({0, 1, 2, 5, 9, 33, 69, seq_q} & set(range(seq_q + 1)))
            for first, last in [*itertools.pairwise(cuts), (0, seq_q)]:
                part = alone(attend, args, both, request, first, last)
                assert torch.equal(part[0], o[start + first : start + last]), (more, request, first, last)
                assert torch.equal(part[1], lse[:, start + first : start + last])


@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_a_request_alone_has_the_bits_it_has_among_others(case):
    args, kwargs = case.inputs()
    for more in options(case):
        both = {**kwargs, **more}
        o, _ = attend(args, both)
        for request, (seq_q, _) in enumerate(case.seqlens):
            start = sum(q for q, _ in case.seqlens[:request])
            assert torch.equal(alone(attend, args, both, request, 0, seq_q)[0], o[start : start + seq_q]), (
                more,
                request,
            )


def test_page_size_layout_and_threads_change_no_bits():
    case = PagedCase("pages", seqlens=((1, 700), (30, 90), (3, 600)), heads=6, dtype=torch.bfloat16)
    args, kwargs = case.inputs()
    expected = attend(args, kwargs)
    seqlens = args[4]
    cu_seqlens = torch.cat([torch.zeros(1), seqlens.cumsum(0)]).to(torch.int32)
    total = int(cu_seqlens[-1])
    tokens = [paged_kv.gather(cache, args[3], cu_seqlens, total) for cache in args[1:3]]
    for page_size, hnd in ((1, False), (5, True), (16, True), (64, False), (700, True)):
        other = replace(case, page_size=page_size, hnd=hnd)
        empty = other.inputs()[0]
        slots = torch.cat(
            [
                empty[3][b, t // page_size].long() * page_size + t % page_size
                for b, t in enumerate(map(torch.arange, seqlens.tolist()))
            ]
        )
        paged_kv.append(*tokens, empty[1], empty[2], slots)
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            assert all(map(torch.equal, attend((args[0], *empty[1:]), kwargs), expected))


# ---- what reaches a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("seq_q", [2, 40])
def test_a_poisoned_token_reaches_the_rows_that_see_it(seq_q, poison):
    case = PagedCase("poison", seqlens=((seq_q, 200), (1, 30)), heads=2, kv_heads=1, page_size=8)
    args, kwargs = case.inputs()
    for more in ({}, {"window": (60, 0)}, {"tree_mask": torch.full((seq_q + 1, 2), 0x55555555, dtype=torch.int32)}):
        clean, _ = attend(args, {**kwargs, **more})
        for token in (0, 127, 128, 139, 140, 163, 170, 198, 199):
            k_cache, v_cache = args[1].clone(), args[2].clone()
            place = (int(args[3][0, token // 8]), token % 8)
            k_cache[place] = v_cache[place] = poison
            bad = (args[0], k_cache, v_cache, *args[3:])
            o, _ = attend(bad, {**kwargs, **more})
            truth, _ = reference.paged_kv.attend(*bad, **kwargs, **more)
            assert torch.equal(o.isfinite(), truth.isfinite()), (more, token)
            assert torch.equal(o[o.isfinite()], clean[o.isfinite()]), (more, token)


def test_pages_behind_the_window_may_be_gone():
    case = PagedCase("window", seqlens=((3, 700), (40, 300)), page_size=4)
    args, kwargs = case.inputs()
    kwargs["window"] = (50, 0)
    expected = attend(args, kwargs)
    for b, (seq_q, seq_k) in enumerate(case.seqlens):
        args[3][b, : (seq_k - seq_q - 50) // 4] = -1
    assert all(map(torch.equal, attend(args, kwargs), expected))


def test_a_tree_is_each_of_its_paths():
    """Tokens 0 to 6 of a draft as the tree 0 -> (1 -> (2, 3), 4 -> 5 -> 6): every path alone gives the same."""
    parents = [-1, 0, 1, 1, 0, 4, 5]
    case = PagedCase("tree", seqlens=((7, 90),), page_size=4)
    args, kwargs = case.inputs()
    paths = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    kwargs["tree_mask"] = torch.tensor([[sum(1 << n for n in path)] for path in paths], dtype=torch.int32)
    o, lse = attend(args, kwargs)
    tokens = [paged_kv.gather(cache, args[3], torch.tensor([0, 90], dtype=torch.int32), 90) for cache in args[1:3]]
    for node, path in enumerate(paths):
        kept = torch.tensor([*range(83), *(83 + n for n in path)])

        def alone(q, k, v, kept=kept):
            o, lse = reference.attention(q[None], k[None, kept], v[None, kept])
            return o[0], lse[0]

        assert_as_good_as_torch((o[node : node + 1], lse[:, node : node + 1]), alone, args[0][node : node + 1], *tokens)


def test_more_queries_than_the_words_of_the_tree_mask_are_causal_there():
    case = PagedCase("wide", seqlens=((50, 90),))
    args, kwargs = case.inputs()
    narrow = torch.full((50, 1), -1, dtype=torch.int32)
    expected = attend(args, kwargs)
    assert all(map(torch.equal, attend(args, {**kwargs, "tree_mask": narrow}), expected))
    assert all(map(torch.equal, attend(args, {**kwargs, "tree_mask": narrow[:, :0]}), expected))


@pytest.mark.parametrize("seqlens", [((1, 30), (1, 5), (1, 200)), ((9, 30), (1, 5))], ids=str)
def test_a_shared_prefix_is_attended_to_once_for_all(seqlens):
    """Against attention over the prefix and the rest of each request together."""
    case = PagedCase("rest", seqlens=(*seqlens, (0, 140)), heads=6)
    args, kwargs = case.inputs()
    q, k_cache, v_cache, table, lengths = args
    cu_seqlens_q = kwargs["cu_seqlens_q"][:-1].clone()
    pages, seqlen = table[-1], lengths[-1:]
    options = {"cu_seqlens_q": cu_seqlens_q, "sinks": torch.randn(6), "softcap": 4.0}
    shared = (q, k_cache, v_cache, pages, seqlen, table[:-1], lengths[:-1])
    actual = CPU.run(paged_kv.attend_shared_prefix, *shared, **options, return_lse=True)
    assert torch.equal(CPU.run(paged_kv.attend_shared_prefix, *shared, **options), actual[0])
    assert_as_good_as_torch(actual, reference.paged_kv.attend_shared_prefix, *shared, **options)
    whole_pages = PagedCase("prefix of whole pages", seqlens=(*seqlens, (0, 144)), heads=6)
    args, kwargs = whole_pages.inputs()
    q, k_cache, v_cache, table, lengths = args
    joined = torch.cat([table[-1, :9].expand(len(seqlens), -1), table[:-1]], dim=1)
    whole = (q, k_cache, v_cache, joined, lengths[:-1] + 144)
    shared = (q, k_cache, v_cache, table[-1], lengths[-1:], table[:-1], lengths[:-1])
    actual = CPU.run(paged_kv.attend_shared_prefix, *shared, **options, return_lse=True)
    assert_as_good_as_torch(actual, reference.paged_kv.attend, *whole, **options)
