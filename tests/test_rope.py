# SPDX-License-Identifier: Apache-2.0
"""rope: values, gradients, edges, errors, and what torch asks of an op."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.library import opcheck

from fmkernels import _library, reference, rope, rope_cache
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("rope_forward")
NATIVE = [backend for backend in BACKENDS if backend.namespace == "fmkernels"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (leading dimensions, heads, kv_heads, head_dim, rotary_dim): whole vectors, tails, one pair, many columns
SHAPES = [
    ((2, 9), 4, 2, 64, 64),
    ((5,), 3, 1, 40, 20),
    ((3,), 2, 2, 7, 2),
    ((2, 3), 5, 1, 96, 64),
    ((2,), 1, 1, 700, 640),
]
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
ON_EACH = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def inputs(
    shape, dtype=torch.float32, device="cpu", cache_dtype=torch.float32, index=torch.int64, seed=0, positions=37
):
    """(q, k, positions, cos_sin); the cache is random, so that a mix-up of its columns is seen."""
    lead, heads, kv_heads, head_dim, rotary_dim = shape
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(*lead, n, head_dim, generator=generator).to(device, dtype) for n in (heads, kv_heads))
    at = torch.randint(0, positions, lead, generator=generator, dtype=index).to(device)
    return q, k, at, torch.randn(positions, rotary_dim, generator=generator).to(device, cache_dtype)


# ---- values ----------------------------------------------------------------------------------------------------------


@ON_EACH
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_matches_reference(shape, dtype, interleaved, backend):
    for cache_dtype in dict.fromkeys((torch.float32, dtype)):
        for inverse in (False, True):
            args = inputs(shape, dtype, backend.device, cache_dtype)
            actual = backend.run(rope, *args, interleaved=interleaved, inverse=inverse)
            assert [t.dtype for t in actual] == [dtype, dtype]
            assert_as_good_as_torch(actual, reference.rope, *args, interleaved=interleaved, inverse=inverse)
            rest = shape[-1]
            assert torch.equal(actual[0][..., rest:], args[0][..., rest:])


@ON_EACH
@LAYOUTS
def test_positions(interleaved, backend):
    """int32 and int64, of any stride, one row for all of a batch, and none of k."""
    q, k, positions, cos_sin = inputs(SHAPES[0], device=backend.device)
    expected = backend.run(rope, q, k, positions, cos_sin, interleaved=interleaved)
    strided = torch.stack([positions, positions + 99], -1)[..., 0]
    for other in (positions.int(), strided, positions.t().contiguous().t()):
        assert all(map(torch.equal, backend.run(rope, q, k, other, cos_sin, interleaved=interleaved), expected))
    row = positions[:1].expand_as(positions)
    expected = backend.run(rope, q, k, row.contiguous(), cos_sin, interleaved=interleaved)
    for other in (row, row[0]):
        assert all(map(torch.equal, backend.run(rope, q, k, other, cos_sin, interleaved=interleaved), expected))
    alone, none = backend.run(rope, q, None, row, cos_sin, interleaved=interleaved)
    assert none is None
    assert torch.equal(alone, expected[0])


@ON_EACH
@LAYOUTS
def test_a_rotation_keeps_norms_and_the_inverse_undoes_it(interleaved, backend):
    q, k, positions, _ = inputs(SHAPES[0], device=backend.device)
    cos_sin = rope_cache(64, 37, device=backend.device)
    turned = backend.run(rope, q, k, positions, cos_sin, interleaved=interleaved)
    back = backend.run(rope, *turned, positions, cos_sin, interleaved=interleaved, inverse=True)
    torch.testing.assert_close(back, (q, k))
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm(dim=-1))


@ON_EACH
def test_scores_depend_on_distances_alone(backend):
    q, k = (torch.randn(1, 1, 32, device=backend.device) for _ in range(2))
    cos_sin = rope_cache(32, 100, device=backend.device)

    def score(i, j):
        turned = [
            backend.run(rope, t, None, torch.tensor([at], device=backend.device), cos_sin)[0]
            for t, at in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(90, 86))


@ON_EACH
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_pair(dtype, interleaved, backend):
    q, k, positions, cos_sin = inputs(SHAPES[0], dtype, backend.device)
    clean = backend.run(rope, q, k, positions, cos_sin, interleaved=interleaved)
    q[1, 4, 2, 6] = math.nan
    actual = backend.run(rope, q, k, positions, cos_sin, interleaved=interleaved)
    wrong = torch.zeros_like(q, dtype=torch.bool)
    wrong[1, 4, 2, [6, 7 if interleaved else 38]] = True
    assert torch.equal(actual[0].isnan(), wrong)
    assert torch.equal(actual[0][~wrong], clean[0][~wrong])
    assert torch.equal(actual[1], clean[1])
    payload = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32).to(backend.device)
    cos_sin[positions[0, 3], 5] = payload[0]  # a NaN that a rounding by addition would turn into a 0
    actual, _ = backend.run(rope, q, k, positions, cos_sin, interleaved=interleaved)
    assert actual[0, 3][:, [10, 11] if interleaved else [5, 37]].isnan().all()


@settings(max_examples=30)
@given(
    lead=st.lists(st.integers(0, 4), min_size=1, max_size=2).map(tuple),
    heads=st.tuples(st.integers(0, 4), st.integers(0, 3)),
    half=st.integers(1, 40),
    rest=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    flags=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 9),
)
def test_any_shape(lead, heads, half, rest, dtype, flags, seed):
    keywords = dict(zip(("interleaved", "inverse"), flags, strict=True))
    for backend in BACKENDS:
        args = inputs((lead, *heads, 2 * half + rest, 2 * half), dtype, backend.device, seed=seed)
        for result, truth, given_ in zip(
            backend.run(rope, *args, **keywords), reference.rope(*args, **keywords), args, strict=False
        ):
            assert result.shape == truth.shape == given_.shape
            if result.numel():
                rest_of = args[2:]
                one = lambda x, p, c: reference.rope(x, None, p, c, **keywords)[0]  # noqa: E731
                assert_as_good_as_torch(result, one, given_, *rest_of)


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(function, q, k, positions, cos_sin, grads, **keywords):
    leaves = [t.detach().requires_grad_() for t in (q, k)]
    return torch.autograd.grad(function(*leaves, positions, cos_sin, **keywords), leaves, grads)


@ON_EACH
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_match_those_of_the_reference(dtype, interleaved, backend):
    for shape in (SHAPES[0], SHAPES[1]):
        q, k, positions, cos_sin = inputs(shape, dtype, backend.device)
        grads = [torch.randn_like(t) for t in (q, k)]
        for inverse in (False, True):
            keywords = {"interleaved": interleaved, "inverse": inverse}
            actual = backend.run(gradients, rope, q, k, positions, cos_sin, grads, **keywords)

            def expected(grad_q, grad_k, q, k, cos_sin, positions=positions, keywords=keywords):
                return gradients(reference.rope, q, k, positions, cos_sin, (grad_q, grad_k), **keywords)

            assert_as_good_as_torch(actual, expected, *grads, q, k, cos_sin)


def test_expanded_gradients_and_second_derivatives():
    q, k, positions, cos_sin = (t.double() if t.is_floating_point() else t for t in inputs(SHAPES[1]))
    leaves = [t.float().requires_grad_() for t in (q, k)]
    turned = rope(*leaves, positions, cos_sin.float())
    (sum(t.sum() for t in turned)).backward()  # expanded gradients
    truth = [t.requires_grad_() for t in (q, k)]
    sum(t.sum() for t in reference.rope(*truth, positions, cos_sin)).backward()
    for leaf, true in zip(leaves, truth, strict=True):
        torch.testing.assert_close(leaf.grad.double(), true.grad, rtol=1e-5, atol=1e-5)
    x = leaves[0]
    turned, _ = rope(x, None, positions, cos_sin.float())
    (first,) = torch.autograd.grad(turned.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    y = truth[0]
    turned, _ = reference.rope(y, None, positions, cos_sin)
    (first,) = torch.autograd.grad(turned.pow(3).sum(), y, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), y)
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-4)


def test_only_one_wants_a_gradient_and_forward_mode_is_refused():
    q, k, positions, cos_sin = inputs(SHAPES[1])
    k.requires_grad_()
    _, turned_k = rope(q, k, positions, cos_sin)
    turned_k.square().sum().backward()
    assert q.grad is None
    assert k.grad.isfinite().all()
    with pytest.raises(RuntimeError, match="jvp"), forward_ad.dual_level():
        rope(forward_ad.make_dual(q, torch.ones_like(q)), None, positions, cos_sin)


# ---- edges -----------------------------------------------------------------------------------------------------------


@ON_EACH
@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "offset by one element", "expanded", "parts of one projection"])
def test_strides_change_no_bits(layout, dtype, interleaved, backend):
    def laid_out(t):
        if layout == "transposed":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "offset by one element":
            return torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view_as(t)
        if layout == "expanded":
            return t[:1].expand_as(t)
        return torch.cat([t, torch.full_like(t, math.nan)], -2)[..., : t.shape[-2], :]

    q, k, positions, cos_sin = inputs(SHAPES[3], dtype, backend.device)
    views = [laid_out(t) for t in (q, k)]
    wide = torch.cat([cos_sin, cos_sin], -1)[:, : cos_sin.shape[1]]
    actual = backend.run(rope, *views, positions, wide, interleaved=interleaved)
    expected = backend.run(rope, *(t.contiguous() for t in views), positions, cos_sin, interleaved=interleaved)
    assert all(map(torch.equal, actual, expected))


@ON_EACH
@LAYOUTS
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=str)
def test_out_may_be_the_input(shape, interleaved, backend):
    q, k, positions, cos_sin = inputs(shape, torch.bfloat16, backend.device)
    expected = backend.run(rope, q, k, positions, cos_sin, interleaved=interleaved)
    for in_place in ((False, False), (True, False), (False, True), (True, True)):
        given_ = (q.clone(), k.clone())
        out = tuple(t if here else torch.empty_like(t) for t, here in zip(given_, in_place, strict=True))
        results = backend.run(rope, *given_, positions, cos_sin, interleaved=interleaved, out=out)
        assert all(result is into for result, into in zip(results, out, strict=True))
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("shape", [((0,), 2, 1, 8, 8), ((2, 0), 2, 1, 8, 4), ((3,), 0, 0, 8, 8)], ids=str)
def test_empty_inputs_give_empty_outputs(shape):
    q, k, positions, cos_sin = inputs(shape)
    leaves = [t.requires_grad_() for t in (q, k)]
    turned = rope(*leaves, positions, cos_sin)
    assert [t.shape for t in turned] == [q.shape, k.shape]
    sum(t.sum() for t in turned).backward()
    assert q.grad.shape == q.shape
    assert rope(q.detach(), None, positions, cos_sin[:0] if positions.numel() == 0 else cos_sin)[0].shape == q.shape


@ON_EACH
def test_threads_and_neighbours_change_no_bits(backend):
    args = inputs(((4, 70), 6, 2, 128, 128), torch.bfloat16, backend.device)
    results = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        results.append(backend.run(rope, *args))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))
    alone = backend.run(rope, *(t[1:2, 3:4] for t in args[:3]), args[3])
    assert all(torch.equal(whole[1:2, 3:4], part) for whole, part in zip(results[0], alone, strict=True))


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.name != "cpu"], ids=str)
def test_positions_beyond_the_cache_read_its_ends(backend):
    """What only a device can see touches nothing else; FMKERNELS_CHECK=1 would raise."""

    def unchecked(*args):
        return _library.ops.rope_forward(*args)

    q, k, _, cos_sin = inputs(((4,), 2, 1, 64, 64), device=backend.device)
    for index in (torch.int64, torch.int32):
        beyond = torch.tensor([-1, 37, 2**31 - 1, -(2**31)], dtype=index, device=backend.device)
        ends = torch.tensor([0, 36, 36, 0], device=backend.device)
        args = (cos_sin, False, False)
        actual, expected = (backend.run(unchecked, q, k, positions, *args) for positions in (beyond, ends))
        assert all(map(torch.equal, actual, expected))


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", NATIVE, ids=str)
def test_opcheck(backend):
    q, k, positions, cos_sin = inputs(SHAPES[1], torch.bfloat16, backend.device)
    for given_ in (k, None):
        opcheck(torch.ops.fmkernels.rope_forward.default, (q, given_, positions, cos_sin, True, False))
        out = (torch.empty_like(q), None if given_ is None else torch.empty_like(k))
        opcheck(torch.ops.fmkernels.rope_forward_out.default, (q, given_, positions, cos_sin, False, True, *out))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(rope, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (5, 9):
        q, k, positions, cos_sin = inputs(((tokens,), 2, 1, 16, 8))
        assert all(map(torch.equal, compiled(q, k, positions, cos_sin), rope(q, k, positions, cos_sin)))
        grads = [torch.ones_like(t) for t in (q, k)]
        both = (gradients(f, q, k, positions, cos_sin, grads, interleaved=True) for f in (compiled, rope))
        assert all(map(torch.equal, *both))
