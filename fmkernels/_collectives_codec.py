# SPDX-License-Identifier: Apache-2.0
"""Strips of tensors as one message: each tensor has a wire of its own in it, one behind another.

A strip is what one rank has for another at a time. All tensors are flat and dense. Chunks cut strips at blocks of their
tensors, so that the blocks of a tensor are counted from its own first element wherever it lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import block_codec

Strip = Sequence[Tensor]


def padded_numel(strip: Strip, block: int) -> int:
    """Elements of whole blocks."""
    return sum(-(-tensor.numel() // block) * block for tensor in strip)


def cut(strip: Strip, block: int, first: int, last: int) -> list[Tensor]:
    """What lies in [first, last), multiples of a block, where every tensor takes whole blocks."""
    parts, begin = [], 0
    for tensor in strip:
        a, b = max(first - begin, 0), min(last - begin, tensor.numel())
        if a < b:
            parts.append(tensor[a:b])
        begin += -(-tensor.numel() // block) * block
    return parts


@dataclass(frozen=True)
class Codec:
    """One way to write elements as bytes."""

    bits: int
    block: int
    hadamard: bool
    device: torch.device

    def message_bytes(self, strip: Strip) -> int:
        return sum(self._wire_bytes(tensor) for tensor in strip)

    def _wire_bytes(self, tensor: Tensor) -> int:
        return block_codec.wire_bytes(tensor.numel(), bits=self.bits, block=self.block)

    def _wires(self, message: Tensor, strip: Strip) -> Iterator[tuple[Tensor, Tensor]]:
        """Every tensor with its part of a message, or of the rows of messages."""
        sizes = [self._wire_bytes(tensor) for tensor in strip]
        return zip(strip, message.split(sizes, -1), strict=True)

    def empty(self, strip: Strip) -> Tensor:
        return torch.empty(self.message_bytes(strip), dtype=torch.uint8, device=self.device)

    def encode(self, strip: Strip, residuals: Strip | None = None, decay: float = 0.0) -> Tensor:
        """The message of a strip, or of strip + residuals, of which the residuals then keep what the message lacks.

        With a decay they keep a moving average of that. A block that is not finite leaves its residual as it is.
        """
        message = self.empty(strip)
        for i, (tensor, wire) in enumerate(self._wires(message, strip)):
            self._encode(tensor, wire, None if residuals is None else residuals[i], decay)
        return message

    def _encode(self, x: Tensor, wire: Tensor, residual: Tensor | None, decay: float) -> None:
        before = residual.clone() if residual is not None and decay else None
        block_codec.quantize(x, bits=self.bits, block=self.block, hadamard=self.hadamard, residual=residual, out=wire)
        if residual is not None and before is not None:
            residual.lerp_(before, decay)

    def decode(self, message: Tensor, strip: Strip) -> None:
        """Writes to the strip."""
        for out, wire in self._wires(message, strip):
            block_codec.dequantize(
                wire, out.numel(), bits=self.bits, block=self.block, hadamard=self.hadamard, dtype=out.dtype, out=out
            )

    def sum(self, messages: Tensor, strip: Strip, op: str) -> None:
        """Writes the sum of [ranks, bytes] to the strip, in the order of ranks and in float32; "avg" divides it."""
        for out, wires in self._wires(messages, strip):
            self._sum(wires, out, op)

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

    def reduce(self, messages: Tensor, strip: Strip, op: str, to: Codec) -> Tensor:
        """The message of the sum of [ranks, bytes], in one pass; of the strip only the lengths matter."""
        result = to.empty(strip)
        for (tensor, wires), (_, out) in zip(self._wires(messages, strip), to._wires(result, strip), strict=True):
            block_codec.reduce_wires(
                wires,
                tensor.numel(),
                bits=self.bits,
                out_bits=to.bits,
                block=self.block,
                hadamard=self.hadamard,
                op=op,
                out=out,
            )
        return result

    def reduce_with(
        self, messages: Tensor, strip: Strip, residuals: Strip, decay: float, op: str, weight: int, to: Codec
    ) -> Tensor:
        """The same of the sum and of what this rank still owes, which is then what the result lacks.

        A residual is of the sum over `weight` ranks, where the message has their average.
        """
        result = to.empty(strip)
        parts = zip(self._wires(messages, strip), to._wires(result, strip), residuals, strict=True)
        for (tensor, wires), (_, out), residual in parts:
            total = torch.empty(tensor.numel(), dtype=torch.float32, device=self.device)
            self._sum(wires, total, op)
            if op == "sum":
                to._encode(total, out, residual, decay)
                continue
            scaled = residual / weight
            before = scaled.clone()
            to._encode(total, out, scaled, decay)
            # What stays as it was stays to the bit; there and back it would be rounded.
            residual.copy_(torch.where(scaled == before, residual, scaled * weight))
        return result
