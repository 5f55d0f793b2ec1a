# SPDX-License-Identifier: Apache-2.0
"""Sums over ranks as chunks of a call: what `quantized_collectives` and the adapters of DDP and FSDP2 share."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from . import _check
from ._collectives_call import (
    Call,
    Options,
    check_apart,
    check_feedback,
    check_like,
    check_splits,
    check_tensor,
    shard_bounds,
    strips_of,
)
from ._collectives_schedules import Steps, one_shot, scatter, two_shot
from ._collectives_work import Work

ALGORITHMS = ("two_shot", "one_shot", "hierarchical")
SCATTER_ALGORITHMS = ("direct", "hierarchical")
_MIN_PIECE = 4096  # elements that are worth a wire of their own


class Owners:
    """Which rank sums which piece of a tensor: by its name and length alone, whatever it travels with."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._plans: dict[tuple[str, int, int], list[tuple[int, slice]]] = {}

    def pieces(self, name: str, numel: int, world_size: int) -> list[tuple[int, slice]]:
        """A piece for each rank, if it is worth it, with its owner.

        The first owner depends on the name, so that small tensors do not all go to one rank.
        """
        plan = self._plans.get((name, numel, world_size))
        if plan is None:
            num_blocks = -(-numel // self._block)
            count = max(1, min(world_size, num_blocks * self._block // _MIN_PIECE))
            ends = shard_bounds(numel, count, self._block)
            first = zlib.crc32(name.encode())
            plan = [((first + i) % world_size, slice(ends[i], ends[i + 1])) for i in range(count)]
            plan = self._plans[name, numel, world_size] = [(j, piece) for j, piece in plan if piece.start < piece.stop]
        return plan

    def strips(self, tensors: Mapping[str, Tensor], world_size: int) -> list[list[tuple[str, slice]]]:
        """The pieces that each rank owns, by the names of their tensors."""
        strips: list[list[tuple[str, slice]]] = [[] for _ in range(world_size)]
        for name, tensor in tensors.items():
            for owner, piece in self.pieces(name, tensor.numel(), world_size):
                strips[owner].append((name, piece))
        return strips

    def launch(
        self,
        call: Call,
        tensors: Mapping[str, Tensor],
        errors: Mapping[str, Tensor] | None,
        places: Mapping[str, int],
        value: Tensor,
        async_op: bool,
    ) -> Work | None:
        """`launch_all_reduce` of contiguous tensors, and their errors and first places, by their names."""
        strips = self.strips(tensors, call.world_size)

        def parts_of(whole: Mapping[str, Tensor]) -> list[list[Tensor]]:
            return [[whole[name].view(-1)[piece] for name, piece in strip] for strip in strips]

        residuals = None if errors is None else parts_of(errors)
        begins = [[places[name] + piece.start for name, piece in strip] for strip in strips]
        return launch_all_reduce(call, parts_of(tensors), residuals, value, async_op, begins)


def launch_all_reduce(
    call: Call,
    shards: Sequence[Sequence[Tensor]],
    residuals: Sequence[Sequence[Tensor]] | None,
    value: Tensor,
    async_op: bool,
    places: Sequence[Sequence[int]] | None = None,
) -> Work | None:
    """In place, of tensors for every rank; `value` is what the work has as its result, and where they lie.

    `places`: see `Call.strips`.
    """
    has_feedback, zeros = residuals is not None, [0] * call.world_size
    call.begin(sum(tensor.numel() for shard in shards for tensor in shard), zeros, zeros, has_feedback)
    used = [value]
    if residuals is not None:
        used += [tensor for shard in residuals for tensor in shard]
    strips = call.strips(shards, residuals, places)
    if call.options.algorithm == "one_shot":
        strips = [[part for strip in strips for part in strip]]

    def steps(message: int, chunk: int) -> Steps:
        pieces = call.pieces(strips, chunk)
        if call.options.algorithm == "one_shot":
            return one_shot(call.route, message, *pieces)
        return two_shot(call.route, message, pieces)

    return call.launch(steps, call.num_chunks(strips), value, used, async_op, has_feedback)


def launch_reduce_scatter(
    output: Tensor, input: Tensor, options: Options, splits: Any, error_feedback: Tensor | None, async_op: bool
) -> Work | None:
    name = "reduce_scatter"
    _check.flag(name, "async_op", async_op)
    check_tensor(name, "input", input)
    check_like(name, "output", output, input, "input")
    check_feedback(name, error_feedback, input, "input")
    call = Call(name, input, options, SCATTER_ALGORITHMS)
    splits = check_splits(name, "input_splits", splits, input.numel(), call.world_size, "input")
    if output.numel() != splits[call.rank]:
        raise ValueError(f"{name}: output must have this rank's {splits[call.rank]} elements, it has {output.numel()}.")
    check_apart(name, "output", output, input, "input", sum(splits[: call.rank]))
    flat, out = input.detach().view(-1), output.detach().view(-1)
    parts = call.strips(strips_of(input, splits), None if error_feedback is None else strips_of(error_feedback, splits))
    outs = call.strips([[out]])
    call.begin(flat.numel(), splits, [splits[call.rank]] * call.world_size, error_feedback is not None)

    def steps(message: int, chunk: int) -> Steps:
        return scatter(call.route, message, call.pieces(parts, chunk), *call.pieces(outs, chunk))

    used = [flat, out] if error_feedback is None else [flat, out, error_feedback]
    return call.launch(steps, call.num_chunks(parts), output, used, async_op, error_feedback is not None)
