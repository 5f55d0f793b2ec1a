# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=moe_quantized` counts: products of packed experts, by their loads and the bits of a weight."""

from __future__ import annotations

import torch
from counters import Case
from counters_moe_grouped_mm import loads_of, normal

from fmkernels import moe
from fmkernels._library import ops

INNER, COLUMNS = 1024, 256
FORMS = {"int8": {"bits": 8}, "int4 /128": {"bits": 4, "group_size": 128}}


def mm(a: torch.Tensor, *tensors: torch.Tensor | int | None) -> torch.Tensor:
    return ops.moe_quantized_mm(a, *tensors)


def case(kind: str, num_rows: int, num_experts: int, form: str) -> Case:
    loads = loads_of(kind, num_rows, num_experts)
    w = moe.quantize_experts(normal(num_experts, COLUMNS, INNER), **FORMS[form])
    average = -(-num_rows // num_experts)
    tile = next((tile for tile in (8, 16) if average <= tile), 32)  # as moe_quantized.cu chooses it
    full = num_rows / (-(-loads // tile) * tile).sum().item()
    name = f"{form}, {num_rows} rows, {num_experts} experts, {kind}: tiles of {tile}, {full:.0%} full"
    sizes = (w.bits, w.group_size or 0, *w.shape)
    arguments = (normal(num_rows, INNER), w.values, w.scales, w.zeros, loads.cumsum(0).int(), None, *sizes)
    return Case.of(name, mm, arguments, 2 * num_rows * INNER * COLUMNS)


CASES = [
    *[case(kind, 8, 8, form) for form in FORMS for kind in ("balanced", "one-hot")],
    *[case(kind, 256, 8, form) for form in FORMS for kind in ("balanced", "Zipf")],
    case("balanced", 128, 8, "int4 /128"),
]
