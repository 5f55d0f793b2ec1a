# SPDX-License-Identifier: Apache-2.0
"""The paged cache by its definition: token by token, page by page. Caches are changed in place, as the ops do."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from .attention import attention
from .merge_attention import merge_attention

QUANTIZED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Dtypes that are stored over a scale, and their largest number."""


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
    """`fmkernels.paged_kv.append`; what is stored is rounded once, from the dtype to compute in."""
    if rotary_cos is not None:
        cos, sin = rotary_cos[positions], rotary_sin[positions]
        k = rotate(k, cos, sin, interleaved)
        if q is not None:
            q.copy_(rotate(q, cos, sin, interleaved))
    page_size = k_cache.shape[1]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        place = (slot // page_size, slot % page_size)
        for rows, cache, scale in ((k[token], k_cache, k_scale), (v[token], v_cache, v_scale)):
            cache[place] = store(rows, cache.dtype, scale, place)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [tokens, heads, head_dim], each pair of columns turned by an angle: cos, sin [tokens, rotary_dim / 2]."""
    half = cos.shape[-1]
    x, cos, sin = x.to(torch.promote_types(x.dtype, cos.dtype)), cos[:, None], sin[:, None]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([rotated, rest], dim=-1)


def store(rows: Tensor, dtype: torch.dtype, scale: Tensor | None, place: tuple[int, int]) -> Tensor:
    """What a cache of this dtype holds for rows [kv_heads, dim]; scales per token are written."""
    if dtype not in QUANTIZED:
        return rows.to(dtype)
    rows, largest = rows.float(), QUANTIZED[dtype]
    if scale is None:
        divisor: Tensor | float = 1.0
    elif scale.dim() == 3:
        divisor = rows.abs().amax(-1)  # NaN where there is one
        divisor = torch.where(divisor.isfinite(), divisor / largest, math.nan)
        divisor = torch.where(divisor == 0, 1.0, divisor)
        scale[place] = divisor
        divisor = divisor[:, None]
    else:
        divisor = scale[:, None] if scale.numel() > 1 else scale.reshape(())
    rows = rows / divisor
    if dtype == torch.int8:
        return rows.nan_to_num(0.0).clamp(-largest, largest).round().to(dtype)
    return torch.where(rows.isfinite(), rows.clamp(-largest, largest), math.nan).to(dtype)


def tokens_of(cache: Tensor, pages: Tensor, num_tokens: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The first tokens of a request whose pages are these, [num_tokens, kv_heads, dim]."""
    page_size = cache.shape[1]
    token = torch.arange(num_tokens)
    page, row = pages.long()[token // page_size], token % page_size
    tokens = cache[page, row].to(dtype)
    if scale is None:
        return tokens
    if scale.dim() == 3:
        return tokens * scale[page, row].to(dtype)[..., None]
    return tokens * (scale.to(dtype)[:, None] if scale.numel() > 1 else scale.to(dtype).reshape(()))


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
) -> tuple[Tensor, Tensor]:
    """(o, lse) of `fmkernels.paged_kv.attend`: `attention` on each request alone, over its gathered tokens."""
    ends = list(range(len(cache_seqlens) + 1)) if cu_seqlens_q is None else cu_seqlens_q.tolist()
    o, lse = q.new_zeros(*q.shape[:-1], v_cache.shape[-1]), q.new_zeros(q.shape[1], q.shape[0])
    for b, seq_k in enumerate(cache_seqlens.tolist()):
        rows = slice(ends[b], ends[b + 1])
        seq_q = ends[b + 1] - ends[b]
        k = tokens_of(k_cache, block_table[b], seq_k, k_scale, q.dtype)
        v = tokens_of(v_cache, block_table[b], seq_k, v_scale, q.dtype)
        slopes = alibi_slopes[b : b + 1] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        o_b, lse_b = attention(
            q[None, rows],
            k[None],
            v[None],
            causal=causal,
            window=window,
            softmax_scale=softmax_scale,
            softcap=softcap,
            alibi_slopes=slopes,
            sinks=sinks,
            block_mask=None if tree_mask is None else _Tree(tree_mask[rows], seq_q, seq_k),
        )
        o[rows], lse[:, rows] = o_b[0], lse_b[0]
    return o, lse


class _Tree:
    """The tree mask of one request where `attention` takes a block mask."""

    def __init__(self, words: Tensor, seq_q: int, seq_k: int) -> None:
        self.words, self.seq_q, self.seq_k = words, seq_q, seq_k

    def to_dense(self) -> Tensor:
        bit = torch.arange(self.seq_k) - (self.seq_k - self.seq_q)  # of each key
        covered = (bit >= 0) & (bit < 32 * self.words.shape[1])
        bit = bit.clamp(0, max(32 * self.words.shape[1] - 1, 0))
        shown = (self.words[:, bit // 32] >> (bit % 32)) & 1 if self.words.shape[1] > 0 else covered[None]
        return ((shown != 0) | ~covered)[None, None]


def attend_shared_prefix(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefix_pages: Tensor,
    prefix_seqlen: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    sinks: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """(o, lse) of `fmkernels.paged_kv.attend_shared_prefix`: the prefix and the rest, merged."""
    scales = {name: kwargs[name] for name in ("k_scale", "v_scale", "softmax_scale", "softcap") if name in kwargs}
    everyone = torch.tensor([0, q.shape[0]])
    prefix = attend(
        q, k_cache, v_cache, prefix_pages[None], prefix_seqlen, cu_seqlens_q=everyone, causal=False, **scales
    )
    return merge_attention(*prefix, *attend(q, k_cache, v_cache, block_table, cache_seqlens, sinks=sinks, **kwargs))


def gather(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    num_tokens: int,
    *,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`fmkernels.paged_kv.gather`."""
    ends = cu_seqlens.tolist()
    compute = torch.float64 if cache.dtype == torch.float64 else torch.float32
    parts = [tokens_of(cache, block_table[b], e - s, scale, compute) for b, (s, e) in enumerate(pairwise(ends))]
    tokens = torch.cat(parts) if parts else cache.new_zeros(0, *cache.shape[2:], dtype=compute)
    default = torch.float32 if cache.dtype in QUANTIZED else cache.dtype
    return tokens[:num_tokens].to(default if dtype is None else dtype)


def copy_pages(cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """`fmkernels.paged_kv.copy_pages`."""
    cache[dst.long()] = cache[src.long()]


def swap_out(cache: Tensor, pages: Tensor, host_buffer: Tensor) -> None:
    """`fmkernels.paged_kv.swap_out`."""
    host_buffer[: len(pages)] = cache[pages.long()]


def swap_in(cache: Tensor, pages: Tensor, host_buffer: Tensor) -> None:
    """`fmkernels.paged_kv.swap_in`."""
    cache[pages.long()] = host_buffer[: len(pages)]


def compact(cache: Tensor, keep: Tensor) -> None:
    """`fmkernels.paged_kv.compact`."""
    cache[: len(keep)] = cache[keep.long()]


def page_table_from_csr(indptr: Tensor, indices: Tensor, *, max_pages: int) -> Tensor:
    """`fmkernels.paged_kv.page_table_from_csr`."""
    table = indices.new_full((len(indptr) - 1, max_pages), -1)
    for b, (begin, end) in enumerate(pairwise(indptr.tolist())):
        table[b, : end - begin] = indices[begin:end]
    return table
