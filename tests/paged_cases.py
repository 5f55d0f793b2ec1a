# SPDX-License-Identifier: Apache-2.0
"""Paged caches for the tests of paged_kv, in which every slot and table entry that is not in use holds garbage."""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmkernels import reference

QUANTIZED = (torch.float8_e4m3fn, torch.int8)
GARBAGE_PAGE = 2**31 - 1


@dataclass(frozen=True)
class PagedCase:
    """One call of attend; the tensors depend on the fields and on nothing else."""

    name: str
    seqlens: tuple[tuple[int, int], ...] = ((1, 40), (5, 5), (1, 0), (33, 70), (3, 130))  # queries, tokens
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None  # None: dtype
    scales: str = ""  # "", "tensor", "head" or "token"
    hnd: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def stored(self) -> torch.dtype:
        return self.dtype if self.cache_dtype is None else self.cache_dtype

    def inputs(self, device: str = "cpu") -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(q, k_cache, v_cache, block_table, cache_seqlens) and keyword arguments of attend."""
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self).encode()))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        batch, longest = len(self.seqlens), max((k for _, k in self.seqlens), default=0)
        max_pages = -(-longest // self.page_size) + 1
        num_pages = batch * max_pages + 2
        pages = torch.randperm(num_pages, generator=generator)[: batch * max_pages].view(batch, max_pages)
        table = torch.full((batch, max_pages), GARBAGE_PAGE, dtype=torch.int32)
        k_cache, v_cache = (self.empty_cache(num_pages, dim) for dim in (self.head_dim, self.v_head_dim))
        scales = self.empty_scales(num_pages)
        for b, (_, seq_k) in enumerate(self.seqlens):
            used = -(-seq_k // self.page_size)
            table[b, :used] = pages[b, :used]
            for token in range(seq_k):
                place = (int(pages[b, token // self.page_size]), token % self.page_size)
                for cache, name, dim in ((k_cache, "k_scale", self.head_dim), (v_cache, "v_scale", self.v_head_dim)):
                    rows = normal(self.kv_heads, dim)
                    cache[place] = reference.paged_kv.store(rows, self.stored, scales.get(name), place)
        lengths = list(itertools.accumulate((q for q, _ in self.seqlens), initial=0))
        q = normal(lengths[-1], self.heads, self.head_dim).to(self.dtype)
        args = (q, k_cache, v_cache, table, torch.tensor([k for _, k in self.seqlens], dtype=torch.int32))
        kwargs = {"cu_seqlens_q": torch.tensor(lengths, dtype=torch.int32), **scales}
        return tuple(t.to(device) for t in args), {name: t.to(device) for name, t in kwargs.items()}

    def empty_cache(self, num_pages: int, dim: int) -> Tensor:
        shape = (num_pages, self.kv_heads, self.page_size, dim)
        garbage = torch.full(shape, 100 if self.stored == torch.int8 else math.nan).to(self.stored).transpose(1, 2)
        return garbage if self.hnd else garbage.contiguous()

    def empty_scales(self, num_pages: int) -> dict[str, Tensor]:
        def scale(factor: float) -> Tensor:
            if self.scales == "token":
                return torch.full((num_pages, self.page_size, self.kv_heads), math.nan)
            return torch.arange(1, self.kv_heads + 1) * factor if self.scales == "head" else torch.tensor(factor)

        return {"k_scale": scale(0.03), "v_scale": scale(0.02)} if self.scales else {}


def options(case: PagedCase, device: str = "cpu") -> list[dict[str, Any]]:
    """What modifies scores and hides keys: nothing, everything together, then one by one."""
    generator = torch.Generator().manual_seed(7)
    slopes, sinks = torch.rand(case.heads, generator=generator) * 0.1, torch.randn(case.heads, generator=generator)
    total_q = sum(q for q, _ in case.seqlens)
    tree = torch.randint(-(2**31), 2**31 - 1, (total_q, 2), generator=generator).to(torch.int32)
    alone: list[dict[str, Any]] = [
        {},
        {"causal": False},
        {"window": (9, 0)},
        {"causal": False, "window": (20, 3)},
        {"softcap": 3.0},
        {"alibi_slopes": slopes},
        {"sinks": sinks},
        {"tree_mask": tree},
    ]
    together = {"window": (30, 0), "softcap": 2.0, "alibi_slopes": slopes.expand(len(case.seqlens), -1).contiguous()}
    together |= {"sinks": sinks, "tree_mask": tree, "softmax_scale": 0.3}
    return [
        {name: value.to(device) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        for kwargs in [alone[0], together, *alone[1:]]
    ]


def ids(*values):
    return torch.tensor(values, dtype=torch.int32)


def alone(attend, args, kwargs, request, first, last):
    """The queries [first, last) of a request by themselves, when the cache held no token after the last of them."""
    q, k_cache, v_cache, table, seqlens = args
    start, end = kwargs["cu_seqlens_q"][request : request + 2].tolist()
    seqlen = seqlens[request : request + 1] - (end - start - last)
    rest = {name: value for name, value in kwargs.items() if name != "cu_seqlens_q"}
    if "tree_mask" in rest:
        rest["tree_mask"] = rest["tree_mask"][start + first : start + last]
    if rest.get("alibi_slopes", torch.empty(0)).dim() == 2:
        rest["alibi_slopes"] = rest["alibi_slopes"][request : request + 1]
    rest["cu_seqlens_q"] = torch.tensor([0, last - first], dtype=torch.int32)
    q = q[start + first : start + last].clone()
    return attend((q, k_cache, v_cache, table[request : request + 1], seqlen.to(torch.int32)), rest)
