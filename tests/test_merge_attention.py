# SPDX-License-Identifier: Apache-2.0
"""merge_attention: values, gradients, edges, errors, and what torch asks of an op."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck

from fmkernels import _library, attention, merge_attention, reference
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("merge_attention_forward")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 33, 3, 16), (40, 3, 64), (1, 1, 1, 1), (3, 17, 2, 5), (5, 1, 259)]  # o; whole and partial vectors
INFINITY = math.inf


def inputs(shape, dtype=torch.float32, device="cpu", seed=0, hidden=0.0, spread=3.0):
    """(o_a, lse_a, o_b, lse_b); a share `hidden` of the rows of each side has seen no key and holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for _ in range(2):
        o = torch.randn(shape, generator=generator).to(dtype)
        lse = torch.randn(*shape[:-3], shape[-2], shape[-3], generator=generator) * spread
        blind = torch.rand(lse.shape, generator=generator) < hidden
        lse[blind] = -INFINITY
        o[blind.transpose(-1, -2)] = math.nan
        sides += [o.to(device), lse.to(device)]
    return tuple(sides)


def readable(sides):
    """The same sides for the reference, whose gradient would multiply the NaN of a hidden row with zero."""
    o_a, lse_a, o_b, lse_b = sides
    return o_a.nan_to_num(), lse_a, o_b.nan_to_num(), lse_b


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("hidden", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_matches_reference(shape, dtype, hidden, backend):
    sides = inputs(shape, dtype, backend.device, hidden=hidden)
    o, lse = backend.run(merge_attention, *sides)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    assert_as_good_as_torch((o, lse), reference.merge_attention, *readable(sides))
    neither = (sides[1] == -INFINITY) & (sides[3] == -INFINITY)
    assert (lse[neither] == -INFINITY).all()
    assert (o[neither.transpose(-1, -2)] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("level", [-3e4, -200.0, 200.0, 3e4])
def test_lse_beyond_the_range_of_exp(level, backend):
    o_a, lse_a, o_b, lse_b = inputs(SHAPES[0], device=backend.device)
    sides = (o_a, lse_a + level, o_b, lse_b + level)
    assert_as_good_as_torch(backend.run(merge_attention, *sides), reference.merge_attention, *sides)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_one_side_far_above_the_other_is_returned_unchanged(backend):
    o_a, lse_a, o_b, lse_b = inputs(SHAPES[0], device=backend.device)
    o, lse = backend.run(merge_attention, o_a, lse_a, o_b, lse_b - 1000)
    assert torch.equal(o, o_a)
    assert torch.equal(lse, lse_a)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_nan_stays_in_its_row(backend):
    sides = inputs(SHAPES[0], device=backend.device)
    clean = backend.run(merge_attention, *sides)
    sides[1][1, 2, 7] = math.nan
    sides[0][0, 5, 1, 3] = math.nan
    o, lse = backend.run(merge_attention, *sides)
    assert o[1, 7, 2].isnan().all()
    assert lse[1, 2, 7].isnan()
    assert o.isnan().sum() == 16 + 1
    assert lse.isnan().sum() == 1
    assert torch.equal(o[~o.isnan()], clean[0][~o.isnan()])
    assert torch.equal(lse[~lse.isnan()], clean[1][~lse.isnan()])


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=str)  # whole and partial vectors
def test_nan_of_a_side_with_a_vanishing_weight_is_not_lost(shape, backend):
    """exp(-200) is 0 in float32, but the side has seen keys: attention over all of them gives NaN there too."""
    o_a, lse_a, o_b, lse_b = inputs(shape, device=backend.device)
    o_b[0, 5, 1, 3] = math.nan
    expected = torch.zeros(shape, dtype=torch.bool, device=backend.device)
    expected[0, 5, 1, 3] = True
    for low, high in ((0.0, 200.0), (200.0, 0.0)):
        o, lse = backend.run(merge_attention, o_a, lse_a - low, o_b, lse_b - high)
        assert torch.equal(o.isnan(), expected)
        assert lse.isfinite().all()
    grad_o = torch.ones_like(o_a)
    grad_o[0, 5, 1, 2] = math.nan
    sides = (o_a, lse_a, o_b.nan_to_num(), lse_b - 200)
    grad_o_a, _, grad_o_b, _ = backend.run(gradients, merge_attention, sides, (grad_o, None))
    assert torch.equal(grad_o_a.isnan(), grad_o.isnan())
    assert torch.equal(grad_o_b.isnan(), grad_o.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_over_split_keys_is_attention_over_all(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, seq, heads, 32, generator=generator).to(dtype) for seq, heads in ((9, 4), (90, 2), (90, 2))
    )
    for split in (0, 1, 40, 89, 90):
        parts = [attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(split), slice(split, None))]
        merged = merge_attention(*parts[0], *parts[1])
        # Two roundings to the dtype of o where attention has one: the reference may compute in that dtype.
        assert_as_good_as_torch(merged, reference.attention, q, k, v, computed_in=dtype)


