# SPDX-License-Identifier: Apache-2.0
"""A linear layer of whose weight only some blocks are stored, in bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _check as check
from ..block_sparse import dds
from ..block_sparse_matrix import BlockSparse
from ..block_topology import BlockTopology
from ._block_sparse_module import BlockSparseModule
from .block_sparse_linear import BlockSparseLinear


class QuantizedBlockSparseLinear(BlockSparseModule):
    """`fmkernels.nn.BlockSparseLinear` for inference: int8 blocks, each with one scale.

        y = fmkernels.dds(x, w.quantize().t(), bias=bias)

    The weight is constant: buffers `weight` int8, `block_scales` float32, whatever dtype the module is cast to, and the
    lists of the topology. The bias is a parameter; gradients flow into it and into x.

    Args:
        in_features, out_features, bias, topology: as of `fmkernels.nn.BlockSparseLinear`.
        device: of the buffers; default: of the topology.
        dtype: of the bias.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    A new layer has a weight of zeros: load a state dict, or make one with `from_block_sparse`.
    """

    block_scales: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        topology: BlockTopology,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.flag("nn.QuantizedBlockSparseLinear", "bias", bias)
        self._set_features(in_features, out_features, topology)
        device = topology.device if device is None else device
        num_blocks = topology.num_blocks
        weight = torch.zeros(num_blocks, *topology.block, device=device, dtype=torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("block_scales", torch.ones(num_blocks, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self._hold(topology)  # on the device of the weight

    @classmethod
    def from_block_sparse(cls, module: BlockSparseLinear) -> QuantizedBlockSparseLinear:
        """The quantised form of a layer, on its device; it shares the layer's bias."""
        if not isinstance(module, BlockSparseLinear):
            raise TypeError(
                "nn.QuantizedBlockSparseLinear.from_block_sparse: module must be a fmkernels.nn.BlockSparseLinear, got "
                f"{type(module).__name__}."
            )
        result = cls.__new__(cls)
        nn.Module.__init__(result)
        result._set_features(module.in_features, module.out_features, module.topology)
        matrix = BlockSparse.of(module.weight.detach(), module.topology).quantize()
        result.register_buffer("weight", matrix.values)
        result.register_buffer("block_scales", matrix.block_scales)
        result.bias = module.bias
        result.train(module.training)
        return result

    @property
    def matrix(self) -> BlockSparse:
        """The weight, [out_features, in_features], over the buffers."""
        return BlockSparse.of(self.weight, self.topology, block_scales=self.block_scales)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] gives [..., out_features]."""
        return dds(x, self.matrix.t(), bias=self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedBlockSparseLinear:
        """As of every module, but the scales stay float32: `module.bfloat16()` is about what it computes with."""
        scales = self.block_scales
        super()._apply(fn, recurse)
        if self.block_scales.dtype != torch.float32:
            self.block_scales = scales.to(self.block_scales.device)
        return self
