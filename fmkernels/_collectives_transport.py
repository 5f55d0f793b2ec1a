# SPDX-License-Identifier: Apache-2.0
"""How wires travel between the ranks of a group: as tagged messages on the CPU, through collectives of torch on CUDA.

On the CPU every message carries a tag made of the number of its call and of its place in it. Messages of different
calls then never meet, in whatever order a rank sends them: calls may be finished by another thread than began them,
and what the caller does on the same group meanwhile is not disturbed. Collectives of torch match by order instead.
On CUDA a stream keeps that order.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MAX_MESSAGES = 1 << 12  # of one call, to one rank
_MAX_CALLS = 1 << 16  # whose tags are told apart
_FIRST_TAG = 1 << 30  # tags below are those of users

exact_all_gather: Callable[..., Any] = (  # neither where torch has no distributed
    getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
)


class Channel:
    """What the calls on one group share: their numbers, in program order as torch counts its own collectives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_calls = 0
        self.finishers: dict[torch.device, Any] = {}  # of asynchronous calls; made at the first of a device

    def next_call(self) -> int:
        with self._lock:
            self._num_calls += 1
            return self._num_calls - 1


# A group that is destroyed takes its count along; one that is made anew, as after a failure, begins with 0 everywhere.
_channels: weakref.WeakKeyDictionary[Any, Channel] = weakref.WeakKeyDictionary()
_channels_lock = threading.Lock()


def channel_of(group: Any) -> Channel:
    with _channels_lock:
        return _channels.setdefault(group, Channel())


class Pending:
    """Messages under way. `wait` gives what came, in the order of ranks, as parts of one buffer."""

    def __init__(self, name: str, works: Sequence[tuple[int, Any]], received: Tensor, sizes: Sequence[int], sent: Any):
        self._name, self._works, self.received, self._sizes = name, works, received, sizes
        self._sent = sent  # must live until the messages are out

    def wait(self) -> list[Tensor]:
        for peer, work in self._works:
            try:
                work.wait()
            except RuntimeError as error:
                raise _lost(self._name, peer, error) from error
        self._works, self._sent = (), None
        return list(self.received.split(list(self._sizes)))


def _lost(name: str, peer: int, error: RuntimeError) -> RuntimeError:
    who = "a rank" if peer < 0 else f"rank {peer}"
    return RuntimeError(f"{name}: {who} of the group is gone or late: {error}")


