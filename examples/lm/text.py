# SPDX-License-Identifier: Apache-2.0
"""The text that a model learns, byte by byte: Python sources, those of the standard library if no others."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 20  # every 20th file, whole, is for validation
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests"}  # not on every machine, or not the same
END_OF_FILE = b"\0"


@dataclass(frozen=True)
class Text:
    train: Tensor  # [bytes], uint8
    validation: Tensor
    digest: str  # of both


def load(folder: Path | None = None) -> Text:
    """The .py files under `folder`, the standard library when None, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    paths = [path for path in paths if not LEFT_OUT & set(path.parts)]
    if len(paths) < HELD_OUT:
        raise ValueError(f"the text must have at least {HELD_OUT} .py files, {folder} has {len(paths)}")
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(paths, 1):
        parts[number % HELD_OUT == 0].append((folder / path).read_bytes() + END_OF_FILE)
    train, validation = (bytearray(b"".join(part)) for part in parts)
    digest = hashlib.sha256(train + validation).hexdigest()
    return Text(torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(validation, dtype=torch.uint8), digest)


def entropy(text: Text) -> float:
    """Of a byte, in nats: the loss of a model that knows how often each occurs, and nothing else."""
    share = torch.bincount(text.train.int(), minlength=256).double() / len(text.train)
    return torch.special.entr(share).sum().item()


def training_windows(text: Text, seq: int, batch_size: int, seed: int, step: int) -> Tensor:
    """[batch_size, seq + 1] bytes, which follow from seed and step: the step is the position in the data."""
    # The generator looks at 32 bits. Seeds lie a prime apart, above any number of steps.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)
    return _windows(text.train, torch.randint(len(text.train) - seq, (batch_size,), generator=generator), seq)


def validation_windows(text: Text, seq: int, count: int) -> Tensor:
    """[count, seq + 1] bytes, evenly spread over what is held out."""
    return _windows(text.validation, torch.linspace(0, len(text.validation) - seq - 1, count).long(), seq)


def _windows(source: Tensor, starts: Tensor, seq: int) -> Tensor:
    return source[starts[:, None] + torch.arange(seq + 1)].long()
