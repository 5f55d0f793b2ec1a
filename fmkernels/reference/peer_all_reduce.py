# SPDX-License-Identifier: Apache-2.0
"""What `fmkernels.PeerWorkspace` leaves on the ranks, computed in one process; lists have an entry per rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import norm, quantized_collectives


def all_reduce(
    tensors: Sequence[Tensor],
    *,
    op: str = "sum",
    bits: int | None = None,
    block: int = 128,
    algorithm: str = "two_shot",
) -> Tensor:
    """`PeerWorkspace.all_reduce`: the result, which is the same on every rank."""
    if bits is not None:
        return quantized_collectives.all_reduce(tensors, op=op, bits=bits, block=block, algorithm=algorithm)
    return _sum(tensors, op).to(tensors[0].dtype)


def all_reduce_rms_norm(
    tensors: Sequence[Tensor],
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    bits: int | None = None,
    block: int = 128,
    algorithm: str = "two_shot",
) -> tuple[Tensor, Tensor]:
    """`PeerWorkspace.all_reduce_rms_norm`: (out, residual_out) of a rank with this residual.

    The sum of the residual is in at least float32 and is rounded once to the dtype of the inputs, where that is a half.
    """
    dtype = tensors[0].dtype
    if bits is None:
        total = _sum(tensors, "sum")
        total = total.to(dtype).to(total.dtype) if algorithm == "two_shot" else total
    else:
        floats = [x.float() for x in tensors]  # which a half is exactly: the wires are those of the halves
        total = quantized_collectives.all_reduce(floats, bits=bits, block=block, algorithm=algorithm)
    residual_out = (total + residual.to(total.dtype)).to(dtype)
    wide = residual_out.to(torch.promote_types(dtype, torch.float32))
    return norm.rms_norm(wide, weight.to(wide.dtype), eps).to(dtype), residual_out


def _sum(tensors: Sequence[Tensor], op: str) -> Tensor:
    """In the order of ranks, in at least float32."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = torch.zeros_like(tensors[0], dtype=wide)
    for x in tensors:
        total = total + x.to(wide)
    return total * torch.tensor(1 / len(tensors), dtype=torch.float32).to(wide) if op == "avg" else total
