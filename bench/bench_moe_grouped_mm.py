# SPDX-License-Identifier: Apache-2.0
"""`moe.grouped_mm` beside a loop of `torch.mm` over the experts and `torch.nn.functional.grouped_mm`."""

from __future__ import annotations

import pytest
import torch
from counters_moe_grouped_mm import loads_of
from measure import Contender, num_sets
from torch import Tensor

from fmkernels import moe

INNER, COLUMNS = 1024, 512


def loop(a: Tensor, b: Tensor, offsets: Tensor, ends: list[int]) -> Tensor:
    """One product an expert that has rows, each to its place. Halves, which torch multiplies on this CPU in a reference
    loop, as float32: the strongest text."""
    dtype = torch.float32 if a.device.type == "cpu" else a.dtype
    out = torch.empty(a.shape[0], b.shape[2], dtype=dtype, device=a.device)
    begin = 0
    for expert, end in enumerate(ends):
        if end > begin:
            torch.mm(a[begin:end].to(dtype), b[expert].to(dtype), out=out[begin:end])
        begin = end
    return out.to(a.dtype)


def torch_grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, ends: list[int]) -> Tensor:
    return torch.nn.functional.grouped_mm(a, b, offs=offsets)


def fmkernels_grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, ends: list[int]) -> Tensor:
    return moe.grouped_mm(a, b, offsets)


def inputs(
    rows: int, experts: int, kind: str, columns_first: bool, dtype: torch.dtype, device: torch.device, seed: int
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * factor).to(dtype).to(device)

    if kind == "routed":
        loads = torch.multinomial(torch.ones(experts), rows, True, generator=generator).bincount(minlength=experts)
    else:
        loads = loads_of(kind, rows, experts)
    offsets = loads.cumsum(0).int()
    shape = (experts, COLUMNS, INNER) if columns_first else (experts, INNER, COLUMNS)
    b = normal(*shape, factor=INNER**-0.5)
    return normal(rows, INNER), b.transpose(1, 2) if columns_first else b, offsets.to(device), offsets.tolist()


@pytest.mark.parametrize(("experts", "topk"), [(8, 2), (64, 2), (64, 8)])
@pytest.mark.parametrize("tokens", [16, 128, 512, 2048])
@pytest.mark.parametrize("columns_first", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward(compare, device, cache_bytes, dtype, columns_first, tokens, experts, topk):
    rows = tokens * topk
    first = inputs(rows, experts, "routed", columns_first, dtype, device, 0)
    num_bytes = first[1].nbytes + first[0].nbytes
    seeds = range(1, min(num_sets(num_bytes, cache_bytes), 3))
    sets = [first, *(inputs(rows, experts, "routed", columns_first, dtype, device, seed) for seed in seeds)]
    layout = "columns" if columns_first else "rows"
    name = (
        f"{tokens} tokens, {experts} experts, top {topk}, b by {layout}, {'fp32' if dtype == torch.float32 else 'bf16'}"
    )
    work = {"flops": 2 * rows * INNER * COLUMNS} if tokens > 16 else {"num_bytes": num_bytes}
    ours = Contender("fmkernels", fmkernels_grouped_mm, sets)
    peers = [Contender("torch.mm, loop", loop, sets)]
    if dtype == torch.float32 or device.type == "cuda":
        peers.append(Contender("torch grouped_mm", torch_grouped_mm, sets))
    group = f"moe grouped_mm, {'few' if experts == 8 else 'many'} experts{', few tokens' if tokens < 512 else ''}"
    compare(group, name, ours, peers, **work)


def step(function, a: Tensor, b: Tensor, grad: Tensor, *others) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (a, b)]
    with torch.enable_grad():
        out = function(*leaves, *others)
    return torch.autograd.grad(out, leaves, grad)


def loop_of_products(a: Tensor, b: Tensor, offsets: Tensor, ends: list[int]) -> Tensor:
    weights = b.unbind()  # b[e] would make a gradient of all experts for each
    return torch.cat([a[begin:end] @ w for w, begin, end in zip(weights, [0, *ends[:-1]], ends, strict=True)])


@pytest.mark.parametrize(("experts", "topk"), [(8, 2), (64, 2)])
@pytest.mark.parametrize("kind", ["routed", "Zipf"])
def test_training_step(compare, device, experts, topk, kind):
    """Forward and both gradients, 512 tokens, float32 (bfloat16 on CUDA)."""
    rows, dtype = 512 * topk, torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b, offsets, ends = inputs(rows, experts, kind, False, dtype, device, 0)
    grad = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(9)) / 64  # sums of hundreds round
    grad = grad.to(dtype).to(device)
    sets = [(a, b, grad, offsets, ends)]
    ours = Contender("fmkernels", lambda *args: step(fmkernels_grouped_mm, *args), sets)
    peers = [
        Contender("torch, loop", lambda *args: step(loop_of_products, *args), sets),
        Contender("torch grouped_mm", lambda *args: step(torch_grouped_mm, *args), sets),
    ]
    name = f"{experts} experts, top {topk}, {kind}"
    compare("moe grouped_mm, training", name, ours, peers, flops=6 * rows * INNER * COLUMNS)
