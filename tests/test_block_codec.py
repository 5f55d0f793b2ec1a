# SPDX-License-Identifier: Apache-2.0
"""The codec of blocks: bytes, accuracy, draws, residuals, edges, and what torch asks of an op."""

import itertools
import math

import pytest
import torch
from torch.library import opcheck

from fmkernels import block_codec, reference
from fmkernels.testing import backends

BACKENDS = backends("block_codec_quantize")
NATIVE = [backend for backend in BACKENDS if backend.namespace == "fmkernels"]
ON_EACH = pytest.mark.parametrize("backend", BACKENDS, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT8 = "float8_e4m3fn"
BITS = [8, 6, 4, 1, FLOAT8]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048]
EACH_BITS = pytest.mark.parametrize("bits", BITS)
HADAMARD = pytest.mark.parametrize("hadamard", [False, True], ids=["plain", "rotated"])
DRAWN = {"rounding": "stochastic", "seed": 7}


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def with_corners(numel, dtype=torch.float32, device="cpu"):
    """A block of zeros, one of the smallest numbers, one with a NaN, one with an infinity, a tie of both signs."""
    x = normal(numel, dtype=torch.float32)
    if numel >= 1000:
        x[64:128] = 0.0
        x[128:192] *= 1e-35
        x[300], x[420] = math.nan, -math.inf
        x[520], x[530] = -9.0, 9.0
        x[700:764] *= 1e30
    return x.to(device, dtype)


def roundings(bits):
    return [{}] if bits in (1, FLOAT8) else [{}, {**DRAWN, "step": 2**33 + 5, "offset": 2**35}]


def same(a, b):
    return torch.equal(a.nan_to_num(0.125), b.nan_to_num(0.125)) and torch.equal(a.isnan(), b.isnan())


def decoded(x, backend=None, **options):
    run = (lambda function, *args, **kwargs: function(*args, **kwargs)) if backend is None else backend.run
    shared = {name: value for name, value in options.items() if name in ("bits", "block", "hadamard")}
    wire = run(block_codec.quantize, x, **options)
    return run(block_codec.dequantize, wire, x.numel(), **shared)


# ---- values ----------------------------------------------------------------------------------------------------------


def check_bytes(backend, bits, block, cases):
    for dtype, hadamard, rounding in cases:
        x = with_corners(4097 + 31, dtype, backend.device)
        options = {"bits": bits, "block": block, "hadamard": hadamard}
        wire = backend.run(block_codec.quantize, x, **options, **rounding)
        assert torch.equal(wire.cpu(), reference.block_codec.quantize(x.cpu(), **options, **rounding))
        back = backend.run(block_codec.dequantize, wire, x.numel(), **options, dtype=dtype)
        assert back.dtype == dtype
        assert same(back.cpu(), reference.block_codec.dequantize(wire.cpu(), x.numel(), **options, dtype=dtype))


@ON_EACH
@EACH_BITS
@pytest.mark.parametrize("block", BLOCKS)
def test_bytes_are_those_of_the_reference(block, bits, backend):
    """With NaN, infinities, zeros and a ragged end, and back again: drawn or rotated, of each dtype in its turn."""
    turn = BLOCKS.index(block) + BITS.index(bits)
    cases = [(DTYPES[turn % 3], False, roundings(bits)[-1]), (DTYPES[(turn + 1) % 3], True, {})]
    check_bytes(backend, bits, block, cases)


@pytest.mark.slow
@ON_EACH
@EACH_BITS
@pytest.mark.parametrize("block", BLOCKS)
def test_bytes_are_those_of_the_reference_in_every_combination(block, bits, backend):
    check_bytes(backend, bits, block, itertools.product(DTYPES, (False, True), roundings(bits)))


@ON_EACH
@EACH_BITS
@pytest.mark.parametrize("block", [32, 128, 2048])
def test_any_length(block, bits, backend):
    for i, numel in enumerate((0, 1, 31, 32, 33, 63, 65, 127, 128, 129, 2047, 2049)):
        options = {"bits": bits, "block": block, "hadamard": i % 2 == 1}
        x = normal(numel, device=backend.device)
        wire = backend.run(block_codec.quantize, x, **options)
        assert wire.numel() == block_codec.wire_bytes(numel, bits=bits, block=block)
        assert torch.equal(wire.cpu(), reference.block_codec.quantize(x.cpu(), **options))
        back = backend.run(block_codec.dequantize, wire, numel, **options)
        assert torch.equal(back.cpu(), reference.block_codec.dequantize(wire.cpu(), numel, **options))


