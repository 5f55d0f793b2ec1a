# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=quantized_linear` counts: a decode step and a small batch."""

from __future__ import annotations

import torch
from counters import Case

from fmkernels import QuantizedWeight, quantize_weight
from fmkernels._library import ops


def linear(x: torch.Tensor, *tensors: torch.Tensor | int | None) -> torch.Tensor:
    return ops.quantized_linear_forward(x, *tensors)


def arguments(num_rows: int, dtype: torch.dtype, size: tuple[int, int], **form) -> tuple:
    generator = torch.Generator().manual_seed(0)
    w: QuantizedWeight = quantize_weight(torch.randn(size, generator=generator), **form)
    x = torch.randn(num_rows, size[1], generator=generator).to(dtype)
    return (x, w.values, w.scales, w.zeros, None, w.bits, w.group_size or 0, *w.shape)


def cases() -> list[Case]:
    shapes = [
        ("decode 1 row, int4 /128, bf16", 1, torch.bfloat16, {"bits": 4, "group_size": 128}),
        ("decode 1 row, int8, bf16", 1, torch.bfloat16, {"bits": 8}),
        ("decode 32 rows, int4 /128, bf16", 32, torch.bfloat16, {"bits": 4, "group_size": 128}),
        ("decode 1 row, int4 /128, fp32", 1, torch.float32, {"bits": 4, "group_size": 128}),
    ]
    size = (256, 2048)
    return [
        Case.of(f"{name} {list(size)}", linear, arguments(rows, dtype, size, **form), 2 * rows * size[0] * size[1])
        for name, rows, dtype, form in shapes
    ]


CASES = cases()
