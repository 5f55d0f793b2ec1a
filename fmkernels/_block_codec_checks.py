# SPDX-License-Identifier: Apache-2.0
"""The size of a wire, and the argument checks of `block_codec`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as check

FLOAT8 = "float8_e4m3fn"
CODES = {8: 8, 6: 6, 4: 4, 1: 1, FLOAT8: -8}  # what the ops call them
MIN_BLOCK, MAX_BLOCK = 32, 2048
UNIT, ALIGNMENT = 64, 16
MAX_NUMEL = 2**40


def num_bytes(numel: int, code: int, block: int) -> int:
    code_bytes, scale_bytes = (numel + UNIT - 1) // UNIT * 8 * abs(code), (numel + block - 1) // block * 4
    return sum((n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT for n in (code_bytes, scale_bytes))


def code_of(op: str, name: str, bits: Any) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int | str) or bits not in CODES:
        raise ValueError(f"{op}: {name} must be 8, 6, 4, 1 or {FLOAT8!r}, got {bits!r}.")
    return CODES[bits]


def checked_format(op: str, bits: Any, block: Any, numel: Any = 0) -> int:
    """The code."""
    code = code_of(op, "bits", bits)
    check.integer(op, "block", block, 1)
    if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1):
        raise ValueError(f"{op}: block must be a power of two from 32 to 2048, got {block}.")
    check.integer(op, "numel", numel, 0)
    if numel > MAX_NUMEL:
        raise ValueError(f"{op}: numel must be at most 2**40, got {numel}.")
    return code


def checked_rounding(op: str, rounding: Any, code: int, block: int, seed: Any, step: Any, offset: Any) -> int:
    """The seed; 0 where there is none to be had."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{op}: rounding must be 'nearest' or 'stochastic', got {rounding!r}.")
    if seed is not None:
        check.integer(op, "seed", seed, 0)
    elif rounding == "stochastic":
        raise ValueError(f"{op}: seed must be given where rounding is 'stochastic', got None.")
    check.integer(op, "step", step, 0)
    check.integer(op, "offset", offset, 0)
    if rounding == "stochastic":
        if code <= 1:
            raise ValueError(f"{op}: rounding must be 'nearest' for 1 bit and for {FLOAT8!r}, got 'stochastic'.")
        if offset % max(block, UNIT) != 0:
            raise ValueError(f"{op}: offset must be a multiple of {max(block, UNIT)} for this block, got {offset}.")
    return 0 if seed is None else seed


def check_dense(op: str, name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {list(value.stride())}.")


def check_out(op: str, out: Any, dtypes: tuple[torch.dtype, ...], like_name: str, like: Tensor) -> None:
    check.is_tensor(op, "out", out)
    check.dtype(op, "out", out, dtypes)
    check.same_device(op, "out", out, like_name, like)
    check_dense(op, "out", out)


def check_aligned(op: str, name: str, value: Tensor) -> None:
    if check.sees_values(value) and value.data_ptr() % ALIGNMENT != 0:
        raise ValueError(
            f"{op}: {name} must begin on a boundary of 16 bytes, got {value.data_ptr() % ALIGNMENT} behind."
        )


def check_wire(op: str, name: str, wire: Any, numel: int, code: int, block: int, like_name: str, like: Tensor) -> None:
    check_out(op, wire, (torch.uint8,), like_name, like)
    check.rank(op, name, wire, 1, "[bytes]")
    check.size(op, name, wire, 0, "wire_bytes", num_bytes(numel, code, block))
    check_aligned(op, name, wire)


def check_wires(op: str, name: str, wires: Any, numel: int, code: int, block: int) -> None:
    check.is_tensor(op, name, wires)
    check.dtype(op, name, wires, (torch.uint8,))
    check.rank(op, name, wires, 2, "[ranks, bytes]")
    if wires.shape[0] == 0:
        raise ValueError(f"{op}: {name} must have at least 1 row, got 0.")
    check.size(op, name, wires, 1, "wire_bytes", num_bytes(numel, code, block))
    check.last_dim_contiguous(op, name, wires)
    check_aligned(op, name, wires)
    if wires.shape[0] > 1 and wires.stride(0) % ALIGNMENT != 0:
        raise ValueError(f"{op}: {name} must have rows on boundaries of 16 bytes, got stride {wires.stride(0)}.")


def check_quantize(
    x: Any,
    residual: Any,
    code: int,
    block: int,
    hadamard: bool,
    stochastic: bool,
    seed: int,
    step: int,
    offset: int,
    out: Any,
) -> None:
    op = "quantize"
    check.is_tensor(op, "x", x)
    check.dtype(op, "x", x, check.FLOAT_DTYPES)
    check_dense(op, "x", x)
    if residual is not None:
        check.is_tensor(op, "residual", residual)
        check.dtype(op, "residual", residual, (torch.float32,))
        check.same_device(op, "residual", residual, "x", x)
        if residual.numel() != x.numel():
            raise ValueError(f"{op}: residual must have the {x.numel()} elements of x, got {residual.numel()}.")
        check_dense(op, "residual", residual)
    check_wire(op, "out", out, x.numel(), code, block, "x", x)
    check.kernel_exists(op, "block_codec_quantize", x)


def check_reduce(
    wires: Any, numel: int, code: int, out_code: int, block: int, hadamard: bool, factor: float, *options: Any
) -> None:
    op = "reduce_wires"
    check_wires(op, "wires", wires, numel, code, block)
    check_wire(op, "out", options[-1], numel, out_code, block, "wires", wires)
    check.kernel_exists(op, "block_codec_reduce", wires)
