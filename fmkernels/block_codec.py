# SPDX-License-Identifier: Apache-2.0
"""A tensor as a wire: codes of 8, 6, 4 or 1 bit and one scale a block, in one buffer, to be sent and summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._library import call, needs_grad, ops, register_fake

__all__ = ["dequantize", "quantize", "reduce_wires", "sum_wires", "wire_bytes"]

BITS = (8, 6, 4, 1)
MIN_BLOCK, MAX_BLOCK = 32, 2048
UNIT, ALIGNMENT = 64, 16
MAX_NUMEL = 2**40


def wire_bytes(numel: int, *, bits: int = 8, block: int = 128) -> int:
    """Bytes of the wire of `numel` elements: codes, then scales, each to a multiple of 16.

    Args:
        numel: number of elements, up to 2**40.
        bits: 8, 6, 4 or 1.
        block: elements that share a scale, a power of two from 32 to 2048.

    Returns:
        round16(ceil(numel / 64) * 8 * bits) + round16(ceil(numel / block) * 4).

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    _check_format("wire_bytes", bits, block, numel)
    return _wire_bytes(numel, bits, block)


def quantize(
    x: Tensor,
    *,
    bits: int = 8,
    block: int = 128,
    rounding: str = "nearest",
    seed: int | None = None,
    step: int = 0,
    offset: int = 0,
    hadamard: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The wire of a tensor, the same bytes on every device.

    The element of largest magnitude of a block, with its sign, becomes the lowest code, -2^(bits - 1); the others are
    rounded to the nearest code, ties to even, and the highest code is the end of the other side. With stochastic
    rounding it becomes 1 - 2^(bits - 1), so that nothing is clipped and the mean over the draws is x. With 1 bit a code
    is the sign, of 0 +, and the scale is the mean magnitude.

    Args:
        x: float32, bfloat16 or float16, any shape, contiguous: taken as one row of elements.
        bits: 8, 6, 4 or 1.
        block: elements that share a scale, a power of two from 32 to 2048.
        rounding: "nearest" or "stochastic"; 1 bit has "nearest" alone.
        seed: of the draws of "stochastic", from 0 to 2**63 - 1; ranks and stages want different ones.
        step: of the draws too: another one, other draws.
        offset: elements of the whole before x[0], a multiple of block and of 64. A draw depends on seed, step and the
            place of its element in the whole, so that it does not matter how that is cut.
        hadamard: rotate every 32 elements before: outliers are spread over them. `dequantize` rotates back.
        residual: float32, contiguous, as many elements as x, updated: the wire is that of x + residual, and residual
            becomes what the wire lacks of it. It stays as it is where a block has a NaN or an infinity.
        out: uint8 [wire_bytes(...)], on a boundary of 16 bytes, to write to.

    Returns:
        uint8 [wire_bytes(x.numel(), bits=bits, block=block)], or out.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    A NaN or an infinity makes its block decode to NaN, and no other; a block whose largest magnitude is below 2^-100
    decodes to zeros. CPU and CUDA (sm_80 and later). No gradient. Deterministic; a block does not depend on the others.
    """
    op = "quantize"
    _check_format(op, bits, block)
    seed = _checked_rounding(op, rounding, bits, block, seed, step, offset)
    check.flag(op, "hadamard", hadamard)
    if isinstance(x, Tensor) and needs_grad(x):
        x = x.detach()
    if out is None:
        out = _new_wire(x, x.numel() if isinstance(x, Tensor) else 0, bits, block)
    options = (bits, block, hadamard, rounding == "stochastic", seed, step, offset)
    call(ops.block_codec_quantize, (x, residual, *options, out), _check_quantize)
    return out


def dequantize(
    wire: Tensor,
    numel: int,
    *,
    bits: int = 8,
    block: int = 128,
    hadamard: bool = False,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """What a wire stands for.

    Args:
        wire: uint8 [wire_bytes(numel, bits=bits, block=block)], of `quantize` or `reduce_wires` with these options.
        numel: number of elements, up to 2**40.
        bits: as in `quantize`.
        block: as in `quantize`.
        hadamard: as in `quantize`.
        dtype: float32, bfloat16 or float16; that of out where it is given.
        out: contiguous, numel elements of any shape, to write to.

    Returns:
        [numel], or out: codes times scales in float32, rounded once to the dtype.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Deterministic.
    """
    wires = wire.unsqueeze(0) if isinstance(wire, Tensor) and wire.dim() == 1 else wire
    return _sum("dequantize", "wire", wires, numel, bits, block, hadamard, 1.0, dtype, out)


def sum_wires(
    wires: Tensor,
    numel: int,
    *,
    bits: int = 8,
    block: int = 128,
    hadamard: bool = False,
    op: str = "sum",
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """The sum or the mean of what wires stand for, in one pass.

    Args:
        wires: uint8 [ranks, wire_bytes(numel, bits=bits, block=block)], rows on boundaries of 16 bytes.
        numel: as in `dequantize`.
        bits: as in `quantize`.
        block: as in `quantize`.
        hadamard: as in `quantize`.
        op: "sum", or "avg": times 1 / ranks in float32 at last.
        dtype: as in `dequantize`.
        out: as in `dequantize`.

    Returns:
        [numel], or out. Added in float32 from the first wire to the last, whatever the number of elements.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Deterministic.
    """
    factor = _factor("sum_wires", op, wires)
    return _sum("sum_wires", "wires", wires, numel, bits, block, hadamard, factor, dtype, out)


def reduce_wires(
    wires: Tensor,
    numel: int,
    *,
    bits: int = 8,
    out_bits: int | None = None,
    block: int = 128,
    rounding: str = "nearest",
    seed: int | None = None,
    step: int = 0,
    offset: int = 0,
    hadamard: bool = False,
    op: str = "sum",
    out: Tensor | None = None,
) -> Tensor:
    """The wire of the sum or the mean of wires, in one pass: `quantize(sum_wires(wires))` without the numbers between.

    Args:
        wires: as in `sum_wires`.
        numel: as in `dequantize`.
        bits: of the wires.
        out_bits: of the result; None: bits.
        block: of both.
        rounding: as in `quantize`.
        seed: as in `quantize`.
        step: as in `quantize`.
        offset: as in `quantize`.
        hadamard: whether the wires are rotated, as in `quantize`: the sum stays so and the result is.
        op: as in `sum_wires`.
        out: as in `quantize`.

    Returns:
        uint8 [wire_bytes(numel, bits=out_bits, block=block)], or out.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Deterministic.
    """
    name = "reduce_wires"
    _check_format(name, bits, block, numel)
    out_bits = bits if out_bits is None else out_bits
    _check_bits(name, "out_bits", out_bits)
    seed = _checked_rounding(name, rounding, out_bits, block, seed, step, offset)
    check.flag(name, "hadamard", hadamard)
    factor = _factor(name, op, wires)
    if out is None:
        out = _new_wire(wires, numel, out_bits, block)
    options = (bits, out_bits, block, hadamard, factor, rounding == "stochastic", seed, step, offset)
    call(ops.block_codec_reduce, (wires, numel, *options, out), _check_reduce)
    return out


def _wire_bytes(numel: int, bits: int, block: int) -> int:
    code_bytes, scale_bytes = (numel + UNIT - 1) // UNIT * 8 * bits, (numel + block - 1) // block * 4
    return sum((n + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT for n in (code_bytes, scale_bytes))


def _new_wire(like: Any, numel: int, bits: int, block: int) -> Tensor:
    device = like.device if isinstance(like, Tensor) else None
    return torch.empty(_wire_bytes(numel, bits, block), dtype=torch.uint8, device=device)


def _sum(
    op: str,
    name: str,
    wires: Any,
    numel: int,
    bits: int,
    block: int,
    hadamard: bool,
    factor: float,
    dtype: torch.dtype,
    out: Any,
) -> Tensor:
    _check_format(op, bits, block, numel)
    check.flag(op, "hadamard", hadamard)
    if out is None:
        if dtype not in check.FLOAT_DTYPES:
            got = check.dtype_names((dtype,)) if isinstance(dtype, torch.dtype) else repr(dtype)
            raise ValueError(f"{op}: dtype must be {check.dtype_names(check.FLOAT_DTYPES)}, got {got}.")
        out = torch.empty(numel, dtype=dtype, device=wires.device if isinstance(wires, Tensor) else None)
    elif not isinstance(out, Tensor) or out.numel() != numel:
        got = f"{out.numel()} elements" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{op}: out must be a tensor of numel, {numel}, elements, got {got}.")

    def explain(wires: Any, bits: int, block: int, hadamard: bool, factor: float, out: Any) -> None:
        _check_wires(op, name, wires, numel, bits, block)
        _check_out(op, out, "a tensor", check.FLOAT_DTYPES, name, wires)
        check.kernel_exists(op, "block_codec_sum", wires)

    call(ops.block_codec_sum, (wires, bits, block, hadamard, factor, out), explain)
    return out


def _factor(name: str, op: Any, wires: Any) -> float:
    if op not in ("sum", "avg"):
        raise ValueError(f"{name}: op must be 'sum' or 'avg', got {op!r}.")
    is_mean = op == "avg" and isinstance(wires, Tensor) and wires.dim() == 2 and wires.shape[0] > 0
    return 1 / wires.shape[0] if is_mean else 1.0


def _check_bits(op: str, name: str, bits: Any) -> None:
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"{op}: {name} must be 8, 6, 4 or 1, got {bits!r}.")


def _check_format(op: str, bits: Any, block: Any, numel: Any = 0) -> None:
    _check_bits(op, "bits", bits)
    check.integer(op, "block", block, 1)
    if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1):
        raise ValueError(f"{op}: block must be a power of two from 32 to 2048, got {block}.")
    check.integer(op, "numel", numel, 0)
    if numel > MAX_NUMEL:
        raise ValueError(f"{op}: numel must be at most 2**40, got {numel}.")


def _checked_rounding(op: str, rounding: Any, bits: int, block: int, seed: Any, step: Any, offset: Any) -> int:
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
        if bits == 1:
            raise ValueError(f"{op}: rounding must be 'nearest' where a code has 1 bit, got 'stochastic'.")
        if offset % max(block, UNIT) != 0:
            raise ValueError(f"{op}: offset must be a multiple of {max(block, UNIT)} for this block, got {offset}.")
    return 0 if seed is None else seed


def _check_dense(op: str, name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {list(value.stride())}.")


def _check_out(op: str, out: Any, layout: str, dtypes: tuple[torch.dtype, ...], like_name: str, like: Tensor) -> None:
    check.is_tensor(op, "out", out)
    check.dtype(op, "out", out, dtypes)
    check.same_device(op, "out", out, like_name, like)
    _check_dense(op, "out", out)


def _check_aligned(op: str, name: str, value: Tensor) -> None:
    if check.sees_values(value) and value.data_ptr() % ALIGNMENT != 0:
        raise ValueError(
            f"{op}: {name} must begin on a boundary of 16 bytes, got {value.data_ptr() % ALIGNMENT} behind."
        )


def _check_wire(op: str, name: str, wire: Any, numel: int, bits: int, block: int, like_name: str, like: Tensor) -> None:
    _check_out(op, wire, "a wire", (torch.uint8,), like_name, like)
    check.rank(op, name, wire, 1, "[bytes]")
    check.size(op, name, wire, 0, "wire_bytes", _wire_bytes(numel, bits, block))
    _check_aligned(op, name, wire)


def _check_wires(op: str, name: str, wires: Any, numel: int, bits: int, block: int) -> None:
    check.is_tensor(op, name, wires)
    check.dtype(op, name, wires, (torch.uint8,))
    check.rank(op, name, wires, 2, "[bytes]" if name == "wire" else "[ranks, bytes]")
    if wires.shape[0] == 0:
        raise ValueError(f"{op}: {name} must have at least 1 row, got 0.")
    check.size(op, name, wires, 1, "wire_bytes", _wire_bytes(numel, bits, block))
    check.last_dim_contiguous(op, name, wires)
    _check_aligned(op, name, wires)
    if wires.shape[0] > 1 and wires.stride(0) % ALIGNMENT != 0:
        raise ValueError(f"{op}: {name} must have rows on boundaries of 16 bytes, got stride {wires.stride(0)}.")


def _check_quantize(
    x: Any,
    residual: Any,
    bits: int,
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
    _check_dense(op, "x", x)
    if residual is not None:
        check.is_tensor(op, "residual", residual)
        check.dtype(op, "residual", residual, (torch.float32,))
        check.same_device(op, "residual", residual, "x", x)
        if residual.numel() != x.numel():
            raise ValueError(f"{op}: residual must have the {x.numel()} elements of x, got {residual.numel()}.")
        _check_dense(op, "residual", residual)
    _check_wire(op, "out", out, x.numel(), bits, block, "x", x)
    check.kernel_exists(op, "block_codec_quantize", x)


def _check_reduce(
    wires: Any, numel: int, bits: int, out_bits: int, block: int, hadamard: bool, factor: float, *options: Any
) -> None:
    op = "reduce_wires"
    _check_wires(op, "wires", wires, numel, bits, block)
    _check_wire(op, "out", options[-1], numel, out_bits, block, "wires", wires)
    check.kernel_exists(op, "block_codec_reduce", wires)


@register_fake("block_codec_quantize")
def _(x, residual, bits, block, hadamard, stochastic, seed, step, offset, out):
    _check_quantize(x, residual, bits, block, hadamard, stochastic, seed, step, offset, out)


@register_fake("block_codec_sum")
def _(wires, bits, block, hadamard, factor, out):
    _check_wires("sum_wires", "wires", wires, out.numel(), bits, block)
    _check_out("sum_wires", out, "a tensor", check.FLOAT_DTYPES, "wires", wires)


@register_fake("block_codec_reduce")
def _(wires, numel, bits, out_bits, block, hadamard, factor, stochastic, seed, step, offset, out):
    _check_reduce(wires, numel, bits, out_bits, block, hadamard, factor, stochastic, seed, step, offset, out)
