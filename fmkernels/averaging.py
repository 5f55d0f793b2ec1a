# SPDX-License-Identifier: Apache-2.0
"""Parameters averaged now and then, or with neighbours alone, instead of gradients in every step.

All of them are called after `optimizer.step()` and look at parameters only: the optimizer is any, gradients stay
local. That of parameters of `fully_shard` is done shard by shard, over a `group` whose ranks have the same shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _check as check
from ._averaging_neighbours import NeighbourAveraging
from ._collectives_parameters import (
    Averaging,
    check_agreement,
    check_apart_from_mesh,
    check_parameters,
    check_saved,
    copy_parts,
    join_parts,
    local_tensors,
)

__all__ = ["DiLoCo", "NeighbourAveraging", "PeriodicAveraging"]


class PeriodicAveraging:
    """Local SGD: every rank trains by itself, and every `interval` steps all get the average of their parameters.

        averaging = PeriodicAveraging(model.parameters(), interval=16)
        ...
        optimizer.step()
        averaging.step()

    With `bits` what travels is not x but its difference from the last average, which all ranks have:

        a <- a - Q-average over ranks of (a' - x_rank),   x_rank <- a

    so that what is rounded shrinks with the steps between, and never is the parameter itself. a' is what x began with:
    a in the dtype of x. At first a is what rank 0 has as this is made, and again after the warm-up; let all begin with
    the same.

    Args:
        parameters: float32, bfloat16 or float16, on one device, the same on every rank in the same order.
        interval: steps from one average to the next.
        warmup_steps: steps before the first interval begins, in which gradients are averaged (post-local SGD).
        group: a process group; None: the default group.
        bits: 8, 6, 4, 1 or "float8_e4m3fn"; None averages exactly, in float32, and keeps no copy.
        error_feedback: keep what rounding loses and add it the next time.
        **options: block, algorithm, node_size, inter_bits, hadamard, chunk_numel, rounding and seed, as of
            `quantized_collectives.all_reduce`; draws are of `num_steps`.

    The copy is float32. `state_dict` is that of one rank, whose parameters between two averages are its own, too; all
    ranks load together, of the same step.

    Raises ValueError and TypeError for arguments, also where ranks disagree, and RuntimeError when a rank is gone.
    Deterministic. Stich 2019; Lin et al. 2020.
    """

    _always_has_copies = False

    def __init__(
        self,
        parameters: Iterable[Tensor],
        interval: int,
        *,
        warmup_steps: int = 0,
        group: Any = None,
        bits: int | str | None = None,
        error_feedback: bool = False,
        **options: Any,
    ) -> None:
        name = self._name = type(self).__name__
        check.integer(name, "interval", interval, 1)
        check.integer(name, "warmup_steps", warmup_steps, 0)
        self._parameters = check_parameters(name, parameters)
        tensors = local_tensors(self._parameters)
        self._average = Averaging(name, group, bits, error_feedback, options, tensors[0])
        check_apart_from_mesh(name, self._parameters, self._average.group)
        self._average.check_agreement(tensors, interval=interval, warmup_steps=warmup_steps)
        self.interval, self.warmup_steps, self.num_steps = interval, warmup_steps, 0
        self._copies: list[Tensor] = []
        if bits is not None or self._always_has_copies:
            self._copies = [torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device) for tensor in tensors]
            self._take_copies(tensors)
        self._errors = [torch.zeros_like(copy) for copy in self._copies] if error_feedback else []

    @torch.no_grad()
    def step(self) -> bool:
        """Counts a step, and averages if it is the last of an interval: whether it was."""
        num_steps = self.num_steps + 1
        if self._copies and num_steps == self.warmup_steps:
            self._take_copies(local_tensors(self._parameters))
        is_last = num_steps > self.warmup_steps and (num_steps - self.warmup_steps) % self.interval == 0
        if is_last:
            self._synchronize(local_tensors(self._parameters))
        self.num_steps = num_steps
        return is_last

    def _take_copies(self, tensors: list[Tensor]) -> None:
        """What rank 0 has, as what all had last."""
        flat = join_parts(tensors)
        dist.broadcast(flat, group=self._average.group, group_src=0)
        copy_parts(self._copies, flat)

    def _synchronize(self, tensors: list[Tensor]) -> None:
        if not self._copies:
            self._average.exact(tensors)
            return
        # A bfloat16 parameter began with the copy rounded: what lies between the two is no step of this rank.
        deltas = {str(i): copy.to(tensors[i].dtype) - tensors[i].float() for i, copy in enumerate(self._copies)}
        errors = {str(i): error for i, error in enumerate(self._errors)}
        self._average(deltas, errors or None, self.num_steps)
        self._update(list(deltas.values()))
        for tensor, copy in zip(tensors, self._copies, strict=True):
            tensor.copy_(copy)

    def _update(self, deltas: list[Tensor]) -> None:
        torch._foreach_sub_(self._copies, deltas)

    def state_dict(self) -> dict[str, Any]:
        """The steps, the last average and the errors, in the order of parameters. Of this rank."""
        return {
            "num_steps": self.num_steps,
            "copies": [copy.clone() for copy in self._copies],
            "errors": [error.clone() for error in self._errors],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave on this rank, with the same options. All ranks call it."""
        for what, mine in (("copies", self._copies), ("errors", self._errors)):
            check_saved(self._name, what, state[what], mine)
        check.integer(self._name, "num_steps", state["num_steps"], 0)
        check_agreement(self._name, self._average.group, {"num_steps": state["num_steps"]})
        for mine, saved in ((self._copies, state["copies"]), (self._errors, state["errors"])):
            for tensor, value in zip(mine, saved, strict=True):
                tensor.copy_(value)
        self.num_steps = state["num_steps"]


class DiLoCo(PeriodicAveraging):
    """Local steps of an inner optimizer, and every `interval` of them one step of an outer one on what they changed.

        diloco = DiLoCo(model.parameters(), interval=100)
        ...
        optimizer.step()  # AdamW, as a rule
        diloco.step()

    The outer gradient is the average over ranks of what they changed, as codes; a, the parameters that all ranks have,
    is what the outer optimizer moves, and where every rank goes on from:

        a <- outer(a, Q-average over ranks of (a' - x_rank)),   x_rank <- a

    where a' is a in the dtype of x, which the rank began with.

    Args:
        parameters: as of `PeriodicAveraging`.
        interval: inner steps from one outer step to the next.
        warmup_steps: as of `PeriodicAveraging`.
        outer_optimizer: makes an optimizer of torch from a list of tensors, as
            `functools.partial(torch.optim.SGD, lr=1.0)`; None: SGD(lr=0.7, momentum=0.9, nesterov=True).
        group: a process group; None: the default group.
        bits: 8, 6, 4, 1 or "float8_e4m3fn"; None averages exactly and wants error_feedback=False.
        error_feedback: keep what rounding loses and add it the next time.
        **options: as of `PeriodicAveraging`.

    The optimizer is `outer`, for its learning rate; `state_dict` has its state, a and the errors. The inner optimizer
    keeps its state through outer steps. Fragments of the parameters are not sent at different times.

    Errors as those of `PeriodicAveraging`. Deterministic. Douillard et al. 2023.
    """

    _always_has_copies = True

    def __init__(
        self,
        parameters: Iterable[Tensor],
        interval: int,
        *,
        warmup_steps: int = 0,
        outer_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        group: Any = None,
        bits: int | str | None = 8,
        error_feedback: bool = True,
        **options: Any,
    ) -> None:
        if outer_optimizer is not None and not callable(outer_optimizer):
            raise TypeError(
                f"DiLoCo: outer_optimizer must be a function from tensors to an optimizer, got "
                f"{type(outer_optimizer).__name__}."
            )
        common = {"warmup_steps": warmup_steps, "group": group, "bits": bits, "error_feedback": error_feedback}
        super().__init__(parameters, interval, **common, **options)
        make = outer_optimizer or _nesterov
        self._copies = [torch.nn.Parameter(copy) for copy in self._copies]
        self.outer = make(self._copies)
        if not isinstance(self.outer, torch.optim.Optimizer):
            raise TypeError(f"DiLoCo: outer_optimizer must make an optimizer, it made {type(self.outer).__name__}.")

    def _update(self, deltas: list[Tensor]) -> None:
        for copy, delta in zip(self._copies, deltas, strict=True):
            copy.grad = delta
        self.outer.step()
        self.outer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """That of `PeriodicAveraging`, and the outer optimizer's."""
        return super().state_dict() | {"outer": self.outer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave on this rank, with the same options. All ranks call it."""
        super().load_state_dict(state)
        self.outer.load_state_dict(state["outer"])


def _nesterov(tensors: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(tensors, lr=0.7, momentum=0.9, nesterov=True)
