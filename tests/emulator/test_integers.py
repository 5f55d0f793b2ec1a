# SPDX-License-Identifier: Apache-2.0
"""Every integer form, executed as PTX: pairs of edge values and random bit patterns, against Python's integers."""

from collections.abc import Callable

import numpy as np
import pytest
from float_reference import same
from ptx_lanes import SOURCES, load, run

import emulator

DTYPES = {16: np.uint16, 32: np.uint32, 64: np.uint64}
ALL_TYPES = ["u16", "s16", "u32", "s32", "u64", "s64"]
WIDE_TYPES = ["u32", "s32", "u64", "s64"]


def bits(name: str) -> int:
    return int(name[1:])


def is_signed(name: str) -> bool:
    return name[0] == "s"


def numbers(patterns: np.ndarray, name: str) -> list[int]:
    """The integers that bit patterns of any width mean in the low bits of type `name`."""
    return [wrap(int(x), bits(name), is_signed(name)) for x in patterns]


def wrap(x: int, width: int, signed: bool = False) -> int:
    x &= (1 << width) - 1
    return x - (1 << width) if signed and x >> (width - 1) else x


def clamp(x: int, width: int, signed: bool) -> int:
    low = -(1 << (width - 1)) if signed else 0
    return min(max(x, low), low + (1 << width) - 1)


def sources(width: int, count: int, num_random: int = 1000, seed: int = 0) -> list[np.ndarray]:
    """All pairs of edges, then random patterns of random lengths; a third and later source at random."""
    rng = np.random.default_rng(seed + width)
    top = 1 << (width - 1)
    edges = [
        0,
        1,
        2,
        3,
        7,
        8,
        31,
        32,
        33,
        63,
        64,
        65,
        255,
        256,
        top - 2,
        top - 1,
        top,
        top + 1,
        2 * top - 2,
        2 * top - 1,
    ]
    edges = [x & (2 * top - 1) for x in edges]
    pairs = [[x for x in edges for _ in edges], edges * len(edges)]
    result = []
    for i in range(count):
        random = rng.integers(0, 2**64, num_random, np.uint64) >> rng.integers(64 - width, 64, num_random, np.uint64)
        chosen = pairs[i] if i < 2 else rng.choice(np.array(edges, np.uint64), len(edges) ** 2)
        result.append(np.concatenate([np.array(chosen, np.uint64), random]).astype(DTYPES[width]))
    return result


def check(form: str, function: Callable[..., int], types: list[str], *arrays: np.ndarray) -> None:
    """`form` on the arrays, of types[1:], gives the low bits of function(integers) in a register of types[0]."""
    operands = ", ".join(f"%{name}" for name in SOURCES[: len(arrays)])
    result = DTYPES[bits(types[0])]
    actual = run(f"{form} %d, {operands};", result, *arrays)
    columns = [numbers(array, name) for array, name in zip(arrays, types[1:], strict=True)]
    expected = [wrap(function(*row), bits(types[0])) for row in zip(*columns, strict=True)]
    same(actual, np.array(expected, np.uint64).astype(result), *arrays)


