# SPDX-License-Identifier: Apache-2.0
"""What `make counters OP=block_sparse` counts: products of a half-full matrix, by size of block, layout and values."""

from __future__ import annotations

import torch
from counters import Case

from fmkernels._library import ops

ROWS, INNER, COLUMNS = 512, 512, 256
DENSITY = 0.5


def dsd(values: torch.Tensor, dense: torch.Tensor, *lists_and_options) -> torch.Tensor:
    return ops.block_sparse_dsd(values, dense, *lists_and_options)


def sdd(a: torch.Tensor, b: torch.Tensor, *lists_and_options) -> torch.Tensor:
    return ops.block_sparse_sdd(a, b, *lists_and_options)


def topology(rows: int, columns: int) -> torch.Tensor:
    """Which blocks there are: as many in every row of them, so that the work does not depend on the seed."""
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))
    return scores.argsort(1).argsort(1) < DENSITY * columns


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def dsd_parts(block: int, transposed: bool = False, columns: int = COLUMNS) -> tuple:
    """transposed: of S, dense and out, which is the gradient of the dense operand from the right."""
    mask = topology(ROWS // block, INNER // block)
    counts = torch.tensor([0, *mask.sum(1).tolist()])
    values, dense = normal(int(mask.sum()), block, block), normal(1, INNER, columns)
    if transposed:
        dense = dense.transpose(1, 2).contiguous().transpose(1, 2)
    lists = (
        counts.cumsum(0).int()[None],
        mask.nonzero()[:, 1].int(),
        None,
        torch.arange(ROWS // block, dtype=torch.int32),
    )
    arguments = (values, dense, *lists, None, None, ROWS, transposed, transposed, 0)
    layout = ", all transposed" if transposed else ""
    name = f"dsd, blocks of {block}{layout}, bf16 [{ROWS}, {INNER}, {columns}]"
    return name, dsd, arguments, 2 * values.numel() * columns


def dsd_case(*args, **kwargs) -> Case:
    return Case.of(*dsd_parts(*args, **kwargs))


def int8_case(block: int) -> Case:
    """As the first of dsd, with values of a byte."""
    _, function, arguments, flops = dsd_parts(block)
    values, *others = arguments
    values = (values.float() * 40).round().clamp(-127, 127).to(torch.int8)
    arguments = (values, *others, torch.full((len(values),), 1 / 40))
    return Case.of(f"dsd, blocks of {block}, int8 [{ROWS}, {INNER}, {COLUMNS}]", function, arguments, flops)


def sdd_case(block: int, inner: int = COLUMNS) -> Case:
    rows, columns = topology(ROWS // block, INNER // block).nonzero().int().unbind(1)
    arguments = (normal(1, ROWS, inner), normal(1, inner, INNER), rows.contiguous(), columns.contiguous())
    name = f"sdd, blocks of {block}, bf16 [{ROWS}, {inner}, {INNER}]"
    return Case.of(name, sdd, (*arguments, None, None, block, block, 0), 2 * len(rows) * block * block * inner)


CASES = [
    *[dsd_case(block) for block in (128, 64, 32, 16)],
    *[dsd_case(block, transposed=True) for block in (128, 64)],
    *[int8_case(block) for block in (128, 64, 32, 16)],
    *[sdd_case(block) for block in (128, 64, 32, 16)],
]