class _Transport:
    """One call's way to the other ranks of its group."""

    is_tagged: bool  # messages are matched by tags, not by their order: ranks need not send as many

    def __init__(self, name: str, group: Any) -> None:
        self.name, self.group, self.channel = name, group, channel_of(group)
        self.rank, self.world_size = group.rank(), group.size()
        self.header: Callable[[], None] | None = None  # raises when the ranks disagree about the call

    def room(self, sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """What `sizes` bytes of each rank can be received in, and this rank's part: what is written there is sent."""
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        return received, received.narrow(0, sum(sizes[: self.rank]), sizes[self.rank])

    def check(self) -> None:
        """Waits for the headers of all ranks, where they were sent and have not been looked at."""
        header, self.header = self.header, None
        if header is not None:
            header()


class TaggedTransport(_Transport):
    """Point-to-point messages of a group on the CPU; gloo matches them by tag."""

    is_tagged = True

    def __init__(self, name: str, group: Any) -> None:
        super().__init__(name, group)
        self._tag = _FIRST_TAG + self.channel.next_call() % _MAX_CALLS * MAX_MESSAGES

    def exchange(
        self, message: int, sends: Sequence[Tensor], sizes: Sequence[int], received: Tensor | None = None
    ) -> Pending:
        """Sends `sends[j]` to rank j and receives `sizes[j]` bytes from it, this rank's own among them.

        `received`, where it is given, is of `room`, and the own part is there already.
        """
        self.check()
        is_there = received is not None
        if received is None:
            received = sends[self.rank].new_empty(sum(sizes))
        parts = received.split(list(sizes))
        # Begins with the next rank, so that not all send to rank 0 at once.
        peers = [(self.rank + i) % self.world_size for i in range(1, self.world_size)]
        works = [(j, self._post(self.group.recv, parts[j], j, message)) for j in peers if sizes[j]]
        works += [(j, self._post(self.group.send, sends[j], j, message)) for j in peers if sends[j].numel()]
        if not is_there:
            parts[self.rank].copy_(sends[self.rank])
        return Pending(self.name, works, received, sizes, sends)

    def _post(self, way: Callable[..., Any], data: Tensor, peer: int, message: int) -> Any:
        try:
            return way([data], peer, self._tag + message)
        except RuntimeError as error:
            raise _lost(self.name, peer, error) from error

    def gather(self, message: int, wire: Tensor, sizes: Sequence[int], received: Tensor | None = None) -> Pending:
        """Sends `wire` to every rank. `received`: as in `exchange`."""
        return self.exchange(message, [wire] * self.world_size, sizes, received)


class CollectiveTransport(_Transport):
    """Collectives of torch, in the order of the calls: for NCCL, whose works wait on streams and not on the host."""

    is_tagged = False

    def exchange(
        self, message: int, sends: Sequence[Tensor], sizes: Sequence[int], received: Tensor | None = None
    ) -> Pending:
        del message, received  # collectives write the own part as well
        self.check()
        sent = torch.cat(list(sends))
        received = sent.new_empty(sum(sizes))
        splits = [x.numel() for x in sends]
        work = dist.all_to_all_single(received, sent, list(sizes), splits, group=self.group, async_op=True)
        return Pending(self.name, [(-1, work)], received, sizes, sent)

    def gather(self, message: int, wire: Tensor, sizes: Sequence[int], received: Tensor | None = None) -> Pending:
        del message, received
        self.check()
        longest = max(sizes)
        if wire.numel() < longest:  # parts of a collective are equal
            wire = torch.cat((wire, wire.new_zeros(longest - wire.numel())))
        received = wire.new_empty(self.world_size, longest)
        work = exact_all_gather(received.view(-1), wire, group=self.group, async_op=True)
        return _PaddedPending(self.name, [(-1, work)], received, sizes, wire)


class _PaddedPending(Pending):
    """Of equal parts, of which only the beginnings count."""

    def wait(self) -> list[Tensor]:
        rows, self.received = self.received, self.received.view(-1)
        sizes, self._sizes = self._sizes, [rows.shape[1]] * rows.shape[0]
        super().wait()
        return [row[:size] for row, size in zip(rows, sizes, strict=True)]


Transport = TaggedTransport | CollectiveTransport


def make_transport(name: str, group: Any, device: torch.device) -> Transport:
    return TaggedTransport(name, group) if device.type == "cpu" else CollectiveTransport(name, group)


def resolve_group(name: str, group: Any, device: torch.device) -> Any:
    """The group that a call means, or the sentence why it can have none."""
    if group is None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(f"{name}: group is None and there is no default group; call init_process_group first.")
        group = dist.group.WORLD
    if not hasattr(group, "rank") or not hasattr(group, "size"):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{name}: group must have this process among its ranks, it has not.")
        raise TypeError(f"{name}: group must be a process group, got {type(group).__name__}.")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: tensor must be on cpu or cuda, it is on {device.type}.")
    try:
        backend = (group._get_backend(device) if isinstance(group, dist.ProcessGroup) else group).name()
    except RuntimeError as error:
        raise ValueError(
            f"{name}: tensor must be on a device for which the group has a backend, it is on {device.type}."
        ) from error
    if (device.type, backend) in (("cuda", "gloo"), ("cpu", "nccl")):
        raise ValueError(
            f"{name}: tensor must be on a device of the group's backend {backend}, it is on {device.type}."
        )
    return group
