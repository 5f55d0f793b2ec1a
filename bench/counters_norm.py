# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=norm` counts: RMSNorm with and without a residual, LayerNorm, heads, and the gradients."""

from __future__ import annotations

import torch
from counters import Case

import fmkernels
from fmkernels._library import ops


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def backward(*args: object) -> tuple[torch.Tensor, ...]:
    return ops.norm_backward(*args)


def cases() -> list[Case]:
    x, residual = (rows(64, 4096, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    weight = rows(4096, dtype=torch.bfloat16)
    floats, float_weight = rows(64, 2048, dtype=torch.float32), rows(2048, dtype=torch.float32)
    heads, head_weight = rows(64, 32, 128, dtype=torch.bfloat16), rows(128, dtype=torch.bfloat16)
    return [
        Case.of("rms_norm [64, 4096] bf16", fmkernels.rms_norm, (x, weight)),
        Case.of("rms_norm of a sum [64, 4096] bf16", fmkernels.rms_norm, (x, weight, 1e-6, residual)),
        Case.of("rms_norm of heads [64, 32, 128] bf16", fmkernels.rms_norm, (heads, head_weight)),
        Case.of("layer_norm [64, 2048] fp32", fmkernels.layer_norm, (floats, float_weight, float_weight)),
        Case.of(
            "gradients of rms_norm [64, 4096] bf16", backward, (residual, None, x, weight, None, 1e-6, False, True)
        ),
        Case.of(
            "gradients of layer_norm [64, 2048] fp32",
            backward,
            (floats, floats, floats, float_weight, float_weight, 1e-6, True, True),
        ),
    ]


CASES = cases()