@ON_EACH
@EACH_BITS
@pytest.mark.parametrize(("block", "num_wires", "op", "hadamard"), [(128, 3, "avg", True), (32, 1, "sum", False)])
def test_sums_are_those_of_the_reference(block, num_wires, op, hadamard, bits, backend):
    """In the order of the ranks, as a tensor and as a wire of any bits."""
    numel, options = 2500, {"bits": bits, "block": block, "hadamard": hadamard}
    xs = [normal(numel, seed=seed) for seed in range(num_wires)]
    xs[0][1000], xs[-1][2100] = math.nan, math.inf
    wires = torch.stack([reference.block_codec.quantize(x, **options) for x in xs])
    here = wires.to(backend.device)
    total = backend.run(block_codec.sum_wires, here, numel, **options, op=op)
    assert same(total.cpu(), reference.block_codec.sum_wires(wires, numel, **options, op=op))
    for out_bits in BITS:
        to = {**options, **roundings(out_bits)[-1 if bits == 8 else 0], "out_bits": out_bits, "op": op}
        actual = backend.run(block_codec.reduce_wires, here, numel, **to)
        assert torch.equal(actual.cpu(), reference.block_codec.reduce_wires(wires, numel, **to))


def test_a_wire_is_laid_out_as_it_is_drawn():
    x = torch.zeros(128)
    x[:4], x[33], x[127] = torch.tensor([-128.0, 3.0, -2.0, 0.4]), 7.0, 64.0
    wire = block_codec.quantize(x, bits=8, block=128)
    assert wire.shape == (128 + 16,)
    assert torch.equal(wire[:128].view(torch.int8).float(), x.round())
    assert wire[128:132].view(torch.float32).item() == 1.0
    assert wire[132:].count_nonzero() == 0
    nibbles = block_codec.quantize(x / 16, bits=4, block=64)
    assert nibbles.shape == (64 + 16,)
    assert nibbles[:2].tolist() == [8, 0]  # -8 and 0.2 of the first half, 0 and 0.4 of the second
    assert nibbles[63].item() == 0x80  # the largest of its block
    signs = block_codec.quantize(x, bits=1, block=64)
    assert signs[:16].tolist() == [0b101, *[0] * 15]
    assert signs[16:24].view(torch.float32).tolist() == [float(x[:64].abs().mean()), 1.0]


# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "least"), [(8, 43.0), (6, 31.0), (4, 19.0), (1, 4.0), (FLOAT8, 31.0)])
@HADAMARD
def test_signal_over_noise_of_normal_numbers(hadamard, bits, least):
    """The figures that the documentation gives, in dB, for blocks of 128."""
    x = normal(1 << 18)
    noise = x - decoded(x, bits=bits, hadamard=hadamard)
    assert 10 * math.log10(x.square().sum() / noise.square().sum()) >= least


def test_rotation_spreads_outliers():
    x = normal(1 << 18)
    x[::512] *= 50
    plain, rotated = ((x - decoded(x, bits=4, hadamard=hadamard)).square().sum() for hadamard in (False, True))
    assert rotated < plain / 2


@ON_EACH
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_error_exceeds_half_a_step_or_the_end_of_the_codes(dtype, bits, backend):
    """In float64: half a step, or a whole one beyond the highest code, and the rounding of two products."""
    x, block, levels = normal(3000, dtype=dtype, device=backend.device, seed=3), 64, 2 ** (bits - 1)
    actual = decoded(x, backend, bits=bits, block=block)
    blocks = torch.nn.functional.pad(x.double(), (0, -3000 % block)).view(-1, block)
    back = torch.nn.functional.pad(actual.double(), (0, -3000 % block)).view(-1, block)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    step = extreme.abs() / levels
    beyond = (-blocks * extreme.sign() / step > levels - 1).double() / 2
    rounding = extreme.abs() * 2.0**-22
    assert ((blocks - back).abs() <= step * (0.5 + beyond) + rounding).all()


@ON_EACH
@EACH_BITS
@HADAMARD
def test_nan_and_infinity_reach_their_block_and_no_other(hadamard, bits, backend):
    x = normal(2048, device=backend.device)
    clean = decoded(x, backend, bits=bits, hadamard=hadamard)
    x[130], x[700], x[2047] = math.nan, math.inf, -math.inf
    wrong = torch.zeros(16, 128, dtype=torch.bool)
    wrong[1] = wrong[5] = wrong[15] = True
    actual = decoded(x, backend, bits=bits, hadamard=hadamard)
    assert torch.equal(actual.isnan().cpu(), wrong.flatten())
    assert torch.equal(actual[~actual.isnan()], clean[~actual.isnan()])


