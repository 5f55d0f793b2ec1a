# SPDX-License-Identifier: Apache-2.0
"""rms_norm and layer_norm: values, gradients and edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

from fmkernels import layer_norm, reference, rms_norm
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("norm_forward")
NATIVE = [backend for backend in BACKENDS if backend.namespace == "fmkernels"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows of one warp, of several, with a tail, and beyond what a team of threads holds in registers, backward and forward.
SHAPES = [(3, 2, 64), (5, 1), (7, 131), (2, 3, 1536), (2, 9000)]
FUNCTIONS = {"rms_norm": rms_norm, "layer_norm": layer_norm}
EACH = pytest.mark.parametrize("name", FUNCTIONS)
ON_EACH = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def inputs(name, shape, dtype=torch.float32, device="cpu", weight_dtype=None, seed=0):
    """(x, residual, {weight, bias}); a mean that is not 0, so that a norm that forgets it is seen."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x, residual = (2 * normal(*shape) + 0.5).to(device, dtype), normal(*shape).to(device, dtype)
    weights = {"weight": normal(shape[-1]) + 1}
    if name == "layer_norm":
        weights["bias"] = normal(shape[-1])
    return x, residual, {key: t.to(device, weight_dtype or dtype) for key, t in weights.items()}


def norm_of(name):
    """The reference as a function of tensors alone, in the order of `gradients`."""

    def run(x, weight=None, bias=None):
        return getattr(reference, name)(x, weight, *(() if bias is None else (bias,)))

    return run


# ---- values ----------------------------------------------------------------------------------------------------------


@ON_EACH
@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_matches_reference(shape, dtype, name, backend):
    x, residual, weights = inputs(name, shape, dtype, backend.device)
    y = backend.run(FUNCTIONS[name], x, **weights)
    assert y.dtype == dtype
    assert_as_good_as_torch(y, norm_of(name), x, *weights.values())
    y, summed = backend.run(FUNCTIONS[name], x, residual=residual, **weights)
    assert torch.equal(summed, x + residual)
    assert torch.equal(y, backend.run(FUNCTIONS[name], summed, **weights))  # fused is what two calls give, to the bit


@ON_EACH
@EACH
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_weights_in_float32(dtype, name, backend):
    for shape in ((6, 256), (3, 77)):
        x, _, weights = inputs(name, shape, dtype, backend.device, torch.float32)
        y = backend.run(FUNCTIONS[name], x, **weights)
        assert y.dtype == dtype
        assert_as_good_as_torch(y, norm_of(name), x, *weights.values())


@ON_EACH
@EACH
def test_weights_may_be_left_out(name, backend):
    x, residual, weights = inputs(name, (4, 96), device=backend.device)
    assert_as_good_as_torch(backend.run(FUNCTIONS[name], x), norm_of(name), x)
    assert_as_good_as_torch(backend.run(FUNCTIONS[name], x, residual=residual), getattr(reference, name), x, None,
                            residual=residual)  # fmt: skip
    if name == "layer_norm":
        bias = weights["bias"]
        y = backend.run(layer_norm, x, None, bias)
        assert_as_good_as_torch(y, reference.layer_norm, x, None, bias)


@ON_EACH
def test_a_mean_far_above_the_deviation(backend):
    """sum(x^2) / n - mean^2 would lose all digits."""
    x = torch.randn(4, 512, device=backend.device) + 3e3
    assert_as_good_as_torch(backend.run(layer_norm, x), reference.layer_norm, x)


@ON_EACH
@EACH
def test_eps(name, backend):
    x, _, weights = inputs(name, (4, 80), device=backend.device)
    for eps in (1e-2, 3.0, 0):
        y = backend.run(FUNCTIONS[name], x, eps=eps, **weights)
        assert_as_good_as_torch(y, getattr(reference, name), x, **weights, eps=eps)
    zero = torch.zeros(1, 80, device=backend.device)
    assert (backend.run(FUNCTIONS[name], zero) == 0).all()
    assert backend.run(FUNCTIONS[name], zero, eps=0.0).isnan().all()


@ON_EACH
@EACH
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_row_or_column(value, name, backend):
    x, _, weights = inputs(name, (5, 200), device=backend.device)
    clean = backend.run(FUNCTIONS[name], x, **weights)
    x[2, 131] = value
    y = backend.run(FUNCTIONS[name], x, **weights)
    assert torch.equal(y.isfinite(), getattr(reference, name)(x, **weights).isfinite())
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], clean[others])
    weights["weight"][7] = value
    y = backend.run(FUNCTIONS[name], x[others], **weights)
    assert not y[:, 7].isfinite().any()
    assert y.isfinite().sum() == 4 * 199


