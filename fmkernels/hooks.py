# SPDX-License-Identifier: Apache-2.0
"""Communication hooks of DistributedDataParallel: gradients travel as codes (`fmkernels.quantized_collectives`)."""

# No `from __future__ import annotations`: DDP compares the annotation of `bucket` with dist.GradBucket itself.
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _check as check
from ._collectives_call import DEFAULT_CHUNK, PLACE_BITS, Call, Options
from ._collectives_launch import ALGORITHMS, Owners

__all__ = ["QuantizedAllReduce"]


class QuantizedAllReduce:
    """Averages the gradients of a DistributedDataParallel model with `quantized_collectives.all_reduce`.

        compression = QuantizedAllReduce(model, bits=4, error_feedback=True)
        compression.register(DistributedDataParallel(model))

    Asynchronous: the thread of the backward pass only hands a bucket over. The blocks of a parameter are counted from
    its own first element and its shards belong to ranks by its name, so that its gradient has the same bits in whatever
    buckets DDP puts it: those of the first step, of later ones, of another `bucket_cap_mb`, and after a restart.

    Args:
        parameters: the model, wrapped or not, or its `named_parameters()`.
        group: that of the DDP model; None: the default group.
        op: "avg", as DDP without a hook, or "sum".
        bits: 8, 6, 4, 1 or "float8_e4m3fn".
        block: elements to a scale.
        algorithm: "two_shot", "one_shot" or "hierarchical".
        error_feedback: keep what rounding loses, in float32 for every parameter, and add it in the next step.
        decay: of the error, which then is a moving average (LoCo): decay * error + (1 - decay) * what was lost.
        reset_interval: steps after which the errors are set to zero (LoCo); None: never.
        node_size: for "hierarchical": ranks to a node.
        inter_bits: for "hierarchical": bits between nodes.
        rounding: "nearest" or "stochastic": steps count themselves, and parameters, ranks and further roundings draw
            numbers of their own.
        seed: of the draws of "stochastic", the same on every rank.
        hadamard: rotate before rounding.
        chunk_numel: elements that are encoded at a time.

    Scaled losses: errors are in the units of the gradients they come from; `rescale` them when the scale changes. A
    block that is not finite, in a step that a scaler will skip, leaves its error as it was.

    The state is that of one rank. It is saved and loaded by the rank that it belongs to.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        group: Any = None,
        op: str = "avg",
        bits: int | str = 8,
        block: int = 128,
        algorithm: str = "two_shot",
        error_feedback: bool = False,
        decay: float = 0.0,
        reset_interval: int | None = None,
        node_size: int | None = None,
        inter_bits: int | str = 4,
        rounding: str = "nearest",
        seed: int | None = None,
        hadamard: bool = False,
        chunk_numel: int = DEFAULT_CHUNK,
    ) -> None:
        name = type(self).__name__
        if isinstance(parameters, nn.Module):
            parameters = parameters.named_parameters()
        named = list(parameters)
        if all(key.startswith("module.") for key, _ in named):  # of the wrapped model
            named = [(key.removeprefix("module."), tensor) for key, tensor in named]
        self._names = {tensor: key for key, tensor in named}  # a tensor is a key by its identity
        self._numels = {key: tensor.numel() for key, tensor in named}
        # What is drawn for a parameter depends on its name and those of the others, not on buckets.
        self._places = {key: index << PLACE_BITS for index, key in enumerate(sorted(self._numels))}
        self._options = Options(
            op,
            group,
            bits,
            block,
            algorithm,
            node_size,
            inter_bits,
            hadamard,
            chunk_numel,
            rounding,
            seed,
            decay=decay,
        )
        self._options.check(name, ALGORITHMS)
        check.flag(name, "error_feedback", error_feedback)
        if reset_interval is not None:
            check.integer(name, "reset_interval", reset_interval, 1)
        if not error_feedback and (decay or reset_interval is not None):
            raise ValueError(f"{name}: decay and reset_interval must not be given without error_feedback.")
        self._has_feedback, self._reset_interval = error_feedback, reset_interval
        self._num_steps = 0
        self._owners = Owners(block)
        self._errors: dict[str, Tensor] = {}

    def register(self, model: nn.parallel.DistributedDataParallel) -> None:
        """Makes this the communication hook of the model, which can have one."""
        model.register_comm_hook(self, QuantizedAllReduce.hook)

    @staticmethod
    def hook(state: "QuantizedAllReduce", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """For `register_comm_hook(compression, QuantizedAllReduce.hook)`."""
        return state._reduce(bucket)

    @torch.no_grad()
    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer, parameters = bucket.buffer(), bucket.parameters()
        call = Call("all_reduce", buffer, self._options, ALGORITHMS)
        unknown = [list(tensor.shape) for tensor in parameters if tensor not in self._names]
        if unknown:
            raise ValueError(
                f"QuantizedAllReduce: parameters must be all those of the DDP model, one of {unknown[0]} is missing."
            )
        if bucket.index() == 0:
            self._begin_step()
        call.options = replace(self._options, step=self._num_steps)
        names = [self._names[tensor] for tensor in parameters]
        gradients = dict(zip(names, buffer.split([self._numels[name] for name in names]), strict=True))
        errors = {name: self._error(name, buffer.device) for name in names} if self._has_feedback else None
        return self._owners.launch(call, gradients, errors, self._places, buffer, True).get_future()

    def _begin_step(self) -> None:
        if self._reset_interval is not None and self._num_steps and self._num_steps % self._reset_interval == 0:
            self.rescale(0.0)
        self._num_steps += 1

    # ---- errors ----

    def _error(self, name: str, device: torch.device) -> Tensor:
        error = self._errors.get(name)
        if error is None:
            error = torch.zeros(self._numels[name], dtype=torch.float32, device=device)
        self._errors[name] = error = error.to(device)
        return error

    def errors(self) -> dict[str, Tensor]:
        """The error of every parameter that has been through the hook, flat, on its device; copies."""
        return {name: error.clone() for name, error in sorted(self._errors.items())}

    def rescale(self, factor: float) -> None:
        """Multiplies the errors, as when a loss is scaled by another factor from now on."""
        for error in self._errors.values():
            error.mul_(factor) if factor else error.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The errors by the names of parameters, and the number of steps, which draws depend on. Of this rank."""
        return {"errors": self.errors(), "num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave on this rank, of the same step on all, before the first step or between two."""
        name = type(self).__name__
        unknown = sorted(set(state["errors"]) - set(self._names.values()))
        if unknown:
            raise ValueError(f"{name}: errors must be of parameters of the model, it has no {unknown[0]}.")
        if state["errors"] and not self._has_feedback:
            raise ValueError(
                f"{name}: errors must be empty where error_feedback is off, there are {len(state['errors'])}."
            )
        for key, tensor in state["errors"].items():
            if tensor.dtype != torch.float32 or tensor.numel() != self._numels[key]:
                raise ValueError(
                    f"{name}: the error of {key} must be float32 with {self._numels[key]} elements, it is "
                    f"{tensor.dtype} with {tensor.numel()}."
                )
        check.integer(name, "num_steps", state["num_steps"], 0)
        self._errors = {key: tensor.detach().clone().view(-1) for key, tensor in state["errors"].items()}
        self._num_steps = state["num_steps"]
