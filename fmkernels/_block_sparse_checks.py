# SPDX-License-Identifier: Apache-2.0
"""Argument checks of `dsd`, `dds` and `sdd`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._block_sparse_epilogue import ACTIVATIONS
from ._library import autocast, needs_grad
from .block_sparse_matrix import BlockSparse


def operands(op: str, s: BlockSparse, name: str, dense: Tensor) -> tuple[BlockSparse, Tensor]:
    """Both in the dtype to compute in."""
    if not isinstance(s, BlockSparse):
        raise TypeError(f"{op}: s must be a BlockSparse, got {type(s).__name__}.")
    check.is_tensor(op, name, dense)
    if s.is_quantized:
        (values,), (dense,) = (s.values,), autocast(1, dense)
        check.dtype(op, name, dense, check.FLOAT_DTYPES)
    else:
        values, dense = autocast(2, s.values, dense)
        check.same_dtype(op, name, dense, "s", values)
    check.same_device(op, name, dense, "s", values)
    if not values.is_contiguous():
        raise ValueError(f"{op}: the values of s must be contiguous, got strides {list(values.stride())}.")
    return s if values is s.values else s.with_values(values), dense


def check_dense(op: str, name: str, dense: Tensor, s: BlockSparse, inner_dim: int) -> None:
    batched = len(s.shape) == 3
    if dense.dim() not in ((3,) if batched else (2, 3)):
        layout = "[batch, rows, columns]" if batched else "[rows, columns] or [batch, rows, columns]"
        raise ValueError(f"{op}: {name} must be {layout} for this s, got {list(dense.shape)}.")
    inner = s.shape[-1] if op == "dsd" else s.shape[-2]
    check.size(op, name, dense, inner_dim, f"for this s, of shape {s.shape}, size", inner)
    if batched:
        check.size(op, name, dense, 0, "the batch of s,", s.shape[0])
    check_major(op, name, dense)


def check_major(op: str, name: str, t: Tensor) -> None:
    if min(t.shape[-2:]) > 1 and t.stride(-1) != 1 and t.stride(-2) != 1:
        raise ValueError(
            f"{op}: {name} must be contiguous in its rows or in its columns, got strides {list(t.stride())}."
        )


def check_epilogue(
    op: str, length: int, like: Tensor, scale: Tensor | None, bias: Tensor | None, activation: str | None
) -> None:
    if activation not in ACTIVATIONS:
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"{op}: activation must be one of {names}, got {activation!r}.")
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is None:
            continue
        check.is_tensor(op, name, vector)
        check.rank(op, name, vector, 1, "a vector")
        check.size(op, name, vector, 0, "size", length)
        check.same_device(op, name, vector, "the other arguments", like)
        check.last_dim_contiguous(op, name, vector)
    if scale is not None:
        check.dtype(op, "scale", scale, (torch.float32,))
        if needs_grad(scale):
            raise ValueError(f"{op}: scale must not require a gradient: it is a constant.")
    if bias is not None:
        check.float32_or_dtype_of(op, "bias", bias, "matrix", like)


def check_dsd(values: Tensor, dense: Tensor, *others: Any) -> None:
    check.dtype("dsd", "values", values, (*check.FLOAT_DTYPES, torch.int8))
    check.same_device("dsd", "the topology", others[0], "values", values)
    check.kernel_exists("dsd", "block_sparse_dsd", dense)


def check_sdd(a: Tensor, b: Tensor, *others: Any) -> None:
    check.dtype("sdd", "a", a, check.FLOAT_DTYPES)
    check.same_device("sdd", "b", b, "a", a)
    check.same_device("sdd", "the topology", others[0], "a", a)
    check.kernel_exists("sdd", "block_sparse_sdd", a)


def as_float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float().contiguous()


def with_major(t: Tensor) -> Tensor:
    """As it is where rows or columns are contiguous, else copied: gradients come in any strides."""
    return t if t.stride(-1) == 1 or t.stride(-2) == 1 else t.contiguous()
