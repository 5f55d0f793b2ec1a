# SPDX-License-Identifier: Apache-2.0
"""A node of ranks in one process, each with a workspace: threads of the CPU, or blocks of one emulated launch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmkernels._library import ops
from fmkernels.testing import EMULATED_NAMESPACE, Backend

HEADER_BYTES = 16384
MAX_RANKS, MAX_LANES = 16, 64
EPOCHS = MAX_LANES * MAX_RANKS  # words of the header, behind the flags [lane, rank that stored it]
BROKEN = EPOCHS + MAX_LANES
FINEST = 8192  # bytes of the smallest slice for a rank, which holds 2048 elements of any dtype


class Node:
    """`epoch`: of the last step that is done; from it on the ranks count."""

    def __init__(
        self, backend: Backend, world_size: int, *, lanes: int = 2, slice_bytes: int | None = None, epoch: int = 0
    ) -> None:
        self.backend, self.world_size, self.lanes = backend, world_size, lanes
        num_bytes = HEADER_BYTES + 2 * lanes * (slice_bytes or FINEST * world_size)
        self.workspaces = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(world_size)]
        for rank in range(world_size):
            self.words(rank)[:BROKEN] = epoch - (1 << 32) if epoch >> 31 else epoch

    def run(self, op: Callable[..., None], *args: object) -> None:
        """Emulated, workspaces are memory that other GPUs touch meanwhile: what orders blocks of one does not do."""
        if self.backend.namespace != EMULATED_NAMESPACE:
            return self.backend.run(op, *args)
        import emulator

        library = ctypes.CDLL(str(emulator.library_dir / "libemulator.so"))
        spans = [(ctypes.c_void_p(t.data_ptr()), ctypes.c_uint64(t.numel())) for t in self.workspaces]
        for span in spans:
            library.emulator_register_peer_memory(*span)
        try:
            self.backend.run(op, *args)
        finally:
            for span in spans:
                library.emulator_unregister_peer_memory(*span)

    def words(self, rank: int) -> Tensor:
        return self.workspaces[rank][:HEADER_BYTES].view(torch.int32)

    def flags(self, rank: int) -> Tensor:
        """[lane, rank that stored it]."""
        return self.words(rank)[:EPOCHS].view(MAX_LANES, MAX_RANKS)

    def epochs(self, rank: int) -> list[int]:
        return [word % (1 << 32) for word in self.words(rank)[EPOCHS : EPOCHS + self.lanes].tolist()]

    def broken(self, rank: int) -> tuple[int, int, int, int]:
        """(whether, rank, the peer that it waited for, lane)."""
        word = self.words(rank)[BROKEN].item() % (1 << 32)
        return tuple(word >> shift & 255 for shift in (0, 8, 16, 24))

    def all_reduce(
        self,
        xs: Sequence[Tensor],
        *,
        rank: int = 0,
        outs: Sequence[Tensor] | None = None,
        op: str = "sum",
        bits: int | None = None,
        block: int = 128,
        algorithm: str = "two_shot",
        timeout_ms: int = 60000,
    ) -> list[Tensor]:
        """The results of the ranks rank, rank + 1, ... that xs are of."""
        outs = [torch.full_like(x, 7.0) for x in xs] if outs is None else list(outs)
        options = (rank, algorithm == "one_shot", bits or 0, block, op == "avg", self.lanes, timeout_ms)
        self.run(lambda: ops.peer_all_reduce(list(xs), self.workspaces, outs, *options))
        return outs

    def all_reduce_rms_norm(
        self,
        xs: Sequence[Tensor],
        residuals: Sequence[Tensor],
        weight: Tensor,
        *,
        eps: float = 1e-6,
        bits: int | None = None,
        block: int = 128,
        algorithm: str = "two_shot",
        outs: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
        timeout_ms: int = 60000,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(out, residual_out) of all ranks."""
        out, residual_out = outs or ([torch.full_like(x, 7.0) for x in xs], [torch.full_like(x, 7.0) for x in xs])
        options = (0, algorithm == "one_shot", bits or 0, block, self.lanes, eps, timeout_ms)
        lists = (list(xs), list(residuals), weight, self.workspaces, list(out), list(residual_out))
        self.run(lambda: ops.peer_all_reduce_rms_norm(*lists, *options))
        return list(out), list(residual_out)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(world_size, *shape, dtype=torch.float32, seed=0):
    return [normal(*shape, dtype=dtype, seed=100 * seed + rank) for rank in range(world_size)]


def smallest_slice(world_size, algorithm):
    return FINEST * (1 if algorithm == "one_shot" else world_size)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