@settings(max_examples=40)
@given(
    shape=st.tuples(*[st.integers(0, 12)] * 3, st.integers(1, 40))
    | st.tuples(*[st.integers(0, 12)] * 2, st.integers(1, 300)),
    dtype=st.sampled_from(DTYPES),
    hidden=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 9),
)
def test_any_shape(shape, dtype, hidden, seed):
    sides = inputs(shape, dtype, seed=seed, hidden=hidden)
    for backend in BACKENDS:
        on_device = [t.to(backend.device) for t in sides]
        actual = backend.run(merge_attention, *on_device)
        assert_as_good_as_torch(actual, reference.merge_attention, *readable(on_device))


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(function, sides, grads):
    leaves = [t.detach().requires_grad_() for t in sides]
    outputs = function(*leaves)
    wanted = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    return torch.autograd.grad([o for o, _ in wanted], leaves, [g for _, g in wanted], materialize_grads=True)


def reference_gradients(o_a, lse_a, o_b, lse_b, grad_o, grad_lse):
    return gradients(reference.merge_attention, (o_a, lse_a, o_b, lse_b), (grad_o, grad_lse))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("through", ["o", "lse", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_match_those_of_the_reference(shape, dtype, through, backend):
    sides = inputs(shape, dtype, backend.device)
    grad_o, grad_lse = (torch.randn_like(t) for t in backend.run(merge_attention, *sides))
    if through == "lse":
        grad_o = None
    if through == "o":
        grad_lse = None
    actual = backend.run(gradients, merge_attention, sides, (grad_o, grad_lse))
    assert_as_good_as_torch(actual, reference_gradients, *sides, grad_o, grad_lse)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_hidden_side_has_no_gradient_and_is_not_read(shape, backend):
    sides = inputs(shape, device=backend.device, hidden=0.4)
    grads = [torch.randn_like(t) for t in backend.run(merge_attention, *sides)]
    actual = backend.run(gradients, merge_attention, sides, grads)
    for o, lse, grad_o, grad_lse in ((*sides[:2], *actual[:2]), (*sides[2:], *actual[2:])):
        blind = lse == -INFINITY
        assert o[blind.transpose(-1, -2)].isnan().all()
        assert (grad_o[blind.transpose(-1, -2)] == 0).all()
        assert (grad_lse[blind] == 0).all()
        assert grad_o.isfinite().all()
        assert grad_lse.isfinite().all()
    one_sided = (sides[1] == -INFINITY) & (sides[3] > -INFINITY)
    assert torch.equal(actual[3][one_sided], grads[1][one_sided])  # lse is lse_b there


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_expanded_and_strided_gradients(backend):
    sides = inputs(SHAPES[0], device=backend.device)
    one = torch.ones((), device=backend.device)
    o, lse = backend.run(merge_attention, *sides)
    expanded = backend.run(gradients, merge_attention, sides, (one.expand_as(o), one.expand_as(lse)))
    dense = backend.run(gradients, merge_attention, sides, (torch.ones_like(o), torch.ones_like(lse)))
    assert all(map(torch.equal, expanded, dense))
    strided = torch.randn(2, 3, 33, 16, device=backend.device).transpose(1, 2), torch.randn_like(lse)
    actual = backend.run(gradients, merge_attention, sides, strided)
    contiguous = backend.run(gradients, merge_attention, sides, [t.contiguous() for t in strided])
    assert all(map(torch.equal, actual, contiguous))


@pytest.mark.parametrize("wanted", range(4))
def test_only_some_inputs_want_a_gradient(wanted):
    sides = inputs(SHAPES[1])
    leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(sides)]
    o, lse = merge_attention(*leaves)
    (o.sum() + lse.sum()).backward()
    expected = reference_gradients(*sides, torch.ones_like(o), torch.ones_like(lse))[wanted]
    torch.testing.assert_close(leaves[wanted].grad, expected)
    assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != wanted)


