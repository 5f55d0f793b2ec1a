# SPDX-License-Identifier: Apache-2.0
"""all_reduce, reduce_scatter, all_gather and all_to_all of torch.distributed, 8 to 1 bits an element on the wire.

Each block of elements is sent as codes and one scale (`fmkernels.block_codec`). Ranks are summed in their order, in
float32, and every rank decodes the same bytes, so that results are bit-identical on all of them. Nothing is requantised
from hop to hop: a sum is rounded once more than its terms and that is all.

A block's result depends on that block of every rank, on the number of ranks and on the options that say so below; not
on the length of the tensor around it, on `chunk_numel`, nor on which rank sums it. Blocks are counted from the first
element of the tensor, or of each part that one rank sends or gets. What is drawn depends on its place besides.

Groups: gloo (tensors on the CPU) and NCCL (on CUDA), of any size; a rank with nothing to send takes part. All ranks
make the same calls in the same order, as with torch; on the CPU, and on CUDA under FMKERNELS_CHECK=1, a call that
differs between ranks raises the same sentence on all of them, and the group stays usable. A rank that is gone or late
raises on the others within the group's timeout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import _check
from ._collectives_call import (
    DEFAULT_CHUNK,
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
from ._collectives_launch import ALGORITHMS, launch_all_reduce, launch_reduce_scatter
from ._collectives_schedules import Steps, exchange, gather
from ._collectives_work import Work

__all__ = ["all_gather", "all_reduce", "all_to_all", "reduce_scatter"]


@torch.no_grad()
def all_reduce(
    tensor: Tensor,
    *,
    op: str = "sum",
    group: Any = None,
    bits: int | str = 8,
    block: int = 128,
    algorithm: str = "two_shot",
    error_feedback: Tensor | None = None,
    async_op: bool = False,
    node_size: int | None = None,
    inter_bits: int | str = 4,
    rounding: str = "nearest",
    seed: int | None = None,
    step: int = 0,
    offset: int = 0,
    hadamard: bool = False,
    chunk_numel: int = DEFAULT_CHUNK,
) -> Work | None:
    """Replaces `tensor` by the sum or the average of what all ranks have.

    Args:
        tensor: float32, bfloat16 or float16, contiguous, any length; the same dtype and length on every rank.
        op: "sum" or "avg".
        group: a process group; None: the default group.
        bits: 8, 6, 4, 1 or "float8_e4m3fn".
        block: elements to a scale, a power of two from 32 to 2048.
        algorithm: "two_shot": every rank sums a shard and sends it to all; of W ranks each sends and gets
            2 (W - 1) / W wires, two roundings. "one_shot": every rank sums everything; W - 1
            wires, one rounding, for few elements.
            "hierarchical": two_shot in two hops each way, `bits` inside a node and `inter_bits` between nodes.
        error_feedback: float32, as many elements as tensor, zeros at first: what was lost is added in the next call.
            Written in place. Over calls with op "sum", the sum of all tensors is that of all results plus what the
            residuals of all ranks hold; a rank that sums a shard keeps what was lost there too.
        async_op: return at once with a Work; tensor and error_feedback belong to the call until its `wait`. Where
            another asynchronous call follows, on the CPU, that may last until all ranks have begun the other one.
        node_size: for "hierarchical": ranks to a node, of consecutive numbers; divides the size of the group.
        inter_bits: for "hierarchical": as bits.
        rounding: "nearest" or "stochastic", whose mean over seeds and steps is exact; not of 1 bit nor of floats.
        seed: of the draws of "stochastic", from 0 to 2**63 - 1, the same on every rank. Ranks, and each further
            rounding, draw numbers of their own from it.
        step: of the draws too, below 2**40: another one, other draws.
        offset: elements of the whole before the first one, a multiple of block and of 64. A draw depends on the place
            of its element in the whole, so that it does not matter how that is cut.
        hadamard: rotate 32 elements at a time before they are rounded, for data with outliers.
        chunk_numel: elements that are encoded at a time while others travel; changes no bit.

    Returns:
        None, or the Work of an asynchronous call.

    Raises ValueError and TypeError for arguments, also where ranks disagree, and RuntimeError when a rank is gone.
    Deterministic. A NaN or an infinity makes its block NaN and no other.
    """
    options = Options(
        op, group, bits, block, algorithm, node_size, inter_bits, hadamard, chunk_numel, rounding, seed, step, offset
    )
    name = "all_reduce"
    check_tensor(name, "tensor", tensor)
    check_feedback(name, error_feedback, tensor, "tensor")
    _check.flag(name, "async_op", async_op)
    call = Call(name, tensor, options, ALGORITHMS)
    if algorithm == "one_shot":
        sizes = [tensor.numel()]
    else:
        sizes = [end - begin for begin, end in pairwise(shard_bounds(tensor.numel(), call.world_size, block))]
    residuals = None if error_feedback is None else strips_of(error_feedback, sizes)
    return launch_all_reduce(call, strips_of(tensor, sizes), residuals, tensor, async_op)


@torch.no_grad()
def reduce_scatter(
    output: Tensor,
    input: Tensor,
    *,
    op: str = "sum",
    group: Any = None,
    bits: int | str = 8,
    block: int = 128,
    algorithm: str = "direct",
    input_splits: Sequence[int] | None = None,
    error_feedback: Tensor | None = None,
    async_op: bool = False,
    node_size: int | None = None,
    inter_bits: int | str = 4,
    rounding: str = "nearest",
    seed: int | None = None,
    step: int = 0,
    offset: int = 0,
    hadamard: bool = False,
    chunk_numel: int = DEFAULT_CHUNK,
) -> Work | None:
    """Writes to `output` the sum or the average of the part of `input` that is this rank's, over all ranks.

    Args:
        output: as many elements as this rank's part, dtype and device of input; contiguous.
        input: float32, bfloat16 or float16, contiguous; the same dtype and length on every rank.
        op: "sum" or "avg".
        group: a process group; None: the default group.
        bits: 8, 6, 4, 1 or "float8_e4m3fn".
        block: elements to a scale, a power of two from 32 to 2048; counted from the beginning of each part.
        algorithm: "direct": one exchange, one rounding. "hierarchical": inside a node with `bits`, then between nodes
            with `inter_bits`; two roundings.
        input_splits: elements of each rank's part, the same on every rank; by default equal parts.
        error_feedback: float32, as many elements as input; see `all_reduce`.
        async_op: return at once with a Work.
        node_size: for "hierarchical": ranks to a node.
        inter_bits: for "hierarchical": as bits.
        rounding, seed, step, offset: see `all_reduce`; the place of a part is a multiple of block and of 64.
        hadamard: rotate 32 elements at a time before they are rounded.
        chunk_numel: elements that are encoded at a time; changes no bit.

    Returns:
        None, or the Work of an asynchronous call. Errors as those of `all_reduce`. Deterministic.
    """
    options = Options(
        op, group, bits, block, algorithm, node_size, inter_bits, hadamard, chunk_numel, rounding, seed, step, offset
    )
    return launch_reduce_scatter(output, input, options, input_splits, error_feedback, async_op)


@torch.no_grad()
def all_gather(
    output: Tensor,
    input: Tensor,
    *,
    group: Any = None,
    bits: int | str = 8,
    block: int = 128,
    output_splits: Sequence[int] | None = None,
    error_feedback: Tensor | None = None,
    async_op: bool = False,
    rounding: str = "nearest",
    seed: int | None = None,
    step: int = 0,
    offset: int = 0,
    hadamard: bool = False,
    chunk_numel: int = DEFAULT_CHUNK,
) -> Work | None:
    """Writes to `output` what every rank has as `input`, one behind another; this rank's own as decoded, too.

    Args:
        output: as many elements as all inputs together, dtype and device of input; contiguous. Input may be
            this rank's part of it.
        input: float32, bfloat16 or float16, contiguous; the same dtype on every rank.
        group: a process group; None: the default group.
        bits: 8, 6, 4, 1 or "float8_e4m3fn".
        block: elements to a scale, a power of two from 32 to 2048; counted from the beginning of each input.
        output_splits: elements of each rank's input, the same list on every rank; by default equal parts of output.
        error_feedback: float32, as many elements as input; see `all_reduce`.
        async_op: return at once with a Work.
        rounding, seed, step, offset: see `all_reduce`; places are those in input.
        hadamard: rotate 32 elements at a time before they are rounded.
        chunk_numel: elements of the output that are encoded at a time; changes no bit.

    Returns:
        None, or the Work of an asynchronous call. Errors as those of `all_reduce`. Deterministic.
    """
    name = "all_gather"
    check_tensor(name, "input", input)
    check_like(name, "output", output, input, "input")
    check_feedback(name, error_feedback, input, "input")
    _check.flag(name, "async_op", async_op)
    options = Options(
        "sum", group, bits, block, "direct", None, bits, hadamard, chunk_numel, rounding, seed, step, offset
    )
    call = Call(name, input, options, ("direct",))
    splits = check_splits(name, "output_splits", output_splits, output.numel(), call.world_size, "output")
    if input.numel() != splits[call.rank]:
        raise ValueError(f"{name}: input must have this rank's {splits[call.rank]} elements, it has {input.numel()}.")
    check_apart(name, "input", input, output, "output", sum(splits[: call.rank]))
    numel = input.numel()
    own = call.strips(strips_of(input, [numel]), None if error_feedback is None else strips_of(error_feedback, [numel]))
    outs = call.strips(strips_of(output, splits))
    call.begin(output.numel(), [numel] * call.world_size, splits, error_feedback is not None)

    def steps(message: int, chunk: int) -> Steps:
        return gather(call.route, message, *call.pieces(own, chunk), call.pieces(outs, chunk))

    used = [input, output] if error_feedback is None else [input, output, error_feedback]
    return call.launch(steps, call.num_chunks(outs), output, used, async_op, error_feedback is not None)


@torch.no_grad()
def all_to_all(
    output: Tensor,
    input: Tensor,
    *,
    group: Any = None,
    bits: int | str = 8,
    block: int = 128,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
    error_feedback: Tensor | None = None,
    async_op: bool = False,
    rounding: str = "nearest",
    seed: int | None = None,
    step: int = 0,
    offset: int = 0,
    hadamard: bool = False,
    chunk_numel: int = DEFAULT_CHUNK,
) -> Work | None:
    """Sends a part of `input` to every rank and writes what they sent to `output`, as all_to_all_single does.

    Args:
        output: the parts of all ranks one behind another, dtype and device of input; contiguous.
        input: float32, bfloat16 or float16, contiguous; the same dtype on every rank.
        group: a process group; None: the default group.
        bits: 8, 6, 4, 1 or "float8_e4m3fn".
        block: elements to a scale, a power of two from 32 to 2048; counted from the beginning of each part.
        output_splits: elements from each rank; by default equal parts.
        input_splits: elements to each rank; by default equal parts.
        error_feedback: float32, as many elements as input; see `all_reduce`.
        async_op: return at once with a Work.
        rounding, seed, step, offset: see `all_reduce`; the place of a part is a multiple of block and of 64.
        hadamard: rotate 32 elements at a time before they are rounded.
        chunk_numel: elements of the input that are encoded at a time; the same on every rank, and changes no bit. On
            CUDA all are one chunk: ranks with other lengths would make another number of collectives of torch.

    Returns:
        None, or the Work of an asynchronous call. Errors as those of `all_reduce`. Deterministic.
    """
    name = "all_to_all"
    check_tensor(name, "input", input)
    check_like(name, "output", output, input, "input")
    check_feedback(name, error_feedback, input, "input")
    _check.flag(name, "async_op", async_op)
    options = Options(
        "sum", group, bits, block, "direct", None, bits, hadamard, chunk_numel, rounding, seed, step, offset
    )
    call = Call(name, input, options, ("direct",))
    sends = check_splits(name, "input_splits", input_splits, input.numel(), call.world_size, "input")
    expects = check_splits(name, "output_splits", output_splits, output.numel(), call.world_size, "output")
    check_apart(name, "output", output, input, "input", None)
    parts = call.strips(strips_of(input, sends), None if error_feedback is None else strips_of(error_feedback, sends))
    outs = call.strips(strips_of(output, expects))
    call.begin(0, sends, expects, error_feedback is not None)
    if call.transport.is_tagged:
        num_chunks = call.num_chunks([*parts, *outs])
    else:  # as many collectives on every rank, none of which knows the lengths of all
        num_chunks, call.options = 1, replace(options, chunk_numel=1 << 62)

    def steps(message: int, chunk: int) -> Steps:
        return exchange(call.route, message, call.pieces(parts, chunk), call.pieces(outs, chunk))

    used = [input, output] if error_feedback is None else [input, output, error_feedback]
    return call.launch(steps, num_chunks, output, used, async_op, error_feedback is not None)
