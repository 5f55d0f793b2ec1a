# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture, one stack of weights each for their two products."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check as check
from .._library import needs_grad
from .._moe_mapping import MAX_EXPERTS
from .._moe_mlp import moe_mlp_with
from ..moe import moe_mlp
from .weight_grad import DeferredWeightGrad, WeightGradStore, stand_in

_OP = "nn.Experts"
HUB_FORMS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of gate, up and down in checkpoints with a tensor an expert: those of DeepSeek and Qwen, and of Mixtral."""


class Experts(DeferredWeightGrad, nn.Module):
    """w_down[e] (silu(g) * u) of the experts e of each token, summed by their weights: `fmkernels.moe.moe_mlp`.

    The parameters are `gate_up_proj` [num_experts, 2 * width, hidden], gate then up, and `down_proj` [num_experts,
    hidden, width], as transformers 5 has them. State dicts with a tensor an expert, as hubs store them, load too:
    `0.gate_proj.weight`, `0.up_proj.weight`, `0.down_proj.weight`, or `0.w1.weight`, `0.w3.weight`, `0.w2.weight`.

    Args:
        num_experts: from 1 to 1024.
        hidden: width of the input and of the output.
        width: of the gate of an expert.
        weight_grad_store: where backward leaves the gradients of the weights for later; None: in backward.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    A new expert is uniform as torch.nn.Linear is. Devices, dtypes, determinism, autocast: as `fmkernels.moe.moe_mlp`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        width: int,
        *,
        weight_grad_store: WeightGradStore | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("num_experts", num_experts), ("hidden", hidden), ("width", width)):
            check.integer(_OP, name, number, 1)
        if num_experts > MAX_EXPERTS:
            raise ValueError(f"{_OP}: num_experts must be at most {MAX_EXPERTS}, got {num_experts}.")
        self._set_store(_OP, weight_grad_store)
        self.num_experts, self.hidden, self.width = num_experts, hidden, width
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New values, as new experts have."""
        for weight in (self.gate_up_proj, self.down_proj):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)

    def forward(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_idx: Tensor,
        shared: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """x and the result are [num_tokens, hidden]; the choices [num_tokens, num_topk] as `moe.route` gives them.

        shared(x), if given, is added; under `expert_parallel.ExpertParallel` it is computed while the tokens travel.
        """
        weights = self.gate_up_proj, self.down_proj
        if self.weight_grad_store is None or not needs_grad(*weights):
            out = moe_mlp(x, *weights, topk_weights, topk_idx)
        else:
            left: list[tuple[Callable[[], Tensor], ...]] = []
            parameters = stand_in(self.weight_grad_store, self, ("gate_up_proj", "down_proj"), left)
            out = moe_mlp_with(x, *(w.detach() for w in weights), topk_weights, topk_idx, parameters, left)
        return out if shared is None else out + shared(x)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected, errors):
        form = hub_form(state_dict, prefix, self.num_experts)
        if form is not None:
            state_dict = self._stacked(dict(state_dict), prefix, form, missing_keys, errors)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, errors)

    def _stacked(
        self, state: dict[str, Any], prefix: str, form: tuple[str, str, str], missing: list[str], errors: list[str]
    ) -> dict[str, Any]:
        """The state dict with two stacks for the tensors of the experts; what is missing stays as it was."""
        names = ("gate_up_proj", "down_proj")
        ours = [getattr(self, name).detach() for name in names]
        own = expert_places(*ours, form)
        given = {key: state.pop(prefix + key, None) for key in own}
        like = next(t for t in given.values() if t is not None)
        stacks = [torch.empty_like(t, dtype=like.dtype, device=like.device) for t in ours]
        is_whole = True
        for key, place in expert_places(*stacks, form).items():
            tensor = given[key]
            if tensor is not None and tensor.shape != place.shape:
                errors.append(f"{prefix}{key} must be {list(place.shape)}, got {list(tensor.shape)}.")
                is_whole = False
            elif tensor is None:
                missing.append(prefix + key)
                is_whole = is_whole and not own[key].is_meta
            if is_whole:
                place.copy_(own[key] if tensor is None else tensor)
        return state | {prefix + name: t for name, t in zip(names, stacks if is_whole else ours, strict=True)}

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden={self.hidden}, width={self.width}"


def hub_form(names: Container[str], prefix: str, num_experts: int) -> tuple[str, str, str] | None:
    """What gate, up and down of an expert are called among these names; None: the experts are stacked, or not there."""
    if prefix + "gate_up_proj" in names:
        return None
    for form in HUB_FORMS:
        if any(f"{prefix}{e}.{name}.weight" in names for e in range(num_experts) for name in form):
            return form
    return None


def expert_places(gate_up: Tensor, down: Tensor, form: tuple[str, str, str]) -> dict[str, Tensor]:
    """By the names of hubs, the parts of both stacks that are the tensors of the experts."""
    width = down.shape[2]
    places = {}
    for expert, (both, last) in enumerate(zip(gate_up, down, strict=True)):
        for name, part in zip(form, (both[:width], both[width:], last), strict=True):
            places[f"{expert}.{name}.weight"] = part
    return places
