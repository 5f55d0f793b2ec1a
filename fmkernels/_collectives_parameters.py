# SPDX-License-Identifier: Apache-2.0
"""Lists of tensors averaged over ranks, each with pieces and blocks of its own: what the training adapters share."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ._collectives_call import Call, Options, shard_bounds
from ._collectives_launch import ALGORITHMS, launch_all_reduce
from ._collectives_transport import resolve_group

_MIN_PIECE = 4096  # elements that are worth a wire of their own


def owned_pieces(name: str, numel: int, world_size: int, block: int) -> list[tuple[int, slice]]:
    """The pieces of a tensor and their owners, whatever it travels with: a piece for each rank, if it is worth it.

    The first owner depends on the name, so that small tensors do not all go to one rank.
    """
    num_blocks = -(-numel // block)
    count = max(1, min(world_size, num_blocks * block // _MIN_PIECE))
    ends = shard_bounds(numel, count, block)
    first = zlib.crc32(name.encode())
    return [((first + i) % world_size, slice(ends[i], ends[i + 1])) for i in range(count) if ends[i] < ends[i + 1]]


class Averaging:
    """Averages float32 tensors over a group in place: as codes, or exactly where `bits` is None.

    Tensors are contiguous and on one device; all ranks have the same in the same order.
    """

    def __init__(
        self, name: str, group: Any, bits: int | None, error_feedback: bool, options: Mapping[str, Any], like: Tensor
    ) -> None:
        self.name, self.bits, self.error_feedback = name, bits, error_feedback
        known = ("block", "algorithm", "node_size", "inter_bits", "hadamard", "chunk_numel")
        for key in options:
            if key not in known:
                raise TypeError(f"{name}: options must be among {', '.join(known)}, got {key}.")
        if bits is None and (options or error_feedback):
            what = next(iter(options), "error_feedback")
            raise ValueError(f"{name}: {what} must not be given with bits=None, which averages exactly.")
        self.group = resolve_group(name, group, like.device)
        self.options = Options(op="avg", group=group, bits=8 if bits is None else bits, **options)
        self.options.check(name, ALGORITHMS)
        Call(name, like, self.options, ALGORITHMS)  # refuses a node_size that is none of this group
        self._plans: dict[tuple[str, int], list[tuple[int, slice]]] = {}

    @torch.no_grad()
    def exact(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        flat /= self.group.size()
        copy_parts(tensors, flat)

    @torch.no_grad()
    def __call__(self, tensors: Mapping[str, Tensor], errors: Mapping[str, Tensor] | None) -> None:
        """With errors, of the same names: what rounding loses stays in them and is added the next time."""
        if self.bits is None:
            self.exact(tensors.values())
            return
        first = next(iter(tensors.values()))
        call = Call("all_reduce", first, self.options, ALGORITHMS)
        shards: list[list[Tensor]] = [[] for _ in range(call.world_size)]
        residuals: list[list[Tensor]] = [[] for _ in range(call.world_size)]
        for name, tensor in tensors.items():
            for owner, piece in self._pieces(name, tensor.numel(), call.world_size):
                shards[owner].append(tensor.view(-1)[piece])
                if errors is not None:
                    residuals[owner].append(errors[name].view(-1)[piece])
        launch_all_reduce(call, shards, None if errors is None else residuals, first, async_op=False)

    def _pieces(self, name: str, numel: int, world_size: int) -> list[tuple[int, slice]]:
        if (name, numel) not in self._plans:
            self._plans[name, numel] = owned_pieces(name, numel, world_size, self.options.block)
        return self._plans[name, numel]


def copy_parts(tensors: Iterable[Tensor], flat: Tensor) -> None:
    """Writes to tensors of any shape and dtype what lies one behind another in `flat`."""
    begin = 0
    for tensor in tensors:
        tensor.copy_(flat[begin : begin + tensor.numel()].view(tensor.shape))
        begin += tensor.numel()


def check_agreement(name: str, group: Any, facts: Mapping[str, Any]) -> None:
    """Raises the same sentence on every rank when one of these facts is not the same on all."""
    rows: list[Any] = [None] * group.size()
    dist.all_gather_object(rows, dict(facts), group=group)
    for key in facts:
        for rank, row in enumerate(rows):
            if row[key] != rows[0][key]:
                raise ValueError(
                    f"{name}: {key} must be the same on every rank, rank 0 has {rows[0][key]} and rank {rank} "
                    f"{row[key]}."
                )


def check_count(name: str, argument: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: {argument} must be an integer, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name}: {argument} must be at least {least}, got {value}.")


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
