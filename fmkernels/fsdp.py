# SPDX-License-Identifier: Apache-2.0
"""Communication of fully_shard (FSDP2) as codes: parameters that are gathered, gradients that are scattered.

For `set_custom_all_gather` and `set_custom_reduce_scatter` of an FSDPModule, or of all in a model at once:

    communication = fmkernels.fsdp.quantize_communication(model, gather_bits=8, scatter_bits=4, error_feedback=True)

A secondary shard inside the node, as the hpZ of ZeRO++, is `fully_shard(..., reshard_after_forward=node_size)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _check as check
from ._collectives_call import PLACE_BITS, Options
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
        bits: 8, 6, 4, 1 or "float8_e4m3fn".
        block: elements to a scale.
        rounding: "nearest" or "stochastic".
        seed: of the draws of "stochastic".
        offset: places of other modules' elements before those of this one: 2**40 for each keeps their draws apart.
        hadamard: rotate before rounding.
        scatter: of the same module, where rounding is "stochastic": its calls count the steps of what is drawn, so that
            a forward pass and its backward pass have the same parameters, if no gradient is scattered between them.
    """

    def __init__(
        self,
        *,
        bits: int | str = 8,
        block: int = 128,
        rounding: str = "nearest",
        seed: int | None = None,
        offset: int = 0,
        hadamard: bool = False,
        scatter: QuantizedReduceScatter | None = None,
    ) -> None:
        name = type(self).__name__
        self._options = {
            "bits": bits,
            "block": block,
            "rounding": rounding,
            "seed": seed,
            "offset": offset,
            "hadamard": hadamard,
        }
        Options(**self._options).check(name, ("two_shot",))
        if scatter is not None and not isinstance(scatter, QuantizedReduceScatter):
            raise TypeError(f"{name}: scatter must be a QuantizedReduceScatter, got {type(scatter).__name__}.")
        if rounding == "stochastic" and scatter is None:
            raise ValueError(
                f"{name}: scatter must be given where rounding is 'stochastic': a forward pass and its backward pass "
                "need the same parameters, and its calls tell one step from the next."
            )
        self._scatter = scatter
        self._ranks: set[int] | None = None  # over which parameters are sharded, as the first gather is

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> Work | None:
        ranks = set(dist.get_process_group_ranks(group))
        self._ranks = self._ranks or ranks
        if ranks < self._ranks:
            return exact_all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        step = 0 if self._scatter is None else self._scatter.num_steps
        return all_gather(output_tensor, input_tensor, group=group, async_op=async_op, step=step, **self._options)


