# SPDX-License-Identifier: Apache-2.0
"""mma.sp, executed as PTX by one warp, against numpy products of the matrices that its metadata describe."""

import numpy as np
import pytest
from fragments import FRAGMENTS, SPARSE_B, collect, distribute, pack, unpack
from mma_lanes import BITS, multiply, random_matrix, to_bits, to_numbers

# Shape, types, accumulator. The compressed A lies as the dense A of half the depth.
SPARSE = [
    ("m16n8k16", "f16", "f32"), ("m16n8k32", "f16", "f32"), ("m16n8k32", "f16", "f16"), ("m16n8k16", "bf16", "f32"),
    ("m16n8k32", "bf16", "f32"), ("m16n8k8", "tf32", "f32"), ("m16n8k16", "tf32", "f32"), ("m16n8k32", "s8", "s32"),
    ("m16n8k64", "s8", "s32"), ("m16n8k64", "u4", "s32"), ("m16n8k128", "s4", "s32"), ("m16n8k64", "e4m3", "f32"),
]  # fmt: skip


def sparse_row(name: str, depth: int, rng: np.random.Generator) -> tuple[list[int], int]:
    """Columns of a row's nonzeros, and its metadata, lowest chunk in the lowest bits."""
    columns, metadata, shift = [], 0, 0
    if name == "tf32":  # one of two: 0b0100 the first, 0b1110 the second
        for chunk in range(depth // 2):
            second = int(rng.integers(0, 2))
            columns.append(2 * chunk + second)
            metadata |= (0b1110 if second else 0b0100) << shift
            shift += 4
        return columns, metadata
    size = 8 if BITS[name] == 4 else 4  # two of four, or two pairs of four pairs
    for chunk in range(depth // size):
        first, second = sorted(rng.choice(4, 2, replace=False).tolist())
        for index in (first, second):
            columns += [size * chunk + index] if size == 4 else [size * chunk + 2 * index, size * chunk + 2 * index + 1]
        metadata |= (first | second << 2) << shift
        shift += 4
    return columns, metadata


def place_metadata(rows: list[int], name: str, depth: int, selector: int) -> np.ndarray:
    """The metadata registers of the lanes, as the figures of the ISA show; other lanes hold what must not be read."""
    bits = {"tf32": 2 * depth}.get(name, depth // 2 if BITS[name] == 4 else depth)
    lanes = np.full(32, 0xFFFFFFFF, np.uint32)
    for g in range(8):
        low, high = rows[g], rows[g + 8]
        if bits == 16:
            lanes[4 * g + selector] = low | high << 16
        elif bits == 32 and BITS[name] >= 16:
            for half in range(2):
                part = (low >> 16 * half & 0xFFFF) | (high >> 16 * half & 0xFFFF) << 16
                lanes[4 * g + 2 * selector + half] = part
        elif bits == 32:
            lanes[4 * g + 2 * selector], lanes[4 * g + 2 * selector + 1] = low, high
        else:
            for half in range(2):
                lanes[4 * g + 2 * half] = low >> 32 * half & 0xFFFFFFFF
                lanes[4 * g + 2 * half + 1] = high >> 32 * half & 0xFFFFFFFF
    return lanes


@pytest.mark.parametrize(("shape", "name", "accumulator"), SPARSE)
def test_sparse_products(shape, name, accumulator):
    rng = np.random.default_rng(3)
    depth, bits = int(shape.split("k")[1]), BITS[name]
    half = FRAGMENTS[f"m16n8k{depth // 2}", bits]
    num_b, layout_b = SPARSE_B[shape, bits]
    row_bits = {"tf32": 2 * depth}.get(name, depth // 2 if bits == 4 else depth)
    for selector in range(64 // row_bits):
        nonzeros = random_matrix(name, (16, depth // 2), rng)
        b = random_matrix(name, (depth, 8), rng)
        rows = [sparse_row(name, depth, rng) for _ in range(16)]
        c_bits = 16 if accumulator == "f16" else 32
        c = (
            rng.integers(0, 2**20, (16, 8))
            if accumulator == "s32"
            else to_bits(accumulator, rng.integers(-9, 9, (16, 8)) / 2)
        )
        dense = np.zeros((16, depth))
        for r, (columns, _) in enumerate(rows):
            dense[r, columns] = to_numbers(name, nonzeros[r])
        held = multiply(
            f"mma.sp::ordered_metadata.sync.aligned.{shape}.row.col.{accumulator}.{name}.{name}.{accumulator}",
            pack(distribute(nonzeros, half.num_a, half.a), bits),
            pack(distribute(b, num_b, layout_b), bits),
            pack(distribute(c, 4, half.c), c_bits),
            place_metadata([metadata for _, metadata in rows], name, depth, selector),
            selector,
        )
        d = collect(unpack(held, c_bits), (16, 8), half.c)
        expected = dense @ to_numbers(name, b) + to_numbers(accumulator, c)
        if accumulator == "s32":
            assert np.array_equal(d.astype(np.int64), expected.astype(np.int64) & 0xFFFFFFFF)
        else:
            assert np.array_equal(d.astype(np.uint64), to_bits(accumulator, expected))


def test_what_the_metadata_leave_out_is_not_multiplied():
    """Infinity in a row of B that no nonzero of A meets."""
    layout, half = FRAGMENTS["m16n8k16", 16], FRAGMENTS["m16n8k8", 16]
    b = np.zeros((16, 8), np.uint64)
    b[3::4] = 0x7C00
    held = multiply(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        pack(distribute(np.full((16, 8), 0x3C00), half.num_a, half.a), 16),
        pack(distribute(b, 4, layout.b), 16),
        np.zeros((4, 32), np.uint32),
        np.full(32, 0x44444444, np.uint32),  # elements 0 and 1 of each four
        0,
    )
    assert not held.any()
