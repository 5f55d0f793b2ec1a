# SPDX-License-Identifier: Apache-2.0
"""Communication hooks of DistributedDataParallel: gradients travel as codes (`fmkernels.quantized_collectives`)."""

# No `from __future__ import annotations`: DDP compares the annotation of `bucket` with dist.GradBucket itself.
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ._bucket_layout import BucketLayout
from ._collectives_call import DEFAULT_CHUNK, Call, Options, shard_bounds
from .quantized_collectives import ALGORITHMS, launch_all_reduce

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
        bits: 8, 6, 4 or 1.
        block: elements to a scale.
        algorithm: "two_shot", "one_shot" or "hierarchical".
        error_feedback: keep what rounding loses, in float32 for every parameter, and add it in the next step.
        decay: of the error, which then is a moving average (LoCo): decay * error + (1 - decay) * what was lost.
        reset_interval: steps after which the errors are set to zero (LoCo); None: never.
        node_size: for "hierarchical": ranks to a node.
        inter_bits: for "hierarchical": bits between nodes.
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
        bits: int = 8,
        block: int = 128,
        algorithm: str = "two_shot",
        error_feedback: bool = False,
        decay: float = 0.0,
        reset_interval: int | None = None,
        node_size: int | None = None,
        inter_bits: int = 4,
        hadamard: bool = False,
        chunk_numel: int = DEFAULT_CHUNK,
    ) -> None:
        name = type(self).__name__
        if isinstance(parameters, nn.Module):
            parameters = parameters.named_parameters()
        named = [(key.removeprefix("module."), tensor) for key, tensor in parameters]
        self._names = {id(tensor): key for key, tensor in named}
        self._numels = {key: tensor.numel() for key, tensor in named}
        self._options = Options(
            op, group, bits, block, algorithm, node_size, inter_bits, hadamard, chunk_numel, decay=decay
        )
        self._options.check(name, ALGORITHMS)
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"{name}: decay must be at least 0 and below 1, got {decay}.")
        if reset_interval is not None and reset_interval < 1:
            raise ValueError(f"{name}: reset_interval must be None or at least 1, got {reset_interval}.")
        if not error_feedback and (decay or reset_interval is not None):
            raise ValueError(f"{name}: decay and reset_interval must not be given without error_feedback.")
        self._has_feedback, self._reset_interval = error_feedback, reset_interval
        self._num_steps = 0
        self._layouts: dict[tuple[str, ...], BucketLayout] = {}
        self._flat: dict[tuple[str, ...], Tensor] = {}  # errors as the buckets of now have them
        self._loose: dict[str, Tensor] = {}  # errors of parameters that no bucket has had yet

    def register(self, model: nn.parallel.DistributedDataParallel) -> None:
        """Makes this the communication hook of the model, which can have one."""
        model.register_comm_hook(self, QuantizedAllReduce.hook)

    @staticmethod
    def hook(state: "QuantizedAllReduce", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """For `register_comm_hook(compression, QuantizedAllReduce.hook)`."""
        return state._reduce(bucket)

    @torch.no_grad()
    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        call = Call("all_reduce", buffer, self._options, ALGORITHMS)
        if bucket.index() == 0:
            self._begin_step()
        layout = self._layout(bucket.parameters(), call.world_size)
        if self._has_feedback or not layout.is_aligned:
            staged = buffer.new_empty(layout.staged_numel)
            residual = self._residual(layout, buffer.device) if self._has_feedback else None

            def finish() -> None:
                layout.unstage(staged, buffer)
                if residual is not None:
                    layout.clear_padding(residual)

            work = launch_all_reduce(
                call,
                staged,
                staged,
                residual,
                layout.bounds,
                buffer,
                async_op=True,
                before=lambda: layout.stage(buffer, staged),
                finish=finish,
            )
        else:
            bounds = shard_bounds(buffer.numel(), call.world_size, self._options.block)
            work = launch_all_reduce(call, buffer, buffer, None, bounds, buffer, async_op=True)
        return work.get_future()

    def _begin_step(self) -> None:
        if self._reset_interval is not None and self._num_steps and self._num_steps % self._reset_interval == 0:
            self.rescale(0.0)
        self._num_steps += 1

    def _layout(self, parameters: list[Tensor], world_size: int) -> BucketLayout:
        unknown = [list(tensor.shape) for tensor in parameters if id(tensor) not in self._names]
        if unknown:
            raise ValueError(
                f"QuantizedAllReduce: parameters must be all those of the DDP model, one of {unknown[0]} is missing."
            )
        names = tuple(self._names[id(tensor)] for tensor in parameters)
        if names not in self._layouts:
            numels = [tensor.numel() for tensor in parameters]
            repeats = 1 in (self._options.bits, self._options.inter_bits)
            self._layouts[names] = BucketLayout(names, numels, world_size, self._options.block, repeats)
        return self._layouts[names]

    # ---- errors ----

    def _residual(self, layout: BucketLayout, device: torch.device) -> Tensor:
        """The errors of a bucket, as it is staged; taken from other buckets when DDP has formed new ones."""
        if layout.names not in self._flat:
            wanted = set(layout.names)
            for names in [names for names in self._flat if wanted & set(names)]:
                self._loose.update(self._layouts[names].split(self._flat.pop(names)))
            flat = torch.zeros(layout.staged_numel, dtype=torch.float32, device=device)
            layout.join({name: self._loose.pop(name) for name in layout.names if name in self._loose}, flat)
            self._flat[layout.names] = flat
        return self._flat[layout.names]

    def errors(self) -> dict[str, Tensor]:
        """The error of every parameter that has been through the hook, flat, on its device; copies."""
        errors = {name: tensor.clone() for name, tensor in self._loose.items()}
        for names, flat in self._flat.items():
            errors.update(self._layouts[names].split(flat))
        return dict(sorted(errors.items()))

    def rescale(self, factor: float) -> None:
        """Multiplies the errors, as when a loss is scaled by another factor from now on."""
        for tensor in (*self._flat.values(), *self._loose.values()):
            tensor.mul_(factor) if factor else tensor.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The errors by the names of parameters, and the number of steps. Of this rank."""
        return {"errors": self.errors(), "num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave on this rank, before the first step or between two."""
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
        self._flat.clear()
        self._loose = {key: tensor.detach().clone().view(-1) for key, tensor in state["errors"].items()}
        self._num_steps = state["num_steps"]
