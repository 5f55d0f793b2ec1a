# SPDX-License-Identifier: Apache-2.0
"""Mixture of experts: choose experts for every token, move the tokens to them and back.

A slot is one choice of one token; `topk_idx` [num_tokens, num_topk] has the expert of each, -1 for none. A `Mapping`
gives every slot a row, the rows of an expert one after another, so that the experts are one ragged product over rows.
"""

from __future__ import annotations

from ._moe_choice import apply_capacity, route_expert_choice
from ._moe_gated import grouped_mm_gated
from ._moe_grouped import grouped_mm
from ._moe_losses import load_balance_loss, z_loss
from ._moe_mapping import Mapping, build_mapping
from ._moe_mlp import moe_mlp
from ._moe_permute import combine, permute
from ._moe_route import route
from .moe_quantized import quantize_experts, quantized_grouped_mm, quantized_moe_mlp

__all__ = [
    "Mapping",
    "apply_capacity",
    "build_mapping",
    "combine",
    "grouped_mm",
    "grouped_mm_gated",
    "load_balance_loss",
    "moe_mlp",
    "permute",
    "quantize_experts",
    "quantized_grouped_mm",
    "quantized_moe_mlp",
    "route",
    "route_expert_choice",
    "z_loss",
]
