# SPDX-License-Identifier: Apache-2.0
"""integrations.vllm: every name against plain torch, in vLLM's order of arguments."""

import pytest
import torch

from fmkernels import attention_varlen, reference
from fmkernels.integrations import vllm
from fmkernels.testing import assert_as_good_as_torch

BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 16, 6, 2, 16


def paged_batch(dtype=torch.float32):
    """Three requests of 5, 40 and 17 tokens, of which the last 5, 1 and 3 are queries; pages in no order."""
    generator = torch.Generator().manual_seed(0)
    caches = torch.randn(2, 9, BLOCK_SIZE, KV_HEADS, HEAD_DIM, generator=generator).to(dtype)
    q = torch.randn(9, HEADS, HEAD_DIM, generator=generator).to(dtype)
    table = torch.tensor([[4, 0, 0], [7, 2, 5], [1, 8, 0]], dtype=torch.int32)
    seqused = torch.tensor([5, 40, 17], dtype=torch.int32)
    cu_q = torch.tensor([0, 5, 6, 9], dtype=torch.int32)
    return q, *caches, table, seqused, cu_q


def packed(cache, table, seqused):
    return torch.cat([cache[row.long()].flatten(0, 1)[:n] for row, n in zip(table, seqused, strict=True)])


def expected(q, k_cache, v_cache, table, seqused, cu_q, **options):
    cu_k = torch.nn.functional.pad(seqused.cumsum(0, dtype=torch.int32), (1, 0))
    k, v = (packed(cache, table, seqused) for cache in (k_cache, v_cache))
    return reference.attention_varlen(q, k, v, cu_q, cu_k, **options)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"causal": True}, {"causal": True}),
        ({"causal": True, "window_size": [7, 0]}, {"causal": True, "window": (7, 0)}),
        ({"softmax_scale": 0.5, "softcap": 3.0}, {"softmax_scale": 0.5, "softcap": 3.0}),
        ({"causal": True, "s_aux": torch.ones(HEADS)}, {"causal": True, "sinks": torch.ones(HEADS)}),
    ],
)
def test_paged_attention(given, options):
    q, k_cache, v_cache, table, seqused, cu_q = paged_batch()
    args = (q, k_cache, v_cache, 5, cu_q, 40)
    o, lse = vllm.flash_attn_varlen_func(*args, seqused_k=seqused, block_table=table, return_softmax_lse=True, **given)
    batch = (q, k_cache, v_cache, table, seqused, cu_q)
    assert_as_good_as_torch((o, lse), lambda *batch: expected(*batch, **options), *batch)
    out = torch.empty_like(o)
    given_out = vllm.flash_attn_varlen_func(*args, seqused_k=seqused, block_table=table, out=out, fa_version=3, **given)
    assert given_out is out
    assert torch.equal(out, o)


def test_attention_without_pages():
    q, k_cache, v_cache, *_ = paged_batch()
    k, v = k_cache.flatten(0, 1)[:62], v_cache.flatten(0, 1)[:62]
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 6, 9], [0, 5, 45, 62]))
    o, lse = vllm.flash_attn_varlen_func(q, k, v, 5, cu_q, 40, cu_k, causal=True, return_softmax_lse=True)
    wanted = attention_varlen(q, k, v, cu_q, cu_k, 5, 40, causal=True, return_lse=True)
    assert torch.equal(o, wanted[0])
    assert torch.equal(lse, wanted[1])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "fp8_e4m3"])
