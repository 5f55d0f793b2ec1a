# SPDX-License-Identifier: Apache-2.0
"""What the codec of blocks refuses: the sentences of its functions, and what its ops refuse by themselves."""

import pytest
import torch

from fmkernels import block_codec

X = torch.zeros(300)
WIRE = block_codec.quantize(X)
WIRES = torch.stack([WIRE, WIRE])
MISALIGNED = torch.zeros(WIRE.numel() + 1, dtype=torch.uint8)[1:]
STRIDED = torch.zeros(600)[::2]

FORMAT = [
    ("bits", 5, ValueError, "bits must be 8, 6, 4, 1 or 'float8_e4m3fn', got 5."),
    ("bits", True, ValueError, "bits must be 8, 6, 4, 1 or 'float8_e4m3fn', got True."),
    ("bits", "8", ValueError, "bits must be 8, 6, 4, 1 or 'float8_e4m3fn', got '8'."),
    ("block", 100, ValueError, "block must be a power of two from 32 to 2048, got 100."),
    ("block", 16, ValueError, "block must be a power of two from 32 to 2048, got 16."),
    ("block", 4096, ValueError, "block must be a power of two from 32 to 2048, got 4096."),
    ("block", 0, ValueError, "block must be at least 1, got 0."),
    ("block", 128.0, TypeError, "block must be an integer, got float."),
]
NUMEL = [
    ("numel", -1, ValueError, "numel must be at least 0, got -1."),
    ("numel", 2**41, ValueError, "numel must be at most 2**40, got 2199023255552."),
    ("numel", None, TypeError, "numel must be an integer, got NoneType."),
]
ROUNDING = [
    ("rounding", "up", ValueError, "rounding must be 'nearest' or 'stochastic', got 'up'."),
    ("rounding", "stochastic", ValueError, "seed must be given where rounding is 'stochastic', got None."),
    ("seed", -1, ValueError, "seed must be at least 0, got -1."),
    ("seed", 1.0, TypeError, "seed must be an integer, got float."),
    ("step", -1, ValueError, "step must be at least 0, got -1."),
    ("step", 2**63, ValueError, "step must be below 2**63, got 9223372036854775808."),
    ("offset", -1, ValueError, "offset must be at least 0, got -1."),
]
HADAMARD = [("hadamard", 1, TypeError, "hadamard must be True or False, got int.")]
OP = [("op", "mean", ValueError, "op must be 'sum' or 'avg', got 'mean'.")]
RESULT = [
    ("dtype", torch.float64, ValueError, "dtype must be float32 or bfloat16 or float16, got float64."),
    ("dtype", "float32", ValueError, "dtype must be float32 or bfloat16 or float16, got 'float32'."),
    ("out", torch.zeros(299), ValueError, "out must be a tensor of numel, 300, elements, got 299 elements."),
    ("out", [0.0], ValueError, "out must be a tensor of numel, 300, elements, got list."),
    ("out", X.double(), ValueError, "out must be float32 or bfloat16 or float16, got float64."),
    ("out", STRIDED, ValueError, "out must be contiguous, got strides [2]."),
]
WIRE_RESULT = [
    ("out", torch.zeros(416), ValueError, "out must be uint8, got float32."),
    ("out", WIRES[:, :300], ValueError, "out must be contiguous, got strides [336, 1]."),
    ("out", WIRES, ValueError, "out must be [bytes], got 2 dimensions [2, 336]."),
    ("out", WIRE[:-16], ValueError, "out must have wire_bytes 336, got 320."),
    ("out", MISALIGNED, ValueError, "out must begin on a boundary of 16 bytes, got 1 behind."),
    ("out", WIRE.to("meta"), ValueError, "out must be on the device of {}, cpu, got meta."),
    ("out", 3, TypeError, "out must be a tensor, got int."),
]
WIRES_GIVEN = [
    ("wires", None, TypeError, "wires must be a tensor, got NoneType."),
    ("wires", WIRES.float(), ValueError, "wires must be uint8, got float32."),
    ("wires", WIRE, ValueError, "wires must be [ranks, bytes], got 1 dimensions [336]."),
    ("wires", WIRES[:0], ValueError, "wires must have at least 1 row, got 0."),
    ("wires", WIRES[:, 16:], ValueError, "wires must have wire_bytes 336, got 320."),
    (
        "wires",
        torch.zeros(2, 672, dtype=torch.uint8)[:, ::2],
        ValueError,
        "wires must have a contiguous last dimension, got stride 2.",
    ),
    ("wires", MISALIGNED[None], ValueError, "wires must begin on a boundary of 16 bytes, got 1 behind."),
    (
        "wires",
        torch.zeros(2, 337, dtype=torch.uint8)[:, :336],
        ValueError,
        "wires must have rows on boundaries of 16 bytes, got stride 337.",
    ),
]
QUANTIZE = [
    ("x", None, TypeError, "x must be a tensor, got NoneType."),
    ("x", X.double(), ValueError, "x must be float32 or bfloat16 or float16, got float64."),
    ("x", STRIDED, ValueError, "x must be contiguous, got strides [2]."),
    ("residual", 1.0, TypeError, "residual must be a tensor, got float."),
    ("residual", X.half(), ValueError, "residual must be float32, got float16."),
    ("residual", X[1:], ValueError, "residual must have the 300 elements of x, got 299."),
    ("residual", STRIDED, ValueError, "residual must be contiguous, got strides [2]."),
    ("residual", X.to("meta"), ValueError, "residual must be on the device of x, cpu, got meta."),
]
WIRE_GIVEN = [
    ("wire", None, TypeError, "wire must be a tensor, got NoneType."),
    ("wire", WIRE.char(), ValueError, "wire must be uint8, got int8."),
    ("wire", WIRES, ValueError, "wire must be [bytes], got 2 dimensions [2, 336]."),
    ("wire", WIRE[:16], ValueError, "wire must have wire_bytes 336, got 16."),
    ("wire", MISALIGNED, ValueError, "wire must begin on a boundary of 16 bytes, got 1 behind."),
]
CALLS = {
    "wire_bytes": ({"numel": 300}, FORMAT + NUMEL),
    "quantize": ({"x": X}, FORMAT + ROUNDING + HADAMARD + QUANTIZE + WIRE_RESULT),
    "dequantize": ({"wire": WIRE, "numel": 300}, FORMAT + NUMEL + HADAMARD + RESULT + WIRE_GIVEN),
    "sum_wires": ({"wires": WIRES, "numel": 300}, FORMAT + NUMEL + HADAMARD + OP + RESULT + WIRES_GIVEN),
    "reduce_wires": (
        {"wires": WIRES, "numel": 300},
        [
            *FORMAT,
            *NUMEL,
            *ROUNDING,
            *HADAMARD,
            *OP,
            *WIRES_GIVEN,
            *WIRE_RESULT,
            ("out_bits", 2, ValueError, "out_bits must be 8, 6, 4, 1 or 'float8_e4m3fn', got 2."),
        ],
    ),
}
EACH = [(function, *error) for function, (_, errors) in CALLS.items() for error in errors]


