# SPDX-License-Identifier: Apache-2.0
"""The codec of blocks in float32 operations of plain torch, one after another: the bytes of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .dropout import philox

UNIT, GROUP, SMALLEST = 64, 32, 2.0**-100
FLOAT8 = "float8_e4m3fn"
_LOW = 0xFFFFFFFF


def wire_bytes(numel: int, *, bits: int | str = 8, block: int = 128) -> int:
    """`fmkernels.wire_bytes`."""
    code_bytes, scale_bytes = -(-numel // UNIT) * 8 * (8 if bits == FLOAT8 else bits), -(-numel // block) * 4
    return -(-code_bytes // 16) * 16 + -(-scale_bytes // 16) * 16


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
) -> Tensor:
    """`fmkernels.quantize`; computed in float32 whatever the dtype of x."""
    h = x.float().flatten()
    if residual is not None:
        h = h + residual.flatten()
    values = _rotated(_padded(h, UNIT) * 2.0**-5)[: -(-h.numel() // GROUP) * GROUP] if hadamard else h
    wire, decoded = _encode(values, h.numel(), bits, block, rounding, seed, step, offset)
    if residual is not None:
        decoded = (_rotated(decoded) if hadamard else decoded)[: h.numel()].view_as(residual)
        residual.copy_(torch.where(decoded.isnan(), residual, h.view_as(residual) - decoded))
    return wire


def sum_wires(
    wires: Tensor,
    numel: int,
    *,
    bits: int | str = 8,
    block: int = 128,
    hadamard: bool = False,
    op: str = "sum",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`fmkernels.sum_wires`."""
    total = _sum(wires, numel, bits, block)
    total = _rotated(total) if hadamard else total
    return (total * _factor(op, wires.shape[0]))[:numel].to(dtype)


def dequantize(wire: Tensor, numel: int, **options: object) -> Tensor:
    """`fmkernels.dequantize`."""
    return sum_wires(wire[None], numel, **options)


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
) -> Tensor:
    """`fmkernels.reduce_wires`."""
    total = _sum(wires, numel, bits, block) * _factor(op, wires.shape[0])
    counted = -(-numel // GROUP) * GROUP if hadamard else numel
    return _encode(total[:counted], numel, out_bits or bits, block, rounding, seed, step, offset)[0]


def _padded(x: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % multiple))


def _factor(op: str, num_wires: int) -> Tensor:
    return torch.tensor(1.0 if op == "sum" else 1 / num_wires, dtype=torch.float32)


def _rotated(x: Tensor) -> Tensor:
    """H times each group of 32, by butterflies: elements whose places differ in bit 0 first, in bit 4 last."""
    for bit in range(5):
        a, b = x.view(-1, 2, 1 << bit).unbind(1)
        x = torch.stack([a + b, a - b], 1).flatten()
    return x