@ON_EACH
@EACH_BITS
def test_every_magnitude(bits, backend):
    """From where a scale would be subnormal to the largest number: no infinity, no NaN, zeros below 2^-100."""
    for exponent in (-140, -102, -90, 0, 90, 125):
        x = (normal(128).clamp(-1.9, 1.9).double() * 2.0**exponent).float()
        x[7] = 1.99 * 2.0**exponent
        for hadamard in (False, True):
            actual = decoded(x.to(backend.device), backend, bits=bits, hadamard=hadamard).cpu()
            assert actual.isfinite().all()
            if exponent < -100:
                assert actual.count_nonzero() == 0
            else:
                assert (x.double() - actual.double()).norm() < x.double().norm()
    assert decoded(torch.zeros(64, device=backend.device), backend, bits=bits).signbit().count_nonzero() == 0


# ---- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_the_mean_of_the_draws_is_x(bits):
    """Within five standard deviations, each of them below half a step, in every element, ends included."""
    x, count = normal(256, seed=5), 1000
    total = torch.zeros(256, dtype=torch.float64)
    for step in range(count):
        total += decoded(x, bits=bits, **DRAWN, step=step).double()
    extremes = x.view(-1, 128).abs().amax(1, keepdim=True)
    steps = (extremes / (2 ** (bits - 1) - 1)).expand(2, 128).flatten().double()
    assert ((total / count - x).abs() <= 5 * 0.5 * steps / count**0.5).all()
    whole = torch.arange(-7.0, 8.0).repeat(9)
    assert torch.equal(decoded(whole, bits=4, block=64, **DRAWN), whole)  # nothing to round


@pytest.mark.parametrize("backend", backends("block_codec_quantize"), ids=str)
def test_no_draw_goes_beyond_the_extreme(backend):
    """Of one block in seven extreme * inverse is rounded to a little more than -levels."""
    x = torch.rand(1 << 14, 1, generator=torch.Generator().manual_seed(2)).add(0.5).expand(-1, 64).reshape(-1)
    wire = backend.run(block_codec.quantize, x.to(backend.device), block=64, rounding="stochastic", seed=1)
    assert wire[: x.numel()].view(torch.int8).unique().tolist() == [-127]


@ON_EACH
def test_draws_belong_to_the_place_the_seed_and_the_step(backend):
    x = normal(4096, device=backend.device)
    options = {"bits": 4, "block": 128, **DRAWN}
    whole = decoded(x, backend, **options, step=3)
    parts = [decoded(x[i : i + 1024].clone(), backend, **options, step=3, offset=i) for i in range(0, 4096, 1024)]
    assert torch.equal(whole, torch.cat(parts))
    for other in ({"step": 4}, {"step": 3 + 2**32}, {"step": 3, "seed": 8}, {"step": 3, "seed": 7 + 2**32}):
        changed = decoded(x, backend, **{**options, **other}) != whole
        assert 0.2 < changed.float().mean() < 0.6


# ---- residuals -------------------------------------------------------------------------------------------------------


@ON_EACH
@EACH_BITS
@HADAMARD
def test_a_residual_is_what_the_wire_lacks(hadamard, bits, backend):
    for dtype, rounding, block in itertools.product((torch.float32, torch.bfloat16), roundings(bits), (32, 512)):
        x, residual = with_corners(2100, dtype, backend.device), normal(2100, device=backend.device, seed=9)
        before, expected = residual.clone(), residual.cpu().clone()
        options = {"bits": bits, "block": block, "hadamard": hadamard, **rounding}
        wire = backend.run(block_codec.quantize, x, **options, residual=residual)
        assert torch.equal(wire.cpu(), reference.block_codec.quantize(x.cpu(), **options, residual=expected))
        assert torch.equal(residual.cpu(), expected)
        back = backend.run(block_codec.dequantize, wire, 2100, bits=bits, block=block, hadamard=hadamard)
        assert torch.equal(residual, torch.where(back.isnan(), before, x.float() + before - back))


def test_residuals_carry_over_what_was_lost():
    """The sum of what was sent and the last residual is the sum of x, to float32; without them it is not."""
    residual, sent, alone, total = torch.zeros(1000), *(torch.zeros(1000, dtype=torch.float64) for _ in range(3))
    for seed in range(40):
        x = normal(1000, seed=seed)
        total += x.double()
        sent += block_codec.dequantize(block_codec.quantize(x, bits=1, residual=residual), 1000, bits=1).double()
        alone += decoded(x, bits=1).double()
    torch.testing.assert_close(sent + residual, total, rtol=0, atol=40 * 2.0**-22 * residual.abs().max().item())
    assert (sent - total).norm() < (alone - total).norm()


