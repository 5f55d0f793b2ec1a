# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of f16 and bf16, alone and in pairs, executed as PTX, against exact fractions rounded once."""

import numpy as np
import pytest
from float_reference import (
    F16_EDGES,
    F32_EDGES,
    FORMATS,
    NAN16,
    NAN32,
    bits_of,
    exact_results,
    f32,
    half_results,
    numbers,
    ordered,
    patterns,
    same,
    step,
)  # fmt: skip
from ptx_lanes import run

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of NaN between floats


@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_half_arithmetic_is_rounded_once(name, op):
    edges, mantissa, bias = FORMATS[name]
    sources = patterns(edges, np.uint16, 3 if op == "fma" else 2)
    names = ", ".join(f"%{s}" for s in "abc"[: len(sources)])
    actual = run(f"{op}.rn.{name} %d, {names};", np.uint16, *sources)
    expected = [step(r, "rn", mantissa, bias, NAN16) for r in half_results(name, op, sources)]
    same(actual, np.array(expected, np.uint16), *sources)


def test_half_fma_where_two_roundings_would_differ():
    """Products next to a tie of the sum: rounding the float32 sum first would round the half to the wrong side."""
    rng = np.random.default_rng(0)
    for name, (_, mantissa, bias) in FORMATS.items():
        count, exponent = 3000, bias << mantissa
        a, b = [(exponent + rng.integers(0, 1 << mantissa, count)).astype(np.uint16) for _ in range(2)]
        c = (exponent + (rng.integers(mantissa, 2 * mantissa + 3, count) << mantissa)).astype(np.uint16)
        c = c + rng.integers(0, 1 << mantissa, count).astype(np.uint16) | np.uint16(0x8000) * rng.integers(
            0, 2, count
        ).astype(np.uint16)
        actual = run(f"fma.rn.{name} %d, %a, %b, %c;", np.uint16, a, b, c)
        expected = [step(r, "rn", mantissa, bias, NAN16) for r in half_results(name, "fma", [a, b, c])]
        same(actual, np.array(expected, np.uint16), a, b, c)


FORMS = ["add", "sub.rn", "mul", "fma.rn", "fma.rn.relu", "min", "max.NaN", "min.xorsign.abs", "abs", "neg"]
F16_FORMS = ["add.sat", "fma.rn.ftz", "mul.ftz.sat", "max.ftz"]


@pytest.mark.parametrize(
    "form", [*(f"{form}.{name}" for form in FORMS for name in FORMATS), *(f"{f}.f16" for f in F16_FORMS)]
)
def test_pairs_are_two_halves(form):
    name = form.split(".")[-1]
    low, high = (patterns(FORMATS[name][0], np.uint16, 3, 2000) for _ in range(2))
    high = [np.roll(h, 77) for h in high]
    pairs = [(h.astype(np.uint32) << 16) | lo for h, lo in zip(high, low, strict=True)]
    arity = 1 if form.split(".")[0] in ("abs", "neg") else 3 if "fma" in form else 2
    names = ", ".join(f"%{s}" for s in "abc"[:arity])
    actual = run(f"{form}x2 %d, {names};", np.uint32, *pairs[:arity])
    for part, source in ((actual & 0xFFFF, low), (actual >> 16, high)):
        same(part, run(f"{form} %d, {names};", np.uint16, *source[:arity]), *source[:arity])


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_half_modifiers(name):
    edges, _, _ = FORMATS[name]
    a, b = patterns(edges, np.uint16, 2)
    x, y = numbers(a, name), numbers(b, name)
    one = {"f16": 0x3C00, "bf16": 0x3F80}[name]
    for op, is_max in (("min", False), ("max", True)):
        for nan in ("", ".NaN"):
            expected = ordered(x, y, is_max, nan != "")
            first = np.where(expected == x, a, b)
            first = np.where((x == 0) & (y == 0), np.where(is_max, a & b, a | b), first)
            first[np.isnan(expected)] = NAN16
            same(run(f"{op}{nan}.{name} %d, %a, %b;", np.uint16, a, b), first.astype(np.uint16), a, b)
    zero = np.zeros_like(a)
    ones = np.full_like(a, one)
    plain = run(f"fma.rn.{name} %d, %a, %b, %c;", np.uint16, a, b, zero)
    relu = run(f"fma.rn.relu.{name} %d, %a, %b, %c;", np.uint16, a, b, zero)
    same(relu, np.where(plain == NAN16, plain, np.where(plain & 0x8000, 0, plain)).astype(np.uint16), a, b)
    nan = np.isnan(x) & (name == "f16")  # made canonical; bf16 keeps the payload
    same(run(f"neg.{name} %d, %a;", np.uint16, a), np.where(nan, NAN16, a ^ 0x8000).astype(np.uint16), a)
    same(run(f"abs.{name} %d, %a;", np.uint16, a), np.where(nan, NAN16, a & 0x7FFF).astype(np.uint16), a)
    if name == "f16":
        sat = run("mul.sat.f16 %d, %a, %b;", np.uint16, a, ones)
        expected = np.where(np.isnan(x) | (x <= 0), 0, np.where(x > 1, one, a))
        same(sat, expected.astype(np.uint16), a)
        ftz = run("mul.ftz.f16 %d, %a, %b;", np.uint16, a, ones)
        expected = np.where(np.isnan(x), NAN16, np.where(np.abs(x) < 2.0**-14, a & 0x8000, a))
        same(ftz, expected.astype(np.uint16), a)


def test_mixed_precision():
    (a,), (c,) = patterns(F16_EDGES, np.uint16, 1), patterns(F32_EDGES, np.uint32, 1)
    count = min(a.size, c.size)
    a, c = a[-count:], c[-count:]
    x = numbers(a, "f16").astype(np.float32)
    with np.errstate(all="ignore"):
        same(run("add.f32.f16 %d, %a, %b;", np.uint32, a, c), bits_of(x + f32(c), NAN32), a, c)
        same(run("sub.f32.f16 %d, %a, %b;", np.uint32, a, c), bits_of(x - f32(c), NAN32), a, c)
    for rounding in ("rn", "rz"):
        exact = exact_results("fma", x.view(np.uint32), x.view(np.uint32), c)
        expected = np.array([step(result, rounding) for result in exact], np.uint32)
        same(run(f"fma.{rounding}.f32.f16 %d, %a, %a, %b;", np.uint32, a, c), expected, a, c)