@settings(max_examples=30)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3).map(tuple),
    hidden=st.integers(1, 40) | st.integers(41, 700),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(list(FUNCTIONS)),
    seed=st.integers(0, 9),
)
def test_any_shape(shape, hidden, dtype, name, seed):
    for backend in BACKENDS:
        x, residual, weights = inputs(name, (*shape, hidden), dtype, backend.device, seed=seed)
        y, summed = backend.run(FUNCTIONS[name], x, residual=residual, **weights)
        assert torch.equal(summed, x + residual)
        if x.numel():
            assert_as_good_as_torch(y, norm_of(name), summed, *weights.values())


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(function, tensors, grad_y):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, grad_y)


def reference_gradients(name):
    return lambda grad_y, *tensors: gradients(norm_of(name), tensors, grad_y)


def ours(name):
    def run(x, weight=None, bias=None):
        return FUNCTIONS[name](x, weight, *(() if bias is None else (bias,)))

    return run


@ON_EACH
@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (70, 33), (200, 8)], ids=str)
def test_gradients_match_those_of_the_reference(shape, dtype, name, backend):
    x, grad_y, weights = inputs(name, shape, dtype, backend.device)
    actual = backend.run(gradients, ours(name), (x, *weights.values()), grad_y)
    assert [t.dtype for t in actual] == [dtype] * len(actual)
    assert_as_good_as_torch(actual, reference_gradients(name), grad_y, x, *weights.values())


@ON_EACH
@EACH
def test_gradients_of_float32_weights(name, backend):
    x, grad_y, weights = inputs(name, (40, 256), torch.bfloat16, backend.device, torch.float32)
    actual = backend.run(gradients, ours(name), (x, *weights.values()), grad_y)
    assert actual[1].dtype == torch.float32
    assert_as_good_as_torch(actual, reference_gradients(name), grad_y, x, *weights.values())


@ON_EACH
@EACH
@pytest.mark.parametrize("through", ["y", "residual", "both"])
def test_gradients_of_a_residual(through, name, backend):
    """x and the residual have one gradient: that of the norm at their sum, and what flows into the sum itself."""
    x, residual, weights = inputs(name, (6, 72), torch.bfloat16, backend.device)
    grad_y, grad_s = (torch.randn_like(x) if through in (part, "both") else None for part in ("y", "residual"))

    def run(function):
        leaves = [t.detach().clone().requires_grad_() for t in (x, residual, *weights.values())]
        y, summed = function(leaves[0], residual=leaves[1], **dict(zip(weights, leaves[2:], strict=True)))
        wanted = [(o, g) for o, g in ((y, grad_y), (summed, grad_s)) if g is not None]
        outputs, grads = zip(*wanted, strict=True)
        return summed, torch.autograd.grad(outputs, leaves, grads, materialize_grads=True)

    summed, (grad_x, grad_residual, *of_weights) = backend.run(run, FUNCTIONS[name])
    assert torch.equal(grad_x, grad_residual)

    def expected(summed, *weights):
        leaves = [t.detach().requires_grad_() for t in (summed, *weights)]
        flows = norm_of(name)(*leaves) if grad_y is not None else leaves[0] * 0 * sum(t.sum() for t in leaves[1:])
        start = torch.zeros_like(flows) if grad_y is None else grad_y.to(flows.dtype)
        first, *others = torch.autograd.grad(flows, leaves, start)
        return first if grad_s is None else first + grad_s.to(first.dtype), *others

    assert_as_good_as_torch((grad_x, *of_weights), expected, summed, *weights.values())


@ON_EACH
@EACH
def test_expanded_and_strided_gradients(name, backend):
    x, grad_y, weights = inputs(name, (4, 6, 48), device=backend.device)
    tensors = (x, *weights.values())
    one = torch.ones((), device=backend.device)
    expanded = backend.run(gradients, ours(name), tensors, one.expand_as(x))
    dense = backend.run(gradients, ours(name), tensors, torch.ones_like(x))
    assert all(map(torch.equal, expanded, dense))
    strided = grad_y.transpose(0, 1).contiguous().transpose(0, 1)
    actual, expected = (backend.run(gradients, ours(name), tensors, g) for g in (strided, grad_y))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("wanted", range(4))
