# SPDX-License-Identifier: Apache-2.0
"""2:4 sparsity by its definition: every way to choose is tried, and products are those of the dense matrix."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..semi_structured_matrix import SemiStructured

_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def ways() -> list[tuple[tuple[int, int], ...]]:
    """The 90 ways to keep two in each row and two in each column of a 4 x 4 tile, by the columns kept of each row."""
    every_way = itertools.product(_PAIRS, repeat=4)
    return [way for way in every_way if all(sum(c in row for row in way) == 2 for c in range(4))]


def semi_structured_mask(x: Tensor, *, both_directions: bool = False) -> Tensor:
    """[rows, columns] bool of `fmkernels.semi_structured_mask`."""
    rows, columns = x.shape
    magnitude = x.float().abs().nan_to_num(torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    if not both_directions:
        order = magnitude.view(rows, columns // 4, 4).sort(dim=-1, descending=True, stable=True).indices
        return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :2], True).view(rows, columns)
    tiles = (magnitude * 0.125).view(rows // 4, 4, columns // 4, 4).transpose(1, 2)  # [.., .., row, column]
    sums, masks = [], []
    for way in ways():
        pairs = [tiles[..., row, a] + tiles[..., row, b] for row, (a, b) in enumerate(way)]
        sums.append((pairs[0] + pairs[1]) + (pairs[2] + pairs[3]))  # float32 sums of eighths, in the kernels' order
        masks.append([[column in pair for column in range(4)] for pair in way])
    sums = torch.stack(sums)
    first_best = (sums == sums.amax(0)).int().argmax(0)
    chosen = torch.tensor(masks, device=x.device)[first_best]
    return chosen.transpose(1, 2).reshape(rows, columns)


def semi_structured_linear(x: Tensor, w: SemiStructured, bias: Tensor | None = None) -> Tensor:
    """y of `fmkernels.semi_structured_linear`, in the dtype of x."""
    values = w.values.to(x.dtype)
    if x.isfinite().all() and values.isfinite().all():
        dense = values.new_zeros(w.shape).scatter(1, w.columns(), values)
        y = x @ dense.mT
    else:  # zeros that are not stored must not be multiplied with infinity
        y = (
            x.unsqueeze(-2).expand(*x.shape[:-1], *w.shape).gather(-1, w.columns().expand(*x.shape[:-1], -1, -1))
            * values
        )
        y = y.sum(-1)
    return y if bias is None else y + bias
