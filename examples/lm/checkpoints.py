# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run. Whole tensors under plain names: one process, DDP and FSDP read each other's.

What gradients sent as codes still lack is of each process and stands there for each: with it a run goes on as it began.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from .gradients import Compression


def save(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    step: int,
    settings: dict[str, Any],
    rank: int,
    compression: Compression | None = None,
) -> None:
    """Called by all ranks, written by the first. What is at `path` is the old checkpoint or the whole one after it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    errors = None if compression is None else compression.gather()
    if rank != 0:
        return
    saved = {"model": model_state, "optimizer": optimizer_state, "step": step, "settings": settings, "errors": errors}
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(saved, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    settings: dict[str, Any],
    compression: Compression | None = None,
) -> int:
    """Puts the checkpoint into model, optimizer and compression; the number of steps it has made.

    Raises ValueError where its run had other settings: going on would belong to neither.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in settings.items():
        if saved["settings"].get(name) != value:
            before = saved["settings"].get(name)
            raise ValueError(f"{path} is of a run with {name} {before}, this one has {value}")
    if compression is not None:
        compression.scatter(saved["errors"], path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    return saved["step"]
