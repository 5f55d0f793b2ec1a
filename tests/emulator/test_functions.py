# SPDX-License-Identifier: Apache-2.0
"""Approximate functions and comparisons, executed as PTX, against float64 and numpy."""

from fractions import Fraction

import numpy as np
import pytest
from float_reference import (
    BF16_EDGES,
    F16_EDGES,
    F32_EDGES,
    F64_EDGES,
    FORMATS,
    NAN16,
    NAN32,
    bits_of,
    f32,
    f64,
    flush,
    numbers,
    patterns,
    same,
    step,
)  # fmt: skip
from ptx_lanes import run

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of NaN between floats

FUNCTIONS = {
    "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "sqrt": np.sqrt,
    "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
}  # fmt: skip


@pytest.mark.parametrize("form", [*FUNCTIONS, *(f"{name}.ftz" for name in FUNCTIONS if name != "tanh")])
def test_f32_approximations(form):
    """Within one unit in the last place, which the ISA's bounds contain; special values exactly."""
    name, modifiers = form.removesuffix(".ftz"), ".ftz" if form.endswith(".ftz") else ""
    (a,) = patterns(F32_EDGES, np.uint32, 1, 20000)
    rng = np.random.default_rng(5)
    a = np.concatenate([a, (rng.standard_normal(20000) * 30).astype(np.float32).view(np.uint32)])
    a = np.concatenate([a, np.arange(-160, 131).astype(np.float32).view(np.uint32)])
    actual = f32(run(f"{name}.approx{modifiers}.f32 %d, %a;", np.uint32, a))
    x = flush(f32(a)) if modifiers else f32(a)
    with np.errstate(all="ignore"):
        exact = FUNCTIONS[name](x.astype(np.float64))
        expected = exact.astype(np.float32)
    expected = flush(expected) if modifiers else expected
    special = ~np.isfinite(expected) | (expected == 0)
    same(actual.view(np.uint32)[special], bits_of(expected[special], NAN32), a[special])
    ulp = np.spacing(np.abs(expected[~special]).astype(np.float32)).astype(np.float64)
    off = np.abs(actual[~special].astype(np.float64) - expected[~special].astype(np.float64)) / ulp
    assert off.max() <= 1


def test_exp2_of_integers_is_exact_and_nearly_always_correctly_rounded():
    whole = np.arange(-149, 128).astype(np.float32)
    assert (f32(run("ex2.approx.f32 %d, %a;", np.uint32, whole.view(np.uint32))) == 2.0 ** whole.astype(float)).all()
    x = np.random.default_rng(1).uniform(-140, 128, 50000).astype(np.float32)
    actual = f32(run("ex2.approx.f32 %d, %a;", np.uint32, x.view(np.uint32)))
    assert (actual != np.exp2(x.astype(np.float64)).astype(np.float32)).sum() <= 1


@pytest.mark.parametrize("modifiers", ["approx", "full", "approx.ftz", "full.ftz"])
def test_f32_fast_division(modifiers):
    a, b = patterns(F32_EDGES, np.uint32, 2)
    actual = run(f"div.{modifiers}.f32 %d, %a, %b;", np.uint32, a, b)
    x, y = [flush(f32(s)) if "ftz" in modifiers else f32(s) for s in (a, b)]
    with np.errstate(all="ignore"):
        expected = x / y
        if "approx" in modifiers:  # the reciprocal of so large a number is flushed
            flushed = (np.abs(y) > 2.0**126) & np.isfinite(y)
            expected = np.where(flushed, x * np.copysign(np.float32(0), y), expected).astype(np.float32)
    expected = flush(expected) if "ftz" in modifiers else expected
    same(actual, bits_of(expected, NAN32), a, b)


@pytest.mark.parametrize("name", ["rcp", "rsqrt"])
def test_f64_approximations(name):
    x = np.concatenate([np.random.default_rng(2).lognormal(0, 50, 5000), [0.0, -0.0, np.inf, np.nan, 1.0, 5e-324]])
    actual = f64(run(f"{name}.approx.ftz.f64 %d, %a;", np.uint64, x.view(np.uint64)))
    with np.errstate(all="ignore"):
        flushed = np.where(np.abs(x) < 2.0**-1022, np.copysign(0, x), x)
        exact = FUNCTIONS[name](flushed)
    finite = np.isfinite(exact) & (exact != 0)
    assert (np.abs(actual[finite] / exact[finite] - 1) < 2.0**-19).all()
    assert (actual.view(np.uint64)[finite] & np.uint64(0xFFFFFFFF) == 0).all()
    assert np.array_equal(actual[~finite], exact[~finite], equal_nan=True)


