# SPDX-License-Identifier: Apache-2.0
"""Blocks as small integers with a scale each: how `BlockSparse.quantize` chooses them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._check import FLOAT32_MAX
from .block_topology import BlockTopology

LARGEST = 127
MAX_SCALE = FLOAT32_MAX / LARGEST * (1 - 2**-23)  # LARGEST times as much is finite


def is_inside(topology: BlockTopology) -> Tensor:
    """[num_blocks, block rows, block columns] bool: what of its blocks is a part of the matrix."""
    (rows, columns), rows_of_blocks = topology.block, topology.row_indices.long()
    row = rows_of_blocks.remainder(max(1, topology.num_block_rows))
    left = torch.where(rows_of_blocks < 0, 0, topology.shape[-2] - row * rows)
    is_row = torch.arange(rows, device=topology.device) < left[:, None]
    left = topology.shape[-1] - topology.column_indices.long() * columns
    is_column = torch.arange(columns, device=topology.device) < left[:, None]
    return is_row[:, :, None] & is_column[:, None, :]


def quantize_blocks(values: Tensor, topology: BlockTopology) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales [num_blocks]: symmetric, the largest magnitude of a block is 127 of its scale.

    What lies past the edge of the matrix is 0 and asks for nothing. The scale of a block of zeros is 1, that of a block
    with a value that is not finite NaN.
    """
    wide = torch.where(is_inside(topology), values.detach().float(), 0)
    largest = wide.abs().amax((1, 2))
    scales = (largest / LARGEST).clamp(max=MAX_SCALE)
    scales = torch.where(scales == 0, 1.0, scales)
    quotients = (wide / scales[:, None, None]).round().clamp(-LARGEST, LARGEST)
    is_finite = largest.isfinite()
    quantized = torch.where(is_finite[:, None, None], quotients, 0).to(torch.int8)
    return quantized, torch.where(is_finite, scales, torch.nan)


def dequantize_blocks(values: Tensor, block_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """values * scale in float32, rounded to dtype."""
    return (values.float() * block_scales[:, None, None]).to(dtype)