def test_reshape_and_cache(kv_cache_dtype, layout):
    """Padding after the slots and negative slots are left out; an fp8 cache is kept as bytes."""
    dtype = torch.float32 if kv_cache_dtype == "auto" else torch.uint8
    shape = (3, BLOCK_SIZE, KV_HEADS, HEAD_DIM) if layout == "NHD" else (3, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    caches = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
    caches = caches if layout == "NHD" else [cache.transpose(1, 2) for cache in caches]
    key, value = torch.randn(2, 5, KV_HEADS, HEAD_DIM)
    slots, scales = torch.tensor([17, -1, 40]), [torch.tensor([0.5]), torch.tensor(2.0)]
    vllm.reshape_and_cache_flash(key, value, *caches, slots, kv_cache_dtype, *scales)
    for new, cache, scale in zip((key, value), caches, scales, strict=True):
        wanted = torch.zeros(3 * BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype)
        stored = new if kv_cache_dtype == "auto" else (new / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        wanted[17], wanted[40] = stored[0], stored[2]
        assert torch.equal(cache.reshape(-1, KV_HEADS, HEAD_DIM), wanted)


def test_attention_over_an_fp8_cache():
    q, k_cache, v_cache, *rest = paged_batch()
    stored = [cache.to(torch.float8_e4m3fn) for cache in (k_cache, v_cache)]
    scales = [torch.tensor([0.5, 2.0]), torch.tensor([1.5, 0.25])]
    table, seqused, cu_q = rest
    o = vllm.flash_attn_varlen_func(
        q,
        *(cache.view(torch.uint8) for cache in stored),
        5,
        cu_q,
        40,
        seqused_k=seqused,
        causal=True,
        block_table=table,
        k_descale=scales[0].expand(3, 2),
        v_descale=scales[1].expand(3, 2),
    )
    values = [cache.float() * scale[:, None] for cache, scale in zip(stored, scales, strict=True)]
    assert_as_good_as_torch(o, lambda *batch: expected(*batch, causal=True)[0], q, *values, *rest)


@pytest.mark.parametrize("stored", [torch.float32, torch.uint8], ids=str)
def test_the_arguments_that_vllm_gives_are_taken(stored):
    """Those of its backend, literally: it gives all three scales whatever the cache holds; they were refused once."""
    q, k_cache, v_cache, table, seqused, cu_q = paged_batch()
    values = [cache.to(torch.float8_e4m3fn) for cache in (k_cache, v_cache)]
    caches = [k_cache, v_cache] if stored == torch.float32 else [cache.view(torch.uint8) for cache in values]
    output, one = torch.full((12, HEADS, HEAD_DIM), 7.0), torch.tensor([0.5])
    result = vllm.flash_attn_varlen_func(
        q=q,
        k=caches[0],
        v=caches[1],
        out=output[:9],
        cu_seqlens_q=cu_q,
        max_seqlen_q=5,
        seqused_k=seqused,
        max_seqlen_k=40,
        softmax_scale=0.25,
        causal=True,
        alibi_slopes=None,
        window_size=[-1, -1],
        block_table=table,
        softcap=0.0,
        scheduler_metadata=None,
        fa_version=2,
        q_descale=one.expand(3, KV_HEADS),
        k_descale=one.expand(3, KV_HEADS),
        v_descale=one.expand(3, KV_HEADS),
        num_splits=0,
        s_aux=None,
    )
    truth = [k_cache, v_cache] if stored == torch.float32 else [cache.float() * one for cache in values]
    batch = (q, *truth, table, seqused, cu_q)
    assert_as_good_as_torch(result, lambda *batch: expected(*batch, causal=True, softmax_scale=0.25)[0], *batch)
    assert result.data_ptr() == output.data_ptr()
    assert output[9:].eq(7.0).all()


def test_scales_are_not_read_without_pages():
    """vLLM's encoder gives them too."""
    q, k_cache, v_cache, *_ = paged_batch()
    k, v = k_cache.flatten(0, 1)[:62], v_cache.flatten(0, 1)[:62]
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 6, 9], [0, 5, 45, 62]))
    scales = {f"{name}_descale": torch.tensor([0.5]).expand(3, KV_HEADS) for name in "qkv"}
    args = (q, k, v, 5, cu_q, 40, cu_k)
    assert torch.equal(vllm.flash_attn_varlen_func(*args, **scales), vllm.flash_attn_varlen_func(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype):
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((7, 40), (7, 40), (40,)))
    out, summed, normed = torch.empty_like(x), residual.clone(), x.clone()
    vllm.rms_norm(out, x, weight, 1e-5)
    assert_as_good_as_torch(out, lambda x, w: torch.nn.functional.rms_norm(x, (40,), w, 1e-5), x, weight)
    vllm.fused_add_rms_norm(normed, summed, weight, 1e-5)
    assert torch.equal(summed, x + residual)
    vllm.rms_norm(out, summed, weight, 1e-5)
    assert torch.equal(normed, out)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("silu_and_mul", torch.nn.functional.silu),
        ("gelu_and_mul", torch.nn.functional.gelu),
        ("gelu_tanh_and_mul", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_gated_units(name, activation):
    x, out = torch.randn(5, 2 * 24), torch.empty(5, 24)
    assert getattr(vllm, name)(out, x) is None
    assert_as_good_as_torch(out, lambda x: activation(x[:, :24]) * x[:, 24:], x)


@pytest.mark.parametrize("shape", [(7,), (2, 3)])
@pytest.mark.parametrize("is_neox", [False, True])
def test_rotary_embedding(is_neox, shape):
    """In place, on parts of a fused projection; heads of 16 columns, of which 3 to 10 are rotated."""
    qkv = torch.randn(*shape, (HEADS + KV_HEADS) * HEAD_DIM)
    query, key = qkv.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)
    positions, angles = torch.randint(0, 50, shape), torch.randn(50, 4)
    cache = torch.cat([angles.cos(), angles.sin()], -1)

    def expected(x):
        x = x.unflatten(-1, (-1, HEAD_DIM)).clone()
        cos, sin = cache[positions].to(x.dtype)[..., None, :].chunk(2, -1)
        first = slice(3, 7) if is_neox else slice(3, 11, 2)
        second = slice(7, 11) if is_neox else slice(4, 11, 2)
        u, v = x[..., first].clone(), x[..., second].clone()
        x[..., first], x[..., second] = u * cos - v * sin, v * cos + u * sin
        return x.flatten(-2)

    before = query.clone(), key.clone()
    vllm.rotary_embedding(positions, query, key, HEAD_DIM, cache, is_neox, 3)
    for actual, x in zip((query, key), before, strict=True):
        assert_as_good_as_torch(actual, expected, x)
    whole = query.unflatten(-1, (HEADS, HEAD_DIM)).clone()
    vllm.rotary_embedding(positions, whole, None, HEAD_DIM, cache, is_neox, 3, True)
    torch.testing.assert_close(whole.flatten(-2), before[0])


