# SPDX-License-Identifier: Apache-2.0
"""`moe.quantized_moe_mlp` beside `moe.moe_mlp` with dense weights, and a loop of `F.linear` over the experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import Contender
from torch import Tensor

from fmkernels import QuantizedWeight, dequantize_weight, moe

HIDDEN, WIDTH, TOPK = 1024, 512, 2
FORMS = {"int8": (8, None), "int4 /128": (4, 128)}
WEIGHT_SETS = {8: 6, 64: 2}  # so that what a call reads is not in the cache from the one before
TOKEN_SETS = 12

EVERY_FORM = pytest.mark.parametrize("form", FORMS)
EVERY_SIZE = pytest.mark.parametrize(("experts", "tokens"), [(e, t) for e in WEIGHT_SETS for t in (1, 16, 128, 512)])


def packed_and_dense(rows: int, columns: int, form: str, dtype: torch.dtype, device, generator) -> tuple:
    """Integers whose scale is a power of two, so that bfloat16 holds them as they are. None is negative: sums of halves
    then agree to their last places."""
    bits, group_size = FORMS[form]
    low, high = (0, 128) if bits == 8 else (8, 16)
    q = torch.randint(low, high, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.full((rows, -(-columns // (group_size or columns))), 2.0 ** (-14 if bits == 8 else -10))
    packed = QuantizedWeight.from_integers(q, scales, bits=bits, group_size=group_size).to(device)
    return packed, dequantize_weight(packed, dtype)


def tokens_of(count: int, experts: int, dtype: torch.dtype, device, generator) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(count, HIDDEN, generator=generator).to(dtype).to(device)
    weights, idx = moe.route(torch.randn(count, experts, generator=generator), TOPK)
    return x, weights.to(device), idx.to(device)


def loop(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, idx: Tensor) -> Tensor:
    """Expert by expert over dense weights that were made before: the strongest text of torch's. Halves, which torch
    multiplies on this CPU in a reference loop, as float32, weights too."""
    rows = x.float() if x.device.type == "cpu" else x
    out = torch.zeros_like(rows)
    for expert in idx.unique().tolist():
        token, k = (idx == expert).nonzero(as_tuple=True)
        gate, up = F.linear(rows[token], gate_up[expert]).chunk(2, -1)
        part = F.linear(F.silu(gate) * up, down[expert])
        out.index_add_(0, token, part * weights[token, k].unsqueeze(-1).to(part.dtype))
    return out.to(x.dtype)


def sets(form: str, experts: int, tokens: int, dtype: torch.dtype, device: torch.device):
    """Argument tuples of the packed layer, the dense one in `dtype` and the loop, and the bytes that a call reads."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(WEIGHT_SETS[experts]):
        gate_up = packed_and_dense(experts * 2 * WIDTH, HIDDEN, form, dtype, device, generator)
        down = packed_and_dense(experts * HIDDEN, WIDTH, form, dtype, device, generator)
        pairs.append((gate_up, down))
    dense_in_float32 = dtype != torch.float32 and device.type == "cpu"
    packed_sets, dense_sets, loop_sets, num_bytes = [], [], [], 0.0
    in_float32 = [tuple(d.float() if dense_in_float32 else d for _, d in pair) for pair in pairs]
    for i in range(TOKEN_SETS):
        x, weights, idx = tokens_of(tokens, experts, dtype, device, generator)
        which = i % len(pairs)
        (packed_up, dense_up), (packed_down, dense_down) = pairs[which]
        packed_sets.append((x, packed_up, packed_down, weights, idx))
        dense_sets.append((x, *(d.unflatten(0, (experts, -1)) for d in (dense_up, dense_down)), weights, idx))
        loop_sets.append((x, *(d.unflatten(0, (experts, -1)) for d in in_float32[which]), weights, idx))
        used = len(idx.unique()) / experts
        num_bytes += used * (packed_up.nbytes + packed_down.nbytes) / TOKEN_SETS
    return packed_sets, dense_sets, loop_sets, num_bytes


@EVERY_SIZE
@EVERY_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("peer", ["dense", "torch"])
def test_layer(compare, device, peer, dtype, form, experts, tokens):
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("CUDA has halves alone")
    packed, dense, looped, num_bytes = sets(form, experts, tokens, dtype, device)
    name = "fp32" if dtype == torch.float32 else "bf16"
    ours = Contender("fmkernels", moe.quantized_moe_mlp, packed)
    other = Contender("moe_mlp", moe.moe_mlp, dense) if peer == "dense" else Contender("torch, loop", loop, looped)
    work = {"num_bytes": num_bytes} if tokens <= 16 else {"flops": 6 * tokens * TOPK * HIDDEN * WIDTH}
    against = f"{name}, over {'moe_mlp' if peer == 'dense' else 'torch'}"
    group = f"moe_quantized {form[:4]}, {against}"
    compare(group, f"{form} {tokens} tokens, {experts} experts, {against}", ours, [other], **work)