@pytest.mark.parametrize(("function", "name", "value", "error", "sentence"), EACH)
def test_wrong_arguments(function, name, value, error, sentence):
    with pytest.raises(error) as raised:
        getattr(block_codec, function)(**{**CALLS[function][0], name: value})
    first = next(iter(CALLS[function][0]))
    assert str(raised.value) == f"{function}: {sentence.format(first)}"


def test_draws_want_a_place_and_more_than_one_bit():
    drawn = {"rounding": "stochastic", "seed": 1}
    with pytest.raises(ValueError, match=r"^quantize: offset must be a multiple of 128 for this block, got 64\.$"):
        block_codec.quantize(X, **drawn, offset=64)
    with pytest.raises(ValueError, match=r"^quantize: offset must be a multiple of 64 for this block, got 32\.$"):
        block_codec.quantize(X, **drawn, block=32, offset=32)
    with pytest.raises(ValueError, match=r"^reduce_wires: rounding must be 'nearest' for 1 bit and for 'float8_"):
        block_codec.reduce_wires(WIRES, 300, out_bits=1, **drawn)
    with pytest.raises(
        ValueError, match=r"^quantize: rounding must be 'nearest' for 1 bit and for 'float8_e4m3fn', got"
    ):
        block_codec.quantize(X, bits="float8_e4m3fn", **drawn)
    block_codec.quantize(X, offset=32)  # of no use, and no error


def shrunk(t):
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes - 1)
    return t


WRONG_WIRES = [WIRE[:16], MISALIGNED, WIRES, WIRE.char(), torch.zeros(672, dtype=torch.uint8)[::2], shrunk(WIRE)]


def test_the_ops_themselves_refuse():
    ops = torch.ops.fmkernels
    right = {"x": X, "residual": None, "bits": 8, "block": 128, "hadamard": False, "stochastic": False}
    right |= {"seed": 0, "step": 0, "offset": 0, "out": WIRE.clone()}
    wrong = [("x", t) for t in (X.double(), STRIDED, X[1:250], X.to_sparse(), shrunk(X))]
    wrong += [("residual", t) for t in (X.half(), X[1:], STRIDED, shrunk(X))]
    wrong += [("out", t) for t in WRONG_WIRES]
    wrong += [("bits", 5), ("bits", 0), ("block", 0), ("block", -128), ("block", 96), ("block", 4096), ("offset", -1)]
    wrong += [("bits", -4), ("bits", -1)]
    for name, value in wrong:
        with pytest.raises(RuntimeError):
            ops.block_codec_quantize(**{**right, name: value})
    with pytest.raises(RuntimeError, match="offset must be a multiple"):
        ops.block_codec_quantize(**{**right, "stochastic": True, "offset": 64})

    right = {"wires": WIRES, "bits": 8, "block": 128, "hadamard": False, "factor": 1.0, "out": X.clone()}
    wires = [WIRE, WIRES[:0], WIRES[:, :320], WIRES.float(), MISALIGNED[None], shrunk(WIRES)]
    wires += [torch.zeros(2, 337, dtype=torch.uint8)[:, :336], torch.zeros(2, 672, dtype=torch.uint8)[:, ::2]]
    wrong = [("wires", t) for t in wires]
    for name, value in [*wrong, ("out", X.double()), ("out", STRIDED), ("out", shrunk(X)), ("bits", 3), ("block", 1)]:
        with pytest.raises(RuntimeError):
            ops.block_codec_sum(**{**right, name: value})

    right = {"wires": WIRES, "numel": 300, "bits": 8, "out_bits": 8, "block": 128, "hadamard": False, "factor": 1.0}
    right |= {"stochastic": False, "seed": 0, "step": 0, "offset": 0, "out": WIRE.clone()}
    wrong += [("numel", -1), ("numel", 299 + 2**41), ("numel", 600), ("out_bits", 4), ("out_bits", 3)]
    for name, value in [*wrong, *(("out", t) for t in WRONG_WIRES)]:
        with pytest.raises(RuntimeError):
            ops.block_codec_reduce(**{**right, name: value})
