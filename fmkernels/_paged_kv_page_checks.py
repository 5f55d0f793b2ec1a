# SPDX-License-Identifier: Apache-2.0
"""The argument checks of the functions of `paged_kv` that move whole pages."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _check as check
from ._paged_kv_checks import (
    TABLE,
    check_cache,
    check_requests,
    check_scale,
)


def check_page_list(op: str, name: str, pages: Any, cache: Tensor) -> list[int]:
    """The values, where they are seen."""
    check.plain(op, name, pages, 1, "[num]", torch.int32, "cache", cache)
    if not check.sees_values(pages):
        return []
    values = pages.tolist()
    for page in values:
        if not 0 <= page < cache.shape[0]:
            raise ValueError(f"{op}: {name} must be from 0 to {cache.shape[0] - 1}, got {page}.")
    return values


def check_once(op: str, name: str, pages: list[int]) -> None:
    seen: set[int] = set()
    for page in pages:
        if page in seen:
            raise ValueError(f"{op}: {name} must not name a page twice, got {page}.")
        seen.add(page)


def check_pages_tensor(op: str, cache: Any) -> None:
    check.is_tensor(op, "cache", cache)
    if not 2 <= cache.dim() <= 5:
        raise ValueError(f"{op}: cache must be [num_pages, ...] with 2 to 5 dimensions, got {list(cache.shape)}.")
    check.last_dim_contiguous(op, "cache", cache)


def check_gather(cache, table, cu_seqlens, num_tokens, scale, dtype) -> None:
    op = "paged_kv.gather"
    check.is_tensor(op, "cache", cache)
    check_cache(op, "cache", cache, "cache", cache)
    check_scale(op, "scale", scale, "cache", cache)
    check.plain(op, "block_table", table, 2, TABLE, torch.int32, "cache", cache)
    check.plain(op, "cu_seqlens", cu_seqlens, 1, "[batch + 1]", torch.int32, "cache", cache)
    check.size(op, "cu_seqlens", cu_seqlens, 0, "batch + 1 elements,", table.shape[0] + 1)
    if check.sees_values(cu_seqlens):
        check.prefix_sums(op, "cu_seqlens", cu_seqlens, "num_tokens", num_tokens)
        ends = cu_seqlens.tolist()
        lengths = [e - s for s, e in itertools.pairwise(ends)]
        check_requests(op, table, [0] * len(lengths), lengths, cache)
    check.kernel_exists(op, "paged_kv_gather", cache)


def check_copy_pages(cache, src, dst) -> None:
    op = "paged_kv.copy_pages"
    check_pages_tensor(op, cache)
    check.written(op, "cache", cache)
    sources, targets = (check_page_list(op, name, t, cache) for name, t in (("src", src), ("dst", dst)))
    check.size(op, "dst", dst, 0, "as many pages as src,", src.shape[0])
    taken = set(sources)
    for page in targets:
        if page in taken:
            raise ValueError(f"{op}: dst must not name a page of src, got {page}.")
    check_once(op, "dst", targets)
    check.kernel_exists(op, "paged_kv_copy_pages", cache)


def check_swap(name, cache, pages, host_buffer) -> None:
    op = f"paged_kv.{name}"
    check_pages_tensor(op, cache)
    values = check_page_list(op, "pages", pages, cache)
    check.is_tensor(op, "host_buffer", host_buffer)
    if host_buffer.dim() != cache.dim() or host_buffer.shape[1:] != cache.shape[1:]:
        raise ValueError(
            f"{op}: host_buffer must have pages as those of cache, {list(cache.shape[1:])}, "
            f"got {list(host_buffer.shape)}."
        )
    check.same_dtype(op, "host_buffer", host_buffer, "cache", cache)
    check.last_dim_contiguous(op, "host_buffer", host_buffer)
    check.written(op, *(("cache", cache) if name == "swap_in" else ("host_buffer", host_buffer)))
    if host_buffer.shape[0] < pages.shape[0]:
        raise ValueError(f"{op}: host_buffer must hold {pages.shape[0]} pages, got {host_buffer.shape[0]}.")
    if host_buffer.device.type not in ("cpu", "meta"):
        raise ValueError(f"{op}: host_buffer must be on the CPU, got {host_buffer.device}.")
    if cache.device.type == "cuda" and not isinstance(host_buffer, FakeTensor) and not host_buffer.is_pinned():
        raise ValueError(f"{op}: host_buffer must be pinned where cache is on cuda: torch.empty(..., pin_memory=True).")
    if name == "swap_in":
        check_once(op, "pages", values)
    check.kernel_exists(op, f"paged_kv_{name}", cache)


def check_compact(cache, keep) -> None:
    op = "paged_kv.compact"
    check_pages_tensor(op, cache)
    check.written(op, "cache", cache)
    values = check_page_list(op, "keep", keep, cache)
    if keep.shape[0] > cache.shape[0]:
        raise ValueError(f"{op}: keep must name at most {cache.shape[0]} pages, got {keep.shape[0]}.")
    for first, second in itertools.pairwise(values):
        if second <= first:
            raise ValueError(f"{op}: keep must ascend, got {first} before {second}.")
    check.kernel_exists(op, "paged_kv_compact", cache)


def check_page_table(indptr, indices, max_pages) -> None:
    op = "paged_kv.page_table_from_csr"
    check.is_tensor(op, "indptr", indptr)
    check.plain(op, "indptr", indptr, 1, "[batch + 1]", torch.int32, "indptr", indptr)
    check.plain(op, "indices", indices, 1, "[num_indices]", torch.int32, "indptr", indptr)
    if indptr.shape[0] < 1:
        raise ValueError(f"{op}: indptr must have batch + 1 elements, got none.")
    if check.sees_values(indptr):
        check.prefix_sums(op, "indptr", indptr, "the number of indices", indices.shape[0])
        longest = max((e - s for s, e in itertools.pairwise(indptr.tolist())), default=0)
        if longest > max_pages:
            raise ValueError(f"{op}: max_pages must be at least the longest list, {longest}, got {max_pages}.")
    check.kernel_exists(op, "paged_kv_page_table_from_csr", indptr)
