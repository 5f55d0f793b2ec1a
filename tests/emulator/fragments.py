# SPDX-License-Identifier: Apache-2.0
"""Fragment layouts of mma, written down from the PTX ISA's formulas shape by shape: element i of lane -> (row, column).

The emulator computes them from one rule; here they stand as the ISA prints them, so that each checks the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Layout = Callable[[int, int, int], tuple[int, int]]  # (g, t, i) -> (row, column), lane = 4 g + t


@dataclass(frozen=True)
class Fragments:
    """Number of elements that a lane holds, and where each stands, for the three matrices of a shape."""

    rows: int
    depth: int
    num_a: int
    a: Layout
    num_b: int
    b: Layout

    @property
    def num_c(self) -> int:
        return self.rows // 4

    def c(self, g: int, t: int, i: int) -> tuple[int, int]:
        if self.rows == 8:
            return g, t * 2 + i
        return (g if i < 2 else g + 8), t * 2 + (i & 1)


# Keyed by shape and bits of an element.
FRAGMENTS: dict[tuple[str, int], Fragments] = {
    ("m16n8k8", 16): Fragments(
        16, 8, 4, lambda g, t, i: (g if i in (0, 1) else g + 8, t * 2 + (i & 1)), 2, lambda g, t, i: (t * 2 + i, g)
    ),
    ("m16n8k16", 16): Fragments(
        16,
        16,
        8,
        lambda g, t, i: (g if i < 2 or 4 <= i < 6 else g + 8, t * 2 + (i & 1) + (8 if i >= 4 else 0)),
        4,
        lambda g, t, i: (t * 2 + (i & 1) + (8 if i >= 2 else 0), g),
    ),
    ("m16n8k4", 32): Fragments(16, 4, 2, lambda g, t, i: (g if i == 0 else g + 8, t), 1, lambda g, t, i: (t, g)),
    ("m16n8k8", 32): Fragments(
        16,
        8,
        4,
        lambda g, t, i: (g if i in (0, 2) else g + 8, t if i in (0, 1) else t + 4),
        2,
        lambda g, t, i: (t if i == 0 else t + 4, g),
    ),
    ("m8n8k4", 64): Fragments(8, 4, 1, lambda g, t, i: (g, t), 1, lambda g, t, i: (t, g)),
    ("m16n8k4", 64): Fragments(16, 4, 2, lambda g, t, i: (g if i == 0 else g + 8, t), 1, lambda g, t, i: (t, g)),
    ("m16n8k8", 64): Fragments(
        16,
        8,
        4,
        lambda g, t, i: (g if i in (0, 2) else g + 8, t if i in (0, 1) else t + 4),
        2,
        lambda g, t, i: (t + i * 4, g),
    ),
    ("m16n8k16", 64): Fragments(
        16,
        16,
        8,
        lambda g, t, i: (g, i * 2 + t) if i % 2 == 0 else (g + 8, i * 2 - 2 + t),
        4,
        lambda g, t, i: (t + i * 4, g),
    ),
    ("m8n8k16", 8): Fragments(8, 16, 4, lambda g, t, i: (g, t * 4 + i), 4, lambda g, t, i: (t * 4 + i, g)),
    ("m16n8k16", 8): Fragments(
        16, 16, 8, lambda g, t, i: (g if i < 4 else g + 8, t * 4 + (i & 3)), 4, lambda g, t, i: (t * 4 + i, g)
    ),
    ("m16n8k32", 8): Fragments(
        16,
        32,
        16,
        lambda g, t, i: (g if i < 4 or 8 <= i < 12 else g + 8, t * 4 + (i & 3) + (16 if i >= 8 else 0)),
        8,
        lambda g, t, i: (t * 4 + (i & 3) + (16 if i >= 4 else 0), g),
    ),
    ("m8n8k32", 4): Fragments(8, 32, 8, lambda g, t, i: (g, t * 8 + i), 8, lambda g, t, i: (t * 8 + i, g)),
    ("m16n8k32", 4): Fragments(
        16, 32, 16, lambda g, t, i: (g if i < 8 else g + 8, t * 8 + (i & 7)), 8, lambda g, t, i: (t * 8 + i, g)
    ),
    ("m16n8k64", 4): Fragments(
        16,
        64,
        32,
        lambda g, t, i: (g if i < 8 or 16 <= i < 24 else g + 8, t * 8 + (i & 7) + (32 if i >= 16 else 0)),
        16,
        lambda g, t, i: (t * 8 + (i & 7) + (32 if i >= 8 else 0), g),
    ),
    ("m8n8k128", 1): Fragments(8, 128, 32, lambda g, t, i: (g, t * 32 + i), 32, lambda g, t, i: (t * 32 + i, g)),
    ("m16n8k128", 1): Fragments(
        16, 128, 64, lambda g, t, i: (g if i < 32 else g + 8, t * 32 + (i & 31)), 32, lambda g, t, i: (t * 32 + i, g)
    ),
    ("m16n8k256", 1): Fragments(
        16,
        256,
        128,
        lambda g, t, i: (g if i < 32 or 64 <= i < 96 else g + 8, t * 32 + (i & 31) + (128 if i >= 64 else 0)),
        64,
        lambda g, t, i: (t * 32 + (i & 31) + (128 if i >= 32 else 0), g),
    ),
}

# B of the sparse shapes that no dense shape has: element i of lane -> (row, column).
SPARSE_B: dict[tuple[str, int], tuple[int, Layout]] = {
    ("m16n8k16", 16): (4, FRAGMENTS["m16n8k16", 16].b),
    ("m16n8k32", 16): (8, lambda g, t, i: (t * 2 + (i & 1) + 8 * (i // 2), g)),
    ("m16n8k8", 32): (2, FRAGMENTS["m16n8k8", 32].b),
    ("m16n8k16", 32): (4, lambda g, t, i: (t + 4 * i, g)),
    ("m16n8k32", 8): (8, FRAGMENTS["m16n8k32", 8].b),
    ("m16n8k64", 8): (16, lambda g, t, i: (t * 4 + (i & 3) + 16 * (i // 4), g)),
    ("m16n8k64", 4): (16, FRAGMENTS["m16n8k64", 4].b),
    ("m16n8k128", 4): (32, lambda g, t, i: (t * 8 + (i & 7) + 32 * (i // 8), g)),
}


def distribute(matrix: np.ndarray, num_elements: int, layout: Layout) -> np.ndarray:
    """[32, num_elements]: what each lane holds of a matrix."""
    return np.array([[matrix[layout(lane // 4, lane % 4, i)] for i in range(num_elements)] for lane in range(32)])


def collect(held: np.ndarray, shape: tuple[int, int], layout: Layout) -> np.ndarray:
    """The matrix whose elements the lanes hold, held [32, num_elements]."""
    matrix = np.zeros(shape, held.dtype)
    for lane in range(32):
        for i in range(held.shape[1]):
            matrix[layout(lane // 4, lane % 4, i)] = held[lane, i]
    return matrix


def pack(elements: np.ndarray, bits: int) -> np.ndarray:
    """[32, n] bit patterns of `bits` each -> [n * bits / 32, 32] registers; the first element in the lowest bits."""
    if bits == 64:
        return np.ascontiguousarray(elements.astype(np.uint64).T)
    per_register = 32 // bits
    groups = elements.astype(np.uint64).reshape(32, -1, per_register)
    words = (groups << (np.arange(per_register, dtype=np.uint64) * np.uint64(bits))).sum(-1)
    return np.ascontiguousarray(words.T.astype(np.uint32))


def unpack(registers: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of pack: [n, 32] registers -> [32, n * 32 / bits] bit patterns."""
    if bits in (32, 64):
        return registers.T.copy()
    per_register = 32 // bits
    shifts = np.arange(per_register, dtype=np.uint32) * np.uint32(bits)
    elements = registers.T[:, :, None] >> shifts & np.uint32((1 << bits) - 1)
    return elements.reshape(32, -1)
