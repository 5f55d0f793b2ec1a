# SPDX-License-Identifier: Apache-2.0
"""What `fmkernels.quantized_collectives` leaves on the ranks, computed in one process; lists have an entry per rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .block_codec import UNIT, dequantize, quantize, reduce_wires, sum_wires


def all_reduce(
    tensors: Sequence[Tensor],
    *,
    op: str = "sum",
    bits: int | str = 8,
    block: int = 128,
    algorithm: str = "two_shot",
    node_size: int | None = None,
    inter_bits: int | str = 4,
    rounding: str = "nearest",
    seed: int | None = None,
    step: int = 0,
    offset: int = 0,
    hadamard: bool = False,
) -> Tensor:
    """`fmkernels.quantized_collectives.all_reduce`: the result, which is the same on every rank."""
    numel, dtype = tensors[0].numel(), tensors[0].dtype
    draws = {"rounding": rounding, "seed": seed, "step": step, "offset": offset}
    wires, bits = _wires(tensors, op, bits, block, node_size, inter_bits, hadamard, draws)
    options: dict[str, Any] = {"block": block, "hadamard": hadamard}
    if algorithm == "one_shot":
        return sum_wires(wires, numel, bits=bits, op=op, dtype=dtype, **options).view_as(tensors[0])
    wire = reduce_wires(wires, numel, bits=bits, op=op, **draws, **options)
    return dequantize(wire, numel, bits=bits, dtype=dtype, **options).view_as(tensors[0])


def reduce_scatter(
    inputs: Sequence[Tensor],
    splits: Sequence[int],
    *,
    op: str = "sum",
    bits: int | str = 8,
    block: int = 128,
    algorithm: str = "direct",
    node_size: int | None = None,
    inter_bits: int | str = 4,
    rounding: str = "nearest",
    seed: int | None = None,
    step: int = 0,
    offset: int = 0,
    hadamard: bool = False,
) -> list[Tensor]:
    """`fmkernels.quantized_collectives.reduce_scatter`: the output of each rank."""
    del algorithm
    outputs = []
    places = _places(splits, block, offset)
    for *parts, place in zip(*(x.flatten().split(list(splits)) for x in inputs), places, strict=True):
        draws = {"rounding": rounding, "seed": seed, "step": step, "offset": place}
        wires, last_bits = _wires(parts, op, bits, block, node_size, inter_bits, hadamard, draws)
        options: dict[str, Any] = {"bits": last_bits, "block": block, "hadamard": hadamard, "op": op}
        outputs.append(sum_wires(wires, parts[0].numel(), dtype=parts[0].dtype, **options))
    return outputs


def all_gather(inputs: Sequence[Tensor], **options: Any) -> Tensor:
    """`fmkernels.quantized_collectives.all_gather`: the output, which is the same on every rank."""
    return torch.cat([_decoded(x.flatten(), rank, **options) for rank, x in enumerate(inputs)])


def all_to_all(
    inputs: Sequence[Tensor], splits: Sequence[Sequence[int]], *, block: int = 128, offset: int = 0, **options: Any
) -> list[Tensor]:
    """`fmkernels.quantized_collectives.all_to_all`: the output of each rank; splits[i][j] go from rank i to rank j."""
    sent = []
    for rank, (x, counts) in enumerate(zip(inputs, splits, strict=True)):
        parts = zip(x.flatten().split(list(counts)), _places(counts, block, offset), strict=True)
        sent.append([_decoded(part, rank, block=block, offset=place, **options) for part, place in parts])
    return [torch.cat([parts[rank] for parts in sent]) for rank in range(len(inputs))]


def _places(splits: Sequence[int], block: int, offset: int) -> list[int]:
    """Where parts begin in what draws are counted in: each at whole blocks and whole units."""
    grain = max(block, UNIT)
    return [offset + sum(-(-n // grain) * grain for n in splits[:i]) for i in range(len(splits))]


def _of(draws: dict[str, Any], stage: int) -> dict[str, Any]:
    """Draws of a stage of a call: 0 the sum of all, 2^20 + n that of node n, 2^21 + r what rank r has."""
    return draws | {"step": draws["step"] + (stage << 40)}


def _decoded(
    x: Tensor,
    rank: int,
    *,
    bits: int | str = 8,
    block: int = 128,
    hadamard: bool = False,
    rounding: str = "nearest",
    seed: int | None = None,
    step: int = 0,
    offset: int = 0,
) -> Tensor:
    options: dict[str, Any] = {"bits": bits, "block": block, "hadamard": hadamard}
    draws = _of({"rounding": rounding, "seed": seed, "step": step, "offset": offset}, (2 << 20) + rank)
    return dequantize(quantize(x, **draws, **options), x.numel(), dtype=x.dtype, **options)


def _wires(
    tensors: Sequence[Tensor],
    op: str,
    bits: int | str,
    block: int,
    node_size: int | None,
    inter_bits: int | str,
    hadamard: bool,
    draws: dict[str, Any],
) -> tuple[Tensor, int | str]:
    """The wires that the owner of a sum adds, and their bits: of ranks, or of nodes."""
    if node_size == 1 and len(tensors) > 1:
        bits = inter_bits
    options: dict[str, Any] = {"bits": bits, "block": block, "hadamard": hadamard}
    wires = torch.stack([quantize(x, **options, **_of(draws, (2 << 20) + rank)) for rank, x in enumerate(tensors)])
    if node_size in (None, 1, len(tensors)):
        return wires, bits
    sums = [
        reduce_wires(w, tensors[0].numel(), out_bits=inter_bits, op=op, **options, **_of(draws, (1 << 20) + node))
        for node, w in enumerate(wires.split(node_size))
    ]
    return torch.stack(sums), inter_bits
