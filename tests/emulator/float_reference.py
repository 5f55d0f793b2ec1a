# SPDX-License-Identifier: Apache-2.0
"""What arithmetic must give, by numpy or by exact fractions, and the bit patterns that it is tried on."""

import math
from fractions import Fraction

import numpy as np
import pytest

F32_EDGES = [
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x80800000, 0x3F800000, 0xBF800000,
    0x3F800001, 0x3F7FFFFF, 0x40490FDB, 0x7F7FFFFF, 0xFF7FFFFF, 0x7E800000, 0x7F000000, 0x7F800000, 0xFF800000,
    0x7FC00000, 0xFFC00001, 0x7F800001, 0x33800000, 0x4B7FFFFF, 0xCB800001,
]  # fmt: skip
F64_EDGES = [
    0, 1 << 63, 1, 0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x3FF0000000000000, 0xBFF0000000000000, 0x7FEFFFFFFFFFFFFF,
    0xFFEFFFFFFFFFFFFF, 0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000, 0x3CA0000000000000,
    0x400921FB54442D18,
]  # fmt: skip
F16_EDGES = [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x3C00, 0xBC00, 0x3C01, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFFFF]
BF16_EDGES = [0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x3F80, 0xBF80, 0x3F81, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF]

NAN32, NAN64, NAN16 = 0x7FFFFFFF, 0xFFF8000000000000, 0x7FFF


def patterns(edges: list[int], dtype: type, arity: int, num_random: int = 4000) -> list[np.ndarray]:
    """All combinations of the edges (of three: a slice of them), then random patterns, then numbers of like size."""
    rng = np.random.default_rng(arity)
    bits = 8 * np.dtype(dtype).itemsize
    grids = np.meshgrid(*[np.array(edges, dtype)] * arity)
    out = []
    near = rng.integers(0, 2**16, num_random)  # products and sums that cancel are more likely among few exponents
    for i, grid in enumerate(grids):
        flat = grid.ravel()[:: 1 if arity < 3 else 7]
        anything = rng.integers(0, 2**bits, num_random, dtype=np.uint64).astype(dtype)
        shift = {16: 0, 32: 13, 64: 42}[bits]
        like = ((near + rng.integers(0, 3, num_random)) << shift).astype(dtype) | dtype((i % 2) << (bits - 1))
        out.append(np.concatenate([flat, anything, like]))
    return out


def f32(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float32)


def f64(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float64)


def bits_of(x: np.ndarray, nan: int) -> np.ndarray:
    """Patterns of results, NaN canonical."""
    out = x.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize]).copy()
    out[np.isnan(x)] = nan
    return out


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x).astype(np.float32)


def saturate(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0)).astype(x.dtype)


def same(actual: np.ndarray, expected: np.ndarray, *sources: np.ndarray) -> None:
    wrong = np.flatnonzero(actual != expected)
    if wrong.size:
        i = wrong[0]
        at = ", ".join(hex(int(s[i])) for s in sources)
        pytest.fail(f"{wrong.size} differ; of ({at}): {int(actual[i]):#x}, expected {int(expected[i]):#x}")


_EXACTLY = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "rcp": lambda x: 1 / x,
    "fma": lambda x, y, z: x * y + z,
}
_IN_FLOAT = {
    "add": lambda x, y, z: x + y,
    "sub": lambda x, y, z: x - y,
    "mul": lambda x, y, z: x * y,
    "div": lambda x, y, z: x / y,
    "rcp": lambda x, y, z: np.float32(1) / x,
    "fma": lambda x, y, z: np.float64(x) * np.float64(y) + np.float64(z),
    "sqrt": lambda x, y, z: np.sqrt(x),
}


