# SPDX-License-Identifier: Apache-2.0
"""Sums over ranks as chunks of a call: what `quantized_collectives` and the adapters of DDP and FSDP2 share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._collectives_call import (
    Call,
    Options,
    check_apart,
    check_feedback,
    check_like,
    check_splits,
    check_tensor,
    strips_of,
)
from ._collectives_codec import Strip
from ._collectives_schedules import Steps, one_shot, scatter, two_shot
from ._collectives_work import Work

ALGORITHMS = ("two_shot", "one_shot", "hierarchical")
SCATTER_ALGORITHMS = ("direct", "hierarchical")


def launch_all_reduce(
    call: Call, shards: Sequence[Strip], residuals: Sequence[Strip] | None, value: Tensor, async_op: bool
) -> Work | None:
    """In place, of a strip for every rank; `value` is what the work has as its result, and where the strips lie."""
    has_feedback, zeros = residuals is not None, [0] * call.world_size
    call.begin(sum(tensor.numel() for strip in shards for tensor in strip), zeros, zeros, has_feedback)
    used = [value]
    if residuals is not None:
        used += [tensor for strip in residuals for tensor in strip]
    if call.options.algorithm == "one_shot":
        whole = [[tensor for strip in strips for tensor in strip] for strips in (shards, residuals or ())]

        def steps(message: int, chunk: int) -> Steps:
            piece, lack = call.pieces(whole, chunk)
            return one_shot(call.route, message, piece, piece, lack if has_feedback else None)

        return call.launch(steps, call.num_chunks(whole[:1]), value, used, async_op, has_feedback)

    def steps(message: int, chunk: int) -> Steps:
        lacks = None if residuals is None else call.pieces(residuals, chunk)
        pieces = call.pieces(shards, chunk)
        return two_shot(call.route, message, pieces, pieces, lacks)

    return call.launch(steps, call.num_chunks(shards), value, used, async_op, has_feedback)


def launch_reduce_scatter(
    output: Tensor, input: Tensor, options: Options, splits: Any, error_feedback: Tensor | None, async_op: bool
) -> Work | None:
    name = "reduce_scatter"
    check_tensor(name, "input", input)
    check_like(name, "output", output, input, "input")
    check_feedback(name, error_feedback, input, "input")
    call = Call(name, input, options, SCATTER_ALGORITHMS)
    splits = check_splits(name, "input_splits", splits, input.numel(), call.world_size, "input")
    if output.numel() != splits[call.rank]:
        raise ValueError(f"{name}: output must have this rank's {splits[call.rank]} elements, it has {output.numel()}.")
    check_apart(name, "output", output, input, "input", sum(splits[: call.rank]))
    flat, out = input.detach().view(-1), output.detach().view(-1)
    parts = strips_of(input, splits)
    residuals = None if error_feedback is None else strips_of(error_feedback, splits)
    call.begin(flat.numel(), splits, [splits[call.rank]] * call.world_size, residuals is not None)

    def steps(message: int, chunk: int) -> Steps:
        lacks = None if residuals is None else call.pieces(residuals, chunk)
        return scatter(call.route, message, call.pieces(parts, chunk), *call.pieces(([out],), chunk), lacks)

    used = [flat, out] if error_feedback is None else [flat, out, error_feedback]
    return call.launch(steps, call.num_chunks(parts), output, used, async_op, residuals is not None)
