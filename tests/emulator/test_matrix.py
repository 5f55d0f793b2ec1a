# SPDX-License-Identifier: Apache-2.0
"""mma, executed as PTX by one warp, against numpy products of matrices that fragments.py spreads over the
lanes."""

import numpy as np
import pytest
from fragments import FRAGMENTS, collect, distribute, pack, unpack
from mma_lanes import BITS, FP8, kernel, multiply, random_matrix, to_bits, to_numbers

import emulator


def product(shape: str, a_type: str, b_type: str, accumulator: str, modifier: str = "", tail: str = "", seed: int = 0):
    """One product of random matrices, and what it must be, both [rows, 8] in numbers."""
    rng = np.random.default_rng(seed)
    layout = FRAGMENTS[shape, BITS[a_type]]
    a = random_matrix(a_type, (layout.rows, layout.depth), rng)
    b = random_matrix(b_type, (layout.depth, 8), rng)
    c_bits = {"f16": 16, "f32": 32, "s32": 32, "f64": 64}[accumulator]
    if accumulator == "s32":
        c = rng.integers(0, 2**32, (layout.rows, 8), dtype=np.uint64)
        c[0, :4] = [2**31 - 1, 2**31, 2**31 - 5, 2**31 + 5]
    else:
        c = to_bits(accumulator, rng.integers(-64, 64, (layout.rows, 8)) / 4)
    instruction = f"mma.sync.aligned.{shape}.row.col{modifier}.{accumulator}.{a_type}.{b_type}.{accumulator}{tail}"
    d = multiply(
        instruction,
        pack(distribute(a, layout.num_a, layout.a), BITS[a_type]),
        pack(distribute(b, layout.num_b, layout.b), BITS[b_type]),
        pack(distribute(c, layout.num_c, layout.c), c_bits),
    )
    return collect(unpack(d, c_bits), (layout.rows, 8), layout.c), a, b, c


FLOATS = [
    ("m16n8k8", "f16", "f32"), ("m16n8k16", "f16", "f32"), ("m16n8k8", "f16", "f16"), ("m16n8k16", "f16", "f16"),
    ("m16n8k8", "bf16", "f32"), ("m16n8k16", "bf16", "f32"), ("m16n8k4", "tf32", "f32"), ("m16n8k8", "tf32", "f32"),
    ("m8n8k4", "f64", "f64"), ("m16n8k4", "f64", "f64"), ("m16n8k8", "f64", "f64"), ("m16n8k16", "f64", "f64"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "name", "accumulator"), FLOATS)
def test_float_products(shape, name, accumulator):
    d, a, b, c = product(shape, name, name, accumulator)
    expected = to_numbers(name, a) @ to_numbers(name, b) + to_numbers(accumulator, c)
    assert np.array_equal(d.astype(np.uint64), to_bits(accumulator, expected))


@pytest.mark.parametrize("accumulator", ["f32", "f16"])
@pytest.mark.parametrize("shape", ["m16n8k16", "m16n8k32"])
@pytest.mark.parametrize("b_type", FP8)
@pytest.mark.parametrize("a_type", FP8)
def test_fp8_products(a_type, b_type, shape, accumulator):
    d, a, b, c = product(shape, a_type, b_type, accumulator)
    expected = to_numbers(a_type, a) @ to_numbers(b_type, b) + to_numbers(accumulator, c)
    assert np.array_equal(d.astype(np.uint64), to_bits(accumulator, expected))


@pytest.mark.parametrize("clamp", ["", ".satfinite"])
@pytest.mark.parametrize("types", ["s8 s8", "s8 u8", "u8 s8", "u8 u8", "s4 s4", "s4 u4", "u4 s4", "u4 u4"])
def test_integer_products(types, clamp):
    a_type, b_type = types.split()
    for shape in ("m8n8k16", "m16n8k16", "m16n8k32") if "8" in types else ("m8n8k32", "m16n8k32", "m16n8k64"):
        d, a, b, c = product(shape, a_type, b_type, "s32", modifier=clamp)
        expected = to_numbers(a_type, a) @ to_numbers(b_type, b) + to_numbers("s32", c)
        expected = np.clip(expected, -(2**31), 2**31 - 1) if clamp else expected
        assert np.array_equal(d.astype(np.int64), expected & 0xFFFFFFFF)
        if clamp:  # ptxas takes it at the end as well
            assert np.array_equal(d, product(shape, a_type, b_type, "s32", tail=clamp)[0])


