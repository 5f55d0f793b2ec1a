# SPDX-License-Identifier: Apache-2.0
"""All-reduce among the ranks of one node through memory that they share: each reads what the others have written.

A `PeerWorkspace` is that memory. Its calls meet in steps that are numbered in it, so that calls of any sizes, dtypes
and algorithms may follow each other, and a message larger than the workspace goes through it in rounds. Bits are those
of `fmkernels.quantized_collectives.all_reduce`, on every rank, and depend on no size around them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from . import _peer_all_reduce_checks as checks
from ._collectives_transport import resolve_group
from ._library import call, ops, register_fake
from ._peer_memory import NAME, check_refusals, make_workspaces

__all__ = ["PeerWorkspace"]

_DEFAULT_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
_DEFAULT_LANES = {"cpu": 1, "cuda": 32}


class PeerWorkspace:
    """Memory of the ranks of a node, each of which has mapped that of all; made and used by all ranks together.

    Args:
        group: a process group whose ranks are on one node, at most 16; None: the default group.
        device: "cpu", or the CUDA device of this rank; None: the CPU.
        max_bytes: of the memory of one rank, the same on every rank; 4 MiB on the CPU and 64 MiB on CUDA by default. A
            larger message goes through it in rounds.
        lanes: on CUDA the blocks of a kernel, from 1 to 64 and no more than the GPU runs at a time; 32 by default. On
            the CPU 1.
        timeout: seconds that a call waits for another rank at most.

    Raises:
        ValueError, TypeError: for arguments, on every rank but for group and device, of which each judges its own;
            where ranks are on other nodes or have other arguments, on every rank.
        RuntimeError: where memory cannot be had or opened, on every rank.

    A call that differs between ranks (operation, dtype, number of elements, bits, block, algorithm, op) raises the same
    ValueError on all of them on the CPU, and the workspace stays usable. A rank that is gone or late raises
    RuntimeError on the others within the timeout, and the workspace is of no use any more: later calls raise at once.
    In both cases the kernel traps on CUDA: the process's CUDA context is of no use any more, and the error is that of a
    failed launch. An argument that a call refuses on one rank alone makes that rank late for the others. Calls of one
    workspace come one after another, in the same order on every rank.

    Not differentiable. Under torch.compile a call is left to Python: the memory behind it is no part of a graph.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        device: torch.device | str | None = None,
        max_bytes: int | None = None,
        lanes: int | None = None,
        timeout: float = 30.0,
    ) -> None:
        device = torch.device("cpu" if device is None else device)
        if device.type not in _DEFAULT_BYTES:
            raise ValueError(f"{NAME}: device must be on cpu or cuda, got {device}.")
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise ValueError(
                    f"{NAME}: device must be one that there is, got {device} where torch has no CUDA device."
                )
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        group = resolve_group(NAME, group, device)
        world_size = group.size()
        max_bytes = _DEFAULT_BYTES[device.type] if max_bytes is None else max_bytes
        lanes = _DEFAULT_LANES[device.type] if lanes is None else lanes
        check_refusals(group, device, _refusal(world_size, device, max_bytes, lanes, timeout))
        self.rank, self.world_size, self.device, self.lanes = group.rank(), world_size, device, lanes
        self._timeout_ms = math.ceil(timeout * 1000)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        same = {"max_bytes": max_bytes, "lanes": lanes, "timeout": float(timeout)}
        self._workspaces: list[Tensor] | None = make_workspaces(group, device, max_bytes, same)

    @property
    def bytes(self) -> int:
        """Of the memory of one rank."""
        return self._max_bytes

    def close(self) -> None:
        """Gives the memory back. On the CPU what other ranks still do with theirs goes on; on CUDA the calls of all
        ranks must be done before one closes.
        """
        with self._lock:
            try:
                if self.device.type == "cuda" and self._workspaces is not None:
                    torch.cuda.synchronize(self.device)
            finally:
                self._workspaces = None

    def __enter__(self) -> PeerWorkspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.compiler.disable
    def all_reduce(
        self,
        x: Tensor,
        *,
        op: str = "sum",
        bits: int | None = None,
        block: int = 128,
        algorithm: str = "two_shot",
        out: Tensor | None = None,
    ) -> Tensor:
        """The sum or the average of what all ranks have.

        Args:
            x: float32, bfloat16 or float16, contiguous, any shape; the same dtype and number of elements on every rank.
            op: "sum" or "avg", in float32 in the order of ranks, rounded to the dtype.
            bits: 8, 6 or 4 for codes of `fmkernels.block_codec`; None: the elements as they are.
            block: elements to a scale, a power of two from 32 to 2048, counted from the first element of x.
            algorithm: "two_shot": every rank sums a part, and all read the sums; two roundings of codes. "one_shot":
                every rank sums everything; one rounding and one step, for few elements or two ranks. Without codes both
                give the same bits.
            out: shape, dtype and device of x, contiguous, to write to; may be x.

        Returns:
            Shape and dtype of x, the same bits on every rank; or out. A NaN or an infinity reaches its own place, with
            codes its block. Deterministic; see the class for errors.
        """
        name = "all_reduce"
        code, block = checks.code_and_block(name, bits, block, algorithm)
        if op not in ("sum", "avg"):
            raise ValueError(f"{name}: op must be 'sum' or 'avg', got {op!r}.")
        checks.check_plain(name, x=x)
        out = torch.empty_like(x) if out is None else out
        options = (self.rank, algorithm == "one_shot", code, block, op == "avg", self.lanes, self._timeout_ms)
        with self._lock:
            _call(name, ops.peer_all_reduce, ([x], self._open(name), [out], *options), checks.check_all_reduce)
        return out

    @torch.compiler.disable
    def all_reduce_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        *,
        eps: float = 1e-6,
        bits: int | None = None,
        block: int = 128,
        algorithm: str = "two_shot",
        out: Tensor | None = None,
        residual_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The sum of what all ranks have, a residual added to it, and RMSNorm, in one pass.

            residual_out = all_reduce(x) + residual,    out = rms_norm(residual_out, weight, eps)

        Args:
            x: [..., hidden], float32, bfloat16 or float16, contiguous; the same dtype and shape on every rank.
            residual: shape, dtype and device of x, contiguous.
            weight: [hidden], float32 or the dtype of x.
            eps: added to the mean of squares.
            bits: as in `all_reduce`; hidden must then be a multiple of block.
            block: as in `all_reduce`.
            algorithm: as in `all_reduce`.
            out: shape, dtype and device of x, contiguous, to write to; may be x.
            residual_out: the same; may be residual.

        Returns:
            (out, residual_out) of the shape and dtype of x. The residual is added in float32 and the sum rounded once;
            "two_shot" without codes has rounded all_reduce(x) to the dtype before. Bits are the same on ranks that have
            the same residual and weight. Deterministic; see the class for errors.
        """
        name = "all_reduce_rms_norm"
        code, block = checks.code_and_block(name, bits, block, algorithm)
        check.number(name, "eps", eps, non_negative=True)
        checks.check_plain(name, x=x, residual=residual, weight=weight)
        out = torch.empty_like(x) if out is None else out
        residual_out = torch.empty_like(x) if residual_out is None else residual_out
        options = (self.rank, algorithm == "one_shot", code, block, self.lanes, float(eps), self._timeout_ms)
        with self._lock:
            lists = ([x], [residual], weight, self._open(name), [out], [residual_out])
            _call(name, ops.peer_all_reduce_rms_norm, (*lists, *options), checks.check_all_reduce_rms_norm)
        return out, residual_out

    def _open(self, name: str) -> list[Tensor]:
        if self._workspaces is None:
            raise RuntimeError(f"{name}: the workspace is closed.")
        return self._workspaces


def _refusal(world_size: int, device: torch.device, max_bytes: Any, lanes: Any, timeout: Any) -> str:
    """The sentence for the first argument that is wrong, or ""."""
    if world_size > checks.MAX_RANKS:
        return f"group must have at most {checks.MAX_RANKS} ranks, got {world_size}."
    most_lanes = 1 if device.type == "cpu" else checks.MAX_LANES
    if isinstance(lanes, bool) or not isinstance(lanes, int) or not 1 <= lanes <= most_lanes:
        allowed = "1 on the CPU" if most_lanes == 1 else f"an integer from 1 to {most_lanes}"
        return f"lanes must be {allowed}, got {lanes!r}."
    least = checks.least_bytes(world_size * checks.GRANULE * 4, lanes)
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or not least <= max_bytes < 1 << 40:
        least_for = f"{least} for {world_size} ranks and {lanes} lanes"
        return f"max_bytes must be an integer of at least {least_for}, got {max_bytes!r}."
    if not isinstance(timeout, int | float) or not 0.001 <= timeout <= 1e6:
        return f"timeout must be a number of seconds from 0.001 to 1000000, got {timeout!r}."
    return ""


def _call(name: str, op: Callable[..., None], args: tuple[Any, ...], check_tensors: Callable[..., None]) -> None:
    try:
        call(op, args, check_tensors)
    except RuntimeError as error:
        text = str(error).split("\n")[0].rstrip(".")
        if "must be the same on every rank" in text:
            raise ValueError(f"{text}.") from None
        raise RuntimeError(f"{text}." if text.startswith(f"{name}: ") else f"{name}: {text}.") from error


register_fake("peer_all_reduce")(checks.check_all_reduce)
register_fake("peer_all_reduce_rms_norm")(checks.check_all_reduce_rms_norm)
