# SPDX-License-Identifier: Apache-2.0
"""Lists of tensors averaged over ranks, each with pieces and blocks of its own: what the training adapters share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import _check
from ._collectives_call import PLACE_BITS, Call, Options
from ._collectives_launch import ALGORITHMS, Owners
from ._collectives_transport import resolve_group

_KNOWN = ("block", "algorithm", "node_size", "inter_bits", "hadamard", "chunk_numel", "rounding", "seed")


class Averaging:
    """Averages tensors over a group in place: as codes, or exactly, in float32, where `bits` is None.

    Those that travel as codes are float32 and contiguous. All are on one device, and ranks have the same in the same
    order.
    """

    def __init__(
        self,
        name: str,
        group: Any,
        bits: int | str | None,
        error_feedback: bool,
        options: Mapping[str, Any],
        like: Tensor,
    ) -> None:
        _check.flag(name, "error_feedback", error_feedback)
        self.name, self.bits, self.error_feedback = name, bits, error_feedback
        for key in options:
            if key not in _KNOWN:
                raise TypeError(f"{name}: options must be among {', '.join(_KNOWN)}, got {key}.")
        if bits is None and (options or error_feedback):
            what = next(iter(options), "error_feedback")
            raise ValueError(f"{name}: {what} must not be given with bits=None, which averages exactly.")
        self.group = resolve_group(name, group, like.device)
        self.options = Options(op="avg", group=group, bits=8 if bits is None else bits, **options)
        Call(name, like, self.options, ALGORITHMS)  # refuses what is no option, and a node_size of another group
        self._owners = Owners(self.options.block)

    def check_agreement(self, tensors: Iterable[Tensor], **facts: Any) -> None:
        """Of these facts, of all options and of the sizes of the tensors: see `check_agreement`."""
        facts |= {"bits": self.bits, "error_feedback": self.error_feedback}
        facts |= {key: getattr(self.options, key) for key in _KNOWN}
        check_agreement(self.name, self.group, facts, tensors)

    @torch.no_grad()
    def exact(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        flat = join_parts(tensors)
        dist.all_reduce(flat, group=self.group)
        flat /= self.group.size()
        copy_parts(tensors, flat)

    @torch.no_grad()
    def __call__(self, tensors: Mapping[str, Tensor], errors: Mapping[str, Tensor] | None, step: int) -> None:
        """With errors, of the same names: what rounding loses stays in them and is added the next time.

        What stochastic rounding draws is of the step and of the place of a tensor among the others.
        """
        if self.bits is None:
            self.exact(tensors.values())
            return
        first = next(iter(tensors.values()))
        call = Call("all_reduce", first, replace(self.options, step=step), ALGORITHMS)
        places = {name: index << PLACE_BITS for index, name in enumerate(tensors)}
        self._owners.launch(call, tensors, errors, places, first, async_op=False)


def join_parts(tensors: Iterable[Tensor]) -> Tensor:
    """What tensors of any shape and dtype have, one behind another, in float32: a copy."""
    return torch.cat([tensor.reshape(-1).float() for tensor in tensors])


def copy_parts(tensors: Iterable[Tensor], flat: Tensor) -> None:
    """Writes to tensors of any shape and dtype what lies one behind another in `flat`."""
    begin = 0
    for tensor in tensors:
        tensor.copy_(flat[begin : begin + tensor.numel()].view(tensor.shape))
        begin += tensor.numel()


def check_agreement(name: str, group: Any, facts: Mapping[str, Any], tensors: Iterable[Tensor] | None = None) -> None:
    """Raises the same sentence on every rank when a fact, or the size of a tensor, is not the same on all."""
    facts = dict(facts)
    if tensors is not None:
        facts["the sizes of the parameters"] = [tensor.numel() for tensor in tensors]
    rows: list[Any] = [None] * group.size()
    dist.all_gather_object(rows, facts, group=group)
    for key in facts:
        _check.same_on_every_rank(name, key, [row[key] for row in rows])


def check_parameters(name: str, parameters: Iterable[Any]) -> list[Tensor]:
    """As a list: tensors of real floating-point numbers on one device."""
    if isinstance(parameters, Tensor):
        raise TypeError(f"{name}: parameters must be an iterable of tensors, got a tensor.")
    result = list(parameters)
    if not result:
        raise ValueError(f"{name}: parameters must be at least one tensor, there are none.")
    for tensor in result:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: parameters must be tensors, got {type(tensor).__name__}.")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name}: parameters must be float32, bfloat16 or float16, one is {tensor.dtype}.")
        if tensor.device != result[0].device:
            raise ValueError(
                f"{name}: parameters must be on one device, they are on {result[0].device} and {tensor.device}."
            )
    return result


def check_apart_from_mesh(name: str, parameters: Iterable[Tensor], group: Any) -> None:
    """Ranks that have other shards of a parameter have nothing to average with this one."""
    for tensor in parameters:
        if isinstance(tensor, DTensor):
            shards = set(tensor.device_mesh.mesh.flatten().tolist()) - {dist.get_rank()}
            others = sorted(shards.intersection(dist.get_process_group_ranks(group)))
            if others:
                raise ValueError(
                    f"{name}: group must have no rank with another shard of a DTensor, it has rank {others[0]}."
                )


def check_saved(name: str, what: str, saved: Sequence[Tensor], mine: Sequence[Tensor]) -> None:
    """Whether tensors of a state_dict fit those that they are loaded to."""
    if len(saved) != len(mine):
        raise ValueError(f"{name}: {what} of the state must be {len(mine)} tensors, there are {len(saved)}.")
    for theirs, own in zip(saved, mine, strict=True):
        if theirs.dtype != torch.float32 or theirs.shape != own.shape:
            raise ValueError(
                f"{name}: {what} of the state must be float32 of the shape {list(own.shape)}, one is {theirs.dtype} "
                f"of {list(theirs.shape)}."
            )


def local_tensors(parameters: Iterable[Tensor]) -> list[Tensor]:
    """What this rank has of them, without gradients and in place."""
    return [p.detach().to_local() if isinstance(p, DTensor) else p.detach() for p in parameters]
