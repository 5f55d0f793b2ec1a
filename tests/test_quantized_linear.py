# SPDX-License-Identifier: Apache-2.0
"""quantized_linear, dequantize_weight: values, gradients, edges, errors, and what torch asks of an op."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fmkernels import QuantizedWeight, _library, dequantize_weight, quantize_weight, quantized_linear, reference
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("quantized_linear_forward")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = {
    "int8": {"bits": 8},
    "int8 in groups": {"bits": 8, "group_size": 64},
    "int4": {"bits": 4, "group_size": 128},
    "int4 with zeros": {"bits": 4, "group_size": 32, "symmetric": False},
}
EVERY_FORMAT = pytest.mark.parametrize("form", FORMATS)
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
ROWS = [1, 5, 9, 37, 70]  # one, a part of a tile of 6, tiles and a part, more than a block of 60
OUT, IN = 40, 200  # a ragged panel, a ragged chunk, and ragged groups of 64 and 128


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(form, out_features=OUT, in_features=IN, seed=1):
    return quantize_weight(normal(out_features, in_features, seed=seed), **FORMATS[form])


def on(backend, w):
    return w.to(backend.device)


# ---- values ----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_FORMAT
def test_product_matches_reference(form, dtype, num_rows, backend):
    if backend.name == "emulated" and num_rows not in (1, 9, 37):
        pytest.skip("its tiles are of 8 and 32 rows")
    w = on(backend, weight(form))
    x = normal(num_rows, IN, dtype=dtype).to(backend.device)
    bias = None if num_rows == 9 else normal(OUT, seed=2).to(backend.device)
    y = backend.run(quantized_linear, x, w, bias)
    assert y.dtype == dtype
    assert_as_good_as_torch(y, reference.quantized_linear, x, w, bias)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_FORMAT
def test_more_columns_than_are_under_way_at_a_time(form, dtype, backend):
    """Eight warps, four chunks of 32 columns each."""
    w = on(backend, weight(form, 3, 1100))
    x = normal(2, 1100, dtype=dtype).to(backend.device)
    assert_as_good_as_torch(backend.run(quantized_linear, x, w), reference.quantized_linear, x, w)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_FORMAT
def test_a_row_has_the_same_bits_in_any_batch(form, dtype, backend):
    w = on(backend, weight(form))
    x = normal(66, IN, dtype=dtype).to(backend.device)
    rows = (0, 5, 65)
    alone = torch.cat([backend.run(quantized_linear, x[i : i + 1], w) for i in rows])
    for count in (7, 33, 66) if backend.name == "cpu" else (7, 66):
        some = backend.run(quantized_linear, x[:count], w)
        inside = [i for i in rows if i < count]
        assert torch.equal(some[inside], alone[: len(inside)])
    moved = backend.run(quantized_linear, x[60:], w)
    assert torch.equal(moved[5], alone[2])


@pytest.mark.parametrize("num_rows", [1, 9])
@EVERY_FORMAT
def test_the_code_for_sm_90(form, num_rows):
    sm_80 = next((backend for backend in BACKENDS if backend.name == "emulated"), None)
    if sm_80 is None:
        pytest.skip("no emulated backend")
    w, x = weight(form), normal(num_rows, IN, dtype=torch.bfloat16)
    sm_90 = dataclasses.replace(sm_80, architecture=90)
    assert torch.equal(sm_90.run(quantized_linear, x, w), sm_80.run(quantized_linear, x, w))


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_FORMAT
def test_dequantized_weight_is_the_drawn_one(form, dtype, backend):
    w = on(backend, weight(form))
    actual = backend.run(dequantize_weight, w, dtype)
    assert torch.equal(actual, reference.dequantize_weight(w).to(dtype))


@settings(max_examples=10)
@given(
    size=st.tuples(st.integers(0, 12), st.integers(1, 50), st.integers(1, 150)),
    form=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_size(size, form, dtype, with_bias, seed):
    num_rows, out_features, in_features = size
    w = weight(form, out_features, in_features, seed)
    x = normal(num_rows, in_features, dtype=dtype, seed=seed)
    bias = normal(out_features, dtype=dtype) if with_bias else None
    for backend in BACKENDS:
        args = [None if t is None else t.to(backend.device) for t in (x, w, bias)]
        assert_as_good_as_torch(backend.run(quantized_linear, *args), reference.quantized_linear, *args)


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 64, 481])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_FORMAT
def test_large_sizes_on_the_cpu(form, dtype, num_rows):
    w, x = weight(form, 500, 2000), normal(num_rows, 2000, dtype=dtype)
    assert_as_good_as_torch(quantized_linear(x, w), reference.quantized_linear, x, w)


def test_the_portable_kernels_agree(tmp_path):
    """Another process, whose kernels are those of a processor without AVX2."""
    x, forms = normal(9, IN), ("int8", "int4 with zeros")
    torch.save((x, [(*weight(form).integers(), FORMATS[form]) for form in forms]), tmp_path / "in")
    code = (
        "import torch, fmkernels, sys\n"
        "x, weights = torch.load(sys.argv[1] + '/in')\n"
        "for i, (*tensors, form) in enumerate(weights):\n"
        "    form.pop('symmetric', None)\n"
        "    w = fmkernels.QuantizedWeight.from_integers(*tensors, **form)\n"
        "    y = [fmkernels.quantized_linear(x[:n], w) for n in (1, 9)]\n"
        "    torch.save((*y, fmkernels.dequantize_weight(w)), f'{sys.argv[1]}/out{i}')\n"
    )
    environment = {**os.environ, "FMKERNELS_CPU_ISA": "generic"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    for i, form in enumerate(forms):
        one, all_rows, matrix = torch.load(tmp_path / f"out{i}")
        assert torch.equal(one, all_rows[:1])
        assert torch.equal(matrix, dequantize_weight(weight(form)))
        assert_as_good_as_torch(all_rows, reference.quantized_linear, x, weight(form))


# ---- gradients -------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["int8", "int4 with zeros"])
def test_gradients_match_those_of_the_reference(form, dtype, backend):
    w = on(backend, weight(form))
    x, bias = normal(2, 3, IN, dtype=dtype).to(backend.device), normal(OUT, dtype=dtype).to(backend.device)
    grad = normal(2, 3, OUT, dtype=dtype, seed=3).to(backend.device)

    def gradients(function, x, w, bias, grad):
        leaves = [t.detach().requires_grad_() for t in (x, bias)]
        return torch.autograd.grad(function(leaves[0], w, leaves[1]), leaves, grad)

    actual = backend.run(gradients, quantized_linear, x, w, bias, grad)
    on_cuda = backend.device == "cuda"  # where torch multiplies halves by the weight in their dtype
    assert_as_good_as_torch(
        actual, lambda *args: gradients(reference.quantized_linear, *args), x, w, bias, grad,
        computed_in=dtype if on_cuda else None,
    )  # fmt: skip


def test_only_what_wants_a_gradient_gets_one():
    w, x, bias = weight("int4"), normal(4, IN), normal(OUT)
    y = quantized_linear(x, w, bias.requires_grad_())
    y.sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((OUT,), 4.0))
    assert x.grad is None
    one_row = x[0].clone().requires_grad_()
    quantized_linear(one_row, w).sum().backward()
    torch.testing.assert_close(one_row.grad, dequantize_weight(w).sum(0), atol=1e-4, rtol=1e-4)


def test_the_bias_of_a_single_row_gets_its_gradient():
    """An IndexError: a row without leading dimensions had none to sum over."""
    bias = normal(OUT).requires_grad_()
    quantized_linear(normal(IN), weight("int8"), bias).backward(torch.arange(OUT).float())
    assert torch.equal(bias.grad, torch.arange(OUT).float())


def test_a_second_derivative_is_refused_and_not_wrong():
    x = normal(4, IN).requires_grad_()
    (grad,) = torch.autograd.grad(quantized_linear(x, weight("int8")).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- edges -----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("num_rows", [1, 9])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@EVERY_FORMAT
def test_what_is_not_finite_reaches_its_row_alone(form, value, num_rows, backend):
    w = on(backend, weight(form))
    x = normal(num_rows, IN).to(backend.device)
    clean = backend.run(quantized_linear, x, w)
    x[0, 33] = value
    y = backend.run(quantized_linear, x, w)
    assert torch.equal(y[1:], clean[1:])
    # The integer 0 times infinity is NaN, elsewhere infinity stands with its sign.
    expected = reference.quantized_linear(x[:1].double(), w).float()
    assert torch.equal(y[:1].isnan(), expected.isnan())
    assert torch.equal(y[:1].isposinf(), expected.isposinf())
    assert torch.equal(y[:1].isneginf(), expected.isneginf())


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 3e37])
@EVERY_FORMAT
def test_values_near_the_ends_of_float32(form, size):
    """Integers are up to 127 times as large as the weights that they stand for: sums of theirs would be infinite."""
    w, x = weight(form), normal(3, IN) * size
    q, scales, zeros = w.integers()
    w = QuantizedWeight.from_integers(q, scales / 64, zeros, bits=w.bits, group_size=w.group_size)
    for rows in (x[:1], x):
        y = quantized_linear(rows, w)
        assert y.isfinite().all()
        truth = reference.quantized_linear(rows.double(), w)
        assert (y - truth).abs().max() < 1e-6 * truth.abs().max()


@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("largest", [2.0**-60, 2.0**-31, 2.0**33, 2.0**60])
@pytest.mark.parametrize("bits", [8, 4])
def test_small_values_beside_large_ones_keep_their_digits(bits, largest, num_rows):
    """Of 2^-60 and 2^-110 in a row, the lower digits of the second were lost, where the weight of the first is 0."""
    q = torch.full((3, 64), 7 if bits == 8 else 15)
    q[:, 0] = 0 if bits == 8 else 8
    w = QuantizedWeight.from_integers(q, torch.full((3, 1), 2.0**-3), bits=bits)
    x = torch.full((num_rows, 64), 0.0)
    x[:, 0], x[:, 1:9] = largest, largest * 2.0**-60 * (1 + 1 / 3)
    assert_as_good_as_torch(quantized_linear(x, w), reference.quantized_linear, x, w)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_beyond_a_nibble_are_the_same_everywhere(dtype, backend):
    """bfloat16 kernels of a GPU read 128 and more as another number than the others did."""
    w = weight("int4 with zeros")
    wide = dataclasses.replace(w, zeros=w.zeros | 0xC0)
    assert torch.equal(wide.integers()[2], w.integers()[2])
    x = normal(3, IN, dtype=dtype).to(backend.device)
    actual = backend.run(quantized_linear, x, on(backend, wide))
    assert torch.equal(actual, backend.run(quantized_linear, x, on(backend, w)))
    assert torch.equal(
        backend.run(dequantize_weight, on(backend, wide)), reference.dequantize_weight(w).to(backend.device)
    )


@EVERY_BACKEND
@pytest.mark.parametrize(
    "layout", ["transposed", "offset by one element", "expanded", "column slice", "vector", "4 dims"]
)
def test_strides_change_no_bits(layout, backend):
    w = on(backend, weight("int8"))
    x = normal(4, 3, IN, dtype=torch.bfloat16).to(backend.device)
    view = {
        "transposed": lambda: x.transpose(0, 1),
        "offset by one element": lambda: torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view_as(x),
        "expanded": lambda: x[:1].expand_as(x),
        "column slice": lambda: torch.cat([x, x.new_full((4, 3, 5), math.nan)], -1)[..., :IN],
        "vector": lambda: x[1, 2],
        "4 dims": lambda: x.view(2, 2, 3, IN).transpose(1, 2),
    }[layout]()
    y = backend.run(quantized_linear, view, w)
    assert y.shape == (*view.shape[:-1], OUT)
    assert y.is_contiguous()
    expected = backend.run(quantized_linear, view.reshape(-1, IN).contiguous(), w)
    assert torch.equal(y.view(-1, OUT), expected)


@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN), (0, 3, IN)], ids=str)
def test_no_rows(shape):
    x = torch.zeros(shape, requires_grad=True)
    y = quantized_linear(x, weight("int8"), torch.zeros(OUT))
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert x.grad.shape == shape


def test_threads_change_no_bits():
    w, x = weight("int4", 3000, 600), normal(70, 600)
    results = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        results.append((quantized_linear(x, w), quantized_linear(x[:1], w)))
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


# ---- errors ----------------------------------------------------------------------------------------------------------

X, W, BIAS = torch.zeros(2, 64), quantize_weight(torch.eye(40, 64)), torch.zeros(40)
ERRORS = [
    ("x", None, TypeError, "x must be a tensor, got NoneType."),
    ("x", torch.zeros(()), ValueError, "x must be [..., in_features], got 0 dimensions []."),
    ("x", X.double(), ValueError, "x must be float32 or bfloat16 or float16, got float64."),
    ("x", X.to("meta"), ValueError, "x must be on the device of weight, cpu, got meta."),
    ("x", X[:, :63], ValueError, "x must have in_features 64, got 63."),
    ("x", torch.zeros(2, 128)[:, ::2], ValueError, "x must have a contiguous last dimension, got stride 2."),
    ("x", X.to_sparse(), ValueError, "x must be a strided tensor, got layout torch.sparse_coo."),
    ("weight", torch.zeros(40, 64), TypeError, "weight must be a QuantizedWeight, got Tensor."),
    ("bias", 1.0, TypeError, "bias must be a tensor, got float."),
    ("bias", BIAS[None], ValueError, "bias must be [out_features], got 2 dimensions [1, 40]."),
    ("bias", BIAS[:39], ValueError, "bias must have out_features 40, got 39."),
    ("bias", BIAS.to("meta"), ValueError, "bias must be on the device of x, cpu, got meta."),
    ("bias", BIAS.half(), ValueError, "bias must be float32, got float16."),
    ("bias", torch.zeros(80)[::2], ValueError, "bias must have a contiguous last dimension, got stride 2."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "sentence"), ERRORS)
def test_wrong_arguments(name, value, error, sentence):
    with pytest.raises(error) as raised:
        quantized_linear(**{"x": X, "weight": W, "bias": BIAS, name: value})
    assert str(raised.value) == f"quantized_linear: {sentence}"


@pytest.mark.parametrize(
    ("args", "error", "sentence"),
    [
        ((X,), TypeError, "weight must be a QuantizedWeight, got Tensor."),
        ((W, "float32"), TypeError, "dtype must be a torch.dtype, got str."),
        ((W, torch.int8), ValueError, "dtype must be float32 or bfloat16 or float16, got int8."),
    ],
)
def test_wrong_arguments_of_dequantize(args, error, sentence):
    with pytest.raises(error) as raised:
        dequantize_weight(*args)
    assert str(raised.value) == f"dequantize_weight: {sentence}"


def test_a_device_without_a_kernel_is_named(monkeypatch):
    monkeypatch.setattr(_library, "cuda_ops", frozenset())
    monkeypatch.setattr(_library, "cuda_error", None)
    with FakeTensorMode():
        tensors = torch.empty(2, 16, 32, device="cuda", dtype=torch.int32), torch.empty(2, 1, 32, device="cuda")
        w = QuantizedWeight(*tensors, None, 8, None, 40, 64)
        with pytest.raises(ValueError, match="quantized_linear: there is no kernel for cuda tensors"):
            quantized_linear(torch.empty(2, 64, device="cuda"), w)
        with pytest.raises(ValueError, match="dequantize_weight: there is no kernel for cuda tensors"):
            dequantize_weight(w)


ZEROS = quantize_weight(torch.eye(40, 64), bits=4, group_size=32, symmetric=False).zeros
INT4 = quantize_weight(torch.eye(40, 64), bits=4, group_size=32)
RIGHT = {"x": X, "values": INT4.values, "scales": INT4.scales, "zeros": ZEROS, "bias": BIAS, "bits": 4}
RIGHT |= {"group_size": 32, "out_features": 40, "in_features": 64}
HOSTILE = [
    torch.zeros(()),
    torch.zeros(4),
    torch.zeros(2, 3, 32),
    torch.zeros(2, 2, 32)[:, ::2],
    X.to_sparse(),
    X.int(),
]


@pytest.mark.parametrize("name", list(RIGHT))
def test_the_ops_themselves_refuse(name):
    op, back = torch.ops.fmkernels.quantized_linear_forward, torch.ops.fmkernels.quantized_linear_dequantize
    op(**RIGHT)
    tensors = [t for t in HOSTILE if t.shape != RIGHT[name].shape] if isinstance(RIGHT[name], torch.Tensor) else []
    for value in tensors or {"bits": (0, 8, 5), "group_size": (-1, 16, 64)}.get(name, (0, -1, 2**40, 30)):
        with pytest.raises(RuntimeError):
            op(**{**RIGHT, name: value})
        if name not in ("x", "bias"):
            arguments = {**RIGHT, name: value, "dtype": torch.float32}
            with pytest.raises(RuntimeError):
                back(**{key: arguments[key] for key in arguments if key not in ("x", "bias")})


@pytest.mark.parametrize("name", ["x", "values", "scales", "zeros", "bias"])
def test_the_ops_refuse_a_tensor_whose_storage_was_shrunk(name):
    shrunk = RIGHT[name].clone()
    shrunk.untyped_storage().resize_(shrunk.nbytes - 1)
    with pytest.raises(RuntimeError, match=r"storage of \d+ bytes, which does not hold its elements"):
        torch.ops.fmkernels.quantized_linear_forward(**{**RIGHT, name: shrunk})


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.namespace == "fmkernels"], ids=str)
@EVERY_FORMAT
def test_opcheck(form, backend):
    w, x = on(backend, weight(form)), normal(2, 3, IN, dtype=torch.bfloat16).to(backend.device)
    tensors, sizes = (w.values, w.scales, w.zeros), (w.bits, w.group_size or 0, *w.shape)
    opcheck(torch.ops.fmkernels.quantized_linear_forward.default, (x, *tensors, x.new_ones(OUT), *sizes))
    opcheck(torch.ops.fmkernels.quantized_linear_dequantize.default, (*tensors, *sizes, torch.bfloat16))


@pytest.mark.parametrize(("form", "dynamic"), [("int8", False), ("int4 with zeros", True)])
def test_compile_is_one_graph(form, dynamic):
    torch._dynamo.reset()
    w = weight(form)
    compiled = torch.compile(quantized_linear, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_rows in (3, 5):
        x = normal(num_rows, IN).requires_grad_()
        grads = [torch.autograd.grad(f(x, w).square().sum(), x)[0] for f in (compiled, quantized_linear)]
        assert torch.equal(*grads)
        assert torch.equal(compiled(x, w), quantized_linear(x, w))
    dense = torch.compile(dequantize_weight, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(dense(w), dequantize_weight(w))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", ["compiled", "checked"])
def test_autocast_is_refused_neither_compiled_nor_with_checked_values(how, grad, monkeypatch):
    """The checks once saw the dtypes of the caller, and not those that autocast gives the kernel."""
    w, x, bias = weight("int8"), normal(4, IN).requires_grad_(grad), normal(OUT, dtype=torch.bfloat16)
    torch._dynamo.reset()
    function = torch.compile(quantized_linear, fullgraph=True, backend="aot_eager") if how == "compiled" else None
    monkeypatch.setattr(_library, "check_values", how == "checked")  # as FMKERNELS_CHECK=1
    with torch.autocast("cpu", torch.bfloat16):
        y = (function or quantized_linear)(x, w, bias)
    assert torch.equal(y, quantized_linear(x.bfloat16(), w, bias))
    if grad:
        y.sum().backward()
        assert x.grad.dtype == torch.float32


def test_autocast_and_flops():
    w, x, bias = weight("int8"), normal(4, IN), normal(OUT)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized_linear(x, w, bias)
    assert torch.equal(y, quantized_linear(x.bfloat16(), w, bias))
    with FlopCounterMode(display=False) as counter:
        quantized_linear(x, w, bias)
    assert counter.get_total_flops() == 2 * 4 * OUT * IN
