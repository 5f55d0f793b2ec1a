# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the public functions: one sentence each, naming the argument, the rule and what came.

Scalars are checked before a call. Tensors are checked after a call has failed, and in fake kernels: the compiled op
refuses every wrong tensor by itself, and these checks then say which and why. A right call does not pay for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _library

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32_MAX = torch.finfo(torch.float32).max


def dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def is_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}.")
    if value.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be a strided tensor, got layout {value.layout}.")


def rank(op: str, name: str, value: Tensor, expected: int, layout: str) -> None:
    if value.dim() != expected:
        raise ValueError(f"{op}: {name} must be {layout}, got {value.dim()} dimensions {list(value.shape)}.")


def dtype(op: str, name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in allowed:
        raise ValueError(f"{op}: {name} must be {dtype_names(allowed)}, got {dtype_names((value.dtype,))}.")


def same_dtype(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise ValueError(
            f"{op}: {name} must have the dtype of {other_name}, {dtype_names((other.dtype,))}, "
            f"got {dtype_names((value.dtype,))}."
        )


def same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name}, {other.device}, got {value.device}.")


def last_dim_contiguous(op: str, name: str, value: Tensor) -> None:
    if value.shape[-1] != 1 and value.stride(-1) != 1 and value.numel() != 0:
        raise ValueError(f"{op}: {name} must have a contiguous last dimension, got stride {value.stride(-1)}.")


def written(op: str, name: str, value: Tensor) -> None:
    """Of a tensor that is written: two elements in one place, as expanding gives, would be written in no order."""
    for dim, (count, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if count > 1 and stride == 0 and value.numel() != 0:
            raise ValueError(
                f"{op}: {name} is written and must have a place for each element, got stride 0 in dimension {dim}."
            )


def copied(op: str, name: str, out: Any, result: Tensor) -> Tensor:
    """The tensor that was given for a result, which is copied to it: not converted, not broadcast."""
    is_tensor(op, name, out)
    shape(op, name, out, "the result", result)
    same_dtype(op, name, out, "the result", result)
    same_device(op, name, out, "the result", result)
    written(op, name, out)
    return out.copy_(result)


def plain(
    op: str, name: str, value: Any, num_dims: int, layout: str, only: torch.dtype, other_name: str, other: Tensor
) -> None:
    """A tensor of one dtype beside another tensor, its last dimension contiguous."""
    is_tensor(op, name, value)
    rank(op, name, value, num_dims, layout)
    dtype(op, name, value, (only,))
    same_device(op, name, value, other_name, other)
    last_dim_contiguous(op, name, value)


def one_a_row(op: str, name: str, value: Any, only: torch.dtype, other_name: str, other: Tensor) -> None:
    """[batch], contiguous: an element for each row of `other`."""
    is_tensor(op, name, value)
    same_device(op, name, value, other_name, other)
    dtype(op, name, value, (only,))
    rank(op, name, value, 1, "[batch]")
    size(op, name, value, 0, f"as many elements as {other_name} has rows,", other.shape[0])
    if not value.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got stride {value.stride(0)}.")


def float32_or_dtype_of(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype not in (torch.float32, other.dtype):
        allowed = dtype_names(tuple(dict.fromkeys((torch.float32, other.dtype))))
        raise ValueError(f"{op}: {name} must be {allowed} for this {other_name}, got {dtype_names((value.dtype,))}.")


def unsupported(op: str, **arguments: Any) -> None:
    """Arguments that a shim has for their names' sake."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"{op}: {name} must be None: it is not supported, got {type(value).__name__}.")


def size(op: str, name: str, value: Tensor, dim: int, what: str, expected: int) -> None:
    if value.shape[dim] != expected:
        raise ValueError(f"{op}: {name} must have {what} {expected}, got {value.shape[dim]}.")


def shape(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {other_name}, {list(other.shape)}, got {list(value.shape)}."
        )


def integer(op: str, name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}.")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value}.")
    if value >= 2**63:
        raise ValueError(f"{op}: {name} must be below 2**63, got {value}.")


def window(op: str, name: str, value: Any) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{op}: {name} must be a pair (left, right), got {value!r}.")
    for side in (0, 1):
        integer(op, f"{name}[{side}]", value[side], -1)


def number(op: str, name: str, value: Any, *, non_negative: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, float | int | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}.")
    if not abs(value) <= FLOAT32_MAX:  # NaN included; math.isfinite breaks the graph of dynamo
        raise ValueError(f"{op}: {name} must be finite in float32, got {value}.")
    if non_negative and value < 0:
        raise ValueError(f"{op}: {name} must not be negative, got {value}.")


def share(op: str, name: str, value: Any) -> None:
    number(op, name, value, non_negative=True)
    if value > 1:
        raise ValueError(f"{op}: {name} must be from 0 to 1, got {value}.")


def vanishes(value: Any) -> bool:
    """Whether a number other than 0 is 0 in float32."""
    return 0 < abs(value) <= 2.0**-150


def flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}.")


def same_on_every_rank(op: str, name: str, values: Sequence[Any]) -> None:
    """values: those of the ranks, in their order."""
    for rank, value in enumerate(values):
        if value != values[0]:
            raise ValueError(
                f"{op}: {name} must be the same on every rank, rank 0 has {values[0]} and rank {rank} {value}."
            )


def sees_values(value: Tensor) -> bool:
    """Whether the values of a tensor are there and are checked: on the CPU always, else under FMKERNELS_CHECK=1."""
    if torch.compiler.is_compiling() or isinstance(value, FakeTensor) or value.device.type == "meta":
        return False
    return value.device.type == "cpu" or _library.check_values


def prefix_sums(
    op: str, name: str, value: Tensor, total_name: str, total: int, longest: tuple[str, int] | None = None
) -> None:
    """From 0 to `total`; `longest` is the argument that bounds the steps, and its value."""
    prefix = value.tolist()
    if prefix[0] != 0:
        raise ValueError(f"{op}: {name} must begin with 0, got {prefix[0]}.")
    for before, after in itertools.pairwise(prefix):
        if after < before:
            raise ValueError(f"{op}: {name} must not decrease, got {before} before {after}.")
        if longest is not None and after - before > longest[1]:
            raise ValueError(
                f"{op}: {longest[0]} must be at least the longest sequence, {after - before}, got {longest[1]}."
            )
    if prefix[-1] != total:
        raise ValueError(f"{op}: {name} must end with {total_name}, {total}, got {prefix[-1]}.")


def kernel_exists(op: str, schema: str, value: Tensor) -> None:
    device = value.device.type
    if device in ("cpu", "meta") or (device == "cuda" and schema in _library.cuda_ops):
        return
    reason = f": {_library.cuda_error}" if device == "cuda" and _library.cuda_error is not None else ""
    raise ValueError(f"{op}: there is no kernel for {device} tensors{reason}.")


MAX_ROW_DIMS = 4  # of csrc/common/rows.h


def rows_merge(op: str, tensors: list[Tensor]) -> None:
    """The leading dimensions merge, for all tensors alike, into at most MAX_ROW_DIMS of one stride each."""
    count, merged = 0, 1
    strides: list[Any] = []
    for dim in range(tensors[0].dim() - 2, -1, -1):
        if tensors[0].shape[dim] == 1:
            continue
        here = [t.stride(dim) for t in tensors]
        if count == 0 or any(stride != inner * merged for stride, inner in zip(here, strides, strict=True)):
            count, merged, strides = count + 1, 1, here
        merged = merged * tensors[0].shape[dim]
    if count > MAX_ROW_DIMS:
        raise ValueError(
            f"{op}: the strides of the leading dimensions must merge into at most {MAX_ROW_DIMS} dimensions, "
            f"got {count}."
        )


def rows_of_gradient(grad: Tensor) -> Tensor:
    """A gradient as the ops take it; contiguous where it is expanded, as sum() gives, or transposed."""
    return grad if grad.stride(-1) == 1 and grad.dim() <= MAX_ROW_DIMS + 1 else grad.contiguous()