class QuantizedReduceScatter(_Communication):
    """Scatters gradients with `quantized_collectives.reduce_scatter`.

    Args:
        bits: 8, 6, 4, 1 or "float8_e4m3fn".
        block: elements to a scale.
        algorithm: "direct" or "hierarchical".
        error_feedback: keep what rounding loses and add it in the next step. The object is then of one module alone,
            whose gradients must have the same layout in every step: `set_reduce_scatter_unused_params(True)`.
        decay: of the error, as in `hooks.QuantizedAllReduce`.
        node_size: for "hierarchical": ranks to a node.
        inter_bits: for "hierarchical": bits between nodes.
        rounding: "nearest" or "stochastic".
        seed: of the draws of "stochastic", the same on every rank; steps count themselves.
        offset: as in `QuantizedAllGather`.
        hadamard: rotate before rounding.
    """

    def __init__(
        self,
        *,
        bits: int | str = 8,
        block: int = 128,
        algorithm: str = "direct",
        error_feedback: bool = False,
        decay: float = 0.0,
        node_size: int | None = None,
        inter_bits: int | str = 4,
        rounding: str = "nearest",
        seed: int | None = None,
        offset: int = 0,
        hadamard: bool = False,
    ) -> None:
        name = type(self).__name__
        self._options = Options(
            bits=bits,
            block=block,
            algorithm=algorithm,
            node_size=node_size,
            inter_bits=inter_bits,
            hadamard=hadamard,
            rounding=rounding,
            seed=seed,
            offset=offset,
            decay=decay,
        )
        self._options.check(name, SCATTER_ALGORITHMS)
        check.flag(name, "error_feedback", error_feedback)
        if decay and not error_feedback:
            raise ValueError(f"{name}: decay must not be given without error_feedback, got {decay}.")
        self._error_feedback = error_feedback
        self._error: Tensor | None = None
        self.num_steps = 0  # calls so far

    @torch.no_grad()
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> Work | None:
        name = type(self).__name__
        ops = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.AVG: "avg"}
        meant = next((text for value, text in ops.items() if op == value), None)
        if meant is None:
            raise ValueError(f"{name}: op must be SUM or AVG, got {op}; a gradient divide factor needs SUM.")
        options = replace(self._options, op=meant, group=group, step=self.num_steps)
        if self._error_feedback:
            if self._error is None:
                self._error = torch.zeros(input_tensor.numel(), dtype=torch.float32, device=input_tensor.device)
            if self._error.numel() != input_tensor.numel():
                raise ValueError(
                    f"{name}: input_tensor must have the {self._error.numel()} elements of the error, it has "
                    f"{input_tensor.numel()}; with error_feedback every module needs an object of its own."
                )
            self._error = self._error.to(input_tensor.device)
        work = launch_reduce_scatter(output_tensor, input_tensor, options, None, self._error, async_op)
        self.num_steps += 1
        return work

    def state_dict(self) -> dict[str, Any]:
        """The error of this rank, as the gradients of the module are laid out for it, and the number of calls."""
        return {"error": None if self._error is None else self._error.clone(), "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave on this rank, in a group of the same size."""
        name, error = type(self).__name__, state["error"]
        if error is not None and not self._error_feedback:
            raise ValueError(f"{name}: error must be None where error_feedback is off, it is a tensor.")
        check.integer(name, "num_steps", state["num_steps"], 0)
        self.num_steps = state["num_steps"]
        self._error = None if error is None else error.detach().clone()


def quantize_communication(
    model: nn.Module,
    *,
    gather_bits: int | str | None = 8,
    scatter_bits: int | str | None = 8,
    block: int = 128,
    algorithm: str = "direct",
    error_feedback: bool = False,
    decay: float = 0.0,
    node_size: int | None = None,
    inter_bits: int | str = 4,
    gather_rounding: str = "nearest",
    scatter_rounding: str = "nearest",
    seed: int | None = None,
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
        gather_rounding: of parameters, "nearest" or "stochastic"; drawn anew after each scatter of the module.
        scatter_rounding: of gradients, "nearest" or "stochastic".
        seed: of what is drawn; each module draws numbers of its own, for parameters and for gradients. Replicas of
            HSDP want another each: groups of ranks do not know of the others, and their roundings would be the same.
        hadamard: rotate before rounding.

    Returns:
        The reduce-scatters by the names of modules: their `state_dict` goes into a checkpoint.
    """
    from torch.distributed.fsdp import FSDPModule

    check.flag("quantize_communication", "error_feedback", error_feedback)
    if gather_rounding != "nearest" and scatter_bits is None:
        raise ValueError(
            "quantize_communication: gather_rounding must be 'nearest' with scatter_bits=None: a gradient that is "
            f"scattered tells one step from the next, got {gather_rounding!r}."
        )
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
    scatters: dict[str, QuantizedReduceScatter] = {}
    for index, (name, module) in enumerate(modules.items()):
        if scatter_bits is not None:
            scatters[name] = QuantizedReduceScatter(
                bits=scatter_bits,
                block=block,
                algorithm=algorithm,
                error_feedback=error_feedback,
                decay=decay,
                node_size=node_size,
                inter_bits=inter_bits,
                rounding=scatter_rounding,
                seed=seed,
                offset=(2 * index) << PLACE_BITS,
                hadamard=hadamard,
            )
            module.set_custom_reduce_scatter(scatters[name])
        if gather_bits is not None:
            gather = QuantizedAllGather(
                bits=gather_bits,
                block=block,
                rounding=gather_rounding,
                seed=seed,
                offset=(2 * index + 1) << PLACE_BITS,
                hadamard=hadamard,
                scatter=scatters.get(name),
            )
            module.set_custom_all_gather(gather)
        if error_feedback:
            module.set_reduce_scatter_unused_params(True, recurse=False)
    return scatters
