# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a call tell each other before any payload: a call that differs is a sentence on every rank.

A payload of another length than the receiver's buffer would break the connection, or be taken for what it is not. The
header of a call is as long whatever the call is, so that it always arrives. It travels while the first chunk is
encoded; nothing is received before all headers agree, and after a disagreement the group is as good as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from ._block_codec_checks import CODES
from ._collectives_transport import Pending, Transport

FUNCTIONS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")
ALGORITHMS = ("direct", "one_shot", "two_shot", "hierarchical")
OPS = ("sum", "avg")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = tuple(CODES)
ROUNDINGS = ("nearest", "stochastic")
_MEANINGS = {
    "function": FUNCTIONS,
    "dtype": DTYPES,
    "op": OPS,
    "bits": BITS,
    "algorithm": ALGORITHMS,
    "inter_bits": BITS,
    "hadamard": (False, True),
    "error_feedback": (False, True),
    "rounding": ROUNDINGS,
}


@dataclass(frozen=True)
class Header:
    """What has to be the same on every rank, in the order in which it is compared."""

    function: str
    dtype: torch.dtype
    numel: int  # where every rank has as much
    op: str
    bits: int | str
    block: int
    algorithm: str
    inter_bits: int | str
    node_size: int
    hadamard: bool
    error_feedback: bool  # whether there is
    chunk_numel: int
    rounding: str
    seed: int  # 0, as step and offset, where nothing is drawn
    step: int
    offset: int

    def words(self) -> list[int]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [_MEANINGS[name].index(value) if name in _MEANINGS else value for name, value in values.items()]

    @staticmethod
    def text(index: int, word: int) -> str:
        name = fields(Header)[index].name
        return str(_MEANINGS[name][word] if name in _MEANINGS else word)


_NUM_WORDS = len(fields(Header))


def send_header(
    transport: Transport, header: Header, sends: Sequence[int], expects: Sequence[int], device: torch.device
) -> None:
    """Sends it to all; what they sent is looked at before the first message after it.

    `sends[j]` and `expects[j]`: elements to and from rank j, where those are the caller's to say.
    """
    words = [*header.words(), *sends, *expects]
    wire = torch.tensor(words, dtype=torch.int64, device=device).view(torch.uint8)
    pending = transport.gather(0, wire, [wire.numel()] * transport.world_size)
    transport.header = lambda: check_headers(transport.name, pending, transport.world_size)


def check_headers(name: str, pending: Pending, world_size: int) -> None:
    """Raises the same sentence on every rank when two of them do not mean the same call."""
    rows = torch.stack([part.view(torch.int64) for part in pending.wait()]).cpu()
    words, sends, expects = rows.split([_NUM_WORDS, world_size, world_size], 1)
    for index, rank in (words != words[0]).t().nonzero().tolist()[:1]:
        first, other = (Header.text(index, word) for word in words[[0, rank], index].tolist())
        raise ValueError(
            f"{name}: {fields(Header)[index].name} must be the same on every rank, rank 0 has {first} and rank {rank} "
            f"{other}."
        )
    for i, j in (sends != expects.t()).nonzero().tolist()[:1]:
        raise ValueError(
            f"{name}: splits must agree between ranks, rank {i} sends {sends[i, j]} elements to rank {j}, "
            f"which expects {expects[j, i]}."
        )


def header_bytes(world_size: int) -> int:
    """Of one header; every rank sends it to every other."""
    return 8 * (_NUM_WORDS + 2 * world_size)
