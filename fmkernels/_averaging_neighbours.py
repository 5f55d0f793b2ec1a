# SPDX-License-Identifier: Apache-2.0
"""Averaging with neighbours alone: no rank waits for more than two others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from . import block_codec
from ._collectives_call import Options
from ._collectives_parameters import (
    check_agreement,
    check_apart_from_mesh,
    check_parameters,
    check_saved,
    copy_parts,
    join_parts,
    local_tensors,
)
from ._collectives_transport import make_transport, resolve_group

_NAME = "NeighbourAveraging"
TOPOLOGIES = ("ring", "shift_one")


class NeighbourAveraging:
    """Decentralised training: in every step a rank averages its parameters with those of its neighbours.

        averaging = NeighbourAveraging(model.parameters(), bits=8)
        ...
        optimizer.step()
        averaging.step()

    A step is x_i <- x_i + sum_j w_ij (x_j - x_i), with symmetric weights, so that the mean over ranks stays, and
    without other changes all ranks approach it. Ranks never agree to the bit: average once before the model is used.

        ring        w = 1/3 for rank - 1 and rank + 1; 1/2 for the other of two ranks
        shift_one   w = 1/2 for one rank of the other half, step after step the next; an even number of ranks

    With `bits`, on a ring, ranks know their neighbours by replicas x^, the same to the bit where they are kept and
    where they are of, and what travels is what these lack:

        q_i = Q(x_i - x^_i),   x^_i <- x^_i + q_i  here and on both neighbours,   x_i <- x_i + sum_j w_ij (x^_j - x^_i)

    The first step sends float32, and replicas begin with it. What Q loses is in the next difference, so that nothing is
    lost in the long run, as with error feedback.

    Args:
        parameters: float32, bfloat16 or float16, on one device, as many on every rank in the same order.
        topology: "ring" or "shift_one".
        group: a process group; None: the default group.
        bits: 8, 6 or 4; None sends float32 in every step. 1 would need smaller weights to converge.
        block: elements to a scale, a power of two from 32 to 2048.

    Replicas are three tensors of all parameters in float32, and in `state_dict`, which is that of one rank; all ranks
    load together, of the same step.

    Raises ValueError and TypeError for arguments, also where ranks disagree as this is made or loads, and RuntimeError
    for a rank that is gone or later than the timeout of the group: on the CPU, where messages go from rank to rank, on
    its neighbours. Then replicas are undefined: load a checkpoint. Deterministic.
    Lian et al. 2017; Tang et al. 2018; Koloskova et al. 2019.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        topology: str = "ring",
        group: Any = None,
        bits: int | None = None,
        block: int = 128,
    ) -> None:
        if topology not in TOPOLOGIES:
            raise ValueError(f"{_NAME}: topology must be one of {', '.join(TOPOLOGIES)}, got {topology}.")
        if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or bits not in (8, 6, 4)):
            raise ValueError(f"{_NAME}: bits must be one of 8, 6, 4 or None, got {bits}.")
        Options(block=block).check(_NAME, ("two_shot",))
        if topology == "shift_one" and bits is not None:
            raise ValueError(f"{_NAME}: bits must be None with shift_one, whose neighbours change, got {bits}.")
        self._parameters = check_parameters(_NAME, parameters)
        tensors = local_tensors(self._parameters)
        self._group = resolve_group(_NAME, group, tensors[0].device)
        self._rank, self._world_size = self._group.rank(), self._group.size()
        if topology == "shift_one" and self._world_size % 2:
            raise ValueError(f"{_NAME}: shift_one must have an even number of ranks, there are {self._world_size}.")
        check_apart_from_mesh(_NAME, self._parameters, self._group)
        check_agreement(_NAME, self._group, {"topology": topology, "bits": bits, "block": block}, tensors)
        self._topology, self._bits, self._block, self.num_steps = topology, bits, block, 0
        self._replicas: dict[int, Tensor] = {}  # by rank, this one among them

    def weights(self) -> dict[int, float]:
        """Of the neighbours in the next step, by rank. Their sum and this rank's own weight are 1."""
        rank, world_size = self._rank, self._world_size
        if self._topology == "shift_one":
            half = world_size // 2
            shift = self.num_steps % half
            return {half + (rank + shift) % half if rank < half else (rank - shift) % half: 0.5}
        neighbours = {(rank - 1) % world_size, (rank + 1) % world_size} - {rank}
        return {j: 1 / (1 + len(neighbours)) for j in sorted(neighbours)}

    @torch.no_grad()
    def step(self) -> None:
        """Averages once."""
        tensors, weights = local_tensors(self._parameters), self.weights()
        x = join_parts(tensors)
        replicas = self._exchange_codes(x, weights) if self._replicas else self._exchange_values(x, weights)
        if self._bits is not None:
            self._replicas = replicas
        mixed = x.clone()
        for j, weight in weights.items():
            mixed.add_(replicas[j] - replicas[self._rank], alpha=weight)
        copy_parts(tensors, mixed)
        self.num_steps += 1

    def _exchange_values(self, x: Tensor, weights: dict[int, float]) -> dict[int, Tensor]:
        received = self._exchange(x.view(torch.uint8), weights)
        return {self._rank: x} | {j: part.view(torch.float32) for j, part in received.items()}

    def _exchange_codes(self, x: Tensor, weights: dict[int, float]) -> dict[int, Tensor]:
        options = {"bits": self._bits, "block": self._block}
        wire = block_codec.quantize(x - self._replicas[self._rank], **options)
        wires = {self._rank: wire} | self._exchange(wire, weights)
        for j, replica in self._replicas.items():
            replica += block_codec.dequantize(wires[j], x.numel(), **options)
        return self._replicas

    def _exchange(self, payload: Tensor, weights: dict[int, float]) -> dict[int, Tensor]:
        """Sends the bytes to all neighbours: what they sent."""
        transport = make_transport(_NAME, self._group, payload.device)
        nothing = payload.new_empty(0)
        sends = [payload if j in weights else nothing for j in range(self._world_size)]
        parts = transport.exchange(0, sends, [part.numel() for part in sends]).wait()
        return {j: parts[j] for j in weights}

    def state_dict(self) -> dict[str, Any]:
        """The steps and the replicas by rank. Of this rank."""
        return {"num_steps": self.num_steps, "replicas": {j: x.clone() for j, x in self._replicas.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave on this rank, with the same options. All ranks call it."""
        check.integer(_NAME, "num_steps", state["num_steps"], 0)
        device = self._parameters[0].device
        numel = sum(tensor.numel() for tensor in local_tensors(self._parameters))
        has_replicas = self._bits is not None and state["num_steps"] > 0
        ranks = sorted({self._rank, *self.weights()}) if has_replicas else []
        if sorted(state["replicas"]) != ranks:
            raise ValueError(f"{_NAME}: replicas must be of ranks {ranks}, they are of {sorted(state['replicas'])}.")
        values = [state["replicas"][j] for j in ranks]
        check_saved(_NAME, "replicas", values, [torch.empty(numel, device="meta")] * len(ranks))
        check_agreement(_NAME, self._group, {"num_steps": state["num_steps"]})
        self._replicas = {j: value.detach().to(device, copy=True) for j, value in zip(ranks, values, strict=True)}
        self.num_steps = state["num_steps"]
