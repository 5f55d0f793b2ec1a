# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts by its definition: slot by slot where order matters, in plain torch where it does not."""

from __future__ import annotations

import torch
from torch import Tensor

from .moe_quantized import quantized_grouped_mm as quantized_grouped_mm
from .moe_quantized import quantized_moe_mlp as quantized_moe_mlp


def build_mapping(
    topk_idx: Tensor, num_experts: int, *, alignment: int = 1, num_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`fmkernels.moe.build_mapping`: the slots of expert 0 in their order, padding, those of expert 1, ..."""
    num_tokens, num_topk = topk_idx.shape
    slots_of: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(topk_idx.flatten().tolist()):
        if 0 <= expert < num_experts:
            slots_of[expert].append(slot)
    rows: list[int] = []
    positions = [-1] * (num_tokens * num_topk)
    ends: list[list[int]] = [[], []]
    for slots in slots_of:
        for slot in slots:
            positions[slot] = len(rows)
            rows.append(slot // num_topk)
        ends[1].append(len(rows))
        rows += [-1] * (-len(rows) % alignment)
        ends[0].append(len(rows))
    if num_rows is None:
        num_slots = topk_idx.numel()
        num_rows = (num_slots + min(num_experts, num_slots) * (alignment - 1)) // alignment * alignment
    rows += [-1] * (num_rows - len(rows))
    lists = (rows, positions, ends)
    tensors = (torch.tensor(values, dtype=torch.int32, device=topk_idx.device) for values in lists)
    pos_to_token, token_topk_to_pos, expert_offsets = tensors
    return pos_to_token, token_topk_to_pos.view(num_tokens, num_topk), expert_offsets


def permute(x: Tensor, mapping: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """`fmkernels.moe.permute`."""
    tokens = mapping[0].long()
    return torch.where((tokens >= 0).unsqueeze(-1), x[tokens.clamp(min=0)], 0)


def combine(y: Tensor, mapping: tuple[Tensor, Tensor, Tensor], topk_weights: Tensor | None) -> Tensor:
    """`fmkernels.moe.combine`; where y is float32 or less, a sum in float32 that is rounded once."""
    rows = mapping[1].long()
    dtype = torch.promote_types(y.dtype, torch.float32)
    total = y.new_zeros((rows.shape[0], y.shape[1]), dtype=dtype)
    for k in range(rows.shape[1]):
        chosen = (rows[:, k] >= 0).unsqueeze(-1)
        part = torch.where(chosen, y[rows[:, k].clamp(min=0)].to(dtype), 0)
        weight = 1 if topk_weights is None else torch.where(chosen[:, 0], topk_weights[:, k], 0).to(dtype).unsqueeze(-1)
        total = total + weight * part
    return total.to(y.dtype)


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, *, bias: Tensor | None = None, trans_b: bool = False) -> Tensor:
    """`fmkernels.moe.grouped_mm`: expert by expert; where a is less, in float32, rounded once."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    left, right = a.to(dtype), (b.transpose(-1, -2) if trans_b else b).to(dtype)
    ends = offsets.tolist()
    rows = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    if b.dim() == 2:
        parts = [left[:, of] @ right[of] for of in rows]
        return (torch.stack(parts) if parts else left.new_zeros(0, a.shape[0], right.shape[1])).to(a.dtype)
    parts = [left[of] @ right[e] + (0 if bias is None else bias[e].to(dtype)) for e, of in enumerate(rows)]
    parts.append(left.new_zeros(a.shape[0] - (ends[-1] if ends else 0), right.shape[2]))
    return torch.cat(parts).to(a.dtype)


def grouped_mm_gated(
    a: Tensor,
    b: Tensor,
    offsets: Tensor | tuple[Tensor, Tensor, Tensor],
    *,
    interleaved: bool = False,
    trans_b: bool = False,
) -> Tensor:
    """`fmkernels.moe.grouped_mm_gated`; where a is less, in float32, rounded once."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    rows, is_row = a.to(dtype), torch.ones(len(a), dtype=torch.bool, device=a.device)
    if isinstance(offsets, tuple):
        is_row = offsets[0] >= 0
        rows, offsets = permute(rows, offsets), offsets[2][0]
    both = grouped_mm(rows, b.to(dtype), offsets, trans_b=trans_b)
    gate, up = (both[:, 0::2], both[:, 1::2]) if interleaved else both.chunk(2, -1)
    return torch.where(is_row.unsqueeze(-1), torch.nn.functional.silu(gate) * up, 0).to(a.dtype)


def moe_mlp(x: Tensor, w_gate_up: Tensor, w_down: Tensor, topk_weights: Tensor, topk_idx: Tensor) -> Tensor:
    """`fmkernels.moe.moe_mlp`, expert by expert and choice by choice, in the dtype of x."""
    out = torch.zeros_like(x)
    for k in range(topk_idx.shape[1]):
        part = torch.zeros_like(x)
        for expert in range(w_gate_up.shape[0]):
            tokens = (topk_idx[:, k] == expert).nonzero().flatten()
            gate, up = (x[tokens] @ w_gate_up[expert].t()).chunk(2, -1)
            part = part.index_put((tokens,), (torch.nn.functional.silu(gate) * up) @ w_down[expert].t())
        chosen = topk_idx[:, k] >= 0
        out = out + torch.where(chosen, topk_weights[:, k], 0).to(x.dtype).unsqueeze(-1) * part
    return out


LARGEST = torch.finfo(torch.float32).max


def scores(logits: Tensor, scoring: str) -> Tensor:
    """Of clamped logits, in the dtype to compute in."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(max=LARGEST)
    if scoring == "softmax":
        return torch.softmax(x, -1)
    return torch.sigmoid(x) if scoring == "sigmoid" else torch.nn.functional.softplus(x, threshold=1e3).sqrt()


def log_scores(logits: Tensor, scoring: str) -> Tensor:
    """Their logarithms; of softmax but for a number that all experts share. -inf stays."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(max=LARGEST)
    if scoring == "softmax":
        return x
    if scoring == "sigmoid":
        return torch.nn.functional.logsigmoid(x)
    small = x < -30  # log(log(1 + e^x)) is x there, in float64 too
    inner = torch.nn.functional.softplus(torch.where(small, 0.0, x), threshold=1e3)
    return 0.5 * torch.where(small, x, inner.log())


def route(
    logits: Tensor,
    num_topk: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = True,
    bias: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
) -> tuple[Tensor, Tensor]:
    """`fmkernels.moe.route`: a stable sort of what is compared."""
    num_tokens, num_experts = logits.shape
    best = {"max": 1, "top2": 2, "sum": max(num_topk // topk_groups, 1)}[group_score]
    is_nan = logits.isnan().any(-1)
    if bias is not None:
        is_nan = is_nan | bias.isnan().any()
    usable = (logits != -torch.inf) & ~is_nan.unsqueeze(-1)
    finite = torch.where(usable, logits, -torch.inf)
    if bias is not None or (num_groups > 1 and best > 1):
        compared = scores(finite.detach(), scoring) + (0 if bias is None else bias)
        compared = torch.where(usable, compared.clamp(max=LARGEST), -torch.inf)
    else:
        compared = finite.detach().clamp(max=LARGEST)
    if num_groups > 1:
        grouped = compared.view(num_tokens, num_groups, num_experts // num_groups)
        top = grouped.topk(min(best, grouped.shape[-1]), -1).values
        group_scores = torch.where(top == -torch.inf, 0, top).sum(-1).where(top[..., 0] != -torch.inf, -torch.inf)
        kept = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk_groups]
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, kept, True)
        compared = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
    order = compared.sort(dim=-1, descending=True, stable=True).indices[:, :num_topk]
    chosen = compared.gather(-1, order) != -torch.inf
    safe = torch.where(is_nan.unsqueeze(-1) | (~usable.any(-1, keepdim=True)), 0, finite)  # rows without an expert
    if renormalize:
        logs = log_scores(safe, scoring).gather(-1, order).masked_fill(~chosen, -torch.inf)
        logs = torch.where(chosen.any(-1, keepdim=True), logs, 0)
        weights = torch.softmax(logs, -1)
    else:
        weights = scores(safe, scoring).gather(-1, order)
    return torch.where(chosen, weights, 0), torch.where(chosen, order, -1).int()


def load_balance_loss(logits: Tensor, topk_idx: Tensor, *, scoring: str = "softmax") -> Tensor:
    """`fmkernels.moe.load_balance_loss`."""
    num_experts = logits.shape[1]
    logs = log_scores(logits, scoring)[(topk_idx >= 0).any(-1)]
    if len(logs) == 0:
        return logs.sum()
    counts = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).to(logs.dtype)
    return num_experts * (counts / counts.sum() * torch.softmax(logs, -1).mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """`fmkernels.moe.z_loss`."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp(max=LARGEST)
    return torch.logsumexp(x, -1).square().sum() / max(len(x), 1)


def route_expert_choice(logits: Tensor, capacity: int, *, scoring: str = "softmax") -> tuple[Tensor, Tensor]:
    """`fmkernels.moe.route_expert_choice`: a stable sort of each column, of scores rounded to float32."""
    num_tokens, num_experts = logits.shape
    is_nan = logits.isnan().any(-1, keepdim=True)
    usable = ~is_nan & (logits != -torch.inf)
    safe = torch.where(usable.any(-1, keepdim=True), torch.where(is_nan, 0, logits), 0)
    s = scores(safe, scoring)
    compared = torch.where(usable, s.detach().float(), -torch.inf)
    order = compared.sort(dim=0, descending=True, stable=True).indices[:capacity]
    taken = (
        torch.zeros(num_tokens, num_experts, dtype=torch.bool, device=logits.device).scatter(0, order, True) & usable
    )
    experts = torch.arange(num_experts, dtype=torch.int32, device=logits.device)
    return torch.where(taken, s, 0), torch.where(taken, experts, -1).int()


def apply_capacity(
    topk_weights: Tensor, topk_idx: Tensor, num_experts: int, capacity: int, *, policy: str = "position"
) -> tuple[Tensor, Tensor]:
    """`fmkernels.moe.apply_capacity`."""
    idx = topk_idx.flatten()
    kept = torch.zeros_like(idx, dtype=torch.bool)
    for expert in range(num_experts):
        slots = (idx == expert).nonzero().flatten()
        if policy == "weight":
            weights = topk_weights.detach().flatten()[slots].nan_to_num(-torch.inf, torch.inf, -torch.inf)
            slots = slots[weights.sort(descending=True, stable=True).indices]
        kept[slots[:capacity]] = True
    kept = kept.view_as(topk_idx)
    return torch.where(kept, topk_weights, 0), torch.where(kept, topk_idx, -1).int()
