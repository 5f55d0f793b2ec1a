# SPDX-License-Identifier: Apache-2.0
"""integrations.flashinfer: every name against plain torch, with FlashInfer's arguments and its base-2 lse."""

import math

import pytest
import torch

from fmkernels import reference
from fmkernels.integrations import flashinfer
from fmkernels.testing import assert_as_good_as_torch

PAGE_SIZE, HEADS, KV_HEADS, HEAD_DIM = 4, 6, 2, 16
INDPTR = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)  # the second request has no pages
INDICES = torch.tensor([3, 0, 6, 2, 5, 1], dtype=torch.int32)
LAST = torch.tensor([1, 0, 4, 3], dtype=torch.int32)
LENGTHS = [5, 0, 12, 3]


def cache_of(layout, form):
    """The cache in the form, and keys and values of each request."""
    whole = torch.randn(7, 2, PAGE_SIZE, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    requests = []
    for begin, end, length in zip(INDPTR[:-1], INDPTR[1:], LENGTHS, strict=True):
        pages = whole[INDICES[begin:end].long()]
        requests.append([pages[:, side].flatten(0, 1)[:length] for side in range(2)])
    whole = whole if layout == "NHD" else whole.transpose(2, 3).contiguous()
    return (whole if form == "one" else (whole[:, 0].clone(), whole[:, 1].clone())), requests


def natural(q, requests, num_queries, **options):
    """reference.attention of each request, packed: o [tokens, heads, head_dim], and lse as FlashInfer gives it."""
    outputs = []
    for q_of_request, (k, v) in zip(q.split(num_queries), requests, strict=True):
        o, lse = reference.attention(q_of_request[None], k[None], v[None], **options)
        outputs.append((o[0], lse[0].t() / math.log(2)))
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def check(actual, q, requests, num_queries, **options):
    flat = [t for pair in requests for t in pair]

    def expected(q, *flat):
        return natural(q, list(zip(flat[::2], flat[1::2], strict=True)), num_queries, **options)

    assert_as_good_as_torch(actual, expected, q, *flat)


@pytest.mark.parametrize("form", ["one", "pair"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_decode(layout, form):
    cache, requests = cache_of(layout, form)
    q = torch.randn(4, HEADS, HEAD_DIM)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(8, dtype=torch.uint8), layout)
    wrapper.plan(INDPTR, INDICES, LAST, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, window_left=3, logits_soft_cap=2.0)
    o, lse = wrapper.run(q, cache, return_lse=True)
    check((o, lse), q, requests, 1, causal=True, window=(3, -1), softcap=2.0)
    assert lse[1].eq(-torch.inf).all()
    assert o[1].eq(0).all()
    out, lse_out = torch.empty_like(o), torch.empty_like(lse)
    assert wrapper.run(q, cache, out=out, lse=lse_out, return_lse=True) == (out, lse_out)
    assert torch.equal(out, o)
    assert torch.equal(lse_out, lse)


@pytest.mark.parametrize("causal", [False, True])
def test_prefill(causal):
    cache, requests = cache_of("NHD", "one")
    num_queries = [2, 1, 7, 3]
    q = torch.randn(13, HEADS, HEAD_DIM)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(None)
    qo_indptr = torch.tensor([0, 2, 3, 10, 13], dtype=torch.int32)
    plan = (qo_indptr, INDPTR, INDICES, LAST, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE)
    wrapper.plan(*plan, causal=causal, sm_scale=0.3)
    check(wrapper.run(q, cache, return_lse=True), q, requests, num_queries, causal=causal, softmax_scale=0.3)
    o = wrapper.run(q, cache, q_scale=0.5, k_scale=2.0, v_scale=0.25)
    assert torch.equal(o, wrapper.run(q, cache) * 0.25)


def test_append_and_its_helpers():
    lengths = flashinfer.get_seq_lens(INDPTR, LAST, PAGE_SIZE)
    assert lengths.tolist() == LENGTHS
    append_indptr = torch.tensor([0, 2, 2, 5, 8], dtype=torch.int32)
    batch_indices, positions = flashinfer.get_batch_indices_positions(append_indptr, lengths, 8)
    assert batch_indices.tolist() == [0, 0, 2, 2, 2, 3, 3, 3]
    assert positions.tolist() == [3, 4, 9, 10, 11, 0, 1, 2]
    assert (batch_indices.dtype, positions.dtype) == (torch.int32, torch.int32)
    key, value = torch.randn(2, 8, KV_HEADS, HEAD_DIM)
    for layout, form in (("NHD", "one"), ("HND", "pair")):
        before, _ = cache_of(layout, form)
        cache, _ = cache_of(layout, form)
        flashinfer.append_paged_kv_cache(
            key, value, batch_indices, positions, cache, INDICES, INDPTR, LAST, kv_layout=layout
        )
        pairs = [t.unbind(1) if form == "one" else t for t in (before, cache)]
        for new, old, changed in zip((key, value), *pairs, strict=True):
            wanted = old.clone() if layout == "NHD" else old.transpose(1, 2).clone()
            for token, place in enumerate([(3, 3), (0, 0), (5, 1), (5, 2), (5, 3), (1, 0), (1, 1), (1, 2)]):
                wanted[place] = new[token]
            assert torch.equal(changed if layout == "NHD" else changed.transpose(1, 2), wanted)


def test_positions_without_a_page():
    cache, _ = cache_of("NHD", "one")
    before = cache.clone()
    x = torch.zeros(1, KV_HEADS, HEAD_DIM)
    for request, position in ((0, 8), (1, 0), (3, -1), (4, 0), (-1, 0)):
        where = [torch.tensor([i], dtype=torch.int32) for i in (request, position)]
        with pytest.raises(ValueError, match=f"got position {position} of request {request}"):
            flashinfer.append_paged_kv_cache(x, x, *where, cache, INDICES, INDPTR, LAST)
    assert torch.equal(cache, before)


def test_pages_that_kv_indptr_names_and_kv_indices_has_not():
    """The token went to the last page there is, which is another request's."""
    cache, _ = cache_of("NHD", "one")
    before, x = cache.clone(), torch.zeros(1, KV_HEADS, HEAD_DIM)
    where = [torch.tensor([i], dtype=torch.int32) for i in (3, 5)]
    for indptr in ([0, 2, 2, 5, 8], [-9, -9, -9, -9, 8]):
        with pytest.raises(ValueError, match="got position 5 of request 3"):
            flashinfer.append_paged_kv_cache(x, x, *where, cache, INDICES, torch.tensor(indptr), LAST)
    assert torch.equal(cache, before)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_single_requests(layout):
    _, requests = cache_of("NHD", "one")
    k, v = requests[2]
    given = (k, v) if layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    q = torch.randn(5, HEADS, HEAD_DIM)
    actual = flashinfer.single_prefill_with_kv_cache(q, *given, causal=True, kv_layout=layout, return_lse=True)
    check(actual, q, [(k, v)], 5, causal=True)
    mask = torch.rand(5, 12) < 0.5
    bias = torch.zeros(5, 12).masked_fill(~mask, -torch.inf)[None, None]
    masked = flashinfer.single_prefill_with_kv_cache(q, *given, custom_mask=mask, kv_layout=layout, return_lse=True)
    check(masked, q, [(k, v)], 5, bias=bias)
    o, lse = flashinfer.single_decode_with_kv_cache(q[4], *given, layout, window_left=6, return_lse=True)
    check((o[None], lse[None]), q[4:], [(k, v)], 1, window=(6, -1))
    scaled = flashinfer.single_decode_with_kv_cache(q[4], *given, layout, q_scale=2.0, k_scale=0.5, v_scale=4.0)
    assert torch.equal(scaled, 4 * flashinfer.single_decode_with_kv_cache(q[4], *given, layout))


def test_merges():
    v = torch.randn(7, 3, HEADS, HEAD_DIM)
    s = torch.randn(7, 3, HEADS) * 3
    s[2, 0] = s[3] = -torch.inf

    def expected(v, s):
        weights = torch.exp2(s - torch.logsumexp(s * math.log(2), 1, keepdim=True) / math.log(2))
        weights = torch.where(s.eq(-torch.inf), 0, weights)
        total = torch.logsumexp(s * math.log(2), 1) / math.log(2)
        return (v * weights[..., None]).sum(1), total

    whole = flashinfer.merge_states(v, s)
    assert_as_good_as_torch(whole, expected, v, s)
    first = flashinfer.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    assert_as_good_as_torch(first, expected, v[:, :2], s[:, :2])
    mask = torch.rand(7) < 0.5
    v_own, s_own = v[:, 0].clone(), s[:, 0].clone()
    flashinfer.merge_state_in_place(v_own, s_own, v[:, 1], s[:, 1], mask)
    assert torch.equal(v_own, torch.where(mask[:, None, None], first[0], v[:, 0]))
    assert torch.equal(s_own, torch.where(mask[:, None], first[1], s[:, 0]))


def test_norms():
    x, residual, weight = torch.randn(7, 40), torch.randn(7, 40), torch.randn(40)
    y = flashinfer.rmsnorm(x, weight, 1e-5)
    assert_as_good_as_torch(y, lambda x, w: torch.nn.functional.rms_norm(x, (40,), w, 1e-5), x, weight)
    out = torch.empty_like(x)
    assert flashinfer.rmsnorm(x, weight, 1e-5, out=out) is out
    normed, summed = x.clone(), residual.clone()
    flashinfer.fused_add_rmsnorm(normed, summed, weight, 1e-5)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, flashinfer.rmsnorm(summed, weight, 1e-5))


PLAN = (INDPTR, INDICES, LAST, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE)
ROTARY = "pos_encoding_mode must be NONE: rotate q and k before, got 'ROPE_LLAMA'."


def test_errors():
    cache, _ = cache_of("NHD", "one")
    q = torch.randn(4, HEADS, HEAD_DIM)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(None)
    name = "BatchDecodeWithPagedKVCacheWrapper"
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(None)
    calls = [
        (lambda: decode.run(q, cache), f"{name}: plan must come before run."),
        (lambda: decode.plan(*PLAN, "ROPE_LLAMA"), f"{name}: {ROTARY}"),
        (
            lambda: decode.plan(*PLAN, rope_theta=1e4),
            f"{name}: rope_theta must be None: it is not supported, got float.",
        ),
        (
            lambda: flashinfer.single_prefill_with_kv_cache(q, q, q, scale_v=torch.nan),
            "single_prefill_with_kv_cache: scale_v must be finite in float32, got nan.",
        ),
        (lambda: type(decode)(None, "HDN"), f"{name}: kv_layout must be NHD or HND, got 'HDN'."),
        (
            lambda: type(decode)(None, "NHD", True),
            f"{name}: use_cuda_graph must be False: capture paged_kv.attend itself, got True.",
        ),
        (
            lambda: prefill.plan(INDPTR, *PLAN, custom_mask=q),
            "BatchPrefillWithPagedKVCacheWrapper: custom_mask must be None: it is not supported, got Tensor.",
        ),
        (
            lambda: flashinfer.single_decode_with_kv_cache(q[0], q, q, pos_encoding_mode="ROPE_LLAMA"),
            f"single_prefill_with_kv_cache: {ROTARY}",
        ),
        (
            lambda: flashinfer.merge_states(q[:, None][:, :0], q),
            "merge_states: v must have at least 1 state, got 0.",
        ),
    ]
    for call, sentence in calls:
        with pytest.raises(ValueError, match=r"\.$") as raised:
            call()
        assert str(raised.value) == sentence
    decode.plan(*PLAN)
    overlaps = "is written and must have a place for each element, got stride 0 in dimension 1."
    for given, sentence in (
        ({"out": torch.empty(4, HEADS, 1)}, "out must have the shape of the result, [4, 6, 16], got [4, 6, 1]."),
        ({"out": torch.empty(5, 4, HEADS, HEAD_DIM)},
         "out must have the shape of the result, [4, 6, 16], got [5, 4, 6, 16]."),
        ({"out": q.half()}, "out must have the dtype of the result, float32, got float16."),
        ({"out": q[:, :1].expand(4, HEADS, HEAD_DIM)}, f"out {overlaps}"),
        ({"lse": torch.empty(5, 4, HEADS)}, "lse must have the shape of the result, [4, 6], got [5, 4, 6]."),
        ({"lse": torch.empty(4, HEADS).double()}, "lse must have the dtype of the result, float32, got float64."),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"\.$") as raised:
            decode.run(q, cache, return_lse=True, **given)
        assert str(raised.value) == f"{name}: {sentence}"
    with pytest.raises(ValueError, match=f"merge_state_in_place: s {overlaps}"):
        flashinfer.merge_state_in_place(q, q[:, :1, 0].expand(4, HEADS), q, q[:, :, 0])
    with pytest.raises(ValueError, match=f"{name}: num_qo_heads must be that of plan, 6, got 5."):
        decode.run(q[:, :5], cache)
    with pytest.raises(TypeError, match="paged_kv_cache must be a tensor or a pair of them, got str"):
        decode.run(q, "cache")


def test_a_plan_that_fails_leaves_the_one_before():
    """It was mixed of both, and run gave numbers of neither."""
    cache, _ = cache_of("NHD", "one")
    q = torch.randn(4, HEADS, HEAD_DIM)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(None)
    wrapper.plan(*PLAN)
    o = wrapper.run(q, cache)
    for wrong in (
        (INDPTR, INDICES[:3], LAST, HEADS + 1, KV_HEADS, HEAD_DIM, PAGE_SIZE),
        (INDPTR, INDICES, LAST[:3], HEADS + 1, KV_HEADS, HEAD_DIM, PAGE_SIZE),
        (INDPTR, INDICES.flip(0), LAST, HEADS, KV_HEADS, "16", PAGE_SIZE),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            wrapper.plan(*wrong)
        assert torch.equal(wrapper.run(q, cache), o)
