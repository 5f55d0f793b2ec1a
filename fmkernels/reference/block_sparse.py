# SPDX-License-Identifier: Apache-2.0
"""Products of a block-sparse matrix by their definition: those of the dense matrix that it stands for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..block_sparse_matrix import BlockSparse
from ..block_topology import BlockTopology

_ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def dsd(
    s: Tensor, b: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """out of `fmkernels.dsd`, of a matrix as `BlockSparse.to_dense` gives it."""
    out = s @ b
    out = out if scale is None else out * scale[:, None]
    out = out if bias is None else out + bias[:, None]
    return _ACTIVATIONS[activation](out)


def dds(
    a: Tensor, s: Tensor, *, scale: Tensor | None = None, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """out of `fmkernels.dds`, likewise."""
    out = a @ s
    out = out if scale is None else out * scale
    out = out if bias is None else out + bias
    return _ACTIVATIONS[activation](out)


def sdd(
    a: Tensor,
    b: Tensor,
    topology: BlockTopology,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The dense matrix that the result of `fmkernels.sdd` stands for: zeros where no block is."""
    ones = torch.ones(topology.num_blocks, *topology.block, device=a.device)
    is_stored = BlockSparse.of(ones, topology).to_dense() != 0
    return torch.where(is_stored, dds(a, b, scale=scale, bias=bias, activation=activation), 0)


def topology_moe(expert_ends: Tensor, num_rows: int, ffn: int, block: int | tuple[int, int] = 128) -> Tensor:
    """[num_rows, experts * ffn] bool, the elements that `fmkernels.topology_moe` stores."""
    row, column = torch.arange(num_rows)[:, None], torch.arange(len(expert_ends) * ffn)
    expert = (row >= expert_ends).sum(-1, keepdim=True)
    return column // ffn == expert if ffn > 0 else torch.zeros(num_rows, 0, dtype=torch.bool)


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 values, scales) of `BlockSparse.quantize`, for blocks that lie whole in the matrix and are finite."""
    scales = torch.stack([block.abs().max().float() / 127 if block.any() else torch.ones(()) for block in values])
    return (values.float() / scales[:, None, None]).round().clamp(-127, 127).to(torch.int8), scales
