# SPDX-License-Identifier: Apache-2.0
"""cvt, executed as PTX: every pattern of the 8- and 16-bit formats, random patterns and all ties of the others, against
numpy, torch and, for the roundings that neither has, the float_reference."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from float_reference import F32_EDGES, F64_EDGES, NAN16, NAN32, NAN64, bits_of, f32, f64, flush, patterns, same, step
from ptx_lanes import load, run

import emulator

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of NaN between floats

ALL_HALVES = np.arange(65536, dtype=np.uint16)
ALL_BYTES = np.arange(256, dtype=np.uint16)
BF16 = (ALL_HALVES.astype(np.uint32) << 16).view(np.float32)
F16 = ALL_HALVES.view(np.float16)
FP8 = {"e4m3": (torch.float8_e4m3fn, 448.0, 0x7F), "e5m2": (torch.float8_e5m2, 57344.0, 0x7F)}


def fp8_numbers(name: str) -> np.ndarray:
    return torch.arange(256).to(torch.uint8).view(FP8[name][0]).float().numpy()


def around_ties(values: np.ndarray) -> np.ndarray:
    """float32 patterns of the midpoints between neighbouring numbers of a format, and their neighbours."""
    values = np.unique(values[np.isfinite(values)].astype(np.float64))
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32).view(np.uint32)
    return np.concatenate([middle, middle + 1, middle - 1, values.astype(np.float32).view(np.uint32)])


def f32_patterns() -> np.ndarray:
    (anything,) = patterns(F32_EDGES, np.uint32, 1, 30000)
    return np.concatenate(
        [anything, around_ties(F16), around_ties(fp8_numbers("e4m3")), around_ties(fp8_numbers("e5m2"))]
    )


def exact(values: np.ndarray):
    """As `step` takes them; infinities apart, which directed roundings keep."""
    for v in values.astype(np.float64):
        yield ("exact", Fraction(v)) if np.isfinite(v) and v != 0 else ("special", v)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = torch.from_numpy(x.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).copy()
    bits[np.isnan(x)] = NAN16
    return bits


# ---- between floats --------------------------------------------------------------------------------------------------


def test_every_half_as_f32_and_f64():
    with np.errstate(all="ignore"):
        same(run("cvt.f32.f16 %d, %a;", np.uint32, ALL_HALVES), bits_of(F16.astype(np.float32), NAN32), ALL_HALVES)
        same(run("cvt.f64.f16 %d, %a;", np.uint64, ALL_HALVES), bits_of(F16.astype(np.float64), NAN64), ALL_HALVES)
        same(run("cvt.f32.bf16 %d, %a;", np.uint32, ALL_HALVES), BF16.view(np.uint32), ALL_HALVES)
        same(run("cvt.f64.bf16 %d, %a;", np.uint64, ALL_HALVES), bits_of(BF16.astype(np.float64), NAN64), ALL_HALVES)
        same(run("cvt.rn.f16.bf16 %d, %a;", np.uint16, ALL_HALVES), bits_of(BF16.astype(np.float16), NAN16), ALL_HALVES)
    same(run("cvt.rn.bf16.f16 %d, %a;", np.uint16, ALL_HALVES), to_bf16(F16.astype(np.float32)), ALL_HALVES)


def test_f32_to_halves():
    a = np.concatenate([f32_patterns(), around_ties(BF16.astype(np.float64))])
    with np.errstate(all="ignore"):
        half = bits_of(f32(a).astype(np.float16), NAN16)
    brain = to_bf16(f32(a))
    same(run("cvt.rn.f16.f32 %d, %a;", np.uint16, a), half, a)
    same(run("cvt.rn.bf16.f32 %d, %a;", np.uint16, a), brain, a)
    b = np.roll(a, 5)
    for name, low in (("f16", half), ("bf16", brain)):
        both = np.roll(low, 5).astype(np.uint32) << 16 | low
        same(run(f"cvt.rn.{name}x2.f32 %d, %b, %a;", np.uint32, a, b), both, a)
        relu = run(f"cvt.rn.relu.{name}x2.f32 %d, %b, %a;", np.uint32, a, b)
        positive = np.where((low & 0x8000) != 0, 0, low)
        same(relu, np.roll(positive, 5).astype(np.uint32) << 16 | positive, a)


@pytest.mark.parametrize(("to", "mantissa", "bias"), [("f16", 10, 15), ("bf16", 7, 127)])
def test_f32_to_halves_toward_zero_and_saturated(to, mantissa, bias):
    a = f32_patterns()[::7]
    expected = np.array([step(x, "rz", mantissa, bias, NAN16) for x in exact(f32(a))], np.uint16)
    same(run(f"cvt.rz.{to}.f32 %d, %a;", np.uint16, a), expected, a)
    nearest = np.array([step(x, "rn", mantissa, bias, NAN16) for x in exact(f32(a))], np.uint16)
    infinity = 0x7C00 if to == "f16" else 0x7F80
    finite = np.where((nearest & 0x7FFF) == infinity, nearest - 1, nearest).astype(np.uint16)
    same(run(f"cvt.rn.satfinite.{to}.f32 %d, %a;", np.uint16, a), finite, a)


@pytest.mark.parametrize("rounding", ["rn", "rz", "rm", "rp"])
def test_f64_to_shorter_floats(rounding):
    (a,) = patterns(F64_EDGES, np.uint64, 1, 1000)
    rng = np.random.default_rng(3)
    like = (rng.standard_normal(2000) * 2.0 ** rng.integers(-155, 130, 2000)).view(np.uint64)
    small = (rng.standard_normal(2000) * 2.0 ** rng.integers(-27, 17, 2000)).view(np.uint64)
    ties = (f32_patterns()[::17].view(np.float32).astype(np.float64) * (1 + 2.0**-25)).view(np.uint64)
    a = np.concatenate([a, like, small, ties])
    for to, dtype, mantissa, bias, nan in (("f32", np.uint32, 23, 127, NAN32), ("f16", np.uint16, 10, 15, NAN16)):
        expected = np.array([step(x, rounding, mantissa, bias, nan) for x in exact(f64(a))], dtype)
        same(run(f"cvt.{rounding}.{to}.f64 %d, %a;", dtype, a), expected, a)


def test_f32_and_f64():
    (a,) = patterns(F32_EDGES, np.uint32, 1)
    same(run("cvt.f64.f32 %d, %a;", np.uint64, a), bits_of(f32(a).astype(np.float64), NAN64), a)
    same(run("cvt.ftz.f64.f32 %d, %a;", np.uint64, a), bits_of(flush(f32(a)).astype(np.float64), NAN64), a)
    saturated = np.where(f32(a) > 0, np.minimum(f32(a), 1), 0).astype(np.float32)
    same(run("cvt.sat.f32.f32 %d, %a;", np.uint32, a), saturated.view(np.uint32), a)


@pytest.mark.parametrize(
    ("rounding", "function"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_floats_to_integral_floats(rounding, function):
    (a,), (d,) = patterns(F32_EDGES, np.uint32, 1, 9000), patterns(F64_EDGES, np.uint64, 1, 9000)
    a = np.concatenate([a, np.arange(-9, 9, 0.25).astype(np.float32).view(np.uint32)])
    d = np.concatenate([d, np.arange(-9, 9, 0.25).view(np.uint64)])
    with np.errstate(all="ignore"):
        same(run(f"cvt.{rounding}.f32.f32 %d, %a;", np.uint32, a), bits_of(function(f32(a)), NAN32), a)
        flushed = bits_of(function(flush(f32(a))), NAN32)
        same(run(f"cvt.{rounding}.ftz.f32.f32 %d, %a;", np.uint32, a), flushed, a)
        same(run(f"cvt.{rounding}.f64.f64 %d, %a;", np.uint64, d), bits_of(function(f64(d)), NAN64), d)
        half = bits_of(function(F16.astype(np.float32)).astype(np.float16), NAN16)
        same(run(f"cvt.{rounding}.f16.f16 %d, %a;", np.uint16, ALL_HALVES), half, ALL_HALVES)


# ---- fp8, tf32 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FP8)
def test_fp8(name):
    dtype, largest, nan = FP8[name]
    with np.errstate(all="ignore"):
        half = bits_of(fp8_numbers(name).astype(np.float16), NAN16).astype(np.uint32)
    pairs = ALL_BYTES | (np.roll(ALL_BYTES, 9) << 8)
    same(run(f"cvt.rn.f16x2.{name}x2 %d, %a;", np.uint32, pairs), half | np.roll(half, 9) << 16, pairs)

    def expected(x: np.ndarray) -> np.ndarray:
        bits = torch.from_numpy(x.copy()).clamp(-largest, largest).to(dtype).view(torch.uint8).numpy().copy()
        bits[np.isnan(x)] = nan
        return bits.astype(np.uint16)

    a = f32_patterns()
    b = np.roll(a, 3)
    both = expected(f32(b)) << 8 | expected(f32(a))
    same(run(f"cvt.rn.satfinite.{name}x2.f32 %d, %b, %a;", np.uint16, a, b), both, a, b)
    with np.errstate(all="ignore"):
        of_halves = expected(F16.astype(np.float32))
    halves = ALL_HALVES.astype(np.uint32) | np.roll(ALL_HALVES, 3).astype(np.uint32) << 16
    actual = run(f"cvt.rn.satfinite.{name}x2.f16x2 %d, %a;", np.uint16, halves)
    same(actual, of_halves | np.roll(of_halves, 3) << 8, halves)
    relu = run(f"cvt.rn.satfinite.relu.{name}x2.f32 %d, %a, %a;", np.uint16, a)
    positive = np.where(expected(f32(a)) & 0x80, 0, expected(f32(a)))
    same(relu, (positive << 8 | positive).astype(np.uint16), a)


def test_tf32():
    a = f32_patterns()
    nan = np.isnan(f32(a))
    away = np.where(nan, NAN32, (a + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).astype(np.uint32)
    same(run("cvt.rna.tf32.f32 %d, %a;", np.uint32, a), away, a)
    for rounding in ("rn", "rz"):
        expected = np.array([step(x, rounding, 10, 127, 0) for x in exact(f32(a[::7]))], np.uint32) << 13
        expected[nan[::7]] = NAN32
        same(run(f"cvt.{rounding}.tf32.f32 %d, %a;", np.uint32, a[::7]), expected, a[::7])
    finite = np.where((away & 0x7FFFFFFF) == 0x7F800000, away - 0x2000, away).astype(np.uint32)
    same(run("cvt.rna.satfinite.tf32.f32 %d, %a;", np.uint32, a), finite, a)


# ---- integers --------------------------------------------------------------------------------------------------------

INTEGERS = {f"{sign}{bits}": (bits, sign == "s") for bits in (8, 16, 32, 64) for sign in "us"}


def clamp(value: float, bits: int, signed: bool, from_f64: bool) -> int:
    """An integral float, or NaN, as the pattern of an integer type extended to 64 bits."""
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if np.isnan(value):
        result = 0 if not from_f64 and bits < 64 else (low if signed else 1 << (bits - 1))
    else:
        result = low if value <= low else high if value >= high else int(value)
    return result & (1 << 64) - 1


@pytest.mark.parametrize("to", INTEGERS)
def test_floats_to_integers(to):
    bits, signed = INTEGERS[to]
    limits = [s * 2.0**e + d for s in (1, -1) for e in (7, 8, 15, 16, 31, 32, 63, 64) for d in (-1, -0.5, 0, 0.5, 1)]
    near = np.concatenate([np.arange(-5, 5, 0.25), limits])
    (a,), (d,) = patterns(F32_EDGES, np.uint32, 1, 1500), patterns(F64_EDGES, np.uint64, 1, 1500)
    a = np.concatenate([a, near.astype(np.float32).view(np.uint32)])
    d = np.concatenate([d, near.view(np.uint64)])
    register = np.uint64 if bits == 64 else np.uint32
    for rounding, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        for name, source, values in (("f32", a, f32(a)), ("f64", d, f64(d)), ("f16", ALL_HALVES[::13], F16[::13]),
                                     ("bf16", ALL_HALVES[::13], BF16[::13])):  # fmt: skip
            with np.errstate(all="ignore"):
                whole = function(values.astype(np.float64))
            expected = np.array([clamp(v, bits, signed, name == "f64") for v in whole], np.uint64).astype(register)
            same(run(f"cvt.{rounding}.{to}.{name} %d, %a;", register, source), expected, source)


@pytest.mark.parametrize("source", INTEGERS)
def test_integers_to_floats(source):
    bits, signed = INTEGERS[source]
    rng = np.random.default_rng(bits)
    wide = rng.integers(0, 2**64, 3000, dtype=np.uint64) >> rng.integers(0, 64, 3000).astype(np.uint64)
    edges = [0, 1, 2**bits - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1, 2**24 + 1 & 2**bits - 1]
    wide = np.concatenate([wide, np.array(edges, np.uint64)])
    register = wide.astype(np.uint64 if bits == 64 else np.uint32)
    values = [int(v) & (1 << bits) - 1 for v in wide]
    values = [v - (1 << bits) if signed and v >> (bits - 1) else v for v in values]
    for rounding in ("rn", "rz", "rm", "rp"):
        for to, dtype, mantissa, bias in (
            ("f32", np.uint32, 23, 127),
            ("f16", np.uint16, 10, 15),
            ("bf16", np.uint16, 7, 127),
        ):
            expected = [
                step(("exact", Fraction(v)) if v else ("special", 0.0), rounding, mantissa, bias) for v in values
            ]
            same(run(f"cvt.{rounding}.{to}.{source} %d, %a;", dtype, register), np.array(expected, dtype), wide)
    with np.errstate(all="ignore"):
        expected = np.array([float(v) for v in values])
    same(run(f"cvt.rn.f64.{source} %d, %a;", np.uint64, register), expected.view(np.uint64), wide)


def test_integers_to_integers():
    rng = np.random.default_rng(8)
    wide = rng.integers(0, 2**64, 500, dtype=np.uint64) >> rng.integers(0, 64, 500).astype(np.uint64)
    edges = [0, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31, 2**63]
    wide = np.concatenate([wide, ~wide, np.array(edges, np.uint64)])
    for source, (from_bits, from_signed) in INTEGERS.items():
        values = [int(v) & (1 << from_bits) - 1 for v in wide]
        values = [v - (1 << from_bits) if from_signed and v >> (from_bits - 1) else v for v in values]
        for to, (bits, signed) in INTEGERS.items():
            low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
            wrapped = [v & (1 << bits) - 1 for v in values]
            wrapped = [v - (1 << bits) if signed and v >> (bits - 1) else v for v in wrapped]
            clamped = [min(max(v, low), high) for v in values]
            # Registers as narrow as the types, and wider ones, which take the result extended.
            narrow = [np.dtype(f"u{max(width, 16) // 8}").type for width in (from_bits, bits)]
            for register, result in ((np.uint64, np.uint64), narrow):
                for modifier, expected in (("", wrapped), (".sat", clamped)):
                    patterns_of = np.array([v & (1 << 64) - 1 for v in expected], np.uint64).astype(result)
                    actual = run(f"cvt{modifier}.{to}.{source} %d, %a;", result, wide.astype(register))
                    same(actual, patterns_of, wide)


def test_pack():
    rng = np.random.default_rng(4)
    a, b = (rng.integers(-(2**31), 2**31, 2000) >> rng.integers(0, 32, 2000) for _ in range(2))
    c = rng.integers(0, 2**32, 2000, dtype=np.uint64).astype(np.uint32)
    sources = [a.astype(np.int32).view(np.uint32), b.astype(np.int32).view(np.uint32)]
    for to, bits in (("u16", 16), ("s16", 16), ("u8", 8), ("s8", 8), ("u4", 4), ("s4", 4), ("u2", 2), ("s2", 2)):
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
        first, second = (np.clip(x, low, high) & (1 << bits) - 1 for x in (a, b))
        expected = first << bits | second
        if bits == 16:
            actual = run(f"cvt.pack.sat.{to}.s32 %d, %a, %b;", np.uint32, *sources)
        else:
            expected = c.astype(np.int64) << 2 * bits & 0xFFFFFFFF | expected
            actual = run(f"cvt.pack.sat.{to}.s32.b32 %d, %a, %b, %c;", np.uint32, *sources, c)
        same(actual, expected.astype(np.uint32), *sources)


@pytest.mark.parametrize(
    "body",
    ["cvt.s32.f32 %d, %a;", "cvt.rn.s32.f32 %d, %a;", "cvt.f16.f32 %h0, %a;", "cvt.rn.rz.f16.f32 %h0, %a;",
     "cvt.f32.s32 %d, %a;", "cvt.rn.e4m3x2.e5m2x2 %h0, %h1;", "cvt.rs.f16x2.f32 %d, %a, %a, %a;",
     "cvt.rn.satfinite.f32.f64 %d, %l0;",
     "cvt.rn.f32.f64 %d, %a;", "cvt.pack.u8.s32.b32 %d, %a, %a, %a;", "cvt.rn.b32.f32 %d, %a;"],
)  # fmt: skip
def test_unknown_conversions_are_errors_when_a_kernel_is_loaded(body):
    with pytest.raises(emulator.Error, match="cvt"):
        load(body, np.uint32, np.uint32)