@pytest.mark.parametrize("form", ["ex2.approx.f16", "ex2.approx.ftz.bf16", "tanh.approx.f16", "tanh.approx.bf16"])
def test_half_functions_on_every_pattern(form):
    name = form.split(".")[-1]
    a = np.arange(65536, dtype=np.uint16)
    actual = run(f"{form} %d, %a;", np.uint16, a)
    with np.errstate(all="ignore"):
        exact = (np.exp2 if "ex2" in form else np.tanh)(numbers(a, name))
    mantissa, bias = FORMATS[name][1:]
    expected = np.array([step(("exact", Fraction(v)) if np.isfinite(v) and v else ("special", v), "rn", mantissa, bias,
                              NAN16) for v in exact], np.int64)  # fmt: skip
    if "ftz" in form:
        expected = np.where(expected < 0x80, 0, expected)
    assert np.abs(actual.astype(np.int64) - expected).max() <= 1
    pairs = (np.roll(a, 1).astype(np.uint32) << 16) | a
    both = run(f"{form}x2 %d, %a;", np.uint32, pairs)
    same(both, (np.roll(actual, 1).astype(np.uint32) << 16) | actual, pairs)


# ---- comparisons -----------------------------------------------------------------------------------------------------

ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def comparison(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    nan = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        return nan == (name == "nan")
    with np.errstate(all="ignore"):
        return np.where(nan, len(name) == 3, ORDERED[name[:2]](x, y))


ALL_COMPARISONS = [*ORDERED, *(f"{name}u" for name in ORDERED), "num", "nan"]


@pytest.mark.parametrize("how", ALL_COMPARISONS)
def test_comparisons(how):
    sources = {
        "f32": [s.view(np.uint32) for s in patterns(F32_EDGES, np.uint32, 2, 500)],
        "f64": patterns(F64_EDGES, np.uint64, 2, 500),
        "f16": patterns(F16_EDGES, np.uint16, 2, 500),
        "bf16": patterns(BF16_EDGES, np.uint16, 2, 500),
    }
    for name, (a, b) in sources.items():
        x, y = (f32(a), f32(b)) if name == "f32" else (f64(a), f64(b)) if name == "f64" else (
            numbers(a, name), numbers(b, name))  # fmt: skip
        holds = comparison(how, x, y)
        actual = run(f"setp.{how}.{name} %p, %a, %b; selp.u32 %d, 1, 0, %p;", np.uint32, a, b)
        same(actual, holds.astype(np.uint32), a, b)
        actual = run(f"set.{how}.u32.{name} %d, %a, %b;", np.uint32, a, b)
        same(actual, np.where(holds, 0xFFFFFFFF, 0).astype(np.uint32), a, b)
        actual = run(f"set.{how}.f32.{name} %d, %a, %b;", np.uint32, a, b)
        same(actual, np.where(holds, 0x3F800000, 0).astype(np.uint32), a, b)


def test_comparisons_with_two_results_and_a_third_operand():
    a, b = patterns(F32_EDGES, np.uint32, 2, 500)
    holds, other = comparison("ltu", f32(a), f32(b)), (a & 1).astype(bool)
    prepare = "and.b32 %w0, %a, 1; setp.ne.u32 %r, %w0, 0;"
    take = "selp.u32 %d, 1, 0, %p; selp.u32 %w1, 2, 0, %q; or.b32 %d, %d, %w1;"
    for name, combine in (("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)):
        for negation, c in (("", other), ("!", ~other)):
            body = f"{prepare} setp.ltu.{name}.f32 %p|%q, %a, %b, {negation}%r; {take}"
            expected = combine(holds, c) + 2 * combine(~holds, c)
            same(run(body, np.uint32, a, b), expected.astype(np.uint32), a, b)
    tiny = np.array([1, 0x80000001, 0x007FFFFF], np.uint32)
    zero = np.zeros(3, np.uint32)
    assert run("setp.eq.ftz.f32 %p, %a, %b; selp.u32 %d, 1, 0, %p;", np.uint32, tiny, zero).all()
    assert not run("setp.eq.f32 %p, %a, %b; selp.u32 %d, 1, 0, %p;", np.uint32, tiny, zero).any()


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_comparisons_of_pairs(name):
    low, high = patterns(FORMATS[name][0], np.uint16, 2, 500), patterns(FORMATS[name][0], np.uint16, 2, 500)
    high = [np.roll(h, 13) for h in high]
    a, b = [(h.astype(np.uint32) << 16) | lo for h, lo in zip(high, low, strict=True)]
    first = comparison("gt", numbers(low[0], name), numbers(low[1], name))
    second = comparison("gt", numbers(high[0], name), numbers(high[1], name))
    take = "selp.u32 %d, 1, 0, %p; selp.u32 %w1, 2, 0, %q; or.b32 %d, %d, %w1;"
    same(run(f"setp.gt.{name}x2 %p|%q, %a, %b; {take}", np.uint32, a, b), (first + 2 * second).astype(np.uint32), a, b)
    mask = run(f"set.gt.u32.{name}x2 %d, %a, %b;", np.uint32, a, b)
    same(mask, (first * 0xFFFF + second * 0xFFFF0000).astype(np.uint32), a, b)
    one = {"f16": 0x3C00, "bf16": 0x3F80}[name]
    ones = run(f"set.gt.{name}x2.{name}x2 %d, %a, %b;", np.uint32, a, b)
    same(ones, (first * one + second * (one << 16)).astype(np.uint32), a, b)
