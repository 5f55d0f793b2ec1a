# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=moe_grouped_mm` counts: products by experts, by their loads and the layout of b."""

from __future__ import annotations

import torch
from counters import Case

from fmkernels._library import ops

INNER, COLUMNS = 1024, 256


def mm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return ops.moe_grouped_mm(a, b, offsets, None)


def inner(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return ops.moe_grouped_mm_inner(a, b, offsets)


def loads_of(kind: str, num_rows: int, num_experts: int) -> torch.Tensor:
    """Rows of each expert: as even as can be, by Zipf's law, or all of one; the same in every run."""
    weights = {
        "balanced": torch.ones(num_experts),
        "Zipf": 1 / torch.arange(1.0, num_experts + 1),
        "one-hot": torch.eye(num_experts)[num_experts // 2],
    }[kind]
    ends = (weights.cumsum(0) / weights.sum() * num_rows).round()
    return ends.diff(prepend=torch.zeros(1)).int()


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def tile_efficiency(loads: torch.Tensor) -> float:
    """Rows over those of the tiles that compute them; the tile is chosen by the bounds, as moe_grouped_mm.cu does."""
    num_rows, average = int(loads.sum()), -(-int(loads.sum()) // len(loads))
    tile = next((tile for tile in (16, 32, 64) if average <= tile), 128)
    return num_rows / (-(-loads // tile) * tile).sum().item()


def mm_case(
    kind: str, num_rows: int, num_experts: int, trans_b: bool = False, inner: int = INNER, columns: int = COLUMNS
) -> Case:
    loads = loads_of(kind, num_rows, num_experts)
    b = normal(num_experts, columns, inner).transpose(1, 2) if trans_b else normal(num_experts, inner, columns)
    layout = "columns" if trans_b else "rows"
    name = f"mm, {num_rows} rows, {num_experts} experts, {kind}, b by {layout}: tiles {tile_efficiency(loads):.0%} full"
    arguments = (normal(num_rows, inner), b, loads.cumsum(0).int())
    return Case.of(name, mm, arguments, 2 * num_rows * inner * columns)


def inner_case(kind: str, num_rows: int, num_experts: int) -> Case:
    offsets = loads_of(kind, num_rows, num_experts).cumsum(0).int()
    arguments = (normal(num_rows, INNER), normal(num_rows, COLUMNS), offsets)
    name = f"inner, {num_rows} rows, {num_experts} experts, {kind}"
    return Case.of(name, inner, arguments, 2 * num_rows * INNER * COLUMNS)


CASES = [
    *[mm_case(kind, 1024, 8) for kind in ("balanced", "Zipf", "one-hot")],
    mm_case("balanced", 1024, 8, trans_b=True),
    *[mm_case("balanced", rows * 8, 8) for rows in (64, 32, 16)],
    *[mm_case(kind, 4096, 64, inner=256, columns=1024) for kind in ("balanced", "Zipf", "one-hot")],  # by turns
    *[inner_case(kind, 1024, 4) for kind in ("balanced", "Zipf")],
]
