# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture, one stack of weights each for their two products."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check as check
from .._library import needs_grad
from ..glu import swiglu
from ..moe import build_mapping, combine, moe_mlp, permute
from .grouped_linear import grouped_mm_deferred
from .weight_grad import DeferredWeightGrad, WeightGradStore

_OP = "nn.Experts"
# Of one expert in the checkpoints of hubs: gate, up and down.
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


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

    def forward(self, x: Tensor, topk_weights: Tensor, topk_idx: Tensor) -> Tensor:
        """x and the result are [num_tokens, hidden]; the choices [num_tokens, num_topk] as `moe.route` gives them."""
        if self.weight_grad_store is not None and needs_grad(self.gate_up_proj, self.down_proj):
            return self._deferred(x, topk_weights, topk_idx, self.weight_grad_store)
        return moe_mlp(x, self.gate_up_proj, self.down_proj, topk_weights, topk_idx)

    def _deferred(self, x: Tensor, topk_weights: Tensor, topk_idx: Tensor, store: WeightGradStore) -> Tensor:
        mapping = build_mapping(topk_idx, self.num_experts)
        offsets = mapping.expert_offsets[0]
        rows = permute(x, mapping)
        inner = swiglu(grouped_mm_deferred(self, "gate_up_proj", rows, offsets, None, store))
        return combine(grouped_mm_deferred(self, "down_proj", inner, offsets, None, store), mapping, topk_weights)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected, errors):
        for names in _NAMES:
            if any(f"{prefix}{e}.{name}.weight" in state_dict for e in range(self.num_experts) for name in names):
                state_dict = self._stacked(state_dict, prefix, names, missing_keys)
                break
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, errors)

    def _stacked(self, state_dict: Any, prefix: str, names: tuple[str, ...], missing_keys: list[str]) -> dict[str, Any]:
        """The state dict with two stacks for the tensors of the experts; what is missing stays as it is here."""
        result = dict(state_dict)
        parts = {
            name: [result.pop(f"{prefix}{e}.{name}.weight", None) for e in range(self.num_experts)] for name in names
        }
        absent = [f"{prefix}{e}.{n}.weight" for n, given in parts.items() for e, t in enumerate(given) if t is None]
        missing_keys += absent
        gate, up, down = parts.values()
        for name, ours in (("gate_up_proj", self.gate_up_proj), ("down_proj", self.down_proj)):
            result.setdefault(prefix + name, ours.detach())
        if not absent:
            pairs = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
            result[prefix + "gate_up_proj"], result[prefix + "down_proj"] = torch.stack(pairs), torch.stack(down)
        return result

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden={self.hidden}, width={self.width}"
