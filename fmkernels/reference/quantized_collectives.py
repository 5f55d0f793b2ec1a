# SPDX-License-Identifier: Apache-2.0
"""What `fmkernels.quantized_collectives` leaves on the ranks, computed in one process; lists have an entry per rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .block_codec import dequantize, quantize, reduce_wires, sum_wires


def all_reduce(
    tensors: Sequence[Tensor],
    *,
    op: str = "sum",
    bits: int = 8,
    block: int = 128,
    algorithm: str = "two_shot",
    node_size: int | None = None,
    inter_bits: int = 4,
    hadamard: bool = False,
) -> Tensor:
    """`fmkernels.quantized_collectives.all_reduce`: the result, which is the same on every rank."""
    numel, dtype = tensors[0].numel(), tensors[0].dtype
    wires, bits = _wires(tensors, op, bits, block, node_size, inter_bits, hadamard)
    options = {"block": block, "hadamard": hadamard}
    if algorithm == "one_shot":
        return sum_wires(wires, numel, bits=bits, op=op, dtype=dtype, **options).view_as(tensors[0])
    wire = reduce_wires(wires, numel, bits=bits, op=op, **options)
    return dequantize(wire, numel, bits=bits, dtype=dtype, **options).view_as(tensors[0])


def reduce_scatter(
    inputs: Sequence[Tensor],
    splits: Sequence[int],
    *,
    op: str = "sum",
    bits: int = 8,
    block: int = 128,
    algorithm: str = "direct",
    node_size: int | None = None,
    inter_bits: int = 4,
    hadamard: bool = False,
) -> list[Tensor]:
    """`fmkernels.quantized_collectives.reduce_scatter`: the output of each rank."""
    del algorithm
    outputs = []
    for parts in zip(*(x.flatten().split(list(splits)) for x in inputs), strict=True):
        wires, last_bits = _wires(parts, op, bits, block, node_size, inter_bits, hadamard)
        options = {"bits": last_bits, "block": block, "hadamard": hadamard, "op": op, "dtype": parts[0].dtype}
        outputs.append(sum_wires(wires, parts[0].numel(), **options))
    return outputs


def all_gather(inputs: Sequence[Tensor], *, bits: int = 8, block: int = 128, hadamard: bool = False) -> Tensor:
    """`fmkernels.quantized_collectives.all_gather`: the output, which is the same on every rank."""
    options = {"bits": bits, "block": block, "hadamard": hadamard}
    return torch.cat([_decoded(x.flatten(), **options) for x in inputs])


def all_to_all(
    inputs: Sequence[Tensor],
    splits: Sequence[Sequence[int]],
    *,
    bits: int = 8,
    block: int = 128,
    hadamard: bool = False,
) -> list[Tensor]:
    """`fmkernels.quantized_collectives.all_to_all`: the output of each rank; splits[i][j] go from rank i to rank j."""
    options = {"bits": bits, "block": block, "hadamard": hadamard}
    parts = [x.flatten().split(list(counts)) for x, counts in zip(inputs, splits, strict=True)]
    return [torch.cat([_decoded(part[rank], **options) for part in parts]) for rank in range(len(inputs))]


def _decoded(x: Tensor, **options: object) -> Tensor:
    return dequantize(quantize(x, **options), x.numel(), dtype=x.dtype, **options)


def _wires(
    tensors: Sequence[Tensor], op: str, bits: int, block: int, node_size: int | None, inter_bits: int, hadamard: bool
) -> tuple[Tensor, int]:
    """The wires that the owner of a sum adds, and their bits: of ranks, or of nodes."""
    wires = torch.stack([quantize(x, bits=bits, block=block, hadamard=hadamard) for x in tensors])
    if node_size in (None, len(tensors)):
        return wires, bits
    if node_size == 1:
        return _wires(tensors, op, inter_bits, block, None, inter_bits, hadamard)
    options = {"bits": bits, "out_bits": inter_bits, "block": block, "hadamard": hadamard, "op": op}
    return torch.stack([reduce_wires(w, tensors[0].numel(), **options) for w in wires.split(node_size)]), inter_bits