def test_a_second_derivative_is_refused_and_not_wrong():
    leaves = [t.requires_grad_() for t in inputs(SHAPES[1])]
    o, _ = merge_attention(*leaves)
    (grad,) = torch.autograd.grad(o.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_forward_mode_is_refused_and_not_zero():
    o_a, *others = inputs(SHAPES[1])
    with pytest.raises(RuntimeError, match="jvp"), forward_ad.dual_level():
        merge_attention(forward_ad.make_dual(o_a, torch.ones_like(o_a)), *others)


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "offset by one element", "expanded", "strided lse"])
def test_strides_change_no_bits(layout, dtype, backend):
    def laid_out(t):
        if layout == "transposed":
            return t.transpose(-3, -2).contiguous().transpose(-3, -2) if t.dim() == 4 else t
        if layout == "offset by one element":
            return torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view_as(t)
        if layout == "expanded":
            return t[:1].expand_as(t)
        return torch.stack([t, t], dim=-1)[..., 0] if t.dim() == 3 else t

    sides = inputs(SHAPES[0], dtype, backend.device)
    views = [laid_out(t) for t in sides]
    actual = backend.run(merge_attention, *views)
    expected = backend.run(merge_attention, *(t.contiguous() for t in views))
    assert all(map(torch.equal, actual, expected))
    grads = [torch.ones_like(t) for t in expected]
    backward = [backend.run(gradients, merge_attention, s, grads) for s in (views, [t.contiguous() for t in views])]
    assert all(map(torch.equal, *backward))


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (0, 2, 8), (5, 0, 8)], ids=str)
def test_empty_inputs_give_empty_outputs(shape):
    sides = [t.requires_grad_() for t in inputs(shape)]
    o, lse = merge_attention(*sides)
    assert o.shape == shape
    assert lse.shape == (*shape[:-3], shape[-2], shape[-3])
    (o.sum() + lse.sum()).backward()
    assert all(t.grad.shape == t.shape for t in sides)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_threads_and_neighbours_change_no_bits(backend):
    sides = inputs((4, 70, 3, 64), device=backend.device)
    results = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        results.append(backend.run(merge_attention, *sides))
    assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))
    alone = backend.run(merge_attention, *(t[2:3] for t in sides))
    assert all(torch.equal(whole[2:3], part) for whole, part in zip(results[0], alone, strict=True))


# ---- errors ----------------------------------------------------------------------------------------------------------

OUT, LSE = torch.zeros(2, 5, 3, 8), torch.zeros(2, 3, 5)
LAYOUTS = "[batch, seq_q, heads, v_head_dim] or [total_q, heads, v_head_dim]"
ERRORS = [
    ("o_a", None, TypeError, "o_a must be a tensor, got NoneType."),
    ("o_a", torch.zeros(3, 8), ValueError, f"o_a must be {LAYOUTS}, got 2 dimensions [3, 8]."),
    ("o_a", OUT.double(), ValueError, "o_a must be float32 or bfloat16 or float16, got float64."),
    ("o_a", OUT.half(), ValueError, "o_b must have the dtype of o_a, float16, got float32."),
    ("o_a", OUT[..., ::2], ValueError, "o_b must have the shape of o_a, [2, 5, 3, 4], got [2, 5, 3, 8]."),
    ("o_a", torch.zeros(2, 5, 3, 16)[..., ::2], ValueError, "o_a must have a contiguous last dimension, got stride 2."),
    ("o_b", 1.0, TypeError, "o_b must be a tensor, got float."),
    ("o_b", OUT[0], ValueError, "o_b must have the shape of o_a, [2, 5, 3, 8], got [5, 3, 8]."),
    ("o_b", OUT.bfloat16(), ValueError, "o_b must have the dtype of o_a, float32, got bfloat16."),
    ("o_b", OUT.to("meta"), ValueError, "o_b must be on the device of o_a, cpu, got meta."),
    ("o_b", torch.zeros(2, 5, 3, 16)[..., ::2], ValueError, "o_b must have a contiguous last dimension, got stride 2."),
    ("lse_a", [0.0], TypeError, "lse_a must be a tensor, got list."),
    ("lse_a", LSE.half(), ValueError, "lse_a must be float32, got float16."),
    ("lse_a", LSE.transpose(1, 2), ValueError, "lse_a must have the shape [2, 3, 5] for this o_a, got [2, 5, 3]."),
    ("lse_a", LSE.to("meta"), ValueError, "lse_a must be on the device of o_a, cpu, got meta."),
    ("lse_b", LSE.to_sparse(), ValueError, "lse_b must be a strided tensor, got layout torch.sparse_coo."),
    ("lse_b", LSE[0], ValueError, "lse_b must have the shape [2, 3, 5] for this o_b, got [3, 5]."),
    ("lse_b", LSE.double(), ValueError, "lse_b must be float32, got float64."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "sentence"), ERRORS)
