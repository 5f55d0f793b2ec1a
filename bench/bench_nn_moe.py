# SPDX-License-Identifier: Apache-2.0
"""`nn.MoE`, the whole layer with its router and its losses, beside the block of Qwen3-MoE in transformers.

Its experts are a loop (eager) or run `torch.nn.functional.grouped_mm`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from measure import Contender
from torch import Tensor, nn

from fmkernels.integrations.moe_checkpoints import moe_arguments
from fmkernels.nn import MoE

transformers = pytest.importorskip("transformers")

WIDTH = 512


def layers(experts: int, topk: int, dtype: torch.dtype, device: torch.device) -> tuple[MoE, dict[str, nn.Module]]:
    """Ours, and theirs by the name of what their experts run, with the same weights."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = transformers.Qwen3MoeConfig(
        hidden_size=WIDTH,
        moe_intermediate_size=WIDTH,
        num_experts=experts,
        num_experts_per_tok=topk,
        norm_topk_prob=True,
    )
    ours = MoE(**moe_arguments(config)).to(device, dtype)
    theirs = {}
    for name in ("eager", "grouped_mm"):
        block = Qwen3MoeSparseMoeBlock(copy.deepcopy(config)).to(device, dtype)
        block.load_state_dict(ours.state_dict())
        block.experts.config._experts_implementation = name
        theirs[name] = block
    return ours, theirs


def tokens(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize(("experts", "topk"), [(8, 2), (64, 8)])
@pytest.mark.parametrize("count", [1, 16, 128, 512])
def test_forward(compare, device, count, experts, topk):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours, theirs = layers(experts, topk, dtype, device)
    x = tokens(count, dtype, device)
    peers = [Contender(f"transformers, {name}", block, [(x,)]) for name, block in theirs.items()]
    work = {"flops": 6 * count * topk * WIDTH * WIDTH}
    if count < 128:
        work = {"num_bytes": 3 * min(experts, count * topk) * WIDTH * WIDTH * x.element_size()}
    compare(
        "nn.MoE",
        f"{count} tokens, {experts} experts, top {topk}",
        Contender("fmkernels", lambda x: ours(x)[0], [(x,)]),
        peers,
        **work,
    )


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x; those of the weights are there, and let go."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        out = layer(leaf)
        out = out[0] if isinstance(out, tuple) else out
        found = torch.autograd.grad(out, [leaf, *layer.parameters()], grad)
    return found[0]


def test_training_step(compare, device):
    """Forward and all gradients of 512 tokens; the loop of 64 experts would take minutes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours, theirs = layers(8, 2, dtype, device)
    x, grad = tokens(512, dtype, device), torch.ones(1, 512, WIDTH, dtype=dtype, device=device)
    peers = [
        Contender(f"transformers, {name}", lambda x, block=block: step(block, x, grad), [(x,)])
        for name, block in theirs.items()
    ]
    mine = Contender("fmkernels", lambda x: step(ours, x, grad), [(x,)])
    compare("nn.MoE, training", "512 tokens, 8 experts, top 2", mine, peers, flops=18 * 512 * 2 * WIDTH * WIDTH)