@pytest.mark.parametrize("operation", ["xor", "and"])
@pytest.mark.parametrize("shape", ["m8n8k128", "m16n8k128", "m16n8k256"])
def test_bit_products(shape, operation):
    d, a, b, c = product(shape, "b1", "b1", "s32", tail=f".{operation}.popc")
    combined = (np.bitwise_xor if operation == "xor" else np.bitwise_and)(a[:, :, None], b[None])
    assert np.array_equal(d.astype(np.uint64), combined.sum(1) + c & np.uint64(0xFFFFFFFF))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_every_half_is_multiplied_exactly(name):
    """256 patterns a product, times the identity, in float32: NaN is canonical, infinity meets no zero."""
    layout = FRAGMENTS["m16n8k16", 16]
    one = int(to_bits(name, np.array([1.0]))[0])
    for start in range(0, 65536, 128 * 37):
        a = (np.arange(start, start + 128) % 65536).astype(np.uint64).reshape(16, 8)
        d = np.zeros((16, 8), np.uint32)
        for column in range(8):  # one nonzero row of B: what stands in the other columns of A is zero
            only = np.zeros((16, 16), np.uint64)
            only[:, column] = a[:, column]
            b = np.zeros((16, 8), np.uint64)
            b[column, column] = one
            held = multiply(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32",
                pack(distribute(only, 8, layout.a), 16),
                pack(distribute(b, 4, layout.b), 16),
                np.zeros((4, 32), np.uint32),
            )
            d[:, column] = collect(unpack(held, 32), (16, 8), layout.c)[:, column]
        with np.errstate(all="ignore"):
            expected = to_numbers(name, a).astype(np.float32)
        finite = np.where(expected == 0, np.float32(0), expected)  # -0 + 0 = 0
        bits = finite.view(np.uint32).copy()
        bits[np.isnan(expected)] = 0x7FFFFFFF
        assert np.array_equal(d, bits)


def test_sums_are_float32_in_ascending_k():
    rng = np.random.default_rng(1)
    layout = FRAGMENTS["m16n8k16", 16]
    a, b = (to_bits("f16", rng.standard_normal(s) * 8) for s in ((16, 16), (16, 8)))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    registers = [pack(distribute(a, 8, layout.a), 16), pack(distribute(b, 4, layout.b), 16)]
    registers.append(pack(distribute(c.view(np.uint32), 4, layout.c), 32))
    d = collect(
        unpack(multiply("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", *registers), 32), (16, 8), layout.c
    )
    x, y, expected = to_numbers("f16", a), to_numbers("f16", b), c.astype(np.float32)
    for k in range(16):
        expected = (np.outer(x[:, k], y[k]) + expected.astype(np.float64)).astype(np.float32)
    assert np.array_equal(d.view(np.float32), expected)


def test_tf32_ignores_the_last_bits():
    rng = np.random.default_rng(2)
    layout = FRAGMENTS["m16n8k8", 32]
    a, b = (rng.standard_normal(s).astype(np.float32).view(np.uint32) for s in ((16, 8), (8, 8)))
    instruction, c = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", np.zeros((4, 32), np.uint32)
    full, cut = (
        multiply(
            instruction, *(pack(distribute(x & m, n, f), 32) for x, n, f in ((a, 4, layout.a), (b, 2, layout.b))), c
        )
        for m in (np.uint32(0xFFFFFFFF), np.uint32(0xFFFFE000))
    )
    assert np.array_equal(full, cut)


@pytest.mark.parametrize(
    "instruction",
    ["mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32", "mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32",
     "mma.sync.aligned.m16n8k16.col.row.f32.f16.f16.f32", "mma.sync.aligned.m16n8k16.row.col.satfinite.f32.f16.f16.f32",
     "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f32", "mma.m16n8k16.row.col.f32.f16.f16.f32"],
)  # fmt: skip
def test_unknown_products_are_errors_when_a_kernel_is_loaded(instruction):
    text = kernel(instruction, {"a": 4, "b": 2, "c": 4, "d": 4}, False, None)
    with pytest.raises(emulator.Error, match=r"no such matrix product.*mma"):
        emulator.Module(text).kernel("k")


def test_registers_are_counted():
    text = kernel("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", {"a": 2, "b": 2, "c": 4, "d": 4}, False, None)
    with pytest.raises(emulator.Error, match="expected 4 registers of a"):
        emulator.Module(text).kernel("k")
