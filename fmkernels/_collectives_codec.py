# SPDX-License-Identifier: Apache-2.0
"""Strips of tensors as one message: each tensor has a wire of its own in it, one behind another.

A strip is what one rank has for another at a time. All tensors are flat and dense. Chunks cut strips at blocks of their
tensors, so that the blocks of a tensor are counted from its own first element wherever it lies.

What is drawn for an element is a function of the seed, the step, its place and the stage of the call: a number for
each rank that rounds what it has, one for each node that rounds a sum, and one for the sum of all, whoever owns it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import block_codec
from ._block_codec_checks import UNIT


class Part(NamedTuple):
    """A tensor of a strip."""

    tensor: Tensor
    residual: Tensor | None = None  # float32, as long: what earlier messages lack
    place: int = 0  # of its first element in the whole, for what is drawn: a multiple of the grain


Strip = Sequence[Part]

# Stages of a call, as a codec's step counts them above STEP_BITS.
STEP_BITS = 40
OF_RESULT = 0


def of_node(node: int) -> int:
    return (1 << 20) + node


def of_rank(rank: int) -> int:
    return (2 << 20) + rank


def grain(block: int) -> int:
    """Elements at whose multiples tensors may be cut: whole blocks and whole units of the codec."""
    return max(block, UNIT)


def padded_numel(strip: Strip, block: int) -> int:
    """Elements of whole grains."""
    return sum(round_up(part.tensor.numel(), grain(block)) for part in strip)


def round_up(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


def cut(strip: Strip, block: int, first: int, last: int) -> list[Part]:
    """What lies in [first, last), multiples of the grain, where every tensor takes whole grains."""
    parts, begin = [], 0
    for tensor, residual, place in strip:
        a, b = max(first - begin, 0), min(last - begin, tensor.numel())
        if a < b:
            parts.append(Part(tensor[a:b], None if residual is None else residual[a:b], place + a))
        begin += round_up(tensor.numel(), grain(block))
    return parts


@dataclass(frozen=True)
class Codec:
    """One way to write elements as bytes."""

    bits: int | str
    block: int
    hadamard: bool
    device: torch.device
    seed: int | None = None  # None: to the nearest
    step: int = 0

    def message_bytes(self, strip: Strip) -> int:
        return sum(self._wire_bytes(part.tensor) for part in strip)

    def _wire_bytes(self, tensor: Tensor) -> int:
        return block_codec.wire_bytes(tensor.numel(), bits=self.bits, block=self.block)

    def _wires(self, message: Tensor, strip: Strip) -> Iterator[tuple[Part, Tensor]]:
        """Every part with that of a message, or of the rows of messages."""
        sizes = [self._wire_bytes(part.tensor) for part in strip]
        return zip(strip, message.split(sizes, -1), strict=True)

    def _rounding(self, stage: int, place: int) -> dict[str, Any]:
        if self.seed is None:
            return {}
        step = self.step + (stage << STEP_BITS)
        return {"rounding": "stochastic", "seed": self.seed, "step": step, "offset": place}

    def empty(self, strip: Strip) -> Tensor:
        return torch.empty(self.message_bytes(strip), dtype=torch.uint8, device=self.device)

    def encode(self, strip: Strip, stage: int, decay: float = 0.0, out: Tensor | None = None) -> Tensor:
        """The message of a strip, or of it and its residuals, which then keep what the message lacks.

        With a decay they keep a moving average of that. A block that is not finite leaves its residual as it is.
        """
        message = self.empty(strip) if out is None else out
        for part, wire in self._wires(message, strip):
            self._encode(part, wire, stage, decay)
        return message

    def _encode(self, part: Part, wire: Tensor, stage: int, decay: float) -> None:
        residual = part.residual
        before = residual.clone() if residual is not None and decay else None
        block_codec.quantize(
            part.tensor,
            bits=self.bits,
            block=self.block,
            hadamard=self.hadamard,
            residual=residual,
            out=wire,
            **self._rounding(stage, part.place),
        )
        if residual is not None and before is not None:
            residual.lerp_(before, decay)

    def decode(self, message: Tensor, strip: Strip) -> None:
        """Writes to the strip."""
        for (out, *_), wire in self._wires(message, strip):
            block_codec.dequantize(
                wire, out.numel(), bits=self.bits, block=self.block, hadamard=self.hadamard, dtype=out.dtype, out=out
            )

    def sum(self, messages: Tensor, strip: Strip, op: str) -> None:
        """Writes the sum of [ranks, bytes] to the strip, in the order of ranks and in float32; "avg" divides it."""
        for part, wires in self._wires(messages, strip):
            self._sum(wires, part.tensor, op)

    def _sum(self, wires: Tensor, out: Tensor, op: str) -> None:
        block_codec.sum_wires(
            wires,
            out.numel(),
            bits=self.bits,
            block=self.block,
            hadamard=self.hadamard,
            op=op,
            dtype=out.dtype,
            out=out,
        )

    def reduce(
        self,
        messages: Tensor,
        strip: Strip,
        op: str,
        to: Codec,
        stage: int,
        weight: int,
        decay: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """The message of the sum of [ranks, bytes]; of the strip the lengths, places and residuals matter.

        In one pass where there is no residual. A residual is what this rank still owes to the sum over `weight` ranks,
        of which the messages may have the average; it is then what the result lacks.
        """
        result = to.empty(strip) if out is None else out
        for (part, wires), (_, wire) in zip(self._wires(messages, strip), to._wires(result, strip), strict=True):
            if part.residual is not None:
                total = torch.empty(part.tensor.numel(), dtype=torch.float32, device=self.device)
                self._sum(wires, total, op)
                to._encode_owing(
                    Part(total, part.residual, part.place), wire, stage, weight if op == "avg" else 1, decay
                )
                continue
            block_codec.reduce_wires(
                wires,
                part.tensor.numel(),
                bits=self.bits,
                out_bits=to.bits,
                block=self.block,
                hadamard=self.hadamard,
                op=op,
                out=wire,
                **to._rounding(stage, part.place),
            )
        return result

    def _encode_owing(self, part: Part, wire: Tensor, stage: int, weight: int, decay: float) -> None:
        """Of a tensor whose residual is `weight` times as large."""
        if weight == 1:
            return self._encode(part, wire, stage, decay)
        residual = part.residual
        scaled = residual / weight
        before = scaled.clone()
        self._encode(part._replace(residual=scaled), wire, stage, decay)
        # What stays as it was stays to the bit; there and back it would be rounded.
        residual.copy_(torch.where(scaled == before, residual, scaled * weight))
