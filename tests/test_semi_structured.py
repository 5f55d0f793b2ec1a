# SPDX-License-Identifier: Apache-2.0
"""semi_structured_linear: values, gradients, edges, errors, and what torch asks of an op."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fmkernels import SemiStructured, reference, semi_structured_linear
from fmkernels._library import ops
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("semi_structured_linear")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    (backend, dtype) for backend in BACKENDS for dtype in DTYPES if backend.name == "cpu" or dtype != torch.float32
]
EVERY_CASE = pytest.mark.parametrize(("backend", "dtype"), CASES, ids=str)
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
ROWS, COLUMNS = 48, 336  # a part of a tile of rows; more than a chain of 256 columns, and a part of a block of 64
TOKENS = [1, 2, 3, 8, 9, 70, 150]  # the tiles for few, one and two panels of the CPU; both tiles of CUDA


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix(dtype=torch.float32, rows=ROWS, columns=COLUMNS, both=False, seed=1):
    return SemiStructured.from_dense(normal(rows, columns, dtype=dtype, seed=seed), both_directions=both)


def fit(backend, dtype):
    """A dtype that the backend has."""
    return torch.bfloat16 if dtype == torch.float32 and backend.name != "cpu" else dtype


# ---- values ----------------------------------------------------------------------------------------------------------


@EVERY_CASE
@pytest.mark.parametrize("tokens", TOKENS)
def test_product_matches_reference(tokens, backend, dtype):
    if backend.name == "emulated" and tokens not in (1, 9, 70, 150):
        pytest.skip("its tiles are of 32 and 128 tokens")
    w = matrix(dtype).to(backend.device)
    x = normal(tokens, COLUMNS, dtype=dtype).to(backend.device)
    bias = None if tokens == 9 else normal(ROWS, seed=2).to(backend.device)
    y = backend.run(semi_structured_linear, x, w, bias)
    assert y.dtype == dtype
    assert_as_good_as_torch(y, reference.semi_structured_linear, x, w, bias)


@EVERY_CASE
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (144, 32), (160, 48), (16, 1040), (32, 64), (272, 80)])
def test_sizes(rows, columns, backend, dtype):
    """One row tile; more rows than a tile of CUDA; columns of one to many stages, whole and not."""
    w = matrix(dtype, rows, columns).to(backend.device)
    for tokens in (2, 67):
        x = normal(tokens, columns, dtype=dtype).to(backend.device)
        assert_as_good_as_torch(backend.run(semi_structured_linear, x, w), reference.semi_structured_linear, x, w)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [*range(1, 30), 96, 97, 192, 300, 500])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (528, 304), (1040, 2064)])
def test_every_width_of_a_panel_on_the_cpu(rows, columns, tokens, dtype):
    w, x = matrix(dtype, rows, columns), normal(tokens, columns, dtype=dtype)
    assert_as_good_as_torch(semi_structured_linear(x, w), reference.semi_structured_linear, x, w)


@EVERY_CASE
def test_a_row_has_the_same_bits_in_any_batch(backend, dtype):
    w = matrix(dtype).to(backend.device)
    x = normal(130, COLUMNS, dtype=dtype).to(backend.device)
    everything = backend.run(semi_structured_linear, x, w)
    for tokens in (1, 2, 4, 7, 9, 40, 90) if backend.name == "cpu" else (1, 65):
        assert torch.equal(backend.run(semi_structured_linear, x[:tokens], w), everything[:tokens])
    assert torch.equal(backend.run(semi_structured_linear, x[125:], w), everything[125:])


def test_the_code_for_sm_90():
    sm_80 = next((backend for backend in BACKENDS if backend.name == "emulated"), None)
    if sm_80 is None:
        pytest.skip("no emulated backend")
    w = matrix(torch.bfloat16)
    for tokens in (9, 70):
        x = normal(tokens, COLUMNS, dtype=torch.bfloat16)
        sm_90 = dataclasses.replace(sm_80, architecture=90)
        assert torch.equal(sm_90.run(semi_structured_linear, x, w), sm_80.run(semi_structured_linear, x, w))


def test_the_portable_kernels_agree(tmp_path):
    """Another process, whose kernels are those of a processor without AVX2."""
    dense, x = normal(ROWS, COLUMNS, seed=1), normal(70, COLUMNS)
    torch.save((dense, x), tmp_path / "in")
    code = (
        "import torch, fmkernels, sys\n"
        "dense, x = torch.load(sys.argv[1] + '/in')\n"
        "w = fmkernels.SemiStructured.from_dense(dense, both_directions=True)\n"
        "y = [fmkernels.semi_structured_linear(x[:n], w) for n in (1, 70)]\n"
        "torch.save((w.values, w.metadata, *y), sys.argv[1] + '/out')\n"
    )
    environment = {**os.environ, "FMKERNELS_CPU_ISA": "generic"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    values, metadata, one, every = torch.load(tmp_path / "out")
    w = matrix(both=True)
    assert torch.equal(values, w.values)
    assert torch.equal(metadata, w.metadata)
    assert torch.equal(one, every[:1])
    assert_as_good_as_torch(every, reference.semi_structured_linear, x, w)


# ---- gradients -------------------------------------------------------------------------------------------------------


@EVERY_CASE
def test_gradients_match_those_of_the_reference(backend, dtype):
    w = matrix(dtype, both=True).to(backend.device)
    x, bias = normal(2, 3, COLUMNS, dtype=dtype).to(backend.device), normal(ROWS, dtype=dtype).to(backend.device)
    grad = normal(2, 3, ROWS, dtype=dtype, seed=3).to(backend.device)

    def gradients(function, x, w, bias, grad):
        leaves = [t.detach().requires_grad_() for t in (x, bias)]
        return torch.autograd.grad(function(leaves[0], w, leaves[1]), leaves, grad)

    actual = backend.run(gradients, semi_structured_linear, x, w, bias, grad)
    assert_as_good_as_torch(
        actual, lambda *args: gradients(reference.semi_structured_linear, *args), x, w, bias, grad
    )  # fmt: skip


def test_only_what_wants_a_gradient_gets_one():
    w, x, bias = matrix(), normal(4, COLUMNS), normal(ROWS).requires_grad_()
    semi_structured_linear(x, w, bias).sum().backward()  # without the transpose: x wants none
    torch.testing.assert_close(bias.grad, torch.full((ROWS,), 4.0))
    one_row = x[0].clone().requires_grad_()
    semi_structured_linear(one_row, matrix(both=True)).sum().backward()
    expected = matrix(both=True).to_dense().sum(0)
    torch.testing.assert_close(one_row.grad, expected, atol=1e-4, rtol=1e-4)


def test_a_gradient_of_x_needs_the_transpose():
    with pytest.raises(ValueError, match=r"^semi_structured_linear: w must have its transpose packed for a gradient"):
        semi_structured_linear(normal(2, COLUMNS).requires_grad_(), matrix())


def test_a_second_derivative_is_refused_and_not_wrong():
    x = normal(4, COLUMNS).requires_grad_()
    y = semi_structured_linear(x, matrix(both=True)).square().sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- edges -----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("tokens", [1, 2, 9, 70])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_reaches_what_depends_on_it_alone(value, tokens, backend):
    """An element of x reaches the rows of w that store its column, and no other token."""
    dtype = fit(backend, torch.float32)
    w = matrix(dtype).to(backend.device)
    x = normal(tokens, COLUMNS, dtype=dtype).to(backend.device)
    clean = backend.run(semi_structured_linear, x, w)
    x[0, 37] = value
    y = backend.run(semi_structured_linear, x, w)
    stored = (w.columns() == 37).any(1)
    assert 0 < stored.sum() < ROWS
    assert torch.equal(y[1:], clean[1:])
    assert torch.equal(~y[0].isfinite(), stored)
    assert torch.equal(y[0][~stored], clean[0][~stored])


@EVERY_CASE
def test_what_is_not_finite_in_w_is_as_the_reference_says(backend, dtype):
    dense = normal(ROWS, 48, dtype=dtype, seed=1)
    dense[3, 5], dense[17, 40], dense[40, 0] = math.inf, -math.inf, math.nan
    w = SemiStructured.from_dense(dense).to(backend.device)
    for tokens in (2, 70):
        x = normal(tokens, 48, dtype=dtype).to(backend.device)
        assert_as_good_as_torch(backend.run(semi_structured_linear, x, w), reference.semi_structured_linear, x, w)


@EVERY_BACKEND
@pytest.mark.parametrize("layout", ["offset by one", "expanded", "column slice", "odd slice", "vector", "4 dims"])
def test_strides_change_no_bits(layout, backend):
    w = matrix(torch.bfloat16).to(backend.device)
    x = normal(4, 3, COLUMNS, dtype=torch.bfloat16).to(backend.device)
    nan = x.new_full((4, 3, 8), math.nan)
    view = {
        "offset by one": lambda: torch.cat([nan[0, 0, :1], x.flatten()])[1:].view_as(x),
        "expanded": lambda: x[:1].expand_as(x),
        "column slice": lambda: torch.cat([x, nan], -1)[..., :COLUMNS],
        "odd slice": lambda: torch.cat([x, nan[..., :5]], -1)[..., :COLUMNS],
        "vector": lambda: x[1, 2],
        "4 dims": lambda: x.view(2, 2, 3, COLUMNS).transpose(1, 2),
    }[layout]()
    y = backend.run(semi_structured_linear, view, w)
    assert y.shape == (*view.shape[:-1], ROWS)
    assert y.is_contiguous()
    expected = backend.run(semi_structured_linear, view.reshape(-1, COLUMNS).clone(), w)
    assert torch.equal(y.view(-1, ROWS), expected)


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("rows", "columns", "shape"),
    [(16, 16, (0, 16)), (0, 16, (3, 16)), (32, 0, (3, 0)), (32, 0, (2, 3, 0)), (32, 0, (0,))],
)
def test_no_elements(rows, columns, shape, backend):
    dtype = fit(backend, torch.float32)
    w = SemiStructured.from_dense(torch.zeros(rows, columns, dtype=dtype), both_directions=True).to(backend.device)
    x = torch.zeros(shape, dtype=dtype, device=backend.device, requires_grad=True)
    bias = normal(rows).to(backend.device)

    def both(x, w, bias):
        y = semi_structured_linear(x, w, bias)
        y.sum().backward()
        return y

    y = backend.run(both, x, w, bias)
    assert torch.equal(y.detach(), bias.to(dtype).expand(*shape[:-1], rows))
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_threads_change_no_bits():
    w, x = matrix(rows=1040, columns=608), normal(150, 608)
    results = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        results.append((semi_structured_linear(x, w), semi_structured_linear(x[:3], w)))
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


# ---- errors ----------------------------------------------------------------------------------------------------------

X, W, BIAS = torch.zeros(2, 64), matrix(rows=48, columns=64), torch.zeros(48)
ERRORS = [
    ("x", None, TypeError, "x must be a tensor, got NoneType."),
    ("x", torch.zeros(()), ValueError, "x must be [..., columns], got 0 dimensions []."),
    ("x", X.double(), ValueError, "x must be float32 or bfloat16 or float16, got float64."),
    ("x", X.half(), ValueError, "x must have the dtype of w, float32, got float16."),
    ("x", X.to("meta"), ValueError, "x must be on the device of w, cpu, got meta."),
    ("x", X[:, :48], ValueError, "x must have as many columns as w, 64, got 48."),
    ("x", torch.zeros(2, 128)[:, ::2], ValueError, "x must have a contiguous last dimension, got stride 2."),
    ("x", X.to_sparse(), ValueError, "x must be a strided tensor, got layout torch.sparse_coo."),
    ("w", torch.zeros(48, 64), TypeError, "w must be a SemiStructured, got Tensor."),
    ("bias", 1.0, TypeError, "bias must be a tensor, got float."),
    ("bias", BIAS[None], ValueError, "bias must be [rows], got 2 dimensions [1, 48]."),
    ("bias", BIAS[:40], ValueError, "bias must have as many elements as w has rows, 48, got 40."),
    ("bias", BIAS.to("meta"), ValueError, "bias must be on the device of x, cpu, got meta."),
    ("bias", BIAS.half(), ValueError, "bias must be float32 for this x, got float16."),
]


@pytest.mark.parametrize(("name", "value", "error", "sentence"), ERRORS)
def test_wrong_arguments_are_told_in_one_sentence(name, value, error, sentence):
    with pytest.raises(error) as caught:
        semi_structured_linear(**{"x": X, "w": W, "bias": BIAS, name: value})
    assert str(caught.value) == f"semi_structured_linear: {sentence}"


def test_the_op_refuses_what_memory_safety_needs():
    good = [X, W.values, W.metadata, BIAS]
    wrong = {
        0: [X[0], X[:, :48], X.double(), X.to("meta"), torch.zeros(2, 128)[:, ::2]],
        1: [W.values.half(), W.values[:, :24], W.values[:8], W.values.t().contiguous().t(), W.values[0]],
        2: [W.metadata[:2], W.metadata[:, :, :16], W.metadata.long(), W.metadata.to("meta"), W.metadata.flatten()],
        3: [BIAS[:40], BIAS.half(), torch.zeros(96)[::2]],
    }
    for namespace in {torch.ops.fmkernels} | {getattr(torch.ops, b.namespace) for b in BACKENDS}:
        for index, values in wrong.items():
            for value in values:
                with pytest.raises((RuntimeError, ValueError)):  # the fake kernel where something is on meta
                    namespace.semi_structured_linear(*good[:index], value, *good[index + 1 :])


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    w, x = matrix(dtype), normal(5, COLUMNS, dtype=dtype)
    opcheck(torch.ops.fmkernels.semi_structured_linear.default, (x, w.values, w.metadata, normal(ROWS)))


def test_compile_and_fake_tensors():
    w, x, bias = matrix(both=True), normal(5, COLUMNS).requires_grad_(), normal(ROWS).requires_grad_()
    compiled = torch.compile(semi_structured_linear, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(x, w, bias), semi_structured_linear(x, w, bias)
    assert torch.equal(actual, expected)
    grad = normal(5, ROWS, seed=4)
    for one, other in zip(*(torch.autograd.grad(y, (x, bias), grad) for y in (actual, expected)), strict=True):
        assert torch.equal(one, other)
    real = [t.detach() for t in (x, w.values, w.metadata, bias)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in real]
        assert ops.semi_structured_linear(*fakes).shape == (5, ROWS)


def test_autocast_and_flops():
    w, x = matrix(both=True), normal(5, COLUMNS).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), FlopCounterMode(display=False) as flops:
        y = semi_structured_linear(x, w, normal(ROWS))
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == torch.float32
    assert flops.get_total_flops() == 2 * 5 * ROWS * COLUMNS  # two products, each half of a dense one
