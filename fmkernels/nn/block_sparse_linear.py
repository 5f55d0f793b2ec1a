# SPDX-License-Identifier: Apache-2.0
"""A linear layer of whose weight only some blocks are stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import _check as check
from .._block_sparse_checks import with_major
from .._library import as_rows, autocast, needs_grad
from ..block_sparse import dds, sdd
from ..block_sparse_matrix import BlockSparse
from ..block_topology import BlockTopology
from ._block_sparse_module import BlockSparseModule
from .weight_grad import DeferredWeightGrad, WeightGradStore, stand_in

_OP = "nn.BlockSparseLinear"


class BlockSparseLinear(DeferredWeightGrad, BlockSparseModule):
    """What `torch.nn.Linear` computes, of a weight that is zero outside of the blocks of a topology.

        y = fmkernels.dds(x, w.t(), bias=bias)

    The blocks are the parameter `weight`, [num_blocks, block rows, block columns]; the topology is two buffers,
    `row_offsets` and `column_indices`, and a part of the state dict. Loading a state dict takes its topology; one of a
    dense `torch.nn.Linear` gives the blocks that this topology has, the rest of its weight is not kept.

    Args:
        in_features, out_features, bias: as of `torch.nn.Linear`.
        topology: a `BlockTopology` of shape (out_features, in_features).
        weight_grad_store: where backward leaves the gradient of the weight for later; None: it is computed in backward.
        device: of the parameters and the topology; default: of the topology.
        dtype: of the parameters.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    A new weight is uniform as that of `torch.nn.Linear`, for the inputs that a row has on average. Devices, dtypes,
    determinism: as `fmkernels.dds`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        topology: BlockTopology,
        weight_grad_store: WeightGradStore | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.flag(_OP, "bias", bias)
        self._set_features(in_features, out_features, topology)
        self._set_store(_OP, weight_grad_store)
        device = topology.device if device is None else device
        self.weight = nn.Parameter(torch.empty(topology.num_blocks, *topology.block, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._hold(topology)  # on the device of the weight
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, module: nn.Linear, topology: BlockTopology, *, weight_grad_store: WeightGradStore | None = None
    ) -> BlockSparseLinear:
        """The blocks of a layer that the topology has, on its device; it shares the layer's bias."""
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{_OP}.from_linear: module must be a torch.nn.Linear, got {type(module).__name__}.")
        result = cls.__new__(cls)
        nn.Module.__init__(result)
        result._set_features(module.in_features, module.out_features, topology)
        result._set_store(_OP, weight_grad_store)
        weight = module.weight
        values = BlockSparse.from_dense(weight.detach(), mask=topology.to(weight.device)).values
        result.weight = nn.Parameter(values, requires_grad=weight.requires_grad)
        result._hold(topology)  # on the device of the weight
        result.bias = module.bias
        result.train(module.training)
        return result

    def reset_parameters(self) -> None:
        """New values, as a new layer has."""
        inputs = self.in_features * self.topology.density
        bound = 1 / math.sqrt(inputs) if inputs > 0 else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] gives [..., out_features]."""
        if self.weight_grad_store is not None and needs_grad(self.weight):
            return self._deferred(x, self.weight_grad_store)
        return dds(x, self.matrix.t(), bias=self.bias)

    def _deferred(self, x: Tensor, store: WeightGradStore) -> Tensor:
        x, values = autocast(2, x, self.weight.detach())
        left: list[tuple[Callable[[], Tensor], ...]] = []
        weight = stand_in(store, self, ("weight",), left, beside=("topology",))
        return _Deferred.apply(x, self.bias, weight, values, self.topology, left)

    @property
    def matrix(self) -> BlockSparse:
        """The weight, [out_features, in_features], over the parameter."""
        return BlockSparse.of(self.weight, self.topology)

    def to_linear(self) -> nn.Linear:
        """The dense layer that computes the same."""
        dense = self.matrix.to_dense().detach()
        result = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        result.weight = nn.Parameter(dense, requires_grad=self.weight.requires_grad)
        result.bias = self.bias
        result.train(self.training)
        return result

    @torch.no_grad()
    def set_topology(self, topology: BlockTopology, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Changes which blocks there are: those that stay keep their values, new ones are zeros.

        Args:
            topology: of the same shape and block.
            optimizer: one that holds the weight: its state of the blocks that stay is kept, that of new ones is zeros.

        With as many blocks as before the weight is changed in place. With more or fewer it is another parameter, which
        takes the place of the old one in the optimizer. Its gradient is dropped.
        """
        self._check_topology(topology)
        if topology.block != self.topology.block:
            raise ValueError(f"{_OP}: topology must have blocks of {self.topology.block}, got {topology.block}.")
        topology = topology.to(self.weight.device)
        old = self.topology
        at = torch.full((old.num_places + 1,), -1, dtype=torch.long, device=self.weight.device)
        at[old.places] = torch.arange(old.num_blocks, device=at.device)
        at[-1] = -1  # of blocks that no row lists
        source = at[topology.places]  # [num_blocks] where a block was, -1: it is new
        is_new = (source < 0)[:, None, None]

        def moved(blocks: Tensor) -> Tensor:
            if old.num_blocks == 0:
                return blocks.new_zeros(topology.num_blocks, *topology.block)
            return torch.where(is_new, 0, blocks[source.clamp(min=0)])

        old_weight, values = self.weight, moved(self.weight)
        if values.shape == old_weight.shape:
            old_weight.copy_(values)
            old_weight.grad = None
        else:
            self.weight = nn.Parameter(values, requires_grad=old_weight.requires_grad)
        if optimizer is not None:
            if old_weight in optimizer.state:
                state = optimizer.state.pop(old_weight)
                optimizer.state[self.weight] = {
                    name: moved(value) if isinstance(value, Tensor) and value.shape == old_weight.shape else value
                    for name, value in state.items()
                }
            for group in optimizer.param_groups:
                group["params"] = [self.weight if p is old_weight else p for p in group["params"]]
        self._hold(topology)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight, names = state_dict.get(prefix + "weight"), ("row_offsets", "column_indices")
        is_dense = isinstance(weight, Tensor) and tuple(weight.shape) == self.topology.shape
        if is_dense and not any(prefix + name in state_dict for name in names):
            topology = self.topology.to(weight.device)
            values = BlockSparse.from_dense(weight.detach(), mask=topology).values
            state_dict = {**state_dict, prefix + "weight": values}
            state_dict |= {prefix + name: getattr(topology, name) for name in names}
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        stand_in: Tensor,
        values: Tensor,
        topology: BlockTopology,
        left: list[tuple[Callable[[], Tensor], ...]],
    ) -> Tensor:
        y = dds(x, BlockSparse.of(values, topology).t(), bias=bias)
        ctx.save_for_backward(x, values, stand_in)
        ctx.topology, ctx.left = topology, left
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, values, stand_in = ctx.saved_tensors
        topology = ctx.topology
        grad, flat = (as_rows(t) for t in (grad_out, x))
        grad = with_major(grad)
        ctx.left[:] = [(lambda: sdd(grad.mT, flat, topology).values,)]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = dds(grad, BlockSparse.of(values, topology)).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.mT.sum(1, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_bias, torch.empty_like(stand_in), None, None, None
