# SPDX-License-Identifier: Apache-2.0
"""paged_kv: append, gather, the copies of pages and the page table; attend is in test_paged_kv_attend.py."""

import math

import pytest
import torch
from paged_cases import QUANTIZED, ids

from fmkernels import paged_kv, reference
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("paged_kv_append")
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)
STORED = [(dtype, dtype, "none") for dtype in FLOATS]
STORED += [(torch.bfloat16, stored, kind) for stored in QUANTIZED for kind in ("tensor", "head", "token")]
STORED += [(torch.float32, torch.int8, "token"), (torch.float16, torch.float8_e4m3fn, "none")]


def same(a, b):
    """Equal to the bit, the sign of zero included; NaN is NaN."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    is_nan = a.float().isnan()
    return torch.equal(is_nan, b.float().isnan()) and torch.equal(a.view(bits)[~is_nan], b.view(bits)[~is_nan])


def caches(num_pages, page_size, kv_heads, dims, dtype, hnd=False):
    """Zeros, in which what was not written is seen."""

    def cache(dim):
        empty = torch.zeros(num_pages, kv_heads, page_size, dim).to(dtype).transpose(1, 2)
        return empty if hnd else empty.contiguous()

    return [cache(dim) for dim in dims]


def scales_of(kind, dtype, num_pages, page_size, kv_heads):
    if dtype not in QUANTIZED or kind == "none":
        return {}
    shapes = {"tensor": (), "head": (kv_heads,), "token": (num_pages, page_size, kv_heads)}
    return {name: torch.rand(shapes[kind]) * 0.02 + 0.01 for name in ("k_scale", "v_scale")}


# ---- append ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize(("dtype", "stored", "kind"), STORED, ids=str)
def test_append_stores_what_the_definition_stores(dtype, stored, kind, backend):
    """To the bit: without a rotation there is one rounding."""
    num_tokens, kv_heads, page_size, num_pages, hnd = 13, 3, 5, 4, kind == "head"
    k, v = torch.randn(num_tokens, kv_heads, 24).to(dtype) * 2, torch.randn(num_tokens, kv_heads, 40).to(dtype)
    k[3, 1] = 0.0
    v[4, 0, 5], v[5, 1, 7], k[6, 2, 3], k[7, 0, 0], k[8, 0, 1] = math.inf, math.nan, -math.inf, 1e4, 1e-6
    slots = torch.randperm(num_pages * page_size)[:num_tokens]
    slots[2] = -1
    expected = caches(num_pages, page_size, kv_heads, (24, 40), stored, hnd)
    expected_scales = scales_of(kind, stored, num_pages, page_size, kv_heads)
    actual, scales = [t.clone() for t in expected], {name: t.clone() for name, t in expected_scales.items()}
    reference.paged_kv.append(k, v, *expected, slots, **expected_scales)
    strided = torch.cat([k, k], dim=-1)[..., :24]
    backend.run(paged_kv.append, strided, v, *actual, slots, **scales)
    assert all(map(same, actual, expected))
    assert all(same(scales[name], expected_scales[name]) for name in scales)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [32, 16, 20, 2])
def test_append_rotates_keys_and_queries(rotary_dim, interleaved, dtype, backend):
    num_tokens, kv_heads, heads = 9, 2, 6
    k, v, q = (torch.randn(num_tokens, h, 32).to(dtype) for h in (kv_heads, kv_heads, heads))
    angles, positions = torch.randn(50, rotary_dim // 2) * 3, torch.randint(50, (num_tokens,))
    cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(20)[:num_tokens]
    slots[4] = -7
    k_cache, v_cache = caches(5, 4, kv_heads, (32, 32), dtype)
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "positions": positions, "interleaved": interleaved}
    rotated_q = q.clone()
    backend.run(paged_kv.append, k, v, k_cache, v_cache, slots, q=rotated_q, **rotary)

    def rotate(x, cos, sin):
        return reference.paged_kv.rotate(x, cos[positions], sin[positions], interleaved)

    written = slots >= 0
    assert_as_good_as_torch(rotated_q, rotate, q, cos, sin)
    stored_k, stored_v = (cache.flatten(0, 1)[slots[written]] for cache in (k_cache, v_cache))
    assert_as_good_as_torch(stored_k, lambda *args: rotate(*args)[written], k, cos, sin)
    assert torch.equal(stored_v, v[written])
    assert torch.equal(rotated_q[..., rotary_dim:], q[..., rotary_dim:])
    assert torch.equal(stored_k[..., rotary_dim:], k[written][..., rotary_dim:])


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("stored", QUANTIZED, ids=str)
def test_round_trips_keep_their_bound(stored, backend):
    """Half a step: of int8 1/127 of the largest, of e4m3 1/16 of the number, or a subnormal."""
    k = torch.randn(40, 2, 64)
    cache, scale = torch.zeros(10, 4, 2, 64).to(stored), torch.zeros(10, 4, 2)
    backend.run(paged_kv.append, k, k, cache, cache.clone(), torch.arange(40), k_scale=scale, v_scale=scale.clone())
    table = torch.arange(10, dtype=torch.int32)[None]
    back = backend.run(paged_kv.gather, cache, table, torch.tensor([0, 40], dtype=torch.int32), 40, scale=scale)
    largest = k.abs().amax(-1, keepdim=True)
    steps = {torch.int8: largest / 254, torch.float8_e4m3fn: torch.maximum(k.abs() / 16, largest / 448 * 2.0**-10)}
    bound = steps[stored]
    assert ((back - k).abs() <= bound * 1.0001).all()


# ---- gather ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("stored", [*FLOATS, *QUANTIZED], ids=str)
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_gather_is_the_definition(page_size, stored, backend):
    lengths, kv_heads, dim = [0, 17, 5, 0, 16], 2, 24
    (cache,) = caches(40, page_size, kv_heads, (dim,), stored, hnd=page_size == 3)
    cache.copy_(torch.randn(cache.shape).mul(9).to(stored))
    table = torch.randperm(40)[: 5 * (16 // page_size + 1)].view(5, -1) if page_size > 1 else torch.randint(40, (5, 17))
    table = table.to(torch.int32)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    for kind in ("none", "tensor", "head", "token") if stored == torch.float8_e4m3fn else ("token",):
        scale = scales_of(kind, stored, 40, page_size, kv_heads).get("k_scale")
        for dtype in (None, torch.float16):
            args, kwargs = (cache, table, cu_seqlens, sum(lengths)), {"scale": scale, "dtype": dtype}
            assert torch.equal(
                backend.run(paged_kv.gather, *args, **kwargs), reference.paged_kv.gather(*args, **kwargs)
            )
    nothing = backend.run(paged_kv.gather, cache, table[:0], cu_seqlens[:1], 0, scale=scale)
    assert nothing.shape == (0, kv_heads, dim)


# ---- pages -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "pages": lambda: torch.randn(9, 4, 2, 16),
    "heads first": lambda: torch.randn(9, 2, 4, 16).transpose(1, 2),
    "bytes": lambda: torch.randint(-100, 100, (9, 3, 2, 8), dtype=torch.int8),
    "odd bytes": lambda: torch.randint(-100, 100, (9, 3, 2, 5), dtype=torch.int8)[..., :3],
    "keys and values": lambda: torch.randn(9, 2, 4, 2, 16).bfloat16(),
    "scales": lambda: torch.randn(9, 4, 3),
    "a part of every page": lambda: torch.randn(9, 8, 2, 16)[:, 2:5],
    "one column": lambda: torch.randn(9, 1),
    "no rows": lambda: torch.zeros(9, 0, 7, 6, 6)[:, :, :6:2, ::2, ::2],  # read a null address once
}


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_copied_swapped_and_compacted(layout, backend):
    cache = LAYOUTS[layout]()

    def copy(t):
        """With its strides, which clone() does not keep."""
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)

    def both(name, *args):
        actual, expected = ([copy(t) for t in args] for _ in range(2))
        assert backend.run(getattr(paged_kv, name), *actual) is None
        getattr(reference.paged_kv, name)(*expected)
        assert all(map(torch.equal, actual, expected))
        return actual

    both("copy_pages", cache, ids(3, 3, 0), ids(1, 8, 7))
    both("compact", cache, ids(0, 2, 3, 5, 6, 8))
    both("compact", cache, torch.arange(9, dtype=torch.int32))
    buffer = torch.zeros(4, *cache.shape[1:], dtype=cache.dtype)
    *_, swapped = both("swap_out", cache, ids(5, 0, 5), buffer)
    both("swap_in", cache, ids(2, 8, 1), swapped)
    for name, args in (("copy_pages", (ids(), ids())), ("compact", (ids(),)), ("swap_out", (ids(), buffer[:0]))):
        both(name, cache, *args)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("lists", [[[4, 2], [], [7, 1, 3]], [[]], []], ids=str)
def test_page_table_from_csr(lists, backend):
    indptr = torch.tensor([0, *map(len, lists)]).cumsum(0).to(torch.int32)
    indices = ids(*(page for pages in lists for page in pages))
    for max_pages in (3, 5) if lists != [[]] else (0, 2):
        table = backend.run(paged_kv.page_table_from_csr, indptr, indices, max_pages=max_pages)
        assert table.tolist() == [pages + [-1] * (max_pages - len(pages)) for pages in lists]
        assert torch.equal(table, reference.paged_kv.page_table_from_csr(indptr, indices, max_pages=max_pages))


def test_a_round_trip_over_every_function():
    """Known answer: two requests share a page, one is forked by copy on write, swapped out, compacted and read back."""
    k = torch.arange(6.0)[:, None, None].expand(6, 1, 8).contiguous()
    k_cache, v_cache = caches(5, 2, 1, (8, 8), torch.float32)
    paged_kv.append(k, -k, k_cache, v_cache, torch.tensor([2, 3, 8, 9, 6, -1]))  # pages 1, 4 and 3
    assert k_cache[:, :, 0, 0].tolist() == [[0, 0], [0, 1], [0, 0], [4, 0], [2, 3]]
    for cache in (k_cache, v_cache):
        paged_kv.copy_pages(cache, ids(3), ids(0))
        buffer = torch.zeros(1, *cache.shape[1:])
        paged_kv.swap_out(cache, ids(4), buffer)
        cache[4] = math.nan
        paged_kv.swap_in(cache, ids(2), buffer)
        paged_kv.compact(cache, ids(1, 2, 3))
    assert k_cache[:3, :, 0, 0].tolist() == [[0, 1], [2, 3], [4, 0]]
    tokens = paged_kv.gather(v_cache, ids(0, 1, 2)[None], ids(0, 5), 5)
    assert tokens[:, 0, 0].tolist() == [0, -1, -2, -3, -4]


# ---- what the host cannot see ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.has_tensor_cores], ids=str)
def test_gather_gives_zeros_for_tokens_that_no_request_has(backend):
    """They were read on, from the pages of the last request."""
    from fmkernels._library import ops

    cache, table = torch.randn(9, 4, 2, 16), torch.arange(8, dtype=torch.int32).view(2, 4)
    args = (table, ids(2, 5, 10), 16, None, torch.float32)
    tokens = backend.run(lambda: ops.paged_kv_gather(cache, *args))
    assert torch.equal(tokens[2:10], torch.cat([cache[0, :3], cache[4], cache[5, :1]]))
    assert tokens[:2].eq(0).all()
    assert tokens[10:].eq(0).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.has_tensor_cores], ids=str)
def test_ids_out_of_range_touch_nothing_outside(backend):
    """On a GPU such writes do not happen, such reads are zeros; the emulator reports any access outside the tensors."""
    from fmkernels._library import ops

    hostile = [-(2**31), -1, 9, 2**31 - 1]
    cache, page_ids = torch.randn(9, 4, 2, 16), ids(*hostile)
    before = cache.clone()
    run = lambda name, *args: backend.run(lambda: getattr(ops, f"paged_kv_{name}")(*args))  # noqa: E731
    run("copy_pages", cache, page_ids, ids(0, 1, 2, 3))
    run("copy_pages", cache, ids(0, 1, 2, 3), page_ids)
    run("swap_in", cache, page_ids, torch.randn(4, 4, 2, 16))
    buffer = torch.ones(4, 4, 2, 16)
    run("swap_out", cache, page_ids, buffer)
    run("compact", cache, page_ids)
    assert (buffer == 1).all()
    slots = torch.tensor([-(2**63), -1, 36, 2**63 - 1, 2**32])
    k = torch.randn(5, 2, 16)
    angles = torch.zeros(3, 8)
    positions = torch.tensor([-1, 3, 2**62, -(2**63), 1])
    run("append", k, k, cache, cache.clone(), slots, None, None, k.clone(), angles, angles, positions, False)
    assert torch.equal(cache, before)
    for prefix in ([0, 5, 9], [-7, 3, 12], [0, 2**31 - 1, 9], [9, 4, -(2**31)], [5, 5, 5]):
        tokens = run("gather", cache, ids(*hostile, 0, 1, 2, 3).view(2, 4), ids(*prefix), 9, None, torch.float32)
        assert tokens.isfinite().all()
    for indptr in ([0, 5, 9], [-7, 3, 12], [0, 2**31 - 1, 9], [9, 4, -(2**31)]):
        table = run("page_table_from_csr", ids(*indptr), ids(1, 2, 3), 4)
        assert set(table.flatten().tolist()) <= {-1, 1, 2, 3}