def exact_results(name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray):
    """Of each lane (kind, value): ("exact", Fraction), ("root", what to take it of), ("zero", sign or 0 of a sum that
    cancels), or ("special", float) where infinity, NaN or a division by zero decides."""
    for x, y, z in zip(f32(a), f32(b), f32(c), strict=True):
        with np.errstate(all="ignore"):
            special = _IN_FLOAT[name](x, y, z)
        used = {"fma": (x, y, z), "sqrt": (x,), "rcp": (x,)}.get(name, (x, y))
        if not all(np.isfinite(v) for v in used) or (name in ("div", "rcp") and used[-1] == 0):
            yield "special", special
            continue
        values = [Fraction(float(v)) for v in used]
        if name == "sqrt":
            yield ("root", values[0]) if x > 0 else ("special", special)
            continue
        value = _EXACTLY[name](*values)
        signs = [math.copysign(1, v) for v in used]
        if name in ("add", "sub", "fma") and value == 0:
            first = signs[0] * signs[1] if name == "fma" else signs[0]
            second = signs[2] if name == "fma" else signs[1] * (-1 if name == "sub" else 1)
            yield "zero", first if first == second else 0
            continue
        if value == 0:
            yield "zero", math.prod(signs)
            continue
        yield "exact", value


def step(result, rounding: str, mantissa: int = 23, bias: int = 127, nan: int = NAN32) -> int:
    """The pattern of an exact result rounded in a direction (rn: to nearest even)."""
    kind, value = result
    sign_bit = 1 << (mantissa + (8 if bias == 127 else 5))
    infinity = sign_bit - (1 << mantissa)
    if kind == "special":
        if math.isnan(value):
            return nan
        if math.isinf(value):
            return infinity | (sign_bit if value < 0 else 0)
        return sign_bit if math.copysign(1, value) < 0 else 0
    if kind == "zero":  # a sum that cancels is +0, downwards -0
        negative = value < 0 or (value == 0 and rounding == "rm")
        return sign_bit if negative else 0
    if kind == "root":
        scaled = value * Fraction(4) ** 200
        root = math.isqrt(scaled.numerator)
        exact = root * root == scaled.numerator and scaled.denominator == 1
        value = (Fraction(root) + (0 if exact else Fraction(1, 2))) / Fraction(2) ** 200
    negative, magnitude = value < 0, abs(value)
    leading = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** leading > magnitude:
        leading -= 1
    unit = Fraction(2) ** (max(leading, 1 - bias) - mantissa)
    whole, rest = divmod(magnitude, unit)
    rest /= unit
    up = {
        "rz": False, "rm": negative and rest > 0, "rp": not negative and rest > 0,
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1),
    }[rounding]  # fmt: skip
    bits = ((max(leading, 1 - bias) - (1 - bias)) << mantissa) + int(whole) + up
    if bits >= infinity:
        toward_zero = rounding == "rz" or (rounding == "rm" and not negative) or (rounding == "rp" and negative)
        bits = infinity - 1 if toward_zero else infinity
    return bits | (sign_bit if negative else 0)


def ordered(x: np.ndarray, y: np.ndarray, is_max: bool, nan: bool) -> np.ndarray:
    """PTX's min and max, -0 below +0."""
    with np.errstate(all="ignore"):
        first = np.where(x == y, np.signbit(x) == (not is_max), (x > y) == is_max)
    chosen = np.where(first, x, y)
    either = np.where(np.isnan(x), y, np.where(np.isnan(y), x, chosen))
    return np.where(np.isnan(x) | np.isnan(y), np.nan, either).astype(x.dtype) if nan else either.astype(x.dtype)


# ---- halves ----------------------------------------------------------------------------------------------------------

FORMATS = {"f16": (F16_EDGES, 10, 15), "bf16": (BF16_EDGES, 7, 127)}


def numbers(bits: np.ndarray, name: str) -> np.ndarray:
    if name == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def half_results(name: str, op: str, sources: list[np.ndarray]):
    """Exact results as `step` takes them."""
    for values in zip(*[numbers(s, name) for s in sources], strict=True):
        with np.errstate(all="ignore"):
            x, y = values[:2]
            special = {"add": x + y, "sub": x - y, "mul": x * y, "fma": x * y + values[-1]}[op]
        if not all(map(math.isfinite, values)):
            yield "special", special
            continue
        exact = _EXACTLY[op](*(Fraction(float(v)) for v in values))
        yield ("exact", exact) if exact != 0 else ("zero", math.copysign(1, special))
