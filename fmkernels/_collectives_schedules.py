# SPDX-License-Identifier: Apache-2.0
"""The steps of a quantised collective for one chunk, as generators that yield while their messages are under way.

A shard belongs to one rank, which sums what all ranks have of it. A chunk is a piece of every shard, cut at blocks: a
block's bits depend on that block of every rank and on nothing around it, and its owner does not depend on the chunks.
What a rank decodes is always the wire, its own shard too: that makes ranks bit-identical.

    all_reduce      reduce_to_owner -> requantise -> gather_from_owners -> decode
    reduce_scatter  reduce_to_owner -> decode and sum
    one_shot        every rank sends all it has to every rank, decode and sum

Hierarchical, rank = node * node_size + local: wires go to the rank of the same `local` inside the node, are summed
there and requantised with `inter_bits`, then to the owner; the result goes back the way they came, in `inter_bits`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import block_codec
from ._collectives_transport import Transport

Steps = Generator[None, None, None]


@dataclass(frozen=True)
class Codec:
    """One way to write elements as bytes."""

    bits: int
    block: int
    hadamard: bool

    def wire_bytes(self, numel: int) -> int:
        return block_codec.wire_bytes(numel, bits=self.bits, block=self.block) if numel else 0

    def encode(self, x: Tensor, residual: Tensor | None = None, decay: float = 0.0) -> Tensor:
        """The wire of x, or of x + residual, of which the residual then keeps what the wire lacks.

        With a decay it keeps a moving average of that. A block whose sum is not finite leaves its residual as it is.
        """
        if x.numel() == 0:
            return x.new_empty(0, dtype=torch.uint8)
        before = residual.clone() if residual is not None and decay else None
        wire = block_codec.quantize(x, bits=self.bits, block=self.block, hadamard=self.hadamard, residual=residual)
        if before is not None:
            residual.lerp_(before, decay)
        return wire

    def decode(self, wire: Tensor, out: Tensor) -> None:
        if out.numel():
            block_codec.dequantize(
                wire, out.numel(), bits=self.bits, block=self.block, hadamard=self.hadamard, dtype=out.dtype, out=out
            )

    def sum(self, wires: Tensor, out: Tensor, op: str) -> Tensor:
        """Of [ranks, bytes], in the order of ranks and in float32; divided by their number where op is "avg"."""
        if out.numel():
            block_codec.sum_wires(
                wires, out.numel(), bits=self.bits, block=self.block, hadamard=self.hadamard, op=op, out=out
            )
        return out

    def reduce(self, wires: Tensor, numel: int, op: str, to: Codec) -> Tensor:
        """The wire of the sum, in one pass."""
        if numel == 0:
            return wires.new_empty(0)
        return block_codec.reduce_wires(
            wires, numel, bits=self.bits, block=self.block, hadamard=self.hadamard, op=op, out_bits=to.bits
        )


@dataclass(frozen=True)
class Route:
    """What all chunks of a call share."""

    transport: Transport
    codec: Codec
    inter_codec: Codec  # between nodes
    node_size: int  # 0: all ranks are alike
    op: str  # "avg" divides by the ranks of each hop
    decay: float  # of the residual

    @property
    def rank(self) -> int:
        return self.transport.rank

    @property
    def world_size(self) -> int:
        return self.transport.world_size

    @property
    def result_codec(self) -> Codec:
        return self.inter_codec if self.node_size else self.codec

    def requantise(
        self, wires: Tensor, numel: int, weight: int, codec: Codec, to: Codec, residual: Tensor | None
    ) -> Tensor:
        """The wire of the sum. What it lacks goes to the residual of this rank: nobody else knows the sum.

        `weight` ranks are in it, of whose sum the residual speaks.
        """
        if residual is None:
            return codec.reduce(wires, numel, self.op, to)
        total = codec.sum(wires, wires.new_empty(numel, dtype=torch.float32), self.op)
        lack = torch.zeros_like(total)
        wire = to.encode(total, lack)
        residual.add_(lack, alpha=(1.0 - self.decay) * (weight if self.op == "avg" else 1))
        return wire

    def encode_all(self, pieces: Sequence[Tensor], residuals: Sequence[Tensor] | None) -> list[Tensor]:
        lacks = [None] * len(pieces) if residuals is None else residuals
        return [self.codec.encode(x, lack, self.decay) for x, lack in zip(pieces, lacks, strict=True)]

    # ---- messages 0, 1 of a chunk: to the owner ----

    def reduce_to_owner(
        self, message: int, pieces: Sequence[Tensor], residuals: Sequence[Tensor] | None
    ) -> Generator[None, None, tuple[Tensor, Codec]]:
        """[ranks, bytes] of the wires whose sum is this rank's piece, and what they are written in."""
        wires = self.encode_all(pieces, residuals)
        if not self.node_size:
            pending = self.transport.exchange(message, wires, [wires[self.rank].numel()] * self.world_size)
            yield
            pending.wait()
            return pending.received.view(self.world_size, -1), self.codec
        node, local = divmod(self.rank, self.node_size)
        peers = range(node * self.node_size, (node + 1) * self.node_size)
        nothing = wires[0].new_empty(0)
        sends, sizes = [nothing] * self.world_size, [0] * self.world_size
        mine = self.of_local(local)
        for peer in peers:
            sends[peer] = torch.cat([wires[owner] for owner in self.of_local(peer - peers.start)])
            sizes[peer] = sum(wires[owner].numel() for owner in mine)
        pending = self.transport.exchange(message, sends, sizes)
        yield
        pending.wait()
        parts = pending.received.view(self.node_size, -1).split([wires[owner].numel() for owner in mine], 1)
        sends = [nothing] * self.world_size
        for owner, part in zip(mine, parts, strict=True):
            lack = None if residuals is None else residuals[owner]
            numel = pieces[owner].numel()
            sends[owner] = self.requantise(part.contiguous(), numel, self.node_size, self.codec, self.inter_codec, lack)
        size = self.inter_codec.wire_bytes(pieces[self.rank].numel())
        pending = self.transport.exchange(
            message + 1, sends, [size if j in mine else 0 for j in range(self.world_size)]
        )
        yield
        pending.wait()
        return pending.received.view(len(mine), -1), self.inter_codec

    def of_local(self, local: int) -> range:
        """The ranks with this place in their nodes."""
        return range(local, self.world_size, self.node_size)

    # ---- messages 2, 3: back to everyone ----

    def gather_from_owners(
        self, message: int, wire: Tensor, sizes: Sequence[int]
    ) -> Generator[None, None, Sequence[Tensor]]:
        """The wires of all pieces, of `sizes` bytes, in the order of their owners."""
        if not self.node_size:
            pending = self.transport.gather(message + 2, wire, sizes)
            yield
            return pending.wait()
        nothing = wire.new_empty(0)
        node, local = divmod(self.rank, self.node_size)
        mine = self.of_local(local)
        pending = self.transport.exchange(
            message + 2,
            [wire if j in mine else nothing for j in range(self.world_size)],
            [sizes[j] if j in mine else 0 for j in range(self.world_size)],
        )
        yield
        pending.wait()
        peers = range(node * self.node_size, (node + 1) * self.node_size)
        parts = {peer: [sizes[owner] for owner in self.of_local(peer - peers.start)] for peer in peers}
        pending = self.transport.exchange(
            message + 3,
            [pending.received if j in peers else nothing for j in range(self.world_size)],
            [sum(parts[j]) if j in peers else 0 for j in range(self.world_size)],
        )
        yield
        received = pending.wait()
        wires: list[Tensor] = [nothing] * self.world_size
        for peer in peers:
            for owner, part in zip(self.of_local(peer - peers.start), received[peer].split(parts[peer]), strict=True):
                wires[owner] = part
        return wires


