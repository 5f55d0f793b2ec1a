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

from ._collectives_codec import OF_RESULT, Codec, Strip, of_node, of_rank
from ._collectives_transport import Transport

Steps = Generator[None, None, None]


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
        self,
        messages: Tensor,
        strip: Strip,
        weight: int,
        codec: Codec,
        to: Codec,
        stage: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """The message of the sum of `weight` ranks. What it lacks is this rank's to keep: nobody else knows the sum."""
        return codec.reduce(messages, strip, self.op, to, stage, weight, self.decay, out)

    def encode(self, strip: Strip, out: Tensor | None = None) -> Tensor:
        """The message of what this rank has."""
        return self.codec.encode(strip, of_rank(self.rank), self.decay, out)

    # ---- messages 0, 1 of a chunk: to the owner ----

    def reduce_to_owner(self, message: int, pieces: Sequence[Strip]) -> Generator[None, None, tuple[Tensor, Codec]]:
        """[ranks, bytes] of the messages whose sum is this rank's piece, and what they are written in."""
        if not self.node_size:
            sizes = [self.codec.message_bytes(pieces[self.rank])] * self.world_size
            received, own = self.transport.room(sizes, self.codec.device)
            wires = [self.encode(strip, own if owner == self.rank else None) for owner, strip in enumerate(pieces)]
            pending = self.transport.exchange(message, wires, sizes, received)
            yield
            pending.wait()
            return pending.received.view(self.world_size, -1), self.codec
        wires = [self.encode(strip) for strip in pieces]
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
            sends[owner] = self.requantise(
                part, pieces[owner], self.node_size, self.codec, self.inter_codec, of_node(node)
            )
        size = self.inter_codec.message_bytes(pieces[self.rank])
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
        self, message: int, wire: Tensor, sizes: Sequence[int], received: Tensor
    ) -> Generator[None, None, Sequence[Tensor]]:
        """The messages of all pieces, of `sizes` bytes, in the order of their owners; `wire` is of `received`."""
        if not self.node_size:
            pending = self.transport.gather(message + 2, wire, sizes, received)
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


def two_shot(route: Route, message: int, pieces: Sequence[Strip]) -> Steps:
    """all_reduce of one piece of each shard, in place; also the hierarchical one."""
    messages, codec = yield from route.reduce_to_owner(message, pieces)
    to, rank = route.result_codec, route.rank
    sizes = [to.message_bytes(strip) for strip in pieces]
    received, own = route.transport.room(sizes, to.device)
    mine = route.requantise(messages, pieces[rank], route.world_size, codec, to, OF_RESULT, own)
    results = yield from route.gather_from_owners(message, mine, sizes, received)
    for result, out in zip(results, pieces, strict=True):
        to.decode(result, out)


def one_shot(route: Route, message: int, piece: Strip) -> Steps:
    """all_reduce of a piece, in place, that every rank sums by itself: one rounding, and as many bytes as ranks."""
    sizes = [route.codec.message_bytes(piece)] * route.world_size
    received, own = route.transport.room(sizes, route.codec.device)
    pending = route.transport.gather(message, route.encode(piece, own), sizes, received)
    yield
    pending.wait()
    route.codec.sum(pending.received.view(route.world_size, -1), piece, route.op)


def scatter(route: Route, message: int, pieces: Sequence[Strip], out: Strip) -> Steps:
    """reduce_scatter of one piece of each shard."""
    messages, codec = yield from route.reduce_to_owner(message, pieces)
    codec.sum(messages, out, route.op)


def gather(route: Route, message: int, piece: Strip, outs: Sequence[Strip]) -> Steps:
    """all_gather of a piece of what every rank has."""
    sizes = [route.codec.message_bytes(out) for out in outs]
    received, own = route.transport.room(sizes, route.codec.device)
    pending = route.transport.gather(message, route.encode(piece, own), sizes, received)
    yield
    for part, out in zip(pending.wait(), outs, strict=True):
        route.codec.decode(part, out)


def exchange(route: Route, message: int, pieces: Sequence[Strip], outs: Sequence[Strip]) -> Steps:
    """all_to_all of a piece of each part."""
    messages = [route.encode(strip) for strip in pieces]
    pending = route.transport.exchange(message, messages, [route.codec.message_bytes(out) for out in outs])
    yield
    for part, out in zip(pending.wait(), outs, strict=True):
        route.codec.decode(part, out)
