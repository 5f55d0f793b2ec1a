# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels of the codec: whole tiles, results past the caches, and the same bytes from every instruction set."""

import hashlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruction_sets import BELOW
from test_block_codec import BITS, BLOCKS, DTYPES, normal, roundings, same, with_corners

from fmkernels import block_codec, reference

SUMMED = 9 * 2048 + 100


def wires_to_sum(block):
    """Of three ranks: sums of 0 and below the smallest scale, a tie of both signs, an overflow, and one NaN."""
    x = normal(3, SUMMED)
    x[:, 64:128] = 0.0
    x[:, 256:512] *= 1e-35
    x[0, 2048:4096] = -x[1, 2048:4096]
    x[2, 2048:4096] = 0.0
    x[:, 4096:4099] = torch.tensor([[-8.0, 7.0, 0.0], [0.0, 1.0, 8.0], [0.0, 0.0, 0.0]])
    x[:, 5000:5002] = 2e38
    x[1, 17000] = math.nan  # more than eight tiles behind the others
    return torch.stack([block_codec.quantize(rank, bits=4, block=block) for rank in x])


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("op", ["sum", "avg"])
def test_whole_tiles_of_4_bits(op, block):
    """Enough of them, and of every kind, for the kernels that take whole tiles alone."""
    wires, numel = wires_to_sum(block), SUMMED
    options = {"bits": 4, "block": block, "hadamard": op == "avg"}
    for num_wires in (1, 3) if op == "sum" else (3,):
        expected = reference.block_codec.reduce_wires(wires[:num_wires], numel, **options, op=op)
        assert torch.equal(block_codec.reduce_wires(wires[:num_wires], numel, **options, op=op), expected)
        for dtype in DTYPES:
            total = block_codec.sum_wires(wires[:num_wires], numel, **options, op=op, dtype=dtype)
            expected = reference.block_codec.sum_wires(wires[:num_wires], numel, **options, op=op, dtype=dtype)
            assert same(total, expected)


def test_results_past_the_caches_are_those_of_the_caches():
    """From 16 MiB on, where the result lies on a boundary of 64 bytes, of 32, or of neither."""
    numel = 2**22 + 100
    wire = block_codec.quantize(normal(numel), bits=4)
    memory = torch.zeros(numel + 64)
    start = -memory.data_ptr() // 4 % 16
    expected = block_codec.dequantize(wire, numel, bits=4, dtype=torch.float16)  # of 8 MiB
    for shift in (0, 8, 1):
        out = memory[start + shift :][:numel]
        block_codec.dequantize(wire, numel, bits=4, out=out)
        assert torch.equal(out.half(), expected)


def digest():
    """Of what the kernels write for many options."""
    result = hashlib.sha256()
    for bits, block, dtype, hadamard in itertools.product(BITS, (32, 512), DTYPES, (False, True)):
        for rounding in roundings(bits):
            x, options = with_corners(2081, dtype), {"bits": bits, "block": block, "hadamard": hadamard}
            residual = torch.ones(2081) / 3
            wire = block_codec.quantize(x, **options, **rounding, residual=residual)
            wires = torch.stack([wire, wire])
            total = block_codec.sum_wires(wires, 2081, **options, dtype=dtype)
            again = block_codec.reduce_wires(wires, 2081, **options, **rounding, op="avg")
            for t in (wire, residual.nan_to_num(), total.float().nan_to_num(), again):
                result.update(t.numpy().tobytes())
    for block, op in itertools.product(BLOCKS, ("sum", "avg")):
        wires, options = wires_to_sum(block), {"numel": SUMMED, "bits": 4, "block": block, "op": op}
        result.update(block_codec.reduce_wires(wires, **options).numpy().tobytes())
        for dtype in DTYPES:  # zeros with their signs
            total = block_codec.sum_wires(wires, **options, dtype=dtype)
            result.update(total.float().nan_to_num().numpy().tobytes())
    return result.hexdigest()


@pytest.mark.parametrize("isa", BELOW)
def test_the_kernels_of_every_instruction_set_write_the_same_bytes(isa):
    """As those of the widest one of this processor, which is that of this process."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_block_codec_isa as test; print(test.digest())"
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    variables = os.environ | {"FMKERNELS_CPU_ISA": isa}
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest()


@pytest.mark.parametrize("isa", ["generic", "widest"])
def test_bytes_do_not_depend_on_whether_subnormal_numbers_are_flushed(isa):
    program = """
import torch
from fmkernels import block_codec
x = torch.ones(2048)
x[::3], x[1::3] = -1e-41, 1e-41
def wires():
    formats = (8, 4, 1, "float8_e4m3fn")
    made = [block_codec.quantize(x, bits=bits, residual=r) for bits in formats for r in (None, -x / 2)]
    return made + [block_codec.reduce_wires(torch.stack([made[2]] * 3), 2048, bits=4, op="avg")]
kept = wires()
assert torch.set_flush_denormal(True)
assert all(map(torch.equal, wires(), kept))
"""
    environment = os.environ | ({"FMKERNELS_CPU_ISA": "generic"} if isa == "generic" else {})
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, timeout=120)