def divided(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


@pytest.mark.parametrize("name", ALL_TYPES)
def test_arithmetic(name):
    a, b, c = sources(bits(name), 3)
    n = bits(name)
    for op, function in {
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
        "mul.lo": lambda x, y: x * y,
        "mul.hi": lambda x, y: x * y >> n,
        "min": min,
        "max": max,
    }.items():
        check(f"{op}.{name}", function, [name] * 3, a, b)
    for op, function in {
        "mad.lo": lambda x, y, z: x * y + z,
        "mad.hi": lambda x, y, z: (x * y >> n) + z,
        "sad": lambda x, y, z: abs(x - y) + z,
    }.items():
        check(f"{op}.{name}", function, [name] * 4, a, b, c)
    divisible = [i for i, y in enumerate(numbers(b, name)) if y]
    for op, function in {"div": divided, "rem": lambda x, y: x - divided(x, y) * y}.items():
        check(f"{op}.{name}", function, [name] * 3, a[divisible], b[divisible])
    if is_signed(name):
        check(f"abs.{name}", abs, [name] * 2, a)
        check(f"neg.{name}", lambda x: -x, [name] * 2, a)
    if n < 64:
        wide = f"{name[0]}{2 * n}"
        (long,) = sources(2 * n, 1, num_random=1000)
        check(f"mul.wide.{name}", lambda x, y: x * y, [wide, name, name], a, b)
        check(f"mad.wide.{name}", lambda x, y, z: x * y + z, [wide, name, name, wide], a, b, long)


def test_saturation():
    a, b, c = sources(32, 3)
    for op, function in {
        "add": lambda x, y: x + y,
        "sub": lambda x, y: x - y,
    }.items():
        check(f"{op}.sat.s32", lambda x, y, f=function: clamp(f(x, y), 32, True), ["s32"] * 3, a, b)
    check("mad.hi.sat.s32", lambda x, y, z: clamp((x * y >> 32) + z, 32, True), ["s32"] * 4, a, b, c)
    check("min.relu.s32", lambda x, y: max(min(x, y), 0), ["s32"] * 3, a, b)
    check("max.relu.s32", lambda x, y: max(x, y, 0), ["s32"] * 3, a, b)


@pytest.mark.parametrize("name", ["u32", "s32"])
def test_24_bits(name):
    a, b, c = sources(32, 3)

    def product(x: int, y: int) -> int:
        return wrap(x, 24, is_signed(name)) * wrap(y, 24, is_signed(name))

    check(f"mul24.lo.{name}", product, [name] * 3, a, b)
    check(f"mul24.hi.{name}", lambda x, y: product(x, y) >> 16, [name] * 3, a, b)
    check(f"mad24.lo.{name}", lambda x, y, z: product(x, y) + z, [name] * 4, a, b, c)
    check(f"mad24.hi.{name}", lambda x, y, z: (product(x, y) >> 16) + z, [name] * 4, a, b, c)
    if is_signed(name):
        saturated = lambda x, y, z: clamp((product(x, y) >> 16) + z, 32, True)  # noqa: E731
        check("mad24.hi.sat.s32", saturated, [name] * 4, a, b, c)


@pytest.mark.parametrize("width", [32, 64])
def test_carries(width):
    """The upper halves of a sum, a difference and a product of twice the width."""
    low, high, other_low, other_high = sources(width, 4)
    result, t, r = DTYPES[width], f"u{width}", "%w0" if width == 32 else "%l0"
    halves = list(zip(*([int(x) for x in s] for s in (low, high, other_low, other_high)), strict=True))
    for op, sign in (("add", 1), ("sub", -1)):
        expected = [((h << width | x) + sign * (h2 << width | x2)) >> width for x, h, x2, h2 in halves]
        body = f"{op}.cc.{t} {r}, %a, %c; {op}c.{t} %d, %b, %e;"
        actual = run(body, result, low, high, other_low, other_high)
        same(actual, np.array([wrap(x, width) for x in expected], result), low, high, other_low, other_high)
    expected = [((x * y + z) >> width) + 5 for x, y, z, _ in halves]
    body = f"mad.lo.cc.{t} {r}, %a, %b, %c; madc.hi.{t} %d, %a, %b, 5;"
    actual = run(body, result, low, high, other_low)
    same(actual, np.array([wrap(x, width) for x in expected], result), low, high, other_low)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_logic_and_shifts(width):
    a, b = sources(width, 2)
    u, s = f"u{width}", f"s{width}"
    for op, function in {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}.items():
        check(f"{op}.b{width}", function, [u] * 3, a, b)
    check(f"not.b{width}", lambda x: ~x, [u] * 2, a)
    check(f"cnot.b{width}", lambda x: int(x == 0), [u] * 2, a)
    counts = np.arange(a.size, dtype=np.uint32) % 70
    counts[-3:] = [2**31, 2**32 - 1, 1 << 8]
    check(f"shl.b{width}", lambda x, n: x << n if n < width else 0, [u, u, "u32"], a, counts)
    check(f"shr.{u}", lambda x, n: x >> n, [u, u, "u32"], a, counts)
    check(f"shr.{s}", lambda x, n: x >> n, [s, s, "u32"], a, counts)
    if width > 16:
        check(f"popc.b{width}", lambda x: x.bit_count(), ["u32", u], a)
        check(f"clz.b{width}", lambda x: width - x.bit_length(), ["u32", u], a)
        check(f"brev.b{width}", lambda x: int(f"{x:0{width}b}"[::-1], 2), [u, u], a)


def test_three_operand_logic():
    a, b, c = sources(32, 3, num_random=200)
    rng = np.random.default_rng(3)
    for table in [0, 255, 0x96, 0xE8, *rng.integers(0, 256, 20)]:

        def of_table(x, y, z, table=int(table)):
            return sum((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | z >> i & 1) & 1) << i for i in range(32))

        body = f"lop3.b32 %d, %a, %b, %c, {int(table)};"
        expected = [of_table(int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]
        same(run(body, np.uint32, a, b, c), np.array(expected, np.uint32), a, b, c)
        for op in ("or", "and"):
            body = f"""setp.lt.u32 %q, %a, %b; lop3.{op}.b32 %w0|%p, %a, %b, %c, {int(table)}, %q;
                       selp.u32 %d, 1, 0, %p;"""
            holds = [(x != 0) & (p < q) if op == "and" else (x != 0) | (p < q)
                     for x, p, q in zip(expected, a, b, strict=True)]  # fmt: skip
            same(run(body, np.uint32, a, b, c), np.array(holds, np.uint32), a, b, c)


@pytest.mark.parametrize("name", WIDE_TYPES)
def test_bit_fields(name):
    """Positions and lengths to 255 and beyond, of which eight bits count."""
    n, signed = bits(name), is_signed(name)
    a, b = sources(n, 2)
    rng = np.random.default_rng(1)
    position, length = [rng.choice([0, 1, 5, n - 1, n, n + 1, 255, 256, *range(2, n)], a.size).astype(np.uint32)
                        for _ in range(2)]  # fmt: skip

    def extracted(x: int, at: int, count: int) -> int:
        at, count = at & 255, count & 255
        sign = x >> min(at + count - 1, n - 1) & 1 if signed and count else 0
        return sum((x >> (at + i) & 1 if i < count and at + i < n else sign) << i for i in range(n))

    def inserted(x: int, into: int, at: int, count: int) -> int:
        at, count = at & 255, count & 255
        for i in range(min(count, max(n - at, 0))):
            into = into & ~(1 << (at + i)) | (x >> i & 1) << (at + i)
        return into

    check(f"bfe.{name}", extracted, [name, name, "u32", "u32"], a, position, length)
    if not signed:
        check(f"bfi.b{n}", inserted, [name, name, name, "u32", "u32"], a, b, position, length)

    def highest(x: int) -> int:
        return (~x if x < 0 else x).bit_length() - 1

    check(f"bfind.{name}", highest, ["u32", name], a)
    check(f"bfind.shiftamt.{name}", lambda x: n - 1 - highest(x) if highest(x) >= 0 else -1, ["u32", name], a)


def test_funnel_shifts_masks_and_extensions():
    a, b = sources(32, 2)
    counts = np.arange(a.size, dtype=np.uint32) % 70
    for mode, of in (("clamp", lambda n: min(n, 32)), ("wrap", lambda n: n & 31)):
        shapes = ["u32"] * 4
        check(f"shf.l.{mode}.b32", lambda x, y, n, of=of: (y << 32 | x) << of(n) >> 32, shapes, a, b, counts)
        check(f"shf.r.{mode}.b32", lambda x, y, n, of=of: (y << 32 | x) >> of(n), shapes, a, b, counts)
        check(f"szext.{mode}.u32", lambda x, n, of=of: wrap(x, of(n)), ["u32"] * 3, a, counts)
        sign_extended = lambda x, n, of=of: wrap(x, of(n), True) if of(n) else 0  # noqa: E731
        check(f"szext.{mode}.s32", sign_extended, ["s32", "s32", "u32"], a, counts)
        check(
            f"bmsk.{mode}.b32",
            lambda x, n, of=of: ((1 << of(n)) - 1) << of(x),
            ["u32"] * 3,
            counts,
            counts[::-1].copy(),
        )


def test_nth_bits():
    """fns: the n-th set bit from a position on, upwards or downwards."""
    mask, base = sources(32, 2)
    base = base & 31
    offset = np.random.default_rng(2).integers(-6, 7, mask.size).astype(np.int32).view(np.uint32)

    def found(m: int, at: int, n: int) -> int:
        if n == 0:
            return at if m >> at & 1 else -1
        places = range(at, 32) if n > 0 else range(at, -1, -1)
        return dict(enumerate((i for i in places if m >> i & 1), 1)).get(abs(n), -1)

    check("fns.b32", found, ["u32", "u32", "u32", "s32"], mask, base, offset)


PERMUTATIONS = {
    "f4e": lambda n: [n, n + 1, n + 2, n + 3],
    "b4e": lambda n: [n, n - 1, n - 2, n - 3],
    "rc8": lambda n: [n] * 4,
    "ecl": lambda n: [max(i, n) for i in range(4)],
    "ecr": lambda n: [min(i, n) for i in range(4)],
    "rc16": lambda n: [0, 1, 0, 1] if n % 2 == 0 else [2, 3, 2, 3],
}


def test_byte_permutations():
    a, b, c = sources(32, 3)

    def permuted(x: int, y: int, selector: int) -> int:
        both = (y << 32 | x).to_bytes(8, "little")
        picked = [(both[n & 7], n & 8) for n in (selector >> 4 * i & 15 for i in range(4))]
        return int.from_bytes([byte if not sign else 255 * (byte >> 7) for byte, sign in picked], "little")

    check("prmt.b32", permuted, ["u32"] * 4, a, b, c)
    for mode, places in PERMUTATIONS.items():

        def special(x, y, selector, places=places):
            both = (y << 32 | x).to_bytes(8, "little")
            return int.from_bytes([both[i % 8] for i in places(selector & 3)], "little")

        check(f"prmt.b32.{mode}", special, ["u32"] * 4, a, b, c)


def elements(x: int, width: int, signed: bool) -> list[int]:
    return [wrap(x >> i, width, signed) for i in range(0, 32, width)]


@pytest.mark.parametrize("a_type", ["u32", "s32"])
@pytest.mark.parametrize("b_type", ["u32", "s32"])
def test_dot_products(a_type, b_type):
    a, b, c = sources(32, 3)
    signs = is_signed(a_type), is_signed(b_type)

    def four(x, y, z):
        return sum(p * q for p, q in zip(elements(x, 8, signs[0]), elements(y, 8, signs[1]), strict=True)) + z

    check(f"dp4a.{a_type}.{b_type}", four, ["u32"] * 4, a, b, c)
    for i, half in enumerate(("lo", "hi")):

        def two(x, y, z, i=i):
            bytes_of = elements(y, 8, signs[1])[2 * i : 2 * i + 2]
            return sum(p * q for p, q in zip(elements(x, 16, signs[0]), bytes_of, strict=True)) + z

        check(f"dp2a.{half}.{a_type}.{b_type}", two, ["u32"] * 4, a, b, c)


VIDEO = {
    "vadd": lambda x, y: x + y,
    "vsub": lambda x, y: x - y,
    "vavrg": lambda x, y: (x + y + (x + y >= 0)) >> 1,
    "vabsdiff": lambda x, y: abs(x - y),
    "vmin": min,
    "vmax": max,
}


@pytest.mark.parametrize("types", ["u32.u32.u32", "s32.s32.s32", "s32.u32.s32"])
@pytest.mark.parametrize("modifier", ["", ".sat", ".add"])
@pytest.mark.parametrize("op", VIDEO)
def test_video(op, modifier, types):
    d_signed, a_signed, b_signed = map(is_signed, types.split("."))
    a, b, c = sources(32, 3, num_random=300)
    for count in (2, 4):

        def packed(x, y, z, width=32 // count):
            pairs = zip(elements(x, width, a_signed), elements(y, width, b_signed), strict=True)
            values = [VIDEO[op](p, q) for p, q in pairs]
            if modifier == ".add":
                return sum(values) + z
            if modifier == ".sat":
                values = [clamp(value, width, d_signed) for value in values]
            return sum(wrap(value, width) << i * width for i, value in enumerate(values))

        check(f"{op}{count}.{types}{modifier}", packed, ["u32"] * 4, a, b, c)


PACKED = {"add": lambda x, y: x + y, "min": min, "max": max}


@pytest.mark.parametrize("name", ["u16x2", "s16x2"])
@pytest.mark.parametrize("op", PACKED)
def test_pairs(op, name):
    a, b = sources(32, 2)
    signed = is_signed(name)
    for relu in ("", ".relu") if signed and op != "add" else ("",):

        def both(x, y, least=0 if relu else -(1 << 16)):
            pairs = zip(elements(x, 16, signed), elements(y, 16, signed), strict=True)
            return sum(wrap(max(PACKED[op](p, q), least), 16) << 16 * i for i, (p, q) in enumerate(pairs))

        check(f"{op}.{name}{relu}", both, ["u32"] * 3, a, b)


@pytest.mark.parametrize("to", ["u8", "s8", *ALL_TYPES])
def test_conversions_between_integers(to):
    """Widened by the sign of the source, cut to the destination, or clamped to it; the rest of the register is the
    value's extension."""
    width = bits(to)
    for source in ("u8", "s8", *ALL_TYPES):
        register = max(bits(source), 16)
        (a,) = sources(register, 1)
        for sat in ("", ".sat"):
            result = DTYPES[max(width, 16)]
            actual = run(f"cvt{sat}.{to}.{source} %d, %a;", result, a)
            values = [
                clamp(x, width, is_signed(to)) if sat else wrap(x, width, is_signed(to)) for x in numbers(a, source)
            ]
            same(actual, np.array([wrap(x, 64) for x in values], np.uint64).astype(result), a)


COMPARISONS = {
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_TYPES)
def test_comparisons_and_selections(name):
    a, b = sources(bits(name), 2)
    for op, function in COMPARISONS.items():
        holds = [int(function(x, y)) for x, y in zip(numbers(a, name), numbers(b, name), strict=True)]
        actual = run(f"setp.{op}.{name} %p, %a, %b; selp.u32 %d, 1, 0, %p;", np.uint32, a, b)
        same(actual, np.array(holds, np.uint32), a, b)
        actual = run(f"set.{op}.u32.{name} %d, %a, %b;", np.uint32, a, b)
        same(actual, np.array(holds, np.uint32) * np.uint32(0xFFFFFFFF), a, b)
    if not is_signed(name):
        for op, as_signed in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items():
            first, second = (run(f"setp.{o}.{name} %p, %a, %b; selp.u32 %d, 1, 0, %p;", np.uint32, a, b)
                             for o in (op, as_signed))  # fmt: skip
            same(first, second, a, b)
    (c,) = sources(32, 1, num_random=a.size - 400)
    check(f"slct.{name}.s32", lambda x, y, z: x if z >= 0 else y, [name, name, name, "s32"], a, b, c)


@pytest.mark.parametrize("form", [
    "add.sat.u32 %d, %a, %b", "mul.wide.u64 %l0, %l1, %l2", "dp4a.f32.u32 %d, %a, %b, %c", "mul.u32 %d, %a, %b",
    "vadd3.u32.u32.u32 %d, %a, %b, %c", "vadd2.u16.u32.u32 %d, %a, %b, %c", "max.relu.u32 %d, %a, %b",
    "max.u16x2.relu %d, %a, %b", "dp2a.u32.u32 %d, %a, %b, %c", "shf.l.b32 %d, %a, %b, %c", "popc.b16 %d, %h0",
])  # fmt: skip
def test_what_is_no_form_is_refused(form):
    with pytest.raises(emulator.Error):
        load(f"{form};", np.uint32, np.uint32, np.uint32, np.uint32)
