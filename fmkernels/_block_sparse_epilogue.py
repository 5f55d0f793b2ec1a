# SPDX-License-Identifier: Apache-2.0
"""The epilogue of `dsd`, `dds` and `sdd`: what the ops call an activation, and the same in torch, for gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._block_sparse_quantize import is_inside
from .block_topology import BlockTopology

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3}  # as the ops number them
FUNCTIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def finish_blocks(
    values: Tensor, topology: BlockTopology, scale: Tensor | None, bias: Tensor | None, activation: str | None
) -> Tensor:
    """The epilogue of sdd by torch's operations, for gradients; past the edge of the matrix stay zeros."""
    block_columns, columns = topology.block[1], topology.shape[-1]

    def of_blocks(vector: Tensor) -> Tensor:
        padded = F.pad(vector, (0, topology.num_block_columns * block_columns - columns))
        return padded.view(-1, 1, block_columns)[topology.column_indices.long()]

    out = values if scale is None else (values * of_blocks(scale)).to(values.dtype)
    out = out if bias is None else (out + of_blocks(bias)).to(values.dtype)
    out = out if activation is None else FUNCTIONS[activation](out)
    return torch.where(is_inside(topology), out, 0)
