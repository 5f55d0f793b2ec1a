# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=block_codec` counts: wires of a tensor, tensors of wires, and wires of their sum."""

from __future__ import annotations

import torch
from counters import Case

from fmkernels import block_codec

NUMEL = 1 << 16


def normal(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cases() -> list[Case]:
    floats, halves = normal(torch.float32), normal(torch.bfloat16)
    result = []
    for bits, name in ((8, "8 bits"), (6, "6 bits"), (4, "4 bits"), (1, "1 bit"), ("float8_e4m3fn", "float8")):
        result.append(Case.of(f"quantize {NUMEL} fp32 to {name}", block_codec.quantize, (floats,), bits=bits))
    drawn = {"bits": 4, "rounding": "stochastic", "seed": 1}
    result += [
        Case.of(f"quantize {NUMEL} bf16 to 8 bits", block_codec.quantize, (halves,), bits=8),
        Case.of(f"quantize {NUMEL} fp32 to 4 bits, drawn", block_codec.quantize, (floats,), **drawn),
        Case.of(f"quantize {NUMEL} fp32 to 4 bits, rotated", block_codec.quantize, (floats,), bits=4, hadamard=True),
        Case.of(
            f"quantize {NUMEL} fp32 to 8 bits, blocks of 2048", block_codec.quantize, (floats,), bits=8, block=2048
        ),
    ]
    for bits in (8, 4):
        wires = torch.stack([block_codec.quantize(normal(torch.float32, seed), bits=bits) for seed in range(4)])
        one, options = wires[0].clone(), {"bits": bits}
        result += [
            Case.of(f"dequantize {NUMEL} of {bits} bits to fp32", block_codec.dequantize, (one, NUMEL), **options),
            Case.of(
                f"sum of 4 wires of {bits} bits to bf16",
                block_codec.sum_wires,
                (wires, NUMEL),
                **options,
                dtype=torch.bfloat16,
            ),
            Case.of(f"4 wires of {bits} bits to one", block_codec.reduce_wires, (wires, NUMEL), **options),
        ]
    return result


CASES = cases()