def two_shot(
    route: Route, message: int, pieces: Sequence[Tensor], outs: Sequence[Tensor], residuals: Sequence[Tensor] | None
) -> Steps:
    """all_reduce of one piece of each shard; also the hierarchical one."""
    wires, codec = yield from route.reduce_to_owner(message, pieces, residuals)
    to = route.result_codec
    numel = pieces[route.rank].numel()
    wire = route.requantise(
        wires, numel, route.world_size, codec, to, None if residuals is None else residuals[route.rank]
    )
    results = yield from route.gather_from_owners(message, wire, [to.wire_bytes(x.numel()) for x in pieces])
    for result, out in zip(results, outs, strict=True):
        to.decode(result, out)


def one_shot(route: Route, message: int, piece: Tensor, out: Tensor, residual: Tensor | None) -> Steps:
    """all_reduce of a piece that every rank sums by itself: one rounding, and as many bytes as ranks."""
    wire = route.codec.encode(piece, residual, route.decay)
    pending = route.transport.gather(message, wire, [wire.numel()] * route.world_size)
    yield
    pending.wait()
    route.codec.sum(pending.received.view(route.world_size, -1), out, route.op)


def scatter(
    route: Route, message: int, pieces: Sequence[Tensor], out: Tensor, residuals: Sequence[Tensor] | None
) -> Steps:
    """reduce_scatter of one piece of each shard."""
    wires, codec = yield from route.reduce_to_owner(message, pieces, residuals)
    codec.sum(wires, out, route.op)


def gather(route: Route, message: int, piece: Tensor, outs: Sequence[Tensor], residual: Tensor | None) -> Steps:
    """all_gather of a piece of what every rank has."""
    wire = route.codec.encode(piece, residual, route.decay)
    pending = route.transport.gather(message, wire, [route.codec.wire_bytes(out.numel()) for out in outs])
    yield
    for part, out in zip(pending.wait(), outs, strict=True):
        route.codec.decode(part, out)


def exchange(
    route: Route, message: int, pieces: Sequence[Tensor], outs: Sequence[Tensor], residuals: Sequence[Tensor] | None
) -> Steps:
    """all_to_all of a piece of each part."""
    wires = route.encode_all(pieces, residuals)
    pending = route.transport.exchange(message, wires, [route.codec.wire_bytes(out.numel()) for out in outs])
    yield
    for part, out in zip(pending.wait(), outs, strict=True):
        route.codec.decode(part, out)