def _draws(numel: int, seed: int, step: int, offset: int) -> Tensor:
    """(k + 1/2) / 2^16 of each element, of 8 times 16 bits a call of Philox."""
    place = torch.arange(offset, offset + numel)
    unit, at = place // UNIT, place % UNIT
    call, k = unit * 8 + at % 32 // 4, at // 32 * 4 + at % 4
    counter = (call & _LOW, call >> 32, torch.full_like(call, step & _LOW), torch.full_like(call, step >> 32))
    words = torch.stack(philox(counter, (torch.tensor(seed & _LOW), torch.tensor(seed >> 32 & _LOW))))
    bits = words.gather(0, (k // 2)[None])[0] >> k % 2 * 16 & 0xFFFF
    return (bits.float() + 0.5) * 2.0**-16


def _mean_magnitudes(x: Tensor, counts: Tensor) -> Tensor:
    """Of the rows [blocks, block]: sums of two, of places that differ in bit 5, in bits 0 to 4, then in the others."""
    x = x.abs() * 2.0**-11
    block = x.shape[1]
    x = x.view(-1, block // 64, 2, 32).sum(2) if block > 32 else x.view(-1, 1, 32)
    for dim in (2, 1):
        while x.shape[dim] > 1:
            x = x.unflatten(dim, (-1, 2))
            x = x.select(dim + 1, 0) + x.select(dim + 1, 1)
    return x[:, 0, 0] / counts * 2.0**11


def _encode(
    values: Tensor, numel: int, bits: int | str, block: int, rounding: str, seed: int | None, step: int, offset: int
) -> tuple[Tensor, Tensor]:
    """The wire, and what it stands for, rotated as the values are and with their padding."""
    x = _padded(values, block).view(-1, block)
    count = values.numel()
    key = x.view(torch.int32).long() & 0x7FFFFFFF
    extreme = x.gather(1, (key * 2 + (x >= 0)).argmax(1, keepdim=True))[:, 0]  # the positive one of two
    wrong = ~x.isfinite().all(1)
    if bits == 1:
        valid = (count - torch.arange(len(x)) * block).clamp(max=block)
        extreme = _mean_magnitudes(torch.where(wrong[:, None], 0.0, x), valid)
    empty = wrong | (extreme.abs() < SMALLEST)
    safe = torch.where(empty, 1.0, extreme)
    if bits == 1:
        scale, codes = safe, torch.where(x < -SMALLEST, -1.0, 1.0)
        codes = torch.where(empty[:, None] | (torch.arange(x.numel()).view_as(x) >= count), 1.0, codes)
    else:
        levels = torch.tensor(-448.0 if bits == FLOAT8 else -(2.0 ** (bits - 1)) + (rounding == "stochastic"))
        scale, v = safe / levels, torch.where(empty[:, None], 0.0, x) * (levels / safe)[:, None]
        if bits == FLOAT8:
            codes = v.to(torch.float8_e4m3fn).float() + 0.0
        elif rounding == "stochastic":
            draws = _padded(_draws(count, seed, step, offset), block).view_as(x)
            codes = v.floor() + (draws < v - v.floor())
        else:
            codes = v.round()
        if bits != FLOAT8:
            codes = codes.clamp(-(2 ** (bits - 1)) + (rounding == "stochastic"), 2 ** (bits - 1) - 1)
    scale = torch.where(wrong, torch.nan, torch.where(empty, 0.0, scale))
    wire = values.new_zeros(wire_bytes(numel, bits=bits, block=block), dtype=torch.uint8)
    packed = _pack(_fitted(codes.flatten(), numel), bits)
    wire[: packed.numel()] = packed
    scale_bytes = torch.where(wrong, 0x7FC00000, scale.view(torch.int32)).to(torch.int32).view(torch.uint8)
    first = -(-packed.numel() // 16) * 16
    wire[first : first + scale_bytes.numel()] = scale_bytes
    return wire, (codes * scale[:, None]).flatten()[: -(-count // GROUP) * GROUP]


def _fitted(codes: Tensor, numel: int) -> Tensor:
    """To whole units: padded, or cut where a block is longer."""
    length = -(-numel // UNIT) * UNIT
    return torch.nn.functional.pad(codes, (0, max(length - codes.numel(), 0)))[:length]


def _pack(codes: Tensor, bits: int | str) -> Tensor:
    if bits == 1:
        return ((codes.view(-1, 8) < 0).long() << torch.arange(8)).sum(1).to(torch.uint8)
    if bits == FLOAT8:
        return codes.to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes.long().view(-1, UNIT)
    if bits == 8:
        return (codes & 255).to(torch.uint8).flatten()
    lower = (codes[:, :32] & 15 | (codes[:, 32:] & 15) << 4).to(torch.uint8).flatten()
    if bits == 4:
        return lower
    upper = ((codes >> 4 & 3).view(-1, 4, 16) << torch.tensor([0, 2, 4, 6])[:, None]).sum(1).to(torch.uint8)
    return torch.cat([lower, upper.flatten()])


def _unpack(data: Tensor, units: int, bits: int | str) -> Tensor:
    """The codes of whole units, in float32."""
    if bits == FLOAT8:
        return data[: units * UNIT].view(torch.float8_e4m3fn).float()
    data = data.long()
    if bits == 1:
        return (1 - 2 * (data[: units * 8, None] >> torch.arange(8) & 1)).flatten().float()
    if bits == 8:
        codes = data[: units * UNIT]
    else:
        lower = data[: units * 32].view(-1, 32)
        codes = torch.cat([lower & 15, lower >> 4], 1)
        if bits == 6:
            upper = data[units * 32 : units * 48].view(-1, 1, 16) >> torch.tensor([0, 2, 4, 6])[:, None] & 3
            codes = codes + upper.flatten(1) * 16
        codes = codes.flatten()
    half = 1 << bits - 1
    return ((codes ^ half) - half).float()


def _sum(wires: Tensor, numel: int, bits: int | str, block: int) -> Tensor:
    """Of all wires, from the first to the last, with the padding of a unit."""
    units, blocks = -(-numel // UNIT), -(-numel // block)
    first = wire_bytes(numel, bits=bits, block=block) - -(-blocks * 4 // 16) * 16
    acc = torch.zeros(units * UNIT)
    for wire in wires:
        scales = wire[first : first + 4 * blocks].clone().view(torch.float32)
        scales = scales.repeat_interleave(block)
        scales = torch.nn.functional.pad(scales, (0, max(acc.numel() - scales.numel(), 0)))[: acc.numel()]
        acc = acc + _unpack(wire, units, bits) * scales
    return acc
