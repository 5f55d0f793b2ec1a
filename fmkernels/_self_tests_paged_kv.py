# SPDX-License-Identifier: Apache-2.0
"""Self-tests of the ops over a paged cache, for `doctor`: one small case each against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import paged_kv, reference
from .testing import Backend, assert_as_good_as_torch

NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM = 6, 4, 2, 16


def _cache(backend: Backend, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn(NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM, generator=generator)
    return cache.to(backend.device, backend.attention_dtypes[0])


def _ints(backend: Backend, *values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=backend.device)


def _assert_same(actual: Tensor, expected: Tensor) -> None:
    wrong = int((actual != expected).sum())
    assert wrong == 0, f"output 0: error in {wrong} numbers of {expected.numel()}"


def _assert_changes(name: str, cache: Tensor, *args: Tensor) -> None:
    """An op that writes to its cache, and the reference on a copy."""
    expected = cache.clone()
    getattr(reference.paged_kv, name)(expected, *args)
    getattr(paged_kv, name)(cache, *args)
    _assert_same(cache, expected)


def _test_append(backend: Backend) -> None:
    k, v = (_cache(backend, seed)[:, 0] for seed in (0, 1))
    slots = torch.tensor([3, -1, 17, 8, 4, 23], device=backend.device)
    caches = [torch.zeros_like(_cache(backend, 0)) for _ in range(4)]
    paged_kv.append(k, v, *caches[:2], slots)
    reference.paged_kv.append(k, v, *caches[2:], slots)
    _assert_same(torch.stack(caches[:2]), torch.stack(caches[2:]))


def _test_attend(backend: Backend) -> None:
    """A chunk of a prompt and a decode token."""
    k_cache, v_cache = _cache(backend, 0), _cache(backend, 1)
    q = _cache(backend, 2)[:, :2].flatten(1, 2)  # [6, 4, 16]
    args = (q, k_cache, v_cache, _ints(backend, [4, 1, 0], [3, 5, 2]), _ints(backend, 9, 11))
    more = {"cu_seqlens_q": _ints(backend, 0, 5, 6)}
    actual = paged_kv.attend(*args, **more, return_lse=True)
    dtype = q.dtype if backend.has_tensor_cores else None

    def output(index: int) -> Callable[..., Tensor]:
        return lambda *tensors, **named: reference.paged_kv.attend(*tensors, **named)[index]

    assert_as_good_as_torch(actual[0], output(0), *args, computed_in=dtype, **more)
    assert_as_good_as_torch(actual[1], output(1), *args, **more)


def _test_gather(backend: Backend) -> None:
    args = (_cache(backend, 0), _ints(backend, [4, 1], [3, 5]), _ints(backend, 0, 7, 9), 9)
    _assert_same(paged_kv.gather(*args), reference.paged_kv.gather(*args))


def _test_copy_pages(backend: Backend) -> None:
    _assert_changes("copy_pages", _cache(backend, 0), _ints(backend, 1, 4), _ints(backend, 0, 5))


def _test_compact(backend: Backend) -> None:
    _assert_changes("compact", _cache(backend, 0), _ints(backend, 1, 4, 5))


def _host_buffer(backend: Backend, cache: Tensor) -> Tensor:
    return torch.zeros(cache[:2].shape, dtype=cache.dtype, pin_memory=backend.name == "cuda")


def _test_swap_out(backend: Backend) -> None:
    cache = _cache(backend, 0)
    host = _host_buffer(backend, cache)
    paged_kv.swap_out(cache, _ints(backend, 5, 2), host)
    _assert_same(host.to(backend.device), cache[[5, 2]])  # waits for the device


def _test_swap_in(backend: Backend) -> None:
    cache = _cache(backend, 0)
    host = _host_buffer(backend, cache)
    host.copy_(_cache(backend, 1)[:2])
    _assert_changes("swap_in", cache, _ints(backend, 5, 2), host)


def _test_page_table(backend: Backend) -> None:
    args = (_ints(backend, 0, 2, 2, 5), _ints(backend, 3, 0, 6, 2, 5))
    expected = reference.paged_kv.page_table_from_csr(*args, max_pages=4)
    _assert_same(paged_kv.page_table_from_csr(*args, max_pages=4), expected)


SELF_TESTS: dict[str, Callable[[Backend], None]] = {
    "paged_kv_append": _test_append,
    "paged_kv_attend": _test_attend,
    "paged_kv_gather": _test_gather,
    "paged_kv_copy_pages": _test_copy_pages,
    "paged_kv_swap_out": _test_swap_out,
    "paged_kv_swap_in": _test_swap_in,
    "paged_kv_compact": _test_compact,
    "paged_kv_page_table_from_csr": _test_page_table,
}
