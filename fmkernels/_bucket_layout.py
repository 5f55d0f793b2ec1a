# SPDX-License-Identifier: Apache-2.0
"""Where the gradients of a bucket go in what is reduced: by the parameter that each belongs to, not by the bucket."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class BucketLayout:
    """The parameters of a bucket, cut into a piece for each rank, ordered by ranks.

    A parameter begins a block and fills its last one with zeros, or (`repeats`) with elements of its own once more, so
    that a mean over the block is about that of the parameter. Its pieces are as long as whole blocks allow; which
    rank has the longer ones and the first one depends on its name, so that small parameters do not all go to one rank.

        buffer    | a0 a1 a2 | b0 b1 b2 |            pieces of a belong to ranks 0 1 2, of b to 1 2 0
        staged    | a0 b2 | a1 b0 | a2 b1 |          bounds: where ranks begin
    """

    def __init__(self, names: Sequence[str], numels: Sequence[int], world_size: int, block: int, repeats: bool) -> None:
        self.names, self._numels = tuple(names), tuple(numels)
        self._repeats = repeats
        self.is_aligned = all(numel % block == 0 for numel in (numels if repeats else numels[:-1]))
        """Whether the buffer itself has every parameter at the beginning of a block."""
        num_blocks = [-(-numel // block) for numel in numels]
        first = [zlib.crc32(name.encode()) % world_size for name in names]  # the owner of piece 0
        self.bounds = [0]
        self._pieces: list[tuple[int, int, int]] = []  # (parameter, from, to) in the order of staged, with padding
        places: dict[tuple[int, int], int] = {}  # where they are in it
        end = 0
        for rank in range(world_size):
            for index, count in enumerate(num_blocks):
                k = (rank - first[index]) % world_size
                begin, stop = (count * i // world_size * block for i in (k, k + 1))
                if begin < stop:
                    places[index, k] = len(self._pieces)
                    self._pieces.append((index, begin, stop))
                    end += stop - begin
            self.bounds.append(end)
        self.staged_numel = end
        self._order = [places[key] for key in sorted(places)]  # of the buffer
        self._sizes = [stop - begin for _, begin, stop in self._pieces]

    def _valid(self, piece: int) -> int:
        """Elements of a piece that are not padding."""
        index, begin, stop = self._pieces[piece]
        return min(stop, self._numels[index]) - begin

    def stage(self, buffer: Tensor, staged: Tensor) -> None:
        """Copies a bucket into place."""
        self._stage(buffer.split(list(self._numels)), staged, self._repeats)

    def _stage(self, gradients: Sequence[Tensor], staged: Tensor, repeats: bool) -> None:
        parts = []
        for piece, (index, begin, stop) in enumerate(self._pieces):
            gradient = gradients[index]
            parts.append(gradient[begin:stop])
            missing = stop - begin - self._valid(piece)
            if missing and repeats:
                parts.append(gradient.repeat(-(-missing // gradient.numel()))[:missing])
            elif missing:
                parts.append(gradient.new_zeros(missing))
        if parts:
            torch.cat(parts, out=staged)

    def clear_padding(self, staged: Tensor) -> None:
        end = 0
        for piece, size in enumerate(self._sizes):
            if self._valid(piece) < size:
                staged[end + self._valid(piece) : end + size].zero_()
            end += size

    def unstage(self, staged: Tensor, buffer: Tensor) -> None:
        """Copies the result back."""
        parts = self._parts(staged)
        if parts:
            torch.cat(parts, out=buffer)

    def _parts(self, staged: Tensor) -> list[Tensor]:
        """The pieces in the order of the buffer, without padding."""
        pieces = staged.split(self._sizes)
        return [pieces[i][: self._valid(i)] for i in self._order]

    def split(self, staged: Tensor) -> dict[str, Tensor]:
        """Of every parameter, flat; copies."""
        flat = staged.new_empty(sum(self._numels))
        self.unstage(staged, flat)
        return {name: part.clone() for name, part in zip(self.names, flat.split(list(self._numels)), strict=True)}

    def join(self, tensors: Mapping[str, Tensor], staged: Tensor) -> None:
        """The reverse of `split`; what is missing is zero."""
        gradients = [
            tensors[name].to(staged) if name in tensors else staged.new_zeros(numel)
            for name, numel in zip(self.names, self._numels, strict=True)
        ]
        self._stage(gradients, staged, False)