def test_only_some_inputs_want_a_gradient(wanted):
    x, residual, weights = inputs("layer_norm", (6, 40))
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((x, residual, *weights.values()))]
    y, _ = layer_norm(leaves[0], *leaves[2:], residual=leaves[1])
    (y * y).sum().backward()
    full = [t.clone().requires_grad_() for t in (x, residual, *weights.values())]
    z, _ = reference.layer_norm(full[0], *full[2:], residual=full[1])
    (z * z).sum().backward()
    torch.testing.assert_close(leaves[wanted].grad, full[wanted].grad)
    assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != wanted)


def test_a_second_derivative_and_forward_mode_are_refused_and_not_wrong():
    x = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="jvp"), forward_ad.dual_level():
        rms_norm(forward_ad.make_dual(x.detach(), torch.ones_like(x)))


# ---- edges -----------------------------------------------------------------------------------------------------------


@ON_EACH
@EACH
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "offset by one element", "expanded", "part of a wider row", "heads"])
def test_strides_change_no_bits(layout, dtype, name, backend):
    def laid_out(t):
        if layout == "transposed":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "offset by one element":
            return torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view_as(t)
        if layout == "expanded":
            return t[:1].expand_as(t)
        if layout == "part of a wider row":
            return torch.cat([t, torch.full_like(t, math.nan)], -1)[..., : t.shape[-1]]
        return torch.stack([t, t], 2).transpose(0, 1)[:, :, 1].unflatten(0, (2, -1))  # four dimensions, none merges

    x, residual, weights = inputs(name, (4, 6, 64), dtype, backend.device)
    views = [laid_out(t) for t in (x, residual)]
    actual = backend.run(FUNCTIONS[name], views[0], residual=views[1], **weights)
    expected = backend.run(FUNCTIONS[name], views[0].contiguous(), residual=views[1].contiguous(), **weights)
    assert all(map(torch.equal, actual, expected))
    tensors = (views[0], *weights.values())
    dense = (views[0].contiguous(), *weights.values())
    assert all(map(torch.equal, *(backend.run(gradients, ours(name), t, views[1]) for t in (tensors, dense))))


@ON_EACH
@EACH
@pytest.mark.parametrize("hidden", [64, 77, 9000])
def test_out_may_be_the_input(hidden, name, backend):
    x, residual, weights = inputs(name, (3, hidden), torch.bfloat16, backend.device)
    expected = backend.run(FUNCTIONS[name], x, residual=residual, **weights)
    out, residual_out = x.clone(), residual.clone()
    results = backend.run(FUNCTIONS[name], out, residual=residual_out, out=out, residual_out=residual_out, **weights)
    assert results[0] is out
    assert results[1] is residual_out
    assert all(map(torch.equal, results, expected))
    out = torch.empty_like(x)
    assert backend.run(FUNCTIONS[name], x, out=out, **weights) is out
    assert torch.equal(out, backend.run(FUNCTIONS[name], x, **weights))


@EACH
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0,) * 3 + (5,)], ids=str)
def test_empty_inputs_give_empty_outputs(shape, name):
    x, residual, weights = inputs(name, shape)
    leaves = [t.requires_grad_() for t in (x, residual, *weights.values())]
    y, summed = FUNCTIONS[name](x, residual=residual, **weights)
    assert y.shape == summed.shape == shape
    (y.sum() + summed.sum()).backward()
    assert all(t.grad.shape == t.shape and (t.grad == 0).all() for t in leaves)


@ON_EACH
@EACH
def test_threads_and_neighbours_change_no_bits(name, backend):
    x, residual, weights = inputs(name, (300, 96), device=backend.device)
    results = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        results.append(backend.run(FUNCTIONS[name], x, residual=residual, **weights))
        results.append(backend.run(gradients, ours(name), (x, *weights.values()), residual))
    for again in (results[2:4], results[4:]):
        assert all(torch.equal(a, b) for first, second in zip(results, again, strict=False)
                   for a, b in zip(first, second, strict=True))  # fmt: skip
    alone = backend.run(FUNCTIONS[name], x[17:18], residual=residual[17:18], **weights)
    assert all(torch.equal(whole[17:18], part) for whole, part in zip(results[0], alone, strict=True))