@pytest.mark.parametrize("num_with_context", [None, 4])
def test_merge(num_with_context):
    """+inf is what an empty prefix has there, and tokens after the last one with context have none."""
    o_a, o_b = torch.randn(2, 6, HEADS, HEAD_DIM)
    lse_a, lse_b = torch.randn(2, HEADS, 6)
    lse_a[:, 1] = torch.inf
    output, output_lse, kept = torch.empty_like(o_a), torch.empty_like(lse_a), lse_a.clone()
    vllm.merge_attn_states(output, o_a, lse_a, o_b, lse_b, output_lse, num_with_context)
    assert torch.equal(lse_a, kept)
    lse_a[:, 1] = -torch.inf
    lse_a[:, 6 if num_with_context is None else num_with_context :] = -torch.inf
    assert_as_good_as_torch((output, output_lse), reference.merge_attention, o_a, lse_a, o_b, lse_b)
    assert torch.equal(output[1], o_b[1])


NONE_OF = torch.zeros(3, 2)
ERRORS = [
    ({"q_v": NONE_OF}, "q_v must be None: it is not supported, got Tensor."),
    ({"q": NONE_OF.to(torch.float8_e4m3fn)}, "q must be float32 or bfloat16 or float16, got float8_e4m3fn."),
    ({"dropout_p": 0.1}, "dropout_p must be 0: nothing else is supported, got 0.1."),
    ({"cp_world_size": 2}, "cp_world_size must be 1: nothing else is supported, got 2."),
    (
        {"k": paged_batch()[1].char(), "v": paged_batch()[2].char(), "k_descale": NONE_OF},
        "k_descale must be one row expanded to all requests, got strides [2, 1].",
    ),
    ({"seqused_k": None}, "seqused_k must be given with block_table, and cu_seqlens_k must not."),
    ({"block_table": None}, "seqused_k must be None without block_table, got Tensor."),
    ({"block_table": None, "seqused_k": None}, "cu_seqlens_k must be given without block_table, got None."),
    ({"out": torch.zeros(2)}, "out must have the shape of the result, [9, 6, 16], got [2]."),
    (
        {"out": torch.zeros(1, 6, 16).expand(9, 6, 16)},
        "out is written and must have a place for each element, got stride 0 in dimension 0.",
    ),
]


