# SPDX-License-Identifier: Apache-2.0
"""A feed-forward layer of experts, of which every token uses a few."""

from __future__ import annotations

import math
from contextlib import nullcontext
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _check as check
from .._library import as_rows, no_view, under_autocast
from .._moe_choice import POLICIES
from ..moe import apply_capacity, build_mapping, grouped_mm, load_balance_loss, route, z_loss
from .experts import Experts
from .glu import SwiGLU
from .weight_grad import WeightGradStore

_OP = "nn.MoE"


class MoELosses(NamedTuple):
    """What a layer tells of a batch, to be weighted, summed over layers and added to the loss by who calls it."""

    load_balance: Tensor
    """float32: `moe.load_balance_loss`, 1 where all experts are used alike."""
    z_loss: Tensor
    """float32: `moe.z_loss`, the mean square of the logarithm of the softmax's denominator."""
    load: Tensor
    """[num_experts], int64: how often each expert was chosen, before a capacity drops anything."""


class Router(nn.Module):
    """The logits of the experts, always in float32: of bfloat16 ones many are equal.

    On the CPU those of a token have the same bits alone and among others: else it might get another expert in another
    batch, or on another rank. On other devices they are torch's product.
    """

    weight: nn.Parameter
    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        selection_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=dtype))
        bias = torch.empty(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New values: uniform as those of torch.nn.Linear, and a bias of zeros."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [num_tokens, hidden] gives [num_tokens, num_experts], float32, under autocast too."""
        no_autocast = torch.autocast(x.device.type, enabled=False) if under_autocast(x) else nullcontext()
        with no_autocast:
            if x.device.type != "cpu":
                return nn.functional.linear(x.float(), self.weight.float())
            ends = torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
            return grouped_mm(x.float(), self.weight.float().unsqueeze(0), ends, trans_b=True)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """As of every module, but the bias stays float32: steps of a thousandth are lost in bfloat16."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if bias is not None and after is not None and after.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        name = prefix + "e_score_correction_bias"
        if isinstance(state_dict.get(name), Tensor):
            state_dict = {**state_dict, name: state_dict[name].float()}
        super()._load_from_state_dict(state_dict, prefix, *args)


class MoE(nn.Module):
    """A router, experts of whom every token uses `num_topk`, and a shared expert that all tokens use, if any.

        out, losses = moe(x)
        loss = task_loss + 0.01 * losses.load_balance + 0.001 * losses.z_loss

    The state dict is that of the MixtralSparseMoeBlock and the DeepseekV3MoE of transformers 5, `gate.weight`,
    `gate.e_score_correction_bias`, `experts.gate_up_proj`, `experts.down_proj` and `shared_experts.gate_proj.weight`
    and so on; one with a tensor an expert loads too, see `Experts`.

    Args:
        hidden: width of the input and of the output.
        width: of the gate of an expert.
        num_experts, num_topk, scoring, renormalize, num_groups, topk_groups, group_score: as of `moe.route`.
        selection_bias: the buffer `gate.e_score_correction_bias` is added to the scores that choose; see `update_bias`.
        routed_scale: a factor of the weights of the experts.
        capacity_factor: None: no slot is dropped. Else an expert takes ceil(capacity_factor * num_tokens * num_topk /
            num_experts) slots, which the shapes alone decide, and more are dropped, in training and after it: a token
            that lost all of its slots gets nothing from the experts.
        policy: which slots stay, as of `moe.apply_capacity`: the first ones ("position"), in whose case a token depends
            on those before it alone, or those of the largest weights ("weight").
        shared_width: of the gate of the shared expert; 0: there is none.
        return_losses: False: forward gives the output alone, as the blocks of transformers do.
        weight_grad_store: of the experts.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU: float32, bfloat16, float16; CUDA: bfloat16, float16. The router computes in float32. Nothing waits for the
    device. Deterministic; on the CPU, without a capacity, a token's bits depend on the token alone (a shared expert is
    made of torch's linear layers, which promise no such thing). Works under autocast and
    `torch.compile(fullgraph=True)`. A token that has NaN has no expert. After Shazeer et al. 2017, Fedus et al. 2021,
    and DeepSeek-AI 2024, DeepSeek-V3.
    """

    def __init__(
        self,
        hidden: int,
        width: int,
        num_experts: int,
        num_topk: int,
        *,
        scoring: str = "softmax",
        renormalize: bool = True,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score: str = "max",
        selection_bias: bool = False,
        routed_scale: float = 1.0,
        capacity_factor: float | None = None,
        policy: str = "position",
        shared_width: int = 0,
        return_losses: bool = True,
        weight_grad_store: WeightGradStore | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, number, least in (("hidden", hidden, 1), ("width", width, 1), ("shared_width", shared_width, 0)):
            check.integer(_OP, name, number, least)
        check.integer(_OP, "num_experts", num_experts, 1)
        for name, flag in (("selection_bias", selection_bias), ("return_losses", return_losses)):
            check.flag(_OP, name, flag)
        check.number(_OP, "routed_scale", routed_scale)
        if capacity_factor is not None:
            check.number(_OP, "capacity_factor", capacity_factor, non_negative=True)
        if policy not in POLICIES:
            raise ValueError(f"{_OP}: policy must be {' or '.join(POLICIES)}, got {policy!r}.")
        self.options: dict[str, Any] = {
            "scoring": scoring,
            "renormalize": renormalize,
            "num_groups": num_groups,
            "topk_groups": topk_groups,
            "group_score": group_score,
        }
        route(torch.empty(0, num_experts), num_topk, **self.options)  # which says what is wrong with them
        self.hidden, self.num_experts, self.num_topk = hidden, num_experts, num_topk
        self.routed_scale, self.capacity_factor, self.policy = routed_scale, capacity_factor, policy
        self.return_losses = return_losses
        self.gate = Router(hidden, num_experts, selection_bias, device, dtype)
        self.experts = Experts(
            num_experts, hidden, width, weight_grad_store=weight_grad_store, device=device, dtype=dtype
        )
        self.shared_experts = SwiGLU(hidden, shared_width, device=device, dtype=dtype) if shared_width else None

    def reset_parameters(self) -> None:
        """New values, as a new layer has: after `to_empty`, for a layer that was made on the meta device."""
        shared = [] if self.shared_experts is None else self.shared_experts.children()
        for module in (self.gate, self.experts, *shared):
            module.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, MoELosses] | Tensor:
        """x [..., hidden] gives ([..., hidden], `MoELosses`), or without return_losses the first alone."""
        check.is_tensor(_OP, "x", x)
        if x.dim() < 1 or x.shape[-1] != self.hidden:
            raise ValueError(f"{_OP}: x must be [..., {self.hidden}], got {list(x.shape)}.")
        rows = as_rows(x)
        topk_weights, topk_idx, losses = self.route(rows)
        out = self.experts(rows, topk_weights, topk_idx, self.shared_experts)
        if x.dim() != 2:
            out = no_view(out, x.shape)
        return out if losses is None else (out, losses)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor, MoELosses | None]:
        """(topk_weights, topk_idx, losses) of [num_tokens, hidden]: what the experts are given."""
        logits = self.gate(rows)
        bias = self.gate.e_score_correction_bias
        topk_weights, topk_idx = route(logits, self.num_topk, bias=bias, **self.options)
        losses = None
        if self.return_losses:
            balance = load_balance_loss(logits, topk_idx, scoring=self.options["scoring"])
            losses = MoELosses(balance, z_loss(logits), expert_load(topk_idx, self.num_experts))
        if self.capacity_factor is not None:
            capacity = self.capacity(rows.shape[0])
            kept = apply_capacity(topk_weights, topk_idx, self.num_experts, capacity, policy=self.policy)
            topk_weights, topk_idx = kept
        if self.routed_scale != 1.0:
            topk_weights = topk_weights * self.routed_scale
        return topk_weights, topk_idx, losses

    def capacity(self, num_tokens: int) -> int:
        """How many slots of so many tokens an expert takes; a factor of 1.1 is eleven tenths, no binary number."""
        factor = Fraction(self.capacity_factor).limit_denominator(1_000_000)
        return -(-num_tokens * self.num_topk * factor.numerator // (self.num_experts * factor.denominator))

    def backward_dw(self) -> None:
        """As of `Experts`: the weight gradients that wait in its store."""
        self.experts.backward_dw()

    @torch.no_grad()
    def update_bias(self, load: Tensor, rate: float, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Raises the bias of the experts that were chosen less than the mean by `rate`, and lowers that of the others.

        Args:
            load: [num_experts], integers: `MoELosses.load`, or a sum of several.
            rate: such as 0.001.
            group: the loads are summed over its ranks first; None: of this process alone.

        To be called once a step, after the optimizer. After Wang et al. 2024, Auxiliary-Loss-Free Load Balancing.
        """
        op = f"{_OP}.update_bias"
        bias = self.gate.e_score_correction_bias
        if bias is None:
            raise ValueError(f"{op}: the layer must have a selection_bias, got one without.")
        check.is_tensor(op, "load", load)
        check.dtype(op, "load", load, (torch.int64, torch.int32))
        check.rank(op, "load", load, 1, "[num_experts]")
        check.size(op, "load", load, 0, "as many elements as the layer has experts,", self.num_experts)
        check.same_device(op, "load", load, "the bias", bias)
        check.number(op, "rate", rate, non_negative=True)
        total = load.long().clone()
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
        bias += rate * torch.sign(total.sum() - self.num_experts * total)

    def extra_repr(self) -> str:
        capacity = "" if self.capacity_factor is None else f", capacity_factor={self.capacity_factor}"
        return f"num_topk={self.num_topk}, scoring={self.options['scoring']}{capacity}"


def expert_load(topk_idx: Tensor, num_experts: int) -> Tensor:
    """[num_experts], int64: how many slots have each expert."""
    ends = build_mapping(topk_idx, num_experts).expert_offsets[1]
    return torch.diff(ends, prepend=ends.new_zeros(1)).long()
