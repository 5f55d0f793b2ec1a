# SPDX-License-Identifier: Apache-2.0
"""A tensor as a wire: codes of 8, 6, 4 or 1 bit and one scale a block, in one buffer, to be sent and summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _block_codec_checks as checks
from . import _check as check
from ._library import call, needs_grad, ops, register_fake

__all__ = ["dequantize", "quantize", "reduce_wires", "sum_wires", "wire_bytes"]


def wire_bytes(numel: int, *, bits: int | str = 8, block: int = 128) -> int:
    """Bytes of the wire of `numel` elements: codes, then scales, each to a multiple of 16.

    Args:
        numel: number of elements, up to 2**40.
        bits: 8, 6, 4, 1 or "float8_e4m3fn".
        block: elements that share a scale, a power of two from 32 to 2048.

    Returns:
        round16(ceil(numel / 64) * 8 * bits) + round16(ceil(numel / block) * 4), with 8 bits for "float8_e4m3fn".

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    return checks.num_bytes(numel, checks.checked_format("wire_bytes", bits, block, numel), block)


def quantize(
    x: Tensor,
    *,
    bits: int | str = 8,
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
    is the sign, of 0 +, and the scale is the mean magnitude. With "float8_e4m3fn" it becomes -448.

    Args:
        x: float32, bfloat16 or float16, any shape, contiguous: taken as one row of elements.
        bits: 8, 6, 4, 1 or "float8_e4m3fn".
        block: elements that share a scale, a power of two from 32 to 2048.
        rounding: "nearest" or "stochastic"; 1 bit and floats have "nearest" alone.
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
    code = checks.checked_format(op, bits, block)
    seed = checks.checked_rounding(op, rounding, code, block, seed, step, offset)
    check.flag(op, "hadamard", hadamard)
    if isinstance(x, Tensor) and needs_grad(x):
        x = x.detach()
    if out is None:
        out = _new_wire(x, x.numel() if isinstance(x, Tensor) else 0, code, block)
    options = (code, block, hadamard, rounding == "stochastic", seed, step, offset)
    call(ops.block_codec_quantize, (x, residual, *options, out), checks.check_quantize)
    return out


def dequantize(
    wire: Tensor,
    numel: int,
    *,
    bits: int | str = 8,
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
    if isinstance(wire, Tensor):
        check.rank("dequantize", "wire", wire, 1, "[bytes]")
    wires = wire.unsqueeze(0) if isinstance(wire, Tensor) else wire
    return _sum("dequantize", "wire", wires, numel, bits, block, hadamard, 1.0, dtype, out)


def sum_wires(
    wires: Tensor,
    numel: int,
    *,
    bits: int | str = 8,
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
    bits: int | str = 8,
    out_bits: int | str | None = None,
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
        out: as in `quantize`; no part of wires.

    Returns:
        uint8 [wire_bytes(numel, bits=out_bits, block=block)], or out.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Deterministic.
    """
    name = "reduce_wires"
    code = checks.checked_format(name, bits, block, numel)
    out_code = code if out_bits is None else checks.code_of(name, "out_bits", out_bits)
    seed = checks.checked_rounding(name, rounding, out_code, block, seed, step, offset)
    check.flag(name, "hadamard", hadamard)
    factor = _factor(name, op, wires)
    if out is None:
        if not _has_size(wires, numel, code, block):
            checks.check_wires(name, "wires", wires, numel, code, block)
        out = _new_wire(wires, numel, out_code, block)
    options = (code, out_code, block, hadamard, factor, rounding == "stochastic", seed, step, offset)
    call(ops.block_codec_reduce, (wires, numel, *options, out), checks.check_reduce)
    return out


def _new_wire(like: Any, numel: int, code: int, block: int) -> Tensor:
    device = like.device if isinstance(like, Tensor) else None
    return torch.empty(checks.num_bytes(numel, code, block), dtype=torch.uint8, device=device)


def _has_size(wires: Any, numel: int, code: int, block: int) -> bool:
    """Asked before a result of numel elements is made."""
    return isinstance(wires, Tensor) and wires.dim() == 2 and wires.shape[1] == checks.num_bytes(numel, code, block)


def _sum(
    op: str,
    name: str,
    wires: Any,
    numel: int,
    bits: int | str,
    block: int,
    hadamard: bool,
    factor: float,
    dtype: torch.dtype,
    out: Any,
) -> Tensor:
    code = checks.checked_format(op, bits, block, numel)
    check.flag(op, "hadamard", hadamard)
    if out is None:
        if not _has_size(wires, numel, code, block):
            checks.check_wires(op, name, wires, numel, code, block)
        if dtype not in check.FLOAT_DTYPES:
            got = check.dtype_names((dtype,)) if isinstance(dtype, torch.dtype) else repr(dtype)
            raise ValueError(f"{op}: dtype must be {check.dtype_names(check.FLOAT_DTYPES)}, got {got}.")
        out = torch.empty(numel, dtype=dtype, device=wires.device if isinstance(wires, Tensor) else None)
    elif not isinstance(out, Tensor) or out.numel() != numel:
        got = f"{out.numel()} elements" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"{op}: out must be a tensor of numel, {numel}, elements, got {got}.")

    def explain(wires: Any, code: int, block: int, hadamard: bool, factor: float, out: Any) -> None:
        checks.check_wires(op, name, wires, numel, code, block)
        checks.check_out(op, out, check.FLOAT_DTYPES, name, wires)
        check.kernel_exists(op, "block_codec_sum", wires)

    call(ops.block_codec_sum, (wires, code, block, hadamard, factor, out), explain)
    return out


def _factor(name: str, op: Any, wires: Any) -> float:
    if op not in ("sum", "avg"):
        raise ValueError(f"{name}: op must be 'sum' or 'avg', got {op!r}.")
    is_mean = op == "avg" and isinstance(wires, Tensor) and wires.dim() == 2 and wires.shape[0] > 0
    return 1 / wires.shape[0] if is_mean else 1.0


@register_fake("block_codec_quantize")
def _(x, residual, bits, block, hadamard, stochastic, seed, step, offset, out):
    checks.check_quantize(x, residual, bits, block, hadamard, stochastic, seed, step, offset, out)


@register_fake("block_codec_sum")
def _(wires, bits, block, hadamard, factor, out):
    checks.check_wires("sum_wires", "wires", wires, out.numel(), bits, block)
    checks.check_out("sum_wires", out, check.FLOAT_DTYPES, "wires", wires)


@register_fake("block_codec_reduce")
def _(wires, numel, bits, out_bits, block, hadamard, factor, stochastic, seed, step, offset, out):
    checks.check_reduce(wires, numel, bits, out_bits, block, hadamard, factor, stochastic, seed, step, offset, out)