def test_wrong_arguments(name, value, error, sentence):
    with pytest.raises(error) as raised:
        merge_attention(**{"o_a": OUT, "lse_a": LSE, "o_b": OUT, "lse_b": LSE, name: value})
    assert str(raised.value) == f"merge_attention: {sentence}"


def test_a_last_dimension_of_zero():
    with pytest.raises(ValueError, match="merge_attention: o_a must have a v_head_dim of at least 1, got 0"):
        merge_attention(OUT[..., :0], LSE, OUT[..., :0], LSE)


@pytest.mark.parametrize("reason", [None, "built without CUDA kernels"])
def test_a_device_without_a_kernel_is_named_and_why(reason, monkeypatch):
    monkeypatch.setattr(_library, "cuda_ops", frozenset())
    monkeypatch.setattr(_library, "cuda_error", reason)
    with FakeTensorMode(), pytest.raises(ValueError, match="merge_attention: there is no kernel") as raised:
        merge_attention(*(torch.empty(shape, device="cuda") for shape in ((2, 5, 3, 8), (2, 3, 5)) * 2))
    sentence = "merge_attention: there is no kernel for cuda tensors"
    assert str(raised.value) == f"{sentence}." if reason is None else f"{sentence}: {reason}."


HOSTILE_SIDES = [
    torch.zeros(()),
    torch.zeros(4),
    OUT[0],
    OUT[:1],
    OUT[:, :1],
    OUT[..., :4],
    OUT[..., :0],
    OUT.double(),
    OUT.int(),
]
HOSTILE_SIDES += [torch.zeros(2, 5, 3, 16)[..., ::2], LSE, OUT.to_sparse()]
HOSTILE_LSES = [torch.zeros(()), LSE[0], LSE[:1], LSE[:, :1], LSE[..., :1], LSE.half(), LSE.transpose(1, 2), OUT]


@pytest.mark.parametrize("name", ["grad_o", "grad_lse", "o_a", "lse_a", "o_b", "lse_b"])
def test_the_ops_themselves_refuse(name):
    names = ["o_a", "lse_a", "o_b", "lse_b"]
    right = {"grad_o": OUT, "grad_lse": LSE, "o_a": OUT, "lse_a": LSE, "o_b": OUT, "lse_b": LSE}
    torch.ops.fmkernels.merge_attention_backward(**right)
    for value in HOSTILE_LSES if "lse" in name else HOSTILE_SIDES:
        with pytest.raises(RuntimeError):
            torch.ops.fmkernels.merge_attention_backward(**{**right, name: value})
        if name in names:
            with pytest.raises(RuntimeError):
                torch.ops.fmkernels.merge_attention_forward(**{k: {**right, name: value}[k] for k in names})


@pytest.mark.parametrize("name", ["grad_o", "grad_lse", "o_a", "lse_a", "o_b", "lse_b"])
def test_the_ops_refuse_a_tensor_whose_storage_was_shrunk(name):
    right = {"grad_o": OUT, "grad_lse": LSE, "o_a": OUT, "lse_a": LSE, "o_b": OUT, "lse_b": LSE}
    shrunk = right[name].clone()
    shrunk.untyped_storage().resize_(shrunk.nbytes - 1)
    with pytest.raises(RuntimeError, match=r"storage of \d+ bytes, which does not hold its elements"):
        torch.ops.fmkernels.merge_attention_backward(**{**right, name: shrunk})


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.namespace == "fmkernels"], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_opcheck(shape, backend):
    sides = inputs(shape, torch.bfloat16, backend.device)
    opcheck(torch.ops.fmkernels.merge_attention_forward.default, sides)
    o, lse = merge_attention(*sides)
    for grad_lse in (None, torch.randn_like(lse)):
        backward = (torch.randn_like(o), grad_lse, *sides)
        opcheck(torch.ops.fmkernels.merge_attention_backward.default, backward)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_compile_is_one_graph(shape, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(merge_attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (shape[-3], shape[-3] + 4):
        sides = inputs((*shape[:-3], num_tokens, *shape[-2:]))
        expected = merge_attention(*sides)
        assert all(map(torch.equal, compiled(*sides), expected))
        grads = [torch.ones_like(t) for t in expected]
        assert all(map(torch.equal, *(gradients(f, sides, grads) for f in (compiled, merge_attention))))


class Module(torch.nn.Module):
    def forward(self, o_a, lse_a, o_b, lse_b):
        return merge_attention(o_a, lse_a, o_b, lse_b)


def test_export():
    sides = inputs(SHAPES[0])
    program = torch.export.export(Module(), sides, strict=True)
    assert all(map(torch.equal, program.module()(*sides), merge_attention(*sides)))
