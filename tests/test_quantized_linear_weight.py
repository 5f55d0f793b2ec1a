# SPDX-License-Identifier: Apache-2.0
"""quantize_weight and QuantizedWeight: the rounding and its bound, the words as they are drawn, and errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmkernels import QuantizedWeight, dequantize_weight, quantize_weight, reference

FORMATS = [
    {"bits": 8, "group_size": None, "symmetric": True},
    {"bits": 8, "group_size": 32, "symmetric": True},
    {"bits": 4, "group_size": 64, "symmetric": True},
    {"bits": 4, "group_size": 128, "symmetric": False},
]
EVERY_FORMAT = pytest.mark.parametrize("form", FORMATS, ids=str)
EPSILON = torch.finfo(torch.float32).eps


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- values ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    form=st.sampled_from(FORMATS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size_of_values=st.sampled_from([1e-6, 1.0, 1e4]),
    shift=st.sampled_from([0.0, 1.5, -4.0]),
    seed=st.integers(0, 99),
)
def test_no_weight_moves_by_more_than_half_a_scale(size, form, dtype, size_of_values, shift, seed):
    w = ((normal(*size, seed=seed) + shift) * size_of_values).to(dtype)
    quantized = quantize_weight(w, **form)
    _, scales, zeros = quantized.integers()
    width = form["group_size"] or size[1]
    scale = scales.double().repeat_interleave(width, 1)[:, : size[1]]
    error = (dequantize_weight(quantized).double() - w.double()).abs()
    # Half a scale, and the rounding to float32 of the scale and of the product, each relative to the weight.
    assert (error <= scale / 2 + 4 * EPSILON * (w.double().abs() + scale)).all()
    if zeros is not None:
        assert int(zeros.max()) <= 15


@EVERY_FORMAT
def test_integers_are_those_of_the_definition(form):
    w = normal(37, 300)
    q, scales, zeros = quantize_weight(w, **form).integers()
    expected_q, expected_scales, expected_zeros = reference.quantize_weight(w, **form)
    torch.testing.assert_close(scales, expected_scales, rtol=2 * EPSILON, atol=0)
    # A value that lies between two integers may fall to either where scales differ in the last place.
    assert (q.long() - expected_q.long()).abs().max() <= 1
    assert (q.long() != expected_q.long()).float().mean() < 1e-3
    assert (zeros is None) == (expected_zeros is None)
    if zeros is not None:
        assert torch.equal(zeros.long(), expected_zeros.long())


@pytest.mark.parametrize("value", [0.0, -1.0, 3.0, 1e-45, 3e38])
@EVERY_FORMAT
def test_constant_groups(form, value):
    """All zeros, one sign only, too small to have a scale, and close to the largest float."""
    w = torch.full((3, 70), value)
    value = w[0, 0].item()  # as float32 has it
    back = dequantize_weight(quantize_weight(w, **form))
    largest = {8: 127, 4: 7.5 if form["symmetric"] else 15}[form["bits"]]
    bound = abs(value) / largest / 2 * (1 + 4 * EPSILON) if abs(value) > 1e-30 else abs(value)
    assert back.isfinite().all()
    assert ((back.double() - w.double()).abs() <= bound + EPSILON * abs(value)).all()


@pytest.mark.parametrize("columns", [1, 31, 128, 130])
@EVERY_FORMAT
def test_integers_survive_packing(form, columns):
    generator = torch.Generator().manual_seed(0)
    low, high = (-128, 127) if form["bits"] == 8 else (0, 15)
    q = torch.randint(low, high + 1, (35, columns), generator=generator)
    groups = 1 if form["group_size"] is None else -(-columns // form["group_size"])
    scales = normal(35, groups)
    zeros = None if form["symmetric"] else torch.randint(0, 16, (35, groups), generator=generator)
    w = QuantizedWeight.from_integers(q, scales, zeros, bits=form["bits"], group_size=form["group_size"])
    back = w.integers()
    assert torch.equal(back[0].long(), q)
    assert torch.equal(back[1], scales)
    assert zeros is None or torch.equal(back[2].long(), zeros)
    assert torch.equal(w.to("cpu").values, w.values)
    assert w.shape == (35, columns)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_integers_of_every_dtype(name, bits):
    """uint8 was refused with bits=8, whatever it held: -128 was 128 in the comparison. Of uint16 torch has no min."""
    q = torch.arange(3 * 70).view(3, 70) % (128 if bits == 8 else 16)
    zeros = q[:, :1] % 16 if bits == 4 else None
    expected = QuantizedWeight.from_integers(q, torch.ones(3, 1), zeros, bits=bits)
    dtype = getattr(torch, name)
    narrow = [None if t is None else t.to(dtype) for t in (q, zeros)]
    w = QuantizedWeight.from_integers(narrow[0], torch.ones(3, 1), narrow[1], bits=bits)
    assert torch.equal(w.values, expected.values)
    assert bits == 8 or torch.equal(w.zeros, expected.zeros)


def test_words_as_they_are_drawn():
    """A row of integers that count up, read as bytes and nibbles."""
    q = torch.arange(64).expand(33, 64).clone()
    q[32] += 1
    words = QuantizedWeight.from_integers(q, torch.ones(33, 1)).values
    assert words.shape == (2, 16, 32)
    assert words[0, 0, 5] == 0x03020100
    assert words[0, 9, 31] == 0x27262524
    assert words[1, 0, 0] == 0x04030201
    assert (words[1, :, 1:] == 0).all()  # rows that do not exist
    nibbles = QuantizedWeight.from_integers(q % 16, torch.ones(33, 1), bits=4).values
    assert nibbles.shape == (2, 8, 32)
    assert nibbles[0, 0, 0] == 0x75316420
    assert nibbles[0, 1, 31] & 0xFFFFFFFF == 0xFDB9ECA8


def test_bytes_that_it_takes():
    w = quantize_weight(normal(64, 256), bits=4, group_size=128)
    assert w.nbytes == 64 * 256 // 2 + 64 * 2 * 4
    assert repr(w) == "QuantizedWeight(64 x 256, bits=4, group_size=128, 8704 bytes, cpu)"
    assert "with zeros" in repr(quantize_weight(normal(4, 32), bits=4, group_size=32, symmetric=False))


# ---- errors ----------------------------------------------------------------------------------------------------------

W = normal(4, 64)
ERRORS = [
    ({"weight": None}, TypeError, "weight must be a tensor, got NoneType."),
    ({"weight": W[0]}, ValueError, "weight must be [out_features, in_features], got 1 dimensions [64]."),
    ({"weight": W.double()}, ValueError, "weight must be float32 or bfloat16 or float16, got float64."),
    ({"weight": W[:0]}, ValueError, "weight must have a row and a column, got [0, 64]."),
    ({"weight": W / 0}, ValueError, "weight must be finite, got infinity or NaN."),
    ({"bits": 5}, ValueError, "bits must be 8 or 4, got 5."),
    ({"bits": "8"}, TypeError, "bits must be an integer, got str."),
    ({"group_size": 48}, ValueError, "group_size must be 32, 64, 128 or None, got 48."),
    ({"group_size": 32.0}, TypeError, "group_size must be an integer, got float."),
    ({"bits": 4}, ValueError, "group_size must be 32, 64 or 128 with bits=4, got None."),
    ({"symmetric": False}, ValueError, "symmetric must be True with bits=8, got False."),
    ({"symmetric": 0}, TypeError, "symmetric must be True or False, got int."),
]


@pytest.mark.parametrize(("arguments", "error", "sentence"), ERRORS)
def test_wrong_arguments(arguments, error, sentence):
    with pytest.raises(error) as raised:
        quantize_weight(**{"weight": W, **arguments})
    assert str(raised.value) == f"quantize_weight: {sentence}"


Q, SCALES = torch.zeros(4, 64, dtype=torch.int64), torch.ones(4, 1)
ERRORS_OF_INTEGERS = [
    ({"q": [0]}, TypeError, "q must be a tensor, got list."),
    ({"q": Q[0]}, ValueError, "q must be [out_features, in_features], got 1 dimensions [64]."),
    ({"q": Q.float()}, ValueError, "q must be integers, got float32."),
    ({"q": Q + 128}, ValueError, "q must lie from -128 to 127, got 128 to 128."),
    ({"q": Q - 1, "bits": 4}, ValueError, "q must lie from 0 to 15, got -1 to -1."),
    ({"q": (Q + 200).to(torch.uint8)}, ValueError, "q must lie from -128 to 127, got 200 to 200."),
    ({"q": (Q + 200).to(torch.uint16)}, ValueError, "q must lie from 0 to 127, got 200 to 200."),
    ({"q": (Q - 5).view(torch.uint64)}, ValueError, "q must lie from 0 to 127, got -5 to -5."),
    ({"q": Q.bool()}, ValueError, "q must be integers, got bool."),
    ({"q": Q[:, :0]}, ValueError, "q must have a row and a column, got [4, 0]."),
    ({"scales": SCALES[:3]}, ValueError, "scales must be [4, 1] for this q, got [3, 1]."),
    ({"scales": SCALES.double()}, ValueError, "scales must be float32 or bfloat16 or float16, got float64."),
    ({"scales": SCALES.to("meta")}, ValueError, "scales must be on the device of q, cpu, got meta."),
    ({"bits": 4, "zeros": SCALES}, ValueError, "zeros must be integers, got float32."),
    ({"bits": 4, "zeros": Q[:, :1] + 16}, ValueError, "zeros must lie from 0 to 15, got 16 to 16."),
    ({"bits": 4, "zeros": Q}, ValueError, "zeros must be [4, 1] for this q, got [4, 64]."),
]


@pytest.mark.parametrize(("arguments", "error", "sentence"), ERRORS_OF_INTEGERS)
def test_wrong_integers(arguments, error, sentence):
    with pytest.raises(error) as raised:
        QuantizedWeight.from_integers(**{"q": Q, "scales": SCALES, **arguments})
    assert str(raised.value) == f"QuantizedWeight.from_integers: {sentence}"


RIGHT = quantize_weight(W, bits=4, group_size=32, symmetric=False)
FIELDS = {name: getattr(RIGHT, name) for name in RIGHT.__dataclass_fields__}
ERRORS_OF_FIELDS = [
    ("values", RIGHT.values[:, 1:], "values must be [1, 8, 32] for a matrix of 4 rows and 64 columns, got [1, 7, 32]."),
    ("values", RIGHT.values.float(), "values must be int32, got float32."),
    ("scales", RIGHT.scales.half(), "scales must be float32, got float16."),
    ("scales", RIGHT.scales.clone().requires_grad_(), "scales must not require a gradient, which no op gives."),
    ("scales", RIGHT.scales.mT.contiguous().mT, "scales must be contiguous, got strides [64, 1, 2]."),
    ("zeros", RIGHT.zeros.to("meta"), "zeros must be on the device of values, cpu, got meta."),
    ("bits", 8, "zeros must be None with bits=8, got a tensor."),
    ("out_features", 0, "out_features must be at least 1, got 0."),
    ("in_features", 2**31, "in_features must be below 2**31, got 2147483648."),
]


@pytest.mark.parametrize(("name", "value", "sentence"), ERRORS_OF_FIELDS)
def test_wrong_fields(name, value, sentence):
    QuantizedWeight(**FIELDS)
    with pytest.raises(ValueError, match="QuantizedWeight") as raised:
        QuantizedWeight(**{**FIELDS, name: value})
    assert str(raised.value) == f"QuantizedWeight: {sentence}"
