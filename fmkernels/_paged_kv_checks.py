# SPDX-License-Identifier: Apache-2.0
"""The argument checks of `paged_kv`, in the manner of `_check`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._attention_checks import MAX_HEAD_DIM, check_modifiers

QUANTIZED_DTYPES = (torch.float8_e4m3fn, torch.int8)
CACHE_DTYPES = (*check.FLOAT_DTYPES, *QUANTIZED_DTYPES)
_CACHE = "[num_pages, page_size, kv_heads, dim]"
TABLE = "[batch, max_pages]"


def check_no_grad(op: str, **tensors: Any) -> None:
    for name, t in tensors.items():
        if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} must not require a gradient: none is computed for it.")


# ---- parts -----------------------------------------------------------------------------------------------------------


def check_cache(op: str, name: str, t: Any, other_name: str, other: Tensor) -> None:
    check.is_tensor(op, name, t)
    check.rank(op, name, t, 4, _CACHE)
    check.dtype(op, name, t, CACHE_DTYPES)
    check.same_device(op, name, t, other_name, other)
    check.last_dim_contiguous(op, name, t)
    if t.shape[1] < 1:
        raise ValueError(f"{op}: {name} must have a page_size of at least 1, got 0.")
    if t.shape[3] % 8 != 0 or not 8 <= t.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: {name} must have a dim that is a multiple of 8 from 8 to 256, got {t.shape[3]}.")


def check_scale(op: str, name: str, scale: Any, cache_name: str, cache: Tensor) -> None:
    if cache.dtype not in QUANTIZED_DTYPES:
        if scale is not None:
            raise ValueError(
                f"{op}: {name} must be None for a cache of {check.dtype_names((cache.dtype,))}, which needs none."
            )
        return
    if scale is None:
        if cache.dtype == torch.int8:
            raise ValueError(f"{op}: {name} must be given for an int8 cache.")
        return
    check.is_tensor(op, name, scale)
    check.dtype(op, name, scale, (torch.float32,))
    check.same_device(op, name, scale, cache_name, cache)
    shapes = ([], [1], [cache.shape[2]], list(cache.shape[:3]))
    if list(scale.shape) not in shapes:
        raise ValueError(
            f"{op}: {name} must be one number, [kv_heads] or [num_pages, page_size, kv_heads] of {cache_name}, "
            f"{shapes[2]} or {shapes[3]}, got {list(scale.shape)}."
        )


def check_caches(
    op: str, k_cache: Any, v_cache: Any, k_scale: Any, v_scale: Any, other_name: str, other: Tensor
) -> None:
    check_cache(op, "k_cache", k_cache, other_name, other)
    check_cache(op, "v_cache", v_cache, other_name, other)
    check.same_dtype(op, "v_cache", v_cache, "k_cache", k_cache)
    for dim, what in enumerate(("num_pages", "page_size", "kv_heads")):
        check.size(op, "v_cache", v_cache, dim, f"the {what} of k_cache,", k_cache.shape[dim])
    check_scale(op, "k_scale", k_scale, "k_cache", k_cache)
    check_scale(op, "v_scale", v_scale, "v_cache", v_cache)
    if other.device.type == "cuda" and k_cache.dtype not in (other.dtype, *QUANTIZED_DTYPES):
        raise ValueError(
            f"{op}: k_cache must have the dtype of {other_name}, {check.dtype_names((other.dtype,))}, or be "
            f"{check.dtype_names(QUANTIZED_DTYPES)}, got {check.dtype_names((k_cache.dtype,))}."
        )


def check_requests(op: str, table: Tensor, first: list[int], lengths: list[int], cache: Tensor) -> None:
    """Of every request the pages from the one of token `first` to that of its last."""
    num_pages, page_size = cache.shape[:2]
    for b, (begin, length) in enumerate(zip(first, lengths, strict=True)):
        most = table.shape[1] * page_size
        if not 0 <= length <= most:
            raise ValueError(
                f"{op}: request {b} must have from 0 to {most} tokens, max_pages * page_size, got {length}."
            )
        for page in table[b, begin // page_size : -(-length // page_size)].tolist():
            if not 0 <= page < num_pages:
                raise ValueError(
                    f"{op}: block_table must name pages from 0 to {num_pages - 1}, got {page} for request {b}."
                )


# ---- functions -------------------------------------------------------------------------------------------------------


def check_append(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, q, cos, sin, positions, interleaved) -> None:
    op = "paged_kv.append"
    check.is_tensor(op, "k", k)
    check.rank(op, "k", k, 3, "[num_tokens, kv_heads, head_dim]")
    check.dtype(op, "k", k, check.FLOAT_DTYPES)
    check_caches(op, k_cache, v_cache, k_scale, v_scale, "k", k)
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache), ("k_scale", k_scale), ("v_scale", v_scale)):
        if t is not None and t.dim() >= 3:  # other scales are read
            check.written(op, name, t)
    rows = (("k", k, k_cache.shape[2], k_cache), ("v", v, v_cache.shape[2], v_cache), ("q", q, None, k_cache))
    for name, t, heads, cache in rows if q is not None else rows[:2]:
        check.is_tensor(op, name, t)
        check.rank(op, name, t, 3, f"[num_tokens, {'heads' if name == 'q' else 'kv_heads'}, dim]")
        check.same_dtype(op, name, t, "k", k)
        check.same_device(op, name, t, "k", k)
        check.last_dim_contiguous(op, name, t)
        check.size(op, name, t, 0, "num_tokens", k.shape[0])
        if heads is not None:
            check.size(op, name, t, 1, "the kv_heads of the caches,", heads)
        check.size(op, name, t, 2, "the dim of its cache,", cache.shape[3])
        if name == "q":
            check.written(op, name, t)
    check.plain(op, "slot_mapping", slot_mapping, 1, "[num_tokens]", torch.int64, "k", k)
    check.size(op, "slot_mapping", slot_mapping, 0, "num_tokens", k.shape[0])
    if not (cos is None) == (sin is None) == (positions is None):
        raise ValueError(f"{op}: rotary_cos, rotary_sin and positions must be given together.")
    if cos is None and q is not None:
        raise ValueError(f"{op}: q must be None without rotary_cos: it is there to be rotated.")
    if cos is not None:
        for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
            check.plain(op, name, t, 2, "[max_position, rotary_dim / 2]", torch.float32, "k", k)
        check.shape(op, "rotary_sin", sin, "rotary_cos", cos)
        if cos.shape[0] > 1 and cos.stride(0) != sin.stride(0):
            raise ValueError(f"{op}: rotary_sin must have the strides of rotary_cos.")
        if 2 * cos.shape[1] > k.shape[2]:
            raise ValueError(f"{op}: rotary_cos must have at most {k.shape[2] // 2} columns, got {cos.shape[1]}.")
        check.plain(op, "positions", positions, 1, "[num_tokens]", torch.int64, "k", k)
        check.size(op, "positions", positions, 0, "num_tokens", k.shape[0])
        for position in positions.tolist() if check.sees_values(positions) else ():
            if not 0 <= position < cos.shape[0]:
                raise ValueError(f"{op}: positions must be from 0 to {cos.shape[0] - 1}, got {position}.")
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    for slot in slot_mapping.tolist() if check.sees_values(slot_mapping) else ():
        if slot >= num_slots:
            raise ValueError(f"{op}: slot_mapping must be below the {num_slots} slots of the cache, got {slot}.")
    check.kernel_exists(op, "paged_kv_append", k)


def check_attend(
    q, k_cache, v_cache, table, seqlens, cu_seqlens_q, k_scale, v_scale, slopes, sinks, tree, causal, left, *scalars
) -> None:
    op = "paged_kv.attend"
    check.is_tensor(op, "q", q)
    check.rank(op, "q", q, 3, "[total_q, heads, head_dim]")
    check.dtype(op, "q", q, check.FLOAT_DTYPES)
    check.last_dim_contiguous(op, "q", q)
    if q.device.type == "cuda" and q.dtype == torch.float32:
        raise ValueError(f"{op}: q must be bfloat16 or float16 on cuda, got float32.")
    check_caches(op, k_cache, v_cache, k_scale, v_scale, "q", q)
    check.size(op, "k_cache", k_cache, 3, "the head_dim of q,", q.shape[2])
    if k_cache.shape[2] < 1 or q.shape[1] % k_cache.shape[2] != 0:
        raise ValueError(
            f"{op}: k_cache has {k_cache.shape[2]} kv_heads, which must divide the {q.shape[1]} heads of q."
        )
    check.plain(op, "block_table", table, 2, TABLE, torch.int32, "q", q)
    batch = table.shape[0]
    check.plain(op, "cache_seqlens", seqlens, 1, "[batch]", torch.int32, "q", q)
    check.size(op, "cache_seqlens", seqlens, 0, "the batch of block_table,", batch)
    if cu_seqlens_q is not None:
        check.plain(op, "cu_seqlens_q", cu_seqlens_q, 1, "[batch + 1]", torch.int32, "q", q)
        check.size(op, "cu_seqlens_q", cu_seqlens_q, 0, "batch + 1 elements,", batch + 1)
    elif q.shape[0] != batch:
        raise ValueError(f"{op}: q must have one query a request, {batch}, without cu_seqlens_q, got {q.shape[0]}.")
    check_modifiers(op, q, batch, slopes, sinks)
    if tree is not None:
        check.plain(op, "tree_mask", tree, 2, "[total_q, num_words]", torch.int32, "q", q)
        check.size(op, "tree_mask", tree, 0, "the total_q of q,", q.shape[0])
    if check.sees_values(seqlens):
        ends = list(range(batch + 1))
        if cu_seqlens_q is not None:
            check.prefix_sums(op, "cu_seqlens_q", cu_seqlens_q, "total_q", q.shape[0])
            ends = cu_seqlens_q.tolist()
        lengths = seqlens.tolist()
        first = [
            max(0, n - (e - s) - left) if left >= 0 else 0 for n, s, e in zip(lengths, ends, ends[1:], strict=False)
        ]
        check_requests(op, table, first, lengths, k_cache)
    check.kernel_exists(op, "paged_kv_attend", q)


def check_prefix(q: Any, prefix_pages: Any, prefix_seqlen: Any) -> None:
    op = "paged_kv.attend_shared_prefix"
    check.is_tensor(op, "q", q)
    check.rank(op, "q", q, 3, "[total_q, heads, head_dim]")
    for name, t, layout in (
        ("prefix_pages", prefix_pages, "[max_prefix_pages]"),
        ("prefix_seqlen", prefix_seqlen, "[1]"),
    ):
        check.plain(op, name, t, 1, layout, torch.int32, "q", q)
    check.size(op, "prefix_seqlen", prefix_seqlen, 0, "size", 1)
