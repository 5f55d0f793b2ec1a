# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=semi_structured` counts: the product with both tiles, the mask and the packing.

A unit of 4096 FLOPs is of those that a dense product would do: mma.sp m16n8k32 is two units.
"""

from __future__ import annotations

import torch
from counters import Case

from fmkernels import SemiStructured
from fmkernels._library import ops

ROWS, COLUMNS = 512, 512


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def linear(*arguments: torch.Tensor | None) -> torch.Tensor:
    return ops.semi_structured_linear(*arguments)


def linear_case(tokens: int) -> Case:
    w = SemiStructured.from_dense(normal(ROWS, COLUMNS))
    name = f"linear, {tokens} tokens, bf16 [{ROWS}, {COLUMNS}]"
    arguments = (normal(tokens, COLUMNS), w.values, w.metadata, None)
    return Case.of(name, linear, arguments, 2 * tokens * ROWS * COLUMNS)


def mask(x: torch.Tensor, both_directions: bool) -> torch.Tensor:
    return ops.semi_structured_mask(x, both_directions).byte()  # results are compared as numbers


def pack(x: torch.Tensor, kept: torch.Tensor, transposed: bool) -> tuple[torch.Tensor, ...]:
    return ops.semi_structured_pack(x, kept, transposed)


def cases() -> list[Case]:
    x = normal(ROWS, COLUMNS)
    kept = mask(x, True).bool()
    return [
        *[linear_case(tokens) for tokens in (256, 128, 32, 8)],
        Case.of("mask along rows", mask, (x, False)),
        Case.of("mask in both directions", mask, (x, True)),
        Case.of("pack", pack, (x, kept, False)),
        Case.of("pack the transpose", pack, (x, kept, True)),
    ]


CASES = cases()