@pytest.mark.parametrize(("given", "sentence"), ERRORS)
def test_what_attention_refuses(given, sentence):
    q, k_cache, v_cache, table, seqused, cu_q = paged_batch()
    right = {"q": q, "k": k_cache, "v": v_cache, "max_seqlen_q": 5, "cu_seqlens_q": cu_q, "max_seqlen_k": 40}
    with pytest.raises(ValueError, match="flash_attn_varlen_func: ") as raised:
        vllm.flash_attn_varlen_func(**{**right, "seqused_k": seqused, "block_table": table, **given})
    assert str(raised.value) == f"flash_attn_varlen_func: {sentence}"


@pytest.mark.parametrize(
    ("kv_cache_dtype", "stored", "allowed"),
    [
        ("auto", torch.float8_e4m3fn, "float32"),
        ("auto", torch.uint8, "float32"),
        ("auto", torch.bfloat16, "float32"),
        ("fp8", torch.float32, "float8_e4m3fn or uint8"),
        ("fp8_e4m3", torch.int8, "float8_e4m3fn or uint8"),
        ("int8", torch.uint8, "int8"),
    ],
    ids=str,
)
def test_a_cache_of_another_dtype_than_its_name_is_refused(kv_cache_dtype, stored, allowed):
    """It was quantised with scale 1, whatever scale came."""
    x, slots, scale = torch.zeros(1, KV_HEADS, HEAD_DIM), torch.zeros(1, dtype=torch.int64), torch.tensor([0.5])
    caches = [torch.zeros(1, BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(stored) for _ in "kv"]
    with pytest.raises(ValueError, match=r"^reshape_and_cache_flash: ") as raised:
        vllm.reshape_and_cache_flash(x, x, *caches, slots, kv_cache_dtype, scale, scale)
    got = str(stored).removeprefix("torch.")
    wanted = f"key_cache must be {allowed} for this key and kv_cache_dtype {kv_cache_dtype}, got {got}."
    assert str(raised.value) == f"reshape_and_cache_flash: {wanted}"


def test_what_the_others_refuse():
    x = torch.zeros(1, KV_HEADS, HEAD_DIM)
    cache, slots = torch.zeros(1, BLOCK_SIZE, KV_HEADS, HEAD_DIM), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, fp8, fp8_e4m3, int8, got 'fp8_e5m2'"):
        vllm.reshape_and_cache_flash(x, x, cache, cache, slots, "fp8_e5m2", None, None)
    with pytest.raises(TypeError, match="reshape_and_cache_flash: key must be a tensor, got NoneType"):
        vllm.reshape_and_cache_flash(None, x, cache, cache, slots, "auto", None, None)
    with pytest.raises(ValueError, match=r"rotary_embedding: query must be \[..., heads \* head_size\] for positions"):
        vllm.rotary_embedding(slots, x, None, 12, torch.zeros(1, 4), True)
    lse = torch.zeros(KV_HEADS, 1)
    with pytest.raises(ValueError, match="merge_attn_states: output_scale must be None: it is not supported"):
        vllm.merge_attn_states(x, x, lse, x, lse, None, None, torch.ones(1))
