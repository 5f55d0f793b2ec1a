# SPDX-License-Identifier: Apache-2.0
"""One call of a quantised collective: its arguments checked, its shards and chunks cut, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _check
from ._block_codec_checks import checked_format, checked_rounding, code_of
from ._collectives_codec import STEP_BITS, Codec, Part, Strip, cut, grain, padded_numel, round_up
from ._collectives_header import BITS, DTYPES, OPS, ROUNDINGS, Header, send_header
from ._collectives_schedules import Route, Steps
from ._collectives_transport import MAX_MESSAGES, make_transport, resolve_group
from ._collectives_work import Job, Work, run, start
from ._library import check_values

DEFAULT_CHUNK = 1 << 22
PLACE_BITS = 40  # tensors of up to so many elements, a parameter or those of a module, have places of their own
_MAX_OFFSET = 1 << 62  # places behind it stay below 2^63
_MESSAGES_OF_CHUNK = 4  # at most; the first message of a call is its header
_MAX_CHUNKS = (MAX_MESSAGES - 1) // _MESSAGES_OF_CHUNK


@dataclass(frozen=True)
class Options:
    """What a caller may choose, in any of the functions."""

    op: str = "sum"
    group: Any = None
    bits: int | str = 8
    block: int = 128
    algorithm: str = "two_shot"
    node_size: int | None = None
    inter_bits: int | str = 4
    hadamard: bool = False
    chunk_numel: int = DEFAULT_CHUNK
    rounding: str = "nearest"
    seed: int | None = None
    step: int = 0
    offset: int = 0
    decay: float = 0.0

    def check(self, name: str, algorithms: Sequence[str]) -> None:
        """One sentence for what is wrong, before any rank hears of the call; the group is looked at later."""
        for argument, value, allowed in (
            ("op", self.op, OPS),
            ("bits", self.bits, BITS),
            ("inter_bits", self.inter_bits, BITS),
            ("algorithm", self.algorithm, algorithms),
            ("rounding", self.rounding, ROUNDINGS),
        ):
            # True is 1 and 8.0 is 8; a tensor is compared element by element.
            if isinstance(value, bool) or not isinstance(value, int | str) or value not in allowed:
                raise ValueError(f"{name}: {argument} must be one of {', '.join(map(str, allowed))}, got {value}.")
        checked_format(name, self.bits, self.block)
        _check.flag(name, "hadamard", self.hadamard)
        _check.integer(name, "chunk_numel", self.chunk_numel, 1)
        _check.number(name, "decay", self.decay)
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"{name}: decay must be at least 0 and below 1, got {self.decay}.")
        if self.node_size is not None:
            _check.integer(name, "node_size", self.node_size, 1)
        if (self.algorithm == "hierarchical") != (self.node_size is not None):
            raise ValueError(
                f"{name}: node_size must be given for the hierarchical algorithm and for no other, "
                f"got {self.node_size} for {self.algorithm}."
            )
        for bits in (self.bits, self.inter_bits) if self.algorithm == "hierarchical" else (self.bits,):
            code = code_of(name, "bits", bits)
            checked_rounding(name, self.rounding, code, self.block, self.seed, self.step, self.offset)
        if self.step >= 1 << STEP_BITS:
            raise ValueError(f"{name}: step must be below 2**{STEP_BITS}, got {self.step}.")
        if self.offset > _MAX_OFFSET:
            raise ValueError(f"{name}: offset must be at most 2**62, got {self.offset}.")


def check_tensor(name: str, argument: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(tensor).__name__}.")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: {argument} must be float32, bfloat16 or float16, it is {tensor.dtype}.")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: {argument} must be contiguous, its strides are {tensor.stride()}.")


def check_like(name: str, argument: str, tensor: Tensor, like: Tensor, what: str) -> None:
    check_tensor(name, argument, tensor)
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name}: {argument} must have the dtype and device of {what}, {like.dtype} on {like.device}, "
            f"it is {tensor.dtype} on {tensor.device}."
        )


def check_feedback(name: str, residual: Any, tensor: Tensor, what: str) -> None:
    if residual is None:
        return
    check_tensor(name, "error_feedback", residual)
    if residual.dtype != torch.float32 or residual.device != tensor.device or residual.numel() != tensor.numel():
        raise ValueError(
            f"{name}: error_feedback must be float32 with the {tensor.numel()} elements of {what} on {tensor.device}, "
            f"it is {residual.dtype} with {residual.numel()} on {residual.device}."
        )
    check_apart(name, "error_feedback", residual, tensor, what, None)


def check_apart(name: str, argument: str, part: Tensor, whole: Tensor, what: str, place: int | None) -> None:
    """A chunk that is written must not be one that is still to be read; `place` is where it never is."""
    begin, other = part.data_ptr(), whole.data_ptr()
    is_apart = not part.nbytes or begin + part.nbytes <= other or other + whole.nbytes <= begin
    if is_apart or (place is not None and begin == other + place * whole.element_size()):
        return
    allowed = "" if place is None else f"be this rank's part of {what} or "
    raise ValueError(f"{name}: {argument} must {allowed}share no memory with {what}.")


def check_splits(name: str, argument: str, splits: Any, numel: int, world_size: int, what: str) -> list[int]:
    """Elements for each rank; by default as many for all."""
    if splits is None:
        if numel % world_size:
            raise ValueError(
                f"{name}: the elements of {what} must be a multiple of the {world_size} ranks where {argument} is not "
                f"given, there are {numel}."
            )
        return [numel // world_size] * world_size
    if not isinstance(splits, Iterable):
        raise TypeError(f"{name}: {argument} must be a list of counts, got {type(splits).__name__}.")
    splits = list(splits)
    are_counts = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in splits)
    if len(splits) != world_size or not are_counts or sum(splits) != numel:
        raise ValueError(
            f"{name}: {argument} must be {world_size} counts, one for each rank, with the sum of {numel}, the elements "
            f"of {what}, got {splits}."
        )
    return splits


def shard_bounds(numel: int, world_size: int, block: int) -> list[int]:
    """Where the shards begin and the last ends: whole grains, as many for every rank or one more."""
    num_grains = -(-numel // grain(block))
    return [min(num_grains * j // world_size * grain(block), numel) for j in range(world_size + 1)]


class Call:
    """A call in the making. Built in program order by the thread that calls: it takes the next number of the group."""

    def __init__(self, name: str, tensor: Tensor, options: Options, algorithms: Sequence[str]) -> None:
        options.check(name, algorithms)
        group = resolve_group(name, options.group, tensor.device)
        world_size = group.size()
        node_size = options.node_size or 0
        if options.node_size is not None and world_size % node_size:
            raise ValueError(
                f"{name}: node_size must divide the {world_size} ranks of the group, got {options.node_size}."
            )
        self.name, self.options, self.device, self.dtype = name, options, tensor.device, tensor.dtype
        self.rank, self.world_size, self._group = group.rank(), world_size, group
        self._node_size = node_size

    def begin(self, numel: int, sends: Sequence[int], expects: Sequence[int], has_feedback: bool) -> None:
        """After the last check of an argument: from here on the other ranks count on this one."""
        o = self.options
        transport = self.transport = make_transport(self.name, self._group, self.device)
        seed = o.seed if o.rounding == "stochastic" else None
        codec, inter_codec = (
            Codec(bits, o.block, o.hadamard, self.device, seed, o.step) for bits in (o.bits, o.inter_bits)
        )
        node_size = self._node_size
        if node_size in (1, self.world_size):  # one of the two hops leads nowhere, and would only round
            codec = inter_codec if node_size < self.world_size else codec
            node_size = 0
        self.route = Route(transport, codec, inter_codec, node_size, o.op, o.decay)
        if self.device.type == "cpu" or check_values:
            header = Header(
                function=self.name,
                dtype=self.dtype,
                numel=numel,
                op=o.op,
                bits=o.bits,
                block=o.block,
                algorithm=o.algorithm,
                inter_bits=o.inter_bits,
                node_size=self._node_size,
                hadamard=o.hadamard,
                error_feedback=has_feedback,
                chunk_numel=o.chunk_numel,
                rounding=o.rounding,
                seed=seed or 0,
                step=0 if seed is None else o.step,
                offset=0 if seed is None else o.offset,
            )
            send_header(transport, header, sends, expects, self.device)

    def strips(
        self,
        tensors: Sequence[Sequence[Tensor]],
        residuals: Sequence[Sequence[Tensor]] | None = None,
        places: Sequence[Sequence[int]] | None = None,
    ) -> list[Strip]:
        """A strip of each list of tensors. By default their places are one behind another, each from a grain on."""
        strips, place = [], self.options.offset
        for i, strip in enumerate(tensors):
            parts = []
            for j, tensor in enumerate(strip):
                residual = None if residuals is None else residuals[i][j]
                parts.append(Part(tensor, residual, place if places is None else places[i][j]))
                place += round_up(tensor.numel(), grain(self.options.block))
            strips.append(parts)
        return strips

    def _step(self, strip: Strip) -> int:
        """Elements of a chunk in a strip: a function of that strip alone, which two ranks have in common."""
        block = self.options.block
        step = max(self.options.chunk_numel // self.world_size, -(-padded_numel(strip, block) // _MAX_CHUNKS), 1)
        return round_up(step, grain(block))

    def num_chunks(self, strips: Sequence[Strip]) -> int:
        lengths = [(padded_numel(strip, self.options.block), self._step(strip)) for strip in strips]
        return max((-(-length // step) for length, step in lengths), default=0)

    def pieces(self, strips: Sequence[Strip], chunk: int) -> list[Strip]:
        """What every strip has of a chunk: nothing, where others are longer."""
        steps = [self._step(strip) for strip in strips]
        block = self.options.block
        return [cut(strip, block, chunk * n, (chunk + 1) * n) for strip, n in zip(strips, steps, strict=True)]

    def launch(
        self,
        steps: Callable[[int, int], Steps],
        num_chunks: int,
        result: Tensor,
        used: list[Tensor],
        async_op: bool,
        has_feedback: bool,
    ) -> Work | None:
        """Runs `steps(message, chunk)` for every chunk."""

        def all_chunks() -> Iterator[Steps]:
            if has_feedback:
                self.transport.check()  # nothing may have changed when it raises
            for chunk in range(num_chunks):
                yield steps(1 + chunk * _MESSAGES_OF_CHUNK, chunk)
            self.transport.check()

        job = Job(all_chunks(), result, self.route.node_size == 0)
        if async_op:
            return start(job, self.transport.channel, used)
        run(job)
        return None


def strips_of(tensor: Tensor, splits: Sequence[int]) -> list[list[Tensor]]:
    """The parts of a tensor, a list of one for each rank."""
    return [[part] for part in tensor.detach().view(-1).split(list(splits))]
