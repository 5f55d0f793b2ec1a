# SPDX-License-Identifier: Apache-2.0
"""What linear layers with a block-sparse weight have in common: a topology, which two buffers bring into the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _check as check
from ..block_topology import BlockTopology


class BlockSparseModule(nn.Module):
    """Has a `weight` of [num_blocks, block rows, block columns], and the lists of its topology as buffers."""

    weight: Tensor
    row_offsets: Tensor
    column_indices: Tensor
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def _set_features(self, in_features: int, out_features: int, topology: BlockTopology) -> None:
        op = f"nn.{type(self).__name__}"
        for name, number in (("in_features", in_features), ("out_features", out_features)):
            check.integer(op, name, number, 1)
        self.in_features, self.out_features = in_features, out_features
        self._check_topology(topology)
        self._hold(topology)

    def _check_topology(self, topology: BlockTopology) -> None:
        op = f"nn.{type(self).__name__}"
        if not isinstance(topology, BlockTopology):
            raise TypeError(f"{op}: topology must be a BlockTopology, got {type(topology).__name__}.")
        expected = (self.out_features, self.in_features)
        if topology.shape != expected:
            raise ValueError(f"{op}: topology must be of shape {expected}, got {topology.shape}.")

    def _hold(self, topology: BlockTopology) -> None:
        """The topology follows the weight, but not to the meta device, which would forget it."""
        weight = getattr(self, "weight", None)
        if weight is not None and weight.device not in (topology.device, torch.device("meta")):
            topology = topology.to(weight.device)
        self.topology = topology
        self.register_buffer("row_offsets", topology.row_offsets)
        self.register_buffer("column_indices", topology.column_indices)

    def _resize(self, num_blocks: int) -> None:
        """Room for the blocks of a state dict, in all that has one entry a block."""
        self.weight.grad = None
        for tensor in (self.weight, getattr(self, "block_scales", None)):
            if tensor is not None:
                tensor.data = tensor.new_empty(num_blocks, *tensor.shape[1:])

    def _apply(self, fn: Any, recurse: bool = True) -> BlockSparseModule:
        topology = self.topology
        super()._apply(fn, recurse)
        self._hold(topology)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected, errors):
        names = [prefix + name for name in ("row_offsets", "column_indices")]
        offsets, indices = map(state_dict.get, names)
        if offsets is None or indices is None:  # one without the other says nothing, and must not be copied
            state_dict = {name: value for name, value in state_dict.items() if name not in names}
        elif isinstance(offsets, Tensor) and isinstance(indices, Tensor):
            try:
                lists = offsets.clone(), indices.clone()
                topology = BlockTopology(*lists, self.topology.shape, self.topology.block)
            except (ValueError, TypeError) as error:
                errors.append(f"{prefix}: {error}")
                return
            if topology.num_blocks != self.topology.num_blocks and (prefix + "weight") in state_dict:
                self._resize(topology.num_blocks)
            self._hold(topology)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected, errors)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block={self.topology.block}, density={self.topology.density:.3g}"
        )
