# SPDX-License-Identifier: Apache-2.0
"""A cache of keys and values in pages: append to it, attend over it, gather from it, move its pages.

A cache is a pair of tensors [num_pages, page_size, kv_heads, dim] with any strides and a contiguous last dimension:
NHD as it stands, HND as `torch.empty(num_pages, kv_heads, page_size, dim).transpose(1, 2)`. The token t of request b
lies in row t % page_size of page block_table[b, t // page_size]; the slot of that row is page * page_size + row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from . import _paged_kv_checks as checks
from ._attention_checks import check_scalars, default_scale
from ._library import call, ops, register_fake, register_flop_formula
from ._paged_kv_pages import compact, copy_pages, gather, page_table_from_csr, swap_in, swap_out
from .merge_attention import merge_attention

__all__ = [
    "append",
    "attend",
    "attend_shared_prefix",
    "compact",
    "copy_pages",
    "gather",
    "page_table_from_csr",
    "swap_in",
    "swap_out",
]


def append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Writes new keys and values to their slots, rotated and quantised on the way where wanted.

    Args:
        k: [num_tokens, kv_heads, head_dim], float32, bfloat16 or float16.
        v: [num_tokens, kv_heads, v_head_dim], dtype of k.
        k_cache: [num_pages, page_size, kv_heads, head_dim]; dtype of k, float8_e4m3fn or int8, on the CPU also another
            of the dtypes of k. Written.
        v_cache: [num_pages, page_size, kv_heads, v_head_dim], dtype of k_cache. Written.
        slot_mapping: [num_tokens], int64; a negative slot is skipped. No slot may come twice.
        k_scale, v_scale: float32, for a float8 cache (None is 1) or an int8 cache (must be given); stored = value /
            scale, rounded to nearest even, clamped to the finite numbers. One number, [kv_heads], or [num_pages,
            page_size, kv_heads]: then append writes them, each the largest magnitude of its row over that of the dtype.
        q: [num_tokens, heads, head_dim], dtype of k; rotated in place, skipped tokens too. Only with rotary_cos.
        rotary_cos, rotary_sin: [max_position, rotary_dim / 2], float32, rotary_dim at most head_dim: k is rotated in
            float32 before it is stored.
        positions: [num_tokens], int64, the rows of rotary_cos and rotary_sin. Together with them.
        interleaved: pairs are columns (2 c, 2 c + 1), not (c, c + rotary_dim / 2).

    Returns:
        None.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Slots and positions out of range
            are refused on the CPU, on CUDA under FMKERNELS_CHECK=1; without it nothing is written, or rotated, there.

    int8 has no NaN: with a scale that is given it stores 0 for one. Where scales are per token, a row that is not
    finite gets the scale NaN. CPU and CUDA (sm_80 and later); not differentiable. Deterministic.
    """
    if torch.is_grad_enabled():
        checks.check_no_grad("paged_kv.append", k=k, v=v, q=q)
    check.flag("paged_kv.append", "interleaved", interleaved)
    args = (k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, q, rotary_cos, rotary_sin, positions, interleaved)
    call(ops.paged_kv_append, args, checks.check_append)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a ragged batch over a paged cache: decode tokens and chunks of prefills in one call.

    Request b has the queries from cu_seqlens_q[b] to cu_seqlens_q[b + 1] and the first cache_seqlens[b] tokens of its
    pages as keys; its queries are the last of them, appended before. Scores are those of `attention`.

    Args:
        q: [total_q, heads, head_dim], float32, bfloat16 or float16 (CUDA: the halves); head_dim a multiple of 8 to 256.
        k_cache: [num_pages, page_size, kv_heads, head_dim], page_size 1 or more; dtype of q, float8_e4m3fn or int8, on
            the CPU also another of the dtypes of q. kv_heads divides heads.
        v_cache: [num_pages, page_size, kv_heads, v_head_dim], dtype of k_cache.
        block_table: [batch, max_pages], int32. Entries past the pages of a request are not read.
        cache_seqlens: [batch], int32, from 0 to max_pages * page_size.
        cu_seqlens_q: [batch + 1], int32, prefix sums of the query lengths; None: one query a request.
        causal: query i of a request sees key j <= i + cache_seqlens - seq_q.
        window: (left, right), how far from itself a query sees; -1 is unlimited.
        softmax_scale: default head_dim ** -0.5.
        softcap: softcap * tanh(score / softcap), 0 for none.
        alibi_slopes: [heads] or [batch, heads], float32: slope * distance is subtracted.
        sinks: [heads], float32, one more logit in the denominator.
        tree_mask: [total_q, num_words], int32. Of the last seq_q keys of its request, which are the queries' own, a
            query sees number t < 32 * num_words only where bit t % 32 of word t // 32 of its row is set, besides what
            causal and window say. -1 hides nothing.
        k_scale, v_scale: as in `append`; value = stored * scale.
        return_lse: also return the logarithm of the denominator.

    Returns:
        o [total_q, heads, v_head_dim], dtype of q; a query that sees no key gives zeros. With return_lse, (o, lse) with
        lse [heads, total_q], float32, natural logarithm, -inf where no key is seen and there is no sink.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Lengths and page ids out of range
            are refused on the CPU, on CUDA under FMKERNELS_CHECK=1; without it such keys read as zeros. Likewise
            queries that cu_seqlens_q gives to no request, as a captured graph is padded with: without it o = 0 there
            and lse = -inf.

    CPU and CUDA (sm_80 and later); not differentiable. Deterministic, and batch invariant: the bits of a row depend on
    its query, its position and the keys that it sees, not on other requests, other queries of its own, or page_size.
    Whether a prompt comes in one chunk, in many or token by token changes none. On CUDA rows begin on 16-byte
    boundaries, and head sizes of quantised caches are multiples of 16. After Dao 2023, FlashAttention-2, and Kwon et
    al. 2023, PagedAttention.
    """
    op = "paged_kv.attend"
    if torch.is_grad_enabled():
        checks.check_no_grad(op, q=q, k_cache=k_cache, v_cache=v_cache, alibi_slopes=alibi_slopes, sinks=sinks)
    check.flag(op, "return_lse", return_lse)
    if not (causal is True and window == (-1, -1) and softmax_scale is None and softcap == 0.0):  # 2 us of a small call
        check_scalars(op, causal, window, softmax_scale, softcap, 0.0, return_lse)
    scale = default_scale(q) if softmax_scale is None else softmax_scale
    tensors = (q, k_cache, v_cache, block_table, cache_seqlens, cu_seqlens_q, k_scale, v_scale)
    args = (*tensors, alibi_slopes, sinks, tree_mask, causal, *window, scale, softcap)
    o, lse = call(ops.paged_kv_attend, args, checks.check_attend)
    return (o, lse) if return_lse else o


def attend_shared_prefix(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_pages: Tensor,
    prefix_seqlen: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attend`, causal, for requests that begin with the same tokens: the keys of the prefix are read once for all.

    Two calls of `attend`, of all queries over the prefix and of each request over the rest, and `merge_attention`.

    Args:
        q, k_cache, v_cache: as in `attend`.
        prefix_pages: [max_prefix_pages], int32, the pages of the prefix.
        prefix_seqlen: [1], int32, tokens of the prefix.
        block_table: [batch, max_pages], int32, the pages after the prefix.
        cache_seqlens: [batch], int32, tokens after the prefix, the queries included.
        cu_seqlens_q, softmax_scale, softcap, sinks, tree_mask, k_scale, v_scale, return_lse: as in `attend`.

    Returns:
        As `attend`. Its bits are not those of one `attend` over all keys, since the prefix is merged by itself.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    checks.check_prefix(q, prefix_pages, prefix_seqlen)
    options = {"softmax_scale": softmax_scale, "softcap": softcap, "k_scale": k_scale, "v_scale": v_scale}
    everyone = torch.arange(0, 2, dtype=torch.int32, device=q.device) * q.shape[0]
    prefix = attend(
        q,
        k_cache,
        v_cache,
        prefix_pages[None],
        prefix_seqlen,
        cu_seqlens_q=everyone,
        causal=False,
        return_lse=True,
        **options,
    )
    rest = attend(
        q,
        k_cache,
        v_cache,
        block_table,
        cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        sinks=sinks,
        tree_mask=tree_mask,
        return_lse=True,
        **options,
    )
    o, lse = merge_attention(*prefix, *rest)
    return (o, lse) if return_lse else o


@register_fake("paged_kv_append")
def _(*args):
    checks.check_append(*args)


@register_fake("paged_kv_attend")
def _(*args):
    checks.check_attend(*args)
    q, _k_cache, v_cache, *_ = args
    total_q, heads, _ = q.shape
    return q.new_empty(total_q, heads, v_cache.shape[-1]), q.new_empty(heads, total_q, dtype=torch.float32)


@register_flop_formula("paged_kv_attend")
def _(q_shape, k_shape, v_shape, table_shape, *args, out_shape=None, **kwargs) -> int:
    """The bound that shapes give: every query against all tokens that a row of the table holds."""
    total_q, heads, head_dim = q_shape
    return 2 * heads * total_q * table_shape[1] * k_shape[1] * (head_dim + v_shape[-1])
