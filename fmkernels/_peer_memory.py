# SPDX-License-Identifier: Apache-2.0
"""Memory of each rank that all ranks of a node have mapped, and what they tell each other while they make it.

On the CPU a rank makes a file without a name (memfd; where the system has none, one in the folder of temporary files)
and the others open it through the process that made it. Once all have mapped it nothing but the mappings keeps it, each
with the descriptor that Python's mmap holds, so that nothing is left behind when a process dies. On CUDA it is torch's
symmetric memory.

Every exchange is one of all ranks and every rank judges what all have said, so that all raise, and the same sentence.
A rank that fails says so in the next exchange instead of staying away from it.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _check

NAME = "PeerWorkspace"
_MESSAGE_BYTES, _ERROR_CHARACTERS = 16384, 512  # a character is 12 bytes of JSON at most
_SAME = ("max_bytes", "lanes", "timeout")


def exchange(group: Any, device: torch.device, message: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank says, in the order of ranks."""
    text = json.dumps(message).encode()
    sent = torch.frombuffer(bytearray(text.ljust(_MESSAGE_BYTES)), dtype=torch.uint8).to(device)
    received = [torch.empty_like(sent) for _ in range(group.size())]
    group.allgather([received], [sent]).wait()
    return [json.loads(bytes(part.cpu().tolist())) for part in received]


def check_refusals(group: Any, device: torch.device, refusal: str) -> None:
    """refusal: what is wrong with the arguments of this rank, or "". The first is raised on every rank."""
    for said in exchange(group, device, {"refusal": refusal[:_ERROR_CHARACTERS]}):
        if said["refusal"]:
            raise ValueError(f"{NAME}: {said['refusal']}")


def make_workspaces(group: Any, device: torch.device, num_bytes: int, same: dict[str, Any]) -> list[Tensor]:
    """The workspaces of all ranks as this one sees them, uint8 [num_bytes], zeros; or a sentence on every rank."""
    if device.type == "cuda":
        check_same(exchange(group, device, {"host": host(), **same}))
        return _symmetric_memory(group, device, num_bytes)
    memory = _File(num_bytes)
    try:
        told = exchange(group, device, {"host": host(), **same, **memory.said})
        check_same(told)
        maps, error = [], ""
        try:
            maps = [memory.map() if rank == group.rank() else _map(said) for rank, said in enumerate(told)]
            maps[group.rank()].zero_()  # finds the pages
        except (OSError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"[:_ERROR_CHARACTERS]
        check_errors(exchange(group, device, {"error": error}), "open the memory of the others")
        return maps
    finally:
        memory.close()


def host() -> str:
    """The same for the processes that can share memory, and for no others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    identity = boot.read_text().strip() if boot.exists() else ""
    return f"{platform.node()} {identity}".strip()


def check_same(told: list[dict[str, Any]]) -> None:
    hosts = [said["host"] for said in told]
    for rank, other in enumerate(hosts):
        if other != hosts[0]:
            raise ValueError(
                f"{NAME}: the ranks of group must be on one node, rank 0 is on {hosts[0]} and rank {rank} on {other}."
            )
    for name in _SAME:
        _check.same_on_every_rank(NAME, name, [said[name] for said in told])
    check_errors(told, "make its memory")


def check_errors(told: list[dict[str, Any]], what: str) -> None:
    for rank, said in enumerate(told):
        if said.get("error"):
            raise RuntimeError(f"{NAME}: rank {rank} could not {what}: {said['error']}")


class _File:
    """Memory of this rank with no name, or with one until it is closed; `said` is what the others open it by."""

    def __init__(self, num_bytes: int) -> None:
        self._fd, self._path, self._num_bytes = -1, "", num_bytes
        try:
            if hasattr(os, "memfd_create"):
                self._fd = os.memfd_create("fmkernels", os.MFD_CLOEXEC)
                path = f"/proc/{os.getpid()}/fd/{self._fd}"
            else:
                self._fd, self._path = tempfile.mkstemp(prefix="fmkernels-")
                path = self._path
            os.ftruncate(self._fd, num_bytes)
            if self._path and hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a signal on a page
                os.posix_fallocate(self._fd, 0, num_bytes)
            self.said = {"path": path, "file": _identity(self._fd), "error": ""}
        except OSError as failure:
            self.close()
            self.said = {"path": "", "file": [], "error": str(failure)[:_ERROR_CHARACTERS]}

    def map(self) -> Tensor:
        return _mapped(self._fd, self._num_bytes)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._path:
            Path(self._path).unlink(missing_ok=True)
            self._path = ""


def _identity(fd: int) -> list[int]:
    status = os.fstat(fd)
    return [status.st_dev, status.st_ino, status.st_size]


def _map(said: dict[str, Any]) -> Tensor:
    fd = os.open(said["path"], os.O_RDWR | os.O_CLOEXEC)
    try:
        if _identity(fd) != said["file"]:  # as in a container with processes of its own
            raise ValueError(f"{said['path']} is another file here than for the rank that made it")
        return _mapped(fd, said["file"][2])
    finally:
        os.close(fd)


def _mapped(fd: int, num_bytes: int) -> Tensor:
    """The tensor keeps the mapping."""
    return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)


def _symmetric_memory(group: Any, device: torch.device, num_bytes: int) -> list[Tensor]:
    import torch.distributed._symmetric_memory as symmetric

    own, error = torch.empty(0), ""
    with torch.cuda.device(device):
        try:
            own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
        except RuntimeError as failure:
            error = str(failure)[:_ERROR_CHARACTERS]
        check_errors(exchange(group, device, {"error": error}), "make its memory")
        handle = symmetric.rendezvous(own, group.group_name)
        own.zero_()
        handle.barrier()  # nobody's first signal is cleared
        torch.cuda.synchronize(device)
    return [
        own if r == handle.rank else handle.get_remote_tensor(r, [num_bytes], torch.uint8) for r in range(group.size())
    ]