# ---- edges -----------------------------------------------------------------------------------------------------------


@ON_EACH
def test_misaligned_tensors_and_given_results_change_no_bytes(backend):
    for dtype in DTYPES:
        x = with_corners(3001, dtype, backend.device)
        moved = torch.cat([x.new_zeros(1), x])[1:]
        wire = backend.run(block_codec.quantize, x)
        out = torch.full_like(wire, 255)
        assert backend.run(block_codec.quantize, moved, out=out) is out
        assert torch.equal(out, wire)
        to = torch.empty(3002, dtype=dtype, device=backend.device)[1:]
        assert backend.run(block_codec.dequantize, wire, 3001, out=to) is to
        assert same(to, backend.run(block_codec.dequantize, wire, 3001, dtype=dtype))
    rows = torch.zeros(3, wire.numel() + 32, dtype=torch.uint8, device=backend.device)[:, : wire.numel()]
    rows[:] = wire
    for function in (block_codec.sum_wires, block_codec.reduce_wires):
        assert same(*(backend.run(function, t, 3001).float() for t in (rows, rows.contiguous())))


@ON_EACH
def test_blocks_and_threads_do_not_matter(backend):
    """A block has the same codes wherever it stands, and however many threads there are."""
    x = normal(40_000 if backend.name == "cpu" else 9000, device=backend.device)
    whole = backend.run(block_codec.quantize, x, block=256)
    assert torch.equal(backend.run(block_codec.quantize, x[2304:2560].clone(), block=256)[:256], whole[2304:2560])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(backend.run(block_codec.quantize, x, block=256), whole)
        torch.set_num_threads(1)
        assert torch.equal(backend.run(block_codec.quantize, x, block=256), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 8), (torch.bfloat16, 4)], ids=str)
def test_results_that_are_written_past_the_caches_are_the_same(dtype, bits):
    numel = 2**24 // dtype.itemsize + 77  # more than 16 MiB
    wires = torch.stack([block_codec.quantize(normal(numel, seed=seed), bits=bits) for seed in range(2)])
    whole = block_codec.sum_wires(wires, numel, bits=bits, op="avg", dtype=dtype)
    shifted = torch.empty(numel + 1, dtype=dtype)[1:]  # on no boundary: written as smaller ones are
    block_codec.sum_wires(wires, numel, bits=bits, op="avg", dtype=dtype, out=shifted)
    assert torch.equal(whole, shifted)


def test_no_gradient_is_recorded():
    x = normal(100).requires_grad_()
    assert not block_codec.quantize(x).requires_grad
    assert torch.equal(block_codec.quantize(x), block_codec.quantize(x.detach()))


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", NATIVE, ids=str)
def test_opcheck(backend):
    x = normal(300, device=backend.device)
    wire, residual = block_codec.quantize(x), torch.zeros_like(x)
    wires = torch.stack([wire, wire])
    quantize = (8, 128, True, True, 3, 4, 128)
    opcheck(torch.ops.fmkernels.block_codec_quantize.default, (x, None, *quantize, wire.clone()))
    opcheck(torch.ops.fmkernels.block_codec_quantize.default, (x.half(), residual, *quantize, wire.clone()))
    opcheck(torch.ops.fmkernels.block_codec_sum.default, (wires, 8, 128, True, 0.5, torch.empty_like(x)))
    reduce = (300, 8, 8, 128, False, 1.0, False, 0, 0, 0)
    opcheck(torch.ops.fmkernels.block_codec_reduce.default, (wires, *reduce, wire.clone()))


def test_compile_is_one_graph():
    torch._dynamo.reset()
    x, residual = normal(1000), torch.zeros(1000)
    options = {"bits": 4, "block": 64, "hadamard": True}
    compiled = torch.compile(block_codec.quantize, fullgraph=True, backend="aot_eager")
    expected = torch.zeros(1000)
    wire = compiled(x, **options, **DRAWN, residual=residual)
    assert torch.equal(wire, block_codec.quantize(x, **options, **DRAWN, residual=expected))
    assert torch.equal(residual, expected)
    compiled = torch.compile(block_codec.dequantize, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(wire, 1000, **options), block_codec.dequantize(wire, 1000, **options))
    wires = torch.stack([wire, wire])
    compiled = torch.compile(block_codec.sum_wires, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(wires, 1000, **options), block_codec.sum_wires(wires, 1000, **options))
    compiled = torch.compile(block_codec.reduce_wires, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(wires, 1000, **options, op="avg"), block_codec.reduce_wires(wires, 1000, **options, op="avg")
    )
