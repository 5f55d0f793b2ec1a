# SPDX-License-Identifier: Apache-2.0
"""Experts of a model over a DeviceMesh: `expert_parallel.ExpertParallel`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ._expert_parallel_exchange import not_traced
from ._expert_parallel_mlp import moe_mlp_parts
from ._expert_parallel_plan import check_options
from ._library import autocast
from .integrations.transformers import check_experts

OP = "expert_parallel.ExpertParallel"
NAMES = ("gate_up_proj", "down_proj")


class ExpertParallel(ParallelStyle):
    """Shares the experts of a module out over a mesh: a style for `torch.distributed.tensor.parallel`.

        parallelize_module(model, mesh["ep"], {"layers.*.mlp.experts": ExpertParallel()})

    The module has the parameters `gate_up_proj` [num_experts, 2 * width, hidden] and `down_proj` [num_experts, hidden,
    width] and is called as module(x, topk_weights, topk_idx), as `fmkernels.nn.Experts`, or as transformers 5 calls its
    experts. They become DTensors, sharded by experts, and its forward becomes `expert_parallel.moe_mlp`. A mesh of two
    dimensions, nodes by devices, takes the way through both. State dicts, `torch.distributed.checkpoint` and
    `full_tensor()` see the whole experts.

    Args:
        split_tokens: a mesh on whose ranks the tokens are the same, as on those of tensor parallelism, and whose ranks
            are in the mesh of the experts too: each takes its part of them, and the results are gathered.
        max_tokens, payload, num_chunks: as of `expert_parallel.run`; max_tokens is of a rank's part.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    `fully_shard` may be applied afterwards, over the other dimensions of the mesh. The gradients of the experts are the
    sums over all ranks of the mesh, as if one process had all tokens, so that where each rank has the mean of its own
    tokens as its loss, `experts.set_gradient_divide_factor(number of all ranks)` makes of them what others have.
    """

    def __init__(
        self,
        *,
        split_tokens: DeviceMesh | None = None,
        max_tokens: int | None = None,
        payload: str | None = None,
        num_chunks: int = 1,
    ) -> None:
        super().__init__()
        check_options(OP, max_tokens, payload, num_chunks)
        if split_tokens is not None and (not isinstance(split_tokens, DeviceMesh) or split_tokens.ndim != 1):
            raise TypeError(f"{OP}: split_tokens must be a DeviceMesh of one dimension, got {split_tokens!r}.")
        self.split_tokens = split_tokens
        self.options = {"max_tokens": max_tokens, "payload": payload, "num_chunks": num_chunks}

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        parameters = dict(module.named_parameters(recurse=False))
        if sorted(parameters) != sorted(NAMES):
            raise ValueError(f"{OP}: module must have the parameters {' and '.join(NAMES)}, got {sorted(parameters)}.")
        if getattr(module, "weight_grad_store", None) is not None:
            raise ValueError(f"{OP}: module must have no weight_grad_store: gradients of DTensors cannot wait in it.")
        if device_mesh.ndim > 2:
            raise ValueError(f"{OP}: device_mesh must have 1 or 2 dimensions, got {device_mesh.ndim}.")
        for name, parameter in parameters.items():
            if parameter.dim() != 3 or parameter.shape[0] % device_mesh.size():
                raise ValueError(
                    f"{OP}: {name} must be [num_experts, ...], a multiple of the {device_mesh.size()} ranks, "
                    f"got {list(parameter.shape)}."
                )
        of_transformers = "top_k_index" in inspect.signature(module.forward).parameters
        if of_transformers:
            check_experts(OP, module)
        for name, parameter in parameters.items():
            placements = [Shard(0)] * device_mesh.ndim
            shards = distribute_tensor(parameter, device_mesh, placements, src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(shards, requires_grad=parameter.requires_grad))
        forward = _Forward(device_mesh, self.split_tokens, self.options)
        module.forward = MethodType(forward.of_transformers if of_transformers else forward, module)
        return module


class _Forward:
    """The forward of a module whose experts are shared out."""

    def __init__(self, mesh: DeviceMesh, split_tokens: DeviceMesh | None, options: dict[str, Any]) -> None:
        self.mesh, self.split_tokens, self.options = mesh, split_tokens, options

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Forward:
        return self  # a mesh is a place, and not state

    @not_traced
    def __call__(
        self,
        module: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_idx: Tensor,
        shared: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        x, *experts = autocast(3, x, *(_local(getattr(module, name)) for name in NAMES))
        args, meanwhile = (x, topk_weights, topk_idx), None if shared is None else lambda _part: shared(x)
        if self.split_tokens is not None:
            args = tuple(_part(t, self.split_tokens) for t in args)
        out, extra = moe_mlp_parts(args[0], *experts, *args[1:], group=self.mesh, shared=meanwhile, **self.options)
        if self.split_tokens is not None:
            out = _whole(out, x.shape[0], self.split_tokens)
        return out if extra is None else out + extra

    def of_transformers(
        self, module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """As transformers 5 calls its experts."""
        idx = torch.where(top_k_index < module.gate_up_proj.shape[0], top_k_index, -1)
        return self(module, hidden_states, top_k_weights.float(), idx)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _part(t: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of what all ranks have; the gradient is gathered."""
    return DTensor.from_local(t, mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(0)]).to_local()


def _whole(t: Tensor, num_rows: int, mesh: DeviceMesh) -> Tensor:
    """The rows of all ranks; the gradient, which all ranks have, is cut."""
    shape = torch.Size((num_rows, t.shape[1]))
    shards = DTensor.from_local(t, mesh, [Shard(0)], run_check=False, shape=shape, stride=(t.shape[1], 1))
    return shards.redistribute(placements=[Replicate()]).to_local()
