# SPDX-License-Identifier: Apache-2.0
"""`block_codec` beside a copy of as many bytes, and beside the same codec written in ops of torch, eager and compiled.

Everything is written to memory that is given: an output of many megabytes in fresh pages would measure the operating
system. The copy is a bound and no rival: its rows say what share of a memcpy the codec reaches.
"""

from __future__ import annotations

import pytest
import torch
from measure import Contender, seeds
from torch import Tensor

from fmkernels import block_codec

BLOCK = 128
SHAPES = [("bucket of 25 MiB", 25 * 2**20 // 4), ("64 KiB", 2**14)]
DTYPES = [torch.float32, torch.bfloat16]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
EACH_SHAPE = pytest.mark.parametrize(("name", "numel"), SHAPES, ids=[name for name, _ in SHAPES])
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
EACH_BITS = pytest.mark.parametrize("bits", [8, 4])


def normal(numel: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(numel, generator=generator, device=device).to(dtype)


def wire_of(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes as int8, [units, 64]."""
    if bits == 4:
        codes = (codes[:, :32] & 15) | (codes[:, 32:] << 4)
    return torch.cat([codes.reshape(-1).view(torch.uint8), scales.view(torch.uint8)])


def quantize_in_torch(x: Tensor, bits: int) -> Tensor:
    """Of whole blocks without NaN: what a reader would write first."""
    blocks = x.float().view(-1, BLOCK)
    low, high = blocks.aminmax(dim=1, keepdim=True)
    extreme = torch.where(high >= -low, high, low)
    levels = -(2.0 ** (bits - 1))
    codes = (blocks * (levels / extreme)).round_().clamp_(levels, -levels - 1).to(torch.int8)
    return wire_of(codes.view(-1, 64), (extreme / levels).view(-1), bits)


def dequantize_in_torch(wire: Tensor, numel: int, bits: int, out: Tensor) -> Tensor:
    num_codes = numel * bits // 8
    scales = wire[num_codes : num_codes + numel // BLOCK * 4].view(torch.float32)
    codes = wire[:num_codes].view(torch.int8)
    if bits == 4:
        codes = codes.view(-1, 32)
        codes = torch.cat([codes << 4 >> 4, codes >> 4], 1)
    torch.mul(codes.reshape(-1, BLOCK), scales[:, None], out=out.view(-1, BLOCK))
    return out


def copy_of(num_bytes: int, sets: list[tuple[Tensor, Tensor]], device: torch.device) -> Contender:
    """A memcpy that moves as many bytes in and out as the codec, and returns the result of the codec."""

    def memory() -> Tensor:
        return torch.zeros(num_bytes // 2, dtype=torch.uint8, device=device)

    def run(source: Tensor, target: Tensor, result: Tensor) -> Tensor:
        target.copy_(source)
        return result

    return Contender("copy", run, [(memory(), memory(), result) for _, result in sets])


@EACH_SHAPE
@EACH_DTYPE
@EACH_BITS
@pytest.mark.parametrize("peer", ["torch", "torch.compile", "copy"])
def test_quantize(compare, device, cache_bytes, peer, bits, dtype, name, numel):
    num_bytes = normal(numel, dtype, device, 0).nbytes + block_codec.wire_bytes(numel, bits=bits)
    sets = []
    for seed in seeds(num_bytes, cache_bytes):
        x = normal(numel, dtype, device, seed)
        sets.append((x, block_codec.quantize(x, bits=bits)))
    ours = Contender("fmkernels", lambda x, out: block_codec.quantize(x, bits=bits, out=out), sets)
    if peer == "copy":
        if num_bytes < cache_bytes // 4:
            pytest.skip("a copy of what is in the cache says nothing of memory")
        peers = [copy_of(num_bytes, sets, device)]
    else:
        torch.compiler.reset()
        theirs = torch.compile(quantize_in_torch, dynamic=False) if peer == "torch.compile" else quantize_in_torch
        peers = [Contender(peer, lambda x, out: out.copy_(theirs(x, bits)), sets)]
    compare(f"quantize int{bits} {NAMES[dtype]} / {peer}", name, ours, peers, num_bytes=num_bytes)


@EACH_SHAPE
@EACH_BITS
@pytest.mark.parametrize("peer", ["torch", "copy"])
def test_dequantize(compare, device, cache_bytes, peer, bits, name, numel):
    num_bytes = 4 * numel + block_codec.wire_bytes(numel, bits=bits)
    sets = []
    for seed in seeds(num_bytes, cache_bytes):
        wire = block_codec.quantize(normal(numel, torch.float32, device, seed), bits=bits)
        sets.append((wire, block_codec.dequantize(wire, numel, bits=bits)))
    ours = Contender("fmkernels", lambda wire, out: block_codec.dequantize(wire, numel, bits=bits, out=out), sets)
    if peer == "copy":
        if num_bytes < cache_bytes // 4:
            pytest.skip("a copy of what is in the cache says nothing of memory")
        peers = [copy_of(num_bytes, sets, device)]
    else:
        peers = [Contender("torch", lambda wire, out: dequantize_in_torch(wire, numel, bits, out), sets)]
    compare(f"dequantize int{bits} fp32 / {peer}", name, ours, peers, num_bytes=num_bytes)


@EACH_BITS
@pytest.mark.parametrize("num_wires", [2, 4])
def test_reduce_wires(compare, device, cache_bytes, num_wires, bits):
    """Beside decoding each wire, adding, and quantising again, in ops of torch."""
    numel = SHAPES[0][1]
    num_bytes = (num_wires + 1) * block_codec.wire_bytes(numel, bits=bits)
    sets = []
    for seed in seeds(num_bytes, cache_bytes):
        xs = [normal(numel, torch.float32, device, seed + 100 * rank) for rank in range(num_wires)]
        wires = torch.stack([block_codec.quantize(x, bits=bits) for x in xs])
        sets.append((wires, block_codec.reduce_wires(wires, numel, bits=bits)))

    def in_torch(wires, out):
        total, part = torch.zeros(numel, device=device), torch.empty(numel, device=device)
        for wire in wires:
            total += dequantize_in_torch(wire, numel, bits, part)
        return out.copy_(quantize_in_torch(total, bits))

    compare(
        f"reduce_wires int{bits}",
        f"{num_wires} wires of a bucket",
        Contender("fmkernels", lambda wires, out: block_codec.reduce_wires(wires, numel, bits=bits, out=out), sets),
        [Contender("torch", in_torch, sets)],
        num_bytes=num_bytes,
    )
