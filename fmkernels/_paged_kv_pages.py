# SPDX-License-Identifier: Apache-2.0
"""The functions of `paged_kv` that move whole pages, and the page table."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _check as check
from . import _paged_kv_page_checks as checks
from ._library import call, ops, register_fake


def gather(
    cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    num_tokens: int,
    *,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The tokens of a batch out of their pages, packed one request after another: what `attention_varlen` takes.

    Args:
        cache: [num_pages, page_size, kv_heads, dim], any dtype of a cache.
        block_table: [batch, max_pages], int32.
        cu_seqlens: [batch + 1], int32, prefix sums of the lengths, from 0 to num_tokens.
        num_tokens: the number of all of them: the shape of a result must not wait for the device.
        scale: as k_scale of `attend`, for a float8 or an int8 cache.
        dtype: of the result: float32, bfloat16 or float16; default that of the cache, float32 where it is quantised.

    Returns:
        [num_tokens, kv_heads, dim].

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Lengths and page ids out of range
            are refused on the CPU, on CUDA under FMKERNELS_CHECK=1; without it such tokens are zeros.

    CPU and CUDA (sm_80 and later). Deterministic.
    """
    op = "paged_kv.gather"
    check.integer(op, "num_tokens", num_tokens, 0)
    if dtype is None:
        dtype = cache.dtype if isinstance(cache, Tensor) and cache.dtype in check.FLOAT_DTYPES else torch.float32
    elif dtype not in check.FLOAT_DTYPES:
        raise ValueError(f"{op}: dtype must be {check.dtype_names(check.FLOAT_DTYPES)}, got {dtype}.")
    args = (cache, block_table, cu_seqlens, num_tokens, scale, dtype)
    return call(ops.paged_kv_gather, args, checks.check_gather)


def copy_pages(cache: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copies page src[i] of a cache to its page dst[i], as copy on write wants it.

    Args:
        cache: [num_pages, ...], at most five dimensions, any dtype, last dimension contiguous: a cache of keys or of
            values, their scales, or both in one tensor [num_pages, 2, page_size, kv_heads, head_dim]. Written.
        src: [num], int32.
        dst: [num], int32. No page twice, and none of src: the copies have no order.

    Returns:
        None.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Values are checked on the CPU, on
            CUDA under FMKERNELS_CHECK=1; without it a copy with an id out of range does not happen.
    """
    args = (cache, src, dst)
    call(ops.paged_kv_copy_pages, args, checks.check_copy_pages)


def swap_out(cache: Tensor, pages: Tensor, host_buffer: Tensor) -> None:
    """Copies page pages[i] of a cache to host_buffer[i], on the current stream.

    Args:
        cache: as in `copy_pages`.
        pages: [num], int32, on the device of the cache.
        host_buffer: [num or more, ...], pages as those of the cache, dtype of the cache, on the CPU; pinned where the
            cache is on CUDA: the copy is then asynchronous, and there once the stream has come to it. Written.

    Returns:
        None.

    Raises:
        ValueError, TypeError: as `copy_pages`.
    """
    args = (cache, pages, host_buffer)
    call(ops.paged_kv_swap_out, args, functools.partial(checks.check_swap, "swap_out"))


def swap_in(cache: Tensor, pages: Tensor, host_buffer: Tensor) -> None:
    """Copies host_buffer[i] to page pages[i] of a cache, on the current stream.

    Args:
        cache: as in `copy_pages`. Written.
        pages: [num], int32, on the device of the cache; no page twice.
        host_buffer: as in `swap_out`; it must hold its values until the stream has come to the copy.

    Returns:
        None.

    Raises:
        ValueError, TypeError: as `copy_pages`.
    """
    args = (cache, pages, host_buffer)
    call(ops.paged_kv_swap_in, args, functools.partial(checks.check_swap, "swap_in"))


def compact(cache: Tensor, keep: Tensor) -> None:
    """Moves the pages that are kept to the front of a cache: page keep[i] becomes page i.

    In a block table the number of a page becomes its place in `keep`. What the pages from len(keep) on hold is left.

    Args:
        cache: as in `copy_pages`. Written.
        keep: [num], int32, ascending: then no page is overwritten before it has moved.

    Returns:
        None.

    Raises:
        ValueError, TypeError: as `copy_pages`.
    """
    args = (cache, keep)
    call(ops.paged_kv_compact, args, checks.check_compact)


def page_table_from_csr(indptr: Tensor, indices: Tensor, *, max_pages: int) -> Tensor:
    """A block table from the lists of pages that FlashInfer's names describe.

    There a request has pages indices[indptr[b]:indptr[b + 1]], and the length (pages - 1) * page_size + last_page_len.

    Args:
        indptr: [batch + 1], int32, from 0 to the number of indices, never decreasing.
        indices: [num_indices], int32.
        max_pages: the width of the table, at least the longest list.

    Returns:
        block_table [batch, max_pages], int32; -1 past the pages of a request.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. Values are checked on the CPU, on
            CUDA under FMKERNELS_CHECK=1; without it longer lists are cut.
    """
    check.integer("paged_kv.page_table_from_csr", "max_pages", max_pages, 0)
    args = (indptr, indices, max_pages)
    return call(ops.paged_kv_page_table_from_csr, args, checks.check_page_table)


@register_fake("paged_kv_gather")
def _(*args):
    checks.check_gather(*args)
    cache, _table, _cu_seqlens, num_tokens, _scale, dtype = args
    return cache.new_empty(num_tokens, *cache.shape[2:], dtype=dtype)


@register_fake("paged_kv_copy_pages")
def _(*args):
    checks.check_copy_pages(*args)


@register_fake("paged_kv_swap_out")
def _(*args):
    checks.check_swap("swap_out", *args)


@register_fake("paged_kv_swap_in")
def _(*args):
    checks.check_swap("swap_in", *args)


@register_fake("paged_kv_compact")
def _(*args):
    checks.check_compact(*args)


@register_fake("paged_kv_page_table_from_csr")
def _(indptr, indices, max_pages):
    checks.check_page_table(indptr, indices, max_pages)
    return indptr.new_empty(indptr.shape[0] - 1, max_pages)
