# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=peer_all_reduce` counts: one rank of a node of eight whose peers have written before it came.

A rank that waits counts what it does meanwhile, which says nothing. So all ranks run once, and rank 0 again with the
workspaces that they have left, in which every flag is set.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from counters import Case
from torch import Tensor

from emulator.counters import Work
from fmkernels import testing
from fmkernels._library import ops
from fmkernels._peer_all_reduce_checks import HEADER_BYTES, MAX_LANES, MAX_RANKS

WORLD_SIZE, LANES, EPS = 8, 8, 1e-6
SLICE_BYTES = 1 << 18  # a round holds the message


@dataclass
class Rank:
    """The call of rank 0. Without a norm `hidden` is 0."""

    numel: int
    dtype: torch.dtype
    bits: int
    one_shot: bool
    hidden: int = 0
    left: list[Tensor] = field(default_factory=list)  # the workspaces after the call of all ranks

    def tensors(self, seed: int) -> list[Tensor]:
        shape = (self.numel // self.hidden, self.hidden) if self.hidden else (self.numel,)
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).to(self.dtype) for _ in range(WORLD_SIZE)]

    def call(self, num_ranks: int, workspaces: list[Tensor], lanes: int) -> tuple[Tensor, ...]:
        x = self.tensors(0)[:num_ranks]
        outs, options = [torch.empty_like(t) for t in x], (0, self.one_shot, self.bits, 128)
        if not self.hidden:
            ops.peer_all_reduce(x, workspaces, outs, *options, False, lanes, 60000)
            return (outs[0],)
        residual, summed = self.tensors(1)[:num_ranks], [torch.empty_like(t) for t in x]
        weight = torch.ones(self.hidden, dtype=self.dtype)
        ops.peer_all_reduce_rms_norm(x, residual, weight, workspaces, outs, summed, *options, lanes, EPS, 60000)
        return outs[0], summed[0]

    def empty(self) -> list[Tensor]:
        num_bytes = HEADER_BYTES + 2 * LANES * SLICE_BYTES
        return [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(WORLD_SIZE)]

    def run(self) -> tuple[Tensor, ...]:
        if ops.namespace != testing.EMULATED_NAMESPACE:
            self.left = self.empty()
            emulated = next(b for b in testing.backends("peer_all_reduce") if b.namespace == testing.EMULATED_NAMESPACE)
            emulated.run(self.call, WORLD_SIZE, self.left, LANES)
            return self.call(WORLD_SIZE, self.empty(), 1)
        words = self.left[0][:HEADER_BYTES].view(torch.int32)
        words[MAX_LANES * MAX_RANKS :][:MAX_LANES] = 0  # the own epochs; the flags stand where the call has left them
        return self.call(1, self.left, LANES)

    def case(self, name: str) -> Case:
        """Of the inputs each payload, each part of a sum and residual_out count once, of the outputs what it writes."""
        elements = self.numel * self.dtype.itemsize
        payload = self.numel * self.bits // 8 + self.numel // 128 * 4 if self.bits else elements
        reads = WORLD_SIZE * payload if self.one_shot else 2 * payload
        writes = payload if self.one_shot else payload + payload // WORLD_SIZE
        more = 2 * elements + self.hidden * self.dtype.itemsize if self.hidden else 0
        results = 2 * elements if self.hidden else elements
        return Case(name, self.run, Work(0, elements + reads + more, writes + results))


def cases() -> list[Case]:
    result = []
    for one_shot, numel in ((True, 1 << 15), (False, 1 << 17)):
        shots = "one shot" if one_shot else "two shots"
        for bits, dtype in ((0, torch.bfloat16), (0, torch.float32), (8, torch.bfloat16), (6, torch.bfloat16)):
            payload = f"{bits} bits of " if bits else ""
            result.append(Rank(numel, dtype, bits, one_shot).case(f"{shots} of {numel} in {payload}{str(dtype)[6:]}"))
        result.append(Rank(numel, torch.bfloat16, 4, one_shot).case(f"{shots} of {numel} in 4 bits of bfloat16"))
        for bits in (0, 8):
            rank = Rank(numel, torch.bfloat16, bits, one_shot, 4096)
            result.append(rank.case(f"{shots} and norm of rows of 4096 in {bits or 16} bits"))
    return result


CASES = cases()
