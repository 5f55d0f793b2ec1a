# SPDX-License-Identifier: Apache-2.0
"""`moe.moe_mlp` beside a loop over the experts as Hugging Face writes it, torch's grouped_mm, and vLLM's fused layer.

width is 512. vLLM is given its weights packed, and memory to write to. torch multiplies halves on a CPU in a reference
loop, so that vLLM alone is beside us there.
"""

from __future__ import annotations

import peers_vllm
import pytest
import torch
import torch.nn.functional as F
from measure import Contender, num_sets
from torch import Tensor

from fmkernels import moe

WIDTH = 512
EXPERTS = pytest.mark.parametrize(("experts", "topk"), [(8, 2), (8, 8), (64, 2), (64, 8)])


def loop(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, idx: Tensor) -> Tensor:
    """The experts that have a token one after another, their rows added to those of the tokens."""
    out = torch.zeros_like(x)
    chosen = F.one_hot(idx.long(), w_gate_up.shape[0]).permute(2, 1, 0)
    gate_ups, downs = w_gate_up.unbind(), w_down.unbind()  # w[e] would make a gradient of all experts for each
    for expert in chosen.sum((-1, -2)).nonzero().flatten().tolist():
        k, token = torch.where(chosen[expert])
        gate, up = F.linear(x[token], gate_ups[expert]).chunk(2, -1)
        rows = F.linear(F.silu(gate) * up, downs[expert]) * weights[token, k, None].to(x.dtype)
        out = out.index_add(0, token, rows) if torch.is_grad_enabled() else out.index_add_(0, token, rows)
    return out


def torch_grouped_mm(x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, idx: Tensor) -> Tensor:
    num_tokens, num_topk = idx.shape
    flat = idx.flatten()
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=w_gate_up.shape[0]).cumsum(0).int()
    gate, up = F.grouped_mm(x[order // num_topk], w_gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * up, w_down.transpose(1, 2), offs=ends)
    rows = rows * weights.flatten()[order, None].to(rows.dtype)
    return rows[torch.argsort(order)].view(num_tokens, num_topk, -1).sum(1)


def inputs(tokens: int, experts: int, topk: int, hidden: int, dtype: torch.dtype, device: torch.device, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * factor).to(dtype).to(device)

    weights, idx = moe.route(torch.randn(tokens, experts, generator=generator).to(device), topk)
    gate_up = normal(experts, 2 * WIDTH, hidden, factor=hidden**-0.5)
    return normal(tokens, hidden), gate_up, normal(experts, hidden, WIDTH, factor=WIDTH**-0.5), weights, idx


def vllm(sets: list[tuple[Tensor, ...]]) -> Contender | None:
    fused, prepack = peers_vllm.op("cpu_fused_moe"), peers_vllm.op("prepack_moe_weight")
    if fused is None or prepack is None or sets[0][0].device.type != "cpu":
        return None

    def packed(weight: Tensor) -> Tensor:
        result = torch.empty_like(weight)
        prepack(weight, result, "vec")
        return result

    def run(out: Tensor, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, idx: Tensor) -> Tensor:
        fused(out, x, w_gate_up, w_down, None, None, weights, idx, False, "silu", "vec")
        return out

    given = [(torch.empty_like(x), x, packed(up), packed(down), weights, idx) for x, up, down, weights, idx in sets]
    return Contender("vllm", run, given)


@EXPERTS
@pytest.mark.parametrize("tokens", [16, 128, 512, 2048])
@pytest.mark.parametrize("hidden", [512, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward(compare, device, cache_bytes, dtype, hidden, tokens, experts, topk):
    first = inputs(tokens, experts, topk, hidden, dtype, device, 0)
    num_bytes = sum(t.nbytes for t in first[:3])
    sets = [first] + [
        inputs(tokens, experts, topk, hidden, dtype, device, seed)
        for seed in range(1, min(num_sets(num_bytes, cache_bytes), 2))
    ]
    ours, peers = Contender("fmkernels", moe.moe_mlp, sets), []
    if dtype == torch.float32 or device.type == "cuda":
        peers = [Contender("torch, loop", loop, sets), Contender("torch grouped_mm", torch_grouped_mm, sets)]
    theirs = vllm(sets)
    if theirs is not None:
        peers.append(theirs)
    if not peers:
        pytest.skip("no peer is installed")
    used = sum(len(idx.unique()) for *_, idx in sets) / len(sets)
    read = used * 3 * WIDTH * hidden * first[1].element_size()
    work = {"num_bytes": read} if tokens == 16 else {"flops": 6 * tokens * topk * hidden * WIDTH}
    short = "fp32" if dtype == torch.float32 else "bf16"
    name = f"{tokens} tokens, {experts} experts, top {topk}, hidden {hidden}, {short}"
    compare(f"moe_mlp, {tokens} tokens", name, ours, peers, **work)


def step(function, x: Tensor, w_gate_up: Tensor, w_down: Tensor, weights: Tensor, idx: Tensor, grad: Tensor):
    leaves = [t.detach().requires_grad_() for t in (x, w_gate_up, w_down, weights)]
    with torch.enable_grad():
        out = function(*leaves, idx)
    return torch.autograd.grad(out, leaves, grad)


@EXPERTS
@pytest.mark.parametrize("tokens", [128, 512])
def test_training_step(compare, device, tokens, experts, topk):
    """Forward and all gradients, hidden 512, float32 (bfloat16 on CUDA)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    args = inputs(tokens, experts, topk, 512, dtype, device, 0)
    grad = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(9)) / 64  # sums of hundreds round
    sets = [(*args, grad.to(dtype).to(device))]
    ours = Contender("fmkernels", lambda *given: step(moe.moe_mlp, *given), sets)
    peers = [
        Contender("torch, loop", lambda *given: step(loop, *given), sets),
        Contender("torch grouped_mm", lambda *given: step(torch_grouped_mm, *given), sets),
    ]
    name = f"{tokens} tokens, {experts} experts, top {topk}"
    compare("moe_mlp, training", name, ours, peers, flops=18 * tokens * topk * 512 * WIDTH)
