# SPDX-License-Identifier: Apache-2.0
"""Every arithmetic form of f32 and f64, executed as PTX: pairs of edge values and random bit patterns, against numpy
and, where numpy has no such rounding, against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from float_reference import (
    F32_EDGES,
    F64_EDGES,
    NAN32,
    NAN64,
    bits_of,
    exact_results,
    f32,
    f64,
    flush,
    ordered,
    patterns,
    same,
    saturate,
    step,
)  # fmt: skip
from ptx_lanes import load, run

import emulator


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    exact = exact_results("fma", *(x.astype(np.float32).view(np.uint32) for x in (a, b, c)))
    return np.array([step(result, "rn") for result in exact], np.uint32).view(np.float32)


NEAREST = {
    "add": lambda a, b, _: a + b,
    "sub": lambda a, b, _: a - b,
    "mul": lambda a, b, _: a * b,
    "fma": lambda a, b, c: fused(a, b, c),
}


# ---- f32 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modifiers", ["", ".ftz", ".sat", ".ftz.sat"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_f32_arithmetic_to_nearest_even(name, modifiers):
    a, b, c = patterns(F32_EDGES, np.uint32, 3)
    sources = (a, b, c) if name == "fma" else (a, b)
    rounding = ".rn" if name == "fma" else ""
    names = ", ".join(f"%{s}" for s in "abc"[: len(sources)])
    actual = run(f"{name}{rounding}{modifiers}.f32 %d, {names};", np.uint32, *sources)
    x = [flush(f32(s)) if "ftz" in modifiers else f32(s) for s in (a, b, c)]
    with np.errstate(all="ignore"):
        expected = NEAREST[name](*x)
    expected = flush(expected) if "ftz" in modifiers else expected
    expected = saturate(expected) if "sat" in modifiers else expected
    same(actual, bits_of(expected, NAN32), *sources)


@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma", "div", "sqrt", "rcp"])
def test_f32_arithmetic_in_other_directions(name, rounding):
    a, b, c = patterns(F32_EDGES, np.uint32, 3)
    arity = {"fma": 3, "sqrt": 1, "rcp": 1}.get(name, 2)
    names = ", ".join(f"%{s}" for s in "abc"[:arity])
    actual = run(f"{name}.{rounding}.f32 %d, {names};", np.uint32, *(a, b, c)[:arity])
    expected = np.array([step(x, rounding) for x in exact_results(name, a, b, c)], np.uint32)
    same(actual, expected, a, b, c)


@pytest.mark.parametrize("modifiers", ["", ".ftz"])
@pytest.mark.parametrize("name", ["div", "sqrt", "rcp"])
def test_f32_division_and_roots_to_nearest(name, modifiers):
    a, b = patterns(F32_EDGES, np.uint32, 2)
    sources = (a, b) if name == "div" else (a,)
    names = ", ".join(f"%{s}" for s in "ab"[: len(sources)])
    actual = run(f"{name}.rn{modifiers}.f32 %d, {names};", np.uint32, *sources)
    x, y = [flush(f32(s)) if modifiers else f32(s) for s in (a, b)]
    with np.errstate(all="ignore"):
        expected = {"div": lambda: x / y, "sqrt": lambda: np.sqrt(x), "rcp": lambda: np.float32(1) / x}[name]()
    same(actual, bits_of(flush(expected) if modifiers else expected, NAN32), *sources)


@pytest.mark.parametrize("modifiers", ["", ".NaN", ".ftz", ".xorsign.abs", ".ftz.NaN.xorsign.abs"])
@pytest.mark.parametrize("name", ["min", "max"])
def test_f32_min_max(name, modifiers):
    a, b = patterns(F32_EDGES, np.uint32, 2)
    actual = run(f"{name}{modifiers}.f32 %d, %a, %b;", np.uint32, a, b)
    x, y = [flush(f32(s)) if "ftz" in modifiers else f32(s) for s in (a, b)]
    sign = np.signbit(x) ^ np.signbit(y)
    if "xorsign" in modifiers:
        expected = ordered(np.abs(x), np.abs(y), name == "max", "NaN" in modifiers)
        expected = np.where(sign, -expected, expected).astype(np.float32)
    else:
        expected = ordered(x, y, name == "max", "NaN" in modifiers)
    same(actual, bits_of(expected, NAN32), a, b)


@pytest.mark.parametrize("body", ["neg.f32", "abs.f32", "neg.ftz.f32", "abs.ftz.f32"])
def test_f32_signs(body):
    (a,) = patterns(F32_EDGES, np.uint32, 1)
    bits = flush(f32(a)).view(np.uint32) if "ftz" in body else a
    bits = np.where(np.isnan(f32(a)), a, bits).astype(np.uint32)
    expected = bits ^ 0x80000000 if "neg" in body else bits & 0x7FFFFFFF
    same(run(f"{body} %d, %a;", np.uint32, a), expected, a)


def test_copysign_and_testp():
    a, b = patterns(F32_EDGES, np.uint32, 2)
    same(run("copysign.f32 %d, %a, %b;", np.uint32, a, b), (a & 0x80000000) | (b & 0x7FFFFFFF), a, b)
    d, e = patterns(F64_EDGES, np.uint64, 2)
    sign = np.uint64(1 << 63)
    same(run("copysign.f64 %d, %a, %b;", np.uint64, d, e), (d & sign) | (e & ~sign), d, e)
    tiny32, tiny64 = np.float32(2.0**-126), 2.0**-1022
    for x, bits, width, tiny in ((f32(a), a, 32, tiny32), (f64(d), d, 64, tiny64)):
        subnormal = (np.abs(x) < tiny) & (x != 0)
        properties = {
            "finite": np.isfinite(x), "infinite": np.isinf(x), "number": ~np.isnan(x), "notanumber": np.isnan(x),
            "normal": np.isfinite(x) & (np.abs(x) >= tiny), "subnormal": subnormal,
        }  # fmt: skip
        for name, expected in properties.items():
            actual = run(f"testp.{name}.f{width} %p, %a; selp.u32 %d, 1, 0, %p;", np.uint32, bits)
            same(actual, expected.astype(np.uint32), bits)


# ---- f64 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "sqrt", "rcp", "min", "max", "neg", "abs"])
def test_f64(name):
    a, b = patterns(F64_EDGES, np.uint64, 2)
    one = name in ("sqrt", "rcp", "neg", "abs")
    rounding = ".rn" if name in ("add", "mul", "div", "sqrt", "rcp") else ""
    actual = run(f"{name}{rounding}.f64 %d, {'%a' if one else '%a, %b'};", np.uint64, *((a,) if one else (a, b)))
    x, y = f64(a), f64(b)
    if name in ("neg", "abs"):
        sign = np.uint64(1 << 63)
        return same(actual, a ^ sign if name == "neg" else a & ~sign, a)
    with np.errstate(all="ignore"):
        expected = {
            "add": lambda: x + y, "sub": lambda: x - y, "mul": lambda: x * y, "div": lambda: x / y,
            "sqrt": lambda: np.sqrt(x), "rcp": lambda: 1 / x,
            "min": lambda: ordered(x, y, False, False), "max": lambda: ordered(x, y, True, False),
        }[name]()  # fmt: skip
    same(actual, bits_of(expected, NAN64), a, b)


def test_f64_fma_and_directions():
    a, b, c = [s[-3000:] for s in patterns(F64_EDGES, np.uint64, 3)]
    with np.errstate(all="ignore"):
        sizes = np.abs(f64(a) * f64(b)) + np.abs(f64(c))
    ok = np.isfinite(f64(a)) & np.isfinite(f64(b)) & np.isfinite(f64(c)) & (sizes < 1e300) & (sizes > 1e-290)
    a, b, c = a[ok], b[ok], c[ok]
    for rounding in ("rn", "rz", "rm", "rp"):
        actual = f64(run(f"fma.{rounding}.f64 %d, %a, %b, %c;", np.uint64, a, b, c))
        for x, y, z, result in zip(f64(a), f64(b), f64(c), actual, strict=True):
            exact = Fraction(x) * Fraction(y) + Fraction(z)
            below, above = Fraction(np.nextafter(result, -np.inf)), Fraction(np.nextafter(result, np.inf))
            r = Fraction(result)
            if rounding == "rm" or (rounding == "rz" and exact > 0):
                assert r <= exact < above
            elif rounding == "rp" or rounding == "rz":
                assert below < exact <= r
            else:
                assert abs(r - exact) <= min(abs(below - exact), abs(above - exact))


# ---- what is not known -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    ["add.rq.f32 %d, %a, %a;", "add.sat.f64 %l0, %l0, %l0;", "ex2.f32 %d, %a;", "tanh.approx.ftz.f32 %d, %a;",
     "div.rn.sat.f32 %d, %a, %a;", "max.xorsign.f32 %d, %a, %a;", "setp.f32 %p, %a, %a;", "add.f32 %d, %a;",
     "mul.sat.bf16 %h0, %h0, %h0;", "ex2.approx.bf16 %h0, %h0;", "testp.odd.f32 %p, %a;",
     "fma.rn.oob.f16 %h0, %h0, %h0, %h0;"],
)  # fmt: skip
def test_unknown_forms_are_errors_when_a_kernel_is_loaded(body):
    with pytest.raises(emulator.Error, match=body.split()[0].split(".")[0]):
        load(body, np.uint32, np.uint32)
