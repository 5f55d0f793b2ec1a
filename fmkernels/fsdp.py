# SPDX-License-Identifier: Apache-2.0
"""Communication of fully_shard (FSDP2) as codes: parameters that are gathered, gradients that are scattered.

For `set_custom_all_gather` and `set_custom_reduce_scatter` of an FSDPModule, or of all in a model at once:

    communication = fmkernels.fsdp.quantize_communication(model, gather_bits=8, scatter_bits=4, error_feedback=True)

A secondary shard inside the node, as the hpZ of ZeRO++, is `fully_shard(..., reshard_after_forward=node_size)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._collectives_call import Options
from ._collectives_launch import SCATTER_ALGORITHMS, launch_reduce_scatter
from ._collectives_transport import exact_all_gather
from ._collectives_work import Work
from .quantized_collectives import all_gather

__all__ = ["QuantizedAllGather", "QuantizedReduceScatter", "quantize_communication"]


class _Communication:
    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class QuantizedAllGather(_Communication):
    """Gathers parameters with `quantized_collectives.all_gather`: every rank computes with the same rounded ones.

    The sharded parameters, which the optimizer updates, stay exact. With `reshard_after_forward=node_size` the backward
    pass gathers what the forward pass has rounded, among some of the ranks. It does so exactly: rounded again, in other
    blocks, they would not be the weights that gradients are of. An object is of modules that are sharded alike.

    Args:
        bits: 8, 6, 4 or 1.
        block: elements to a scale.
        hadamard: rotate before rounding.
    """

    def __init__(self, *, bits: int = 8, block: int = 128, hadamard: bool = False) -> None:
        self._options = {"bits": bits, "block": block, "hadamard": hadamard}
        Options(**self._options).check(type(self).__name__, ("two_shot",))
        self._ranks: set[int] | None = None  # over which parameters are sharded, as the first gather is

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        ranks = set(dist.get_process_group_ranks(group))
        self._ranks = self._ranks or ranks
        if ranks < self._ranks:
            return exact_all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        return all_gather(output_tensor, input_tensor, group=group, async_op=async_op, **self._options)


class QuantizedReduceScatter(_Communication):
    """Scatters gradients with `quantized_collectives.reduce_scatter`.

    Args:
        bits: 8, 6, 4 or 1.
        block: elements to a scale.
        algorithm: "direct" or "hierarchical".
        error_feedback: keep what rounding loses and add it in the next step. The object is then of one module alone,
            whose gradients must have the same layout in every step: `set_reduce_scatter_unused_params(True)`.
        decay: of the error, as in `hooks.QuantizedAllReduce`.
        node_size: for "hierarchical": ranks to a node.
        inter_bits: for "hierarchical": bits between nodes.
        hadamard: rotate before rounding.
    """

    def __init__(
        self,
        *,
        bits: int = 8,
        block: int = 128,
        algorithm: str = "direct",
        error_feedback: bool = False,
        decay: float = 0.0,
        node_size: int | None = None,
        inter_bits: int = 4,
        hadamard: bool = False,
    ) -> None:
        name = type(self).__name__
        self._options = {
            "bits": bits,
            "block": block,
            "algorithm": algorithm,
            "node_size": node_size,
            "inter_bits": inter_bits,
            "hadamard": hadamard,
            "decay": decay,
        }
        Options(**self._options).check(name, SCATTER_ALGORITHMS)
        if decay and not error_feedback:
            raise ValueError(f"{name}: decay must not be given without error_feedback, got {decay}.")
        self._error_feedback = error_feedback
        self._error: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Work | None:
        name = type(self).__name__
        ops = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.AVG: "avg"}
        meant = next((text for value, text in ops.items() if op == value), None)
        if meant is None:
            raise ValueError(f"{name}: op must be SUM or AVG, got {op}; a gradient divide factor needs SUM.")
        options = Options(op=meant, group=group, **self._options)
        if self._error_feedback:
            if self._error is None:
                self._error = torch.zeros(input_tensor.numel(), dtype=torch.float32, device=input_tensor.device)
            if self._error.numel() != input_tensor.numel():
                raise ValueError(
                    f"{name}: input_tensor must have the {self._error.numel()} elements of the error, it has "
                    f"{input_tensor.numel()}; with error_feedback every module needs an object of its own."
                )
            self._error = self._error.to(input_tensor.device)
        return launch_reduce_scatter(output_tensor, input_tensor, options, None, self._error, async_op)

    def state_dict(self) -> dict[str, Any]:
        """The error of this rank, as the gradients of the module are laid out for it."""
        return {"error": None if self._error is None else self._error.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave on this rank, in a group of the same size."""
        error = state["error"]
        if error is not None and not self._error_feedback:
            raise ValueError(f"{type(self).__name__}: error must be None where error_feedback is off, it is a tensor.")
        self._error = None if error is None else error.detach().clone()


def quantize_communication(
    model: nn.Module,
    *,
    gather_bits: int | None = 8,
    scatter_bits: int | None = 8,
    block: int = 128,
    algorithm: str = "direct",
    error_feedback: bool = False,
    decay: float = 0.0,
    node_size: int | None = None,
    inter_bits: int = 4,
    hadamard: bool = False,
) -> dict[str, QuantizedReduceScatter]:
    """Gives every FSDPModule of a model quantised communication, an object to each.

    Args:
        model: a model in which `fully_shard` was applied.
        gather_bits: of parameters; None leaves them as they are.
        scatter_bits: of gradients; None leaves them as they are.
        block: elements to a scale.
        algorithm: of the reduce-scatter.
        error_feedback: of the reduce-scatter. Parameters that had no gradient then travel as zeros, so that errors
            stay with their parameters: such a parameter gets what it still lacks as its gradient.
        decay: of its error.
        node_size: for "hierarchical": ranks to a node.
        inter_bits: for "hierarchical": bits between nodes.
        hadamard: rotate before rounding.

    Returns:
        The reduce-scatters by the names of modules: their `state_dict` goes into a checkpoint.
    """
    from torch.distributed.fsdp import FSDPModule

    if error_feedback and scatter_bits is None:
        raise ValueError("quantize_communication: error_feedback must be off with scatter_bits=None, it was given.")
    modules = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    if not modules:
        raise ValueError("quantize_communication: model must have modules of fully_shard, it has none.")
    if error_feedback and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ValueError(
            f"quantize_communication: error_feedback must be off where FSDPModule has no "
            f"set_reduce_scatter_unused_params, as that of torch {torch.__version__}."
        )
    scatters = {}
    for name, module in modules.items():
        if gather_bits is not None:
            module.set_custom_all_gather(QuantizedAllGather(bits=gather_bits, block=block, hadamard=hadamard))
        if scatter_bits is not None:
            scatters[name] = QuantizedReduceScatter(
                bits=scatter_bits,
                block=block,
                algorithm=algorithm,
                error_feedback=error_feedback,
                decay=decay,
                node_size=node_size,
                inter_bits=inter_bits,
                hadamard=hadamard,
            )
            module.set_custom_reduce_scatter(scatters[name])
        if error_feedback:
            module.set_reduce_scatter_unused_params(True, recurse=False)
    return scatters
