# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=glu` counts: SwiGLU of packed and separate tensors, GeGLU, and the gradients."""

from __future__ import annotations

import torch
from counters import Case

import fmkernels
from fmkernels._library import ops


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def backward(*args: object) -> tuple[torch.Tensor, ...]:
    return ops.glu_backward(*args)


def cases() -> list[Case]:
    packed = rows(32, 2 * 8192, dtype=torch.bfloat16)
    gate, up, grad = (rows(32, 8192, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    floats = tuple(rows(32, 4096, dtype=torch.float32, seed=seed) for seed in range(2))
    return [
        Case.of("swiglu of packed [32, 2 * 8192] bf16", fmkernels.swiglu, (packed,)),
        Case.of("swiglu [32, 8192] bf16", fmkernels.swiglu, (gate, up)),
        Case.of("swiglu [32, 4096] fp32", fmkernels.swiglu, floats),
        Case.of("geglu [32, 8192] bf16", fmkernels.geglu, (gate, up)),
        Case.of("geglu tanh [32, 8192] bf16", fmkernels.geglu, (gate, up), approximate="tanh"),
        Case.of("gradients of swiglu [32, 8192] bf16", backward, (grad, gate, up, 0)),
        Case.of("gradients of geglu of packed [32, 2 * 8192] bf16", backward, (grad, packed, None, 1)),
    ]


CASES = cases()
