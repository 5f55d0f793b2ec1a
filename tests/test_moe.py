# SPDX-License-Identifier: Apache-2.0
"""moe.build_mapping, moe.permute, moe.combine: values, gradients, edges, errors, and what torch asks of an op."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmkernels import moe, reference
from fmkernels.testing import assert_as_good_as_torch, backends

MAPPING_BACKENDS = backends("moe_build_mapping")
BACKENDS = [backend for backend in backends("moe_combine_backward") if backend in backends("moe_permute")]
EVERY_MAPPING = pytest.mark.parametrize("backend", MAPPING_BACKENDS, ids=str)
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ids(num_tokens, num_topk, num_experts, device="cpu", seed=0, lowest=-1):
    """Experts drawn with replacement, so that some come twice in a row; -1 among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, num_topk)
    return torch.randint(lowest, num_experts, shape, generator=generator, dtype=torch.int32).to(device)


def inputs(num_tokens=9, num_topk=3, num_experts=5, hidden=72, dtype=torch.float32, device="cpu", alignment=4):
    """(x, y, mapping, topk_weights)."""
    generator = torch.Generator().manual_seed(1)
    mapping = moe.Mapping(
        *reference.moe.build_mapping(ids(num_tokens, num_topk, num_experts), num_experts, alignment=alignment)
    )
    mapping = moe.Mapping(*(t.to(device) for t in mapping))
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype).to(device)
    y = torch.randn(len(mapping.pos_to_token), hidden, generator=generator).to(dtype).to(device)
    return x, y, mapping, torch.rand(num_tokens, num_topk, generator=generator).to(device)


def gradients(function, tensors, *others):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(leaves[0], others[0], *leaves[1:])
    generator = torch.Generator().manual_seed(2)
    grad = torch.randint(-9, 9, out.shape, generator=generator).to(out.dtype).to(out.device)  # exact in every dtype
    return torch.autograd.grad(out, leaves, grad)


# ---- values ----------------------------------------------------------------------------------------------------------


def test_a_mapping_by_hand():
    topk_idx = torch.tensor([[2, 0], [2, -1], [0, 2], [2, 2]], dtype=torch.int32)
    mapping = moe.build_mapping(topk_idx, 3, alignment=4)
    assert mapping.pos_to_token.tolist() == [0, 2, -1, -1, 0, 1, 2, 3, 3, -1, -1, -1] + [-1] * 4
    assert mapping.token_topk_to_pos.tolist() == [[4, 0], [5, -1], [1, 6], [7, 8]]
    assert mapping.expert_offsets.tolist() == [[4, 4, 12], [2, 4, 9]]


SHAPES = [(5, 2, 3), (700, 3, 7), (33, 8, 256), (1100, 8, 1024), (3, 32, 4), (2500, 1, 1)]  # slots: to 2048 and above


@EVERY_MAPPING
@pytest.mark.parametrize("alignment", [1, 16, 24])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mapping_is_that_of_the_reference(shape, alignment, backend):
    topk_idx = ids(*shape, backend.device)
    actual = backend.run(moe.build_mapping, topk_idx, shape[2], alignment=alignment)
    expected = reference.moe.build_mapping(topk_idx, shape[2], alignment=alignment)
    assert all(map(torch.equal, actual, expected))
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in actual)


@EVERY_MAPPING
@pytest.mark.parametrize("num_slots", [40, 5000])
def test_int64_and_strided_ids(num_slots, backend):
    wide = ids(num_slots // 4, 7, 5, backend.device)
    expected = reference.moe.build_mapping(wide[:, :4], 5)
    for topk_idx in (wide[:, :4], wide.long()[:, :4], wide[:, :4].contiguous()):
        assert all(map(torch.equal, backend.run(moe.build_mapping, topk_idx, 5), expected))
    column = ids(num_slots, 1, 5, backend.device).expand(-1, 1)[::2]
    assert all(map(torch.equal, backend.run(moe.build_mapping, column, 5), reference.moe.build_mapping(column, 5)))


@pytest.mark.slow
@EVERY_MAPPING
@pytest.mark.parametrize("num_experts", [1, 2, 31, 33, 255, 257, 1000, 1024])
@pytest.mark.parametrize("num_slots", [1, 31, 256, 2048, 2049, 9000])
def test_every_size_of_a_mapping(num_slots, num_experts, backend):
    topk_idx = ids(num_slots, 1, num_experts, backend.device)
    actual = backend.run(moe.build_mapping, topk_idx, num_experts, alignment=8)
    assert all(map(torch.equal, actual, reference.moe.build_mapping(topk_idx, num_experts, alignment=8)))


@settings(max_examples=40)
@given(
    st.integers(0, 40), st.integers(1, 9), st.integers(1, 70), st.integers(1, 20), st.integers(0, 99), st.integers(1, 2)
)
def test_any_mapping(num_tokens, num_topk, num_experts, alignment, seed, num_threads):
    torch.set_num_threads(num_threads)
    topk_idx = ids(num_tokens, num_topk, num_experts, seed=seed)
    actual = moe.build_mapping(topk_idx, num_experts, alignment=alignment)
    assert all(map(torch.equal, actual, reference.moe.build_mapping(topk_idx, num_experts, alignment=alignment)))


def test_many_slots_and_any_number_of_threads():
    topk_idx = ids(40000, 6, 200)
    one_a_token = topk_idx[:, :1]
    for few in (topk_idx, one_a_token):
        order = torch.sort(few.flatten(), stable=True).indices
        kept = order[few.flatten()[order] >= 0]
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            mapping = moe.build_mapping(few, 200)
            assert torch.equal(mapping.pos_to_token[: len(kept)], (kept // few.shape[1]).int())
            assert torch.equal(mapping.token_topk_to_pos.flatten()[kept], torch.arange(len(kept), dtype=torch.int32))
            counts = torch.bincount(few[few >= 0], minlength=200)
            assert torch.equal(mapping.expert_offsets[1], counts.cumsum(0).int())


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [72, 37, 1, 328])
def test_permute_and_combine_match_the_reference(hidden, dtype, backend):
    x, y, mapping, weights = inputs(hidden=hidden, dtype=dtype, device=backend.device)
    assert torch.equal(backend.run(moe.permute, x, mapping), reference.moe.permute(x, mapping))
    for given_weights in (weights, None):
        out = backend.run(moe.combine, y, mapping, given_weights)
        assert out.dtype == dtype
        assert_as_good_as_torch(out, reference.moe.combine, y, mapping, given_weights)


@EVERY_BACKEND
@pytest.mark.parametrize("num_topk", [1, 8, 40])
def test_any_number_of_choices(num_topk, backend):
    _, y, mapping, weights = inputs(5, num_topk, 64, 40, device=backend.device)
    assert_as_good_as_torch(backend.run(moe.combine, y, mapping, weights), reference.moe.combine, y, mapping, weights)
    actual = backend.run(gradients, moe.combine, (y, weights), mapping)
    wanted = lambda y, weights: gradients(reference.moe.combine, (y, weights), mapping)  # noqa: E731
    assert_as_good_as_torch(actual, wanted, y, weights)


def test_large_results_that_pass_the_cache_by():
    for hidden in (800, 804):
        x, _, mapping, _ = inputs(3000, 4, 8, hidden)
        assert torch.equal(moe.permute(x, mapping), reference.moe.permute(x, mapping))


@EVERY_BACKEND
def test_round_trip(backend):
    """A token comes back as often as it was sent, exactly: small sums of one number times one, two and four."""
    topk_idx = torch.tensor([[0, 1], [3, -1], [2, 2], [-1, -1]], dtype=torch.int32, device=backend.device)
    mapping = backend.run(moe.build_mapping, topk_idx, 4, alignment=8)
    x = torch.randn(4, 24, device=backend.device)
    back = backend.run(moe.combine, backend.run(moe.permute, x, mapping), mapping, None)
    assert torch.equal(back, x * torch.tensor([2.0, 1.0, 2.0, 0.0], device=backend.device)[:, None])


# ---- gradients -------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [72, 37])
def test_gradients_match_the_reference(hidden, dtype, backend):
    x, y, mapping, weights = inputs(hidden=hidden, dtype=dtype, device=backend.device)
    actual = backend.run(gradients, moe.permute, (x,), mapping)
    assert_as_good_as_torch(actual, lambda x: gradients(reference.moe.permute, (x,), mapping), x)
    actual = backend.run(gradients, moe.combine, (y, weights), mapping)
    assert [t.dtype for t in actual] == [dtype, torch.float32]
    wanted = lambda y, weights: gradients(reference.moe.combine, (y, weights), mapping)  # noqa: E731
    assert_as_good_as_torch(actual, wanted, y, weights)
    (alone,) = backend.run(gradients, lambda y, mapping: moe.combine(y, mapping, None), (y,), mapping)
    wanted = lambda y: gradients(lambda y, mapping: reference.moe.combine(y, mapping, None), (y,), mapping)  # noqa: E731
    assert_as_good_as_torch(alone, wanted, y)


@EVERY_BACKEND
def test_an_expanded_gradient(backend):
    x, y, mapping, weights = (
        t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs(device=backend.device)
    )

    def train():
        return torch.autograd.grad(
            moe.permute(x, mapping).sum() + moe.combine(y, mapping, weights).sum(), (x, y, weights)
        )

    grads = backend.run(train)
    rows = mapping.token_topk_to_pos
    assert torch.equal(grads[0], (rows >= 0).sum(1, keepdim=True).expand_as(x).float())
    assert (grads[2][rows < 0] == 0).all()
    assert (grads[1][mapping.pos_to_token < 0] == 0).all()


def test_a_second_derivative_is_refused():
    x, y, mapping, weights = (t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs())
    for out, leaf in ((moe.permute(x, mapping), x), (moe.combine(y, mapping, weights), y)):
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


# ---- edges -----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(0, 2), (4, 0), (0, 0), (1, 1)], ids=str)
def test_no_tokens_no_choices_one_token(shape, backend):
    topk_idx = torch.zeros(shape, dtype=torch.int32, device=backend.device)
    mapping = backend.run(moe.build_mapping, topk_idx, 3, alignment=4)
    assert all(map(torch.equal, mapping, reference.moe.build_mapping(topk_idx, 3, alignment=4)))
    x = torch.randn(shape[0], 16, device=backend.device)
    y = backend.run(moe.permute, x, mapping)
    assert y.shape == (len(mapping.pos_to_token), 16)
    back = backend.run(moe.combine, y, mapping, torch.ones(shape, device=backend.device))
    assert torch.equal(back, x if shape[1] else torch.zeros_like(x))
    leaves = [x.clone().requires_grad_(), torch.ones(shape, device=backend.device, requires_grad=True)]
    grads = backend.run(
        lambda: torch.autograd.grad(moe.combine(moe.permute(leaves[0], mapping), mapping, leaves[1]).sum(), leaves)
    )
    assert [g.shape for g in grads] == [t.shape for t in leaves]


@EVERY_BACKEND
def test_a_width_of_zero(backend):
    _, _, mapping, weights = inputs(device=backend.device)
    assert backend.run(moe.permute, torch.zeros(9, 0, device=backend.device), mapping).shape == (len(mapping[0]), 0)
    empty = torch.zeros(len(mapping[0]), 0, device=backend.device)
    assert backend.run(moe.combine, empty, mapping, weights).shape == (9, 0)


@EVERY_MAPPING
@pytest.mark.parametrize("kind", ["one expert", "no expert", "every expert", "the last slot"])
@pytest.mark.parametrize("num_tokens", [7, 600])
def test_loads(kind, num_tokens, backend):
    topk_idx = torch.full((num_tokens, 8), -1, dtype=torch.int32)
    if kind == "one expert":
        topk_idx[:] = 5
    elif kind == "every expert":
        topk_idx[:] = torch.arange(8)
    elif kind == "the last slot":
        topk_idx[-1, -1] = 7
    topk_idx = topk_idx.to(backend.device)
    actual = backend.run(moe.build_mapping, topk_idx, 8, alignment=16)
    assert all(map(torch.equal, actual, reference.moe.build_mapping(topk_idx, 8, alignment=16)))


@EVERY_BACKEND
def test_padding_is_not_read(backend):
    """NaN in the rows without a slot, in the weights without a row, and in tokens without an expert."""
    x, y, mapping, weights = inputs(dtype=torch.bfloat16, device=backend.device)
    mapping = backend.run(
        moe.build_mapping,
        torch.where(torch.arange(9, device=backend.device)[:, None] == 4, -1, ids(9, 3, 5, backend.device)),
        5,
        alignment=4,
    )
    clean = backend.run(moe.combine, y, mapping, weights), *backend.run(gradients, moe.combine, (y, weights), mapping)
    x[4], y[mapping.pos_to_token < 0], weights[mapping.token_topk_to_pos < 0] = math.nan, math.nan, math.nan
    poisoned = (
        backend.run(moe.combine, y, mapping, weights),
        *backend.run(gradients, moe.combine, (y, weights), mapping),
    )
    assert all(map(torch.equal, clean, poisoned))
    assert not any(t.isnan().any() for t in poisoned)
    assert (poisoned[0][4] == 0).all()
    rows = backend.run(moe.permute, x, mapping)
    assert not rows.isnan().any()
    assert (rows[mapping.pos_to_token < 0] == 0).all()


@EVERY_BACKEND
def test_nan_reaches_its_token_alone(backend):
    _, y, mapping, weights = inputs(device=backend.device)
    token = 2
    row = mapping.token_topk_to_pos[token].max().item()
    y[row] = math.nan
    out = backend.run(moe.combine, y, mapping, weights)
    assert out[token].isnan().all()
    assert not out[torch.arange(9, device=out.device) != token].isnan().any()


@EVERY_BACKEND
def test_strides_change_no_bits(backend):
    x, y, mapping, weights = inputs(dtype=torch.bfloat16, device=backend.device)

    def laid_out(t, by):
        wide = t.new_full((t.shape[0], t.shape[1] + by), math.nan)
        wide[:, by:] = t
        return wide[:, by:]

    for by in (1, 8):
        views = laid_out(x, by), laid_out(y, by), laid_out(weights, by)
        assert torch.equal(backend.run(moe.permute, views[0], mapping), backend.run(moe.permute, x, mapping))
        expected = backend.run(moe.combine, y, mapping, weights)
        assert torch.equal(backend.run(moe.combine, views[1], mapping, views[2]), expected)
        grads = [backend.run(gradients, moe.combine, pair, mapping) for pair in (views[1:], (y, weights))]
        if by == 8:
            assert all(map(torch.equal, *grads))  # other vectors are another order of the sum of a weight's gradient
        assert torch.equal(grads[0][0], grads[1][0])


@EVERY_BACKEND
def test_repeats_threads_and_neighbours_change_no_bits(backend):
    _, y, _, weights = inputs(dtype=torch.bfloat16, device=backend.device)
    topk_idx = ids(9, 3, 5, backend.device)
    y = torch.randn(27, 72, device=backend.device)

    def run(tokens):
        mapping = backend.run(moe.build_mapping, topk_idx[tokens], 5)
        slots = mapping.token_topk_to_pos.clone()
        all_rows = backend.run(moe.build_mapping, topk_idx, 5).token_topk_to_pos[tokens]
        own = torch.zeros(len(mapping.pos_to_token), 72, device=backend.device)
        own[slots[slots >= 0].long()] = y[all_rows[slots >= 0].long()]
        return (
            backend.run(moe.combine, own, mapping, weights[tokens]),
            backend.run(gradients, moe.combine, (own, weights[tokens]), mapping)[1],
        )

    everything = slice(0, 9)
    results = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        results.append(run(everything)[0])
    assert all(torch.equal(results[0], other) for other in results)
    assert torch.equal(run(slice(3, 4))[0], results[0][3:4])


# ---- errors ----------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
FEWER = "must make fewer than 2**31 rows"
MAPPING_ERRORS = [
    ({"topk_idx": [0]}, TypeError, "topk_idx must be a tensor, got list."),
    ({"topk_idx": IDS[0]}, ValueError, "topk_idx must be [num_tokens, num_topk], got 1 dimensions [2]."),
    ({"topk_idx": IDS.float()}, ValueError, "topk_idx must be int32 or int64, got float32."),
    ({"topk_idx": IDS.t()}, ValueError, "topk_idx must have a contiguous last dimension, got stride 2."),
    ({"topk_idx": IDS + 1}, ValueError, "topk_idx must be from -1 to 2, got 3."),
    ({"topk_idx": IDS - 1}, ValueError, "topk_idx must be from -1 to 2, got -2."),
    ({"topk_idx": IDS.long() * 2**33}, ValueError, f"topk_idx must be from -1 to 2, got {-(2**33)}."),
    ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0."),
    ({"num_experts": 1025}, ValueError, "num_experts must be at most 1024, got 1025."),
    ({"num_experts": 3.0}, TypeError, "num_experts must be an integer, got float."),
    ({"alignment": 0}, ValueError, "alignment must be at least 1, got 0."),
    ({"alignment": 65537}, ValueError, "alignment must be at most 65536, got 65537."),
    ({"num_rows": -1}, ValueError, "num_rows must be at least 0, got -1."),
    ({"num_rows": 23, "alignment": 8}, ValueError, "num_rows must be at least 24 for these topk_idx, got 23."),
    ({"num_rows": 2**31}, ValueError, f"topk_idx, alignment and num_rows {FEWER}, got {2**31}."),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "sentence"), MAPPING_ERRORS)
def test_wrong_arguments_of_a_mapping(changed, error, sentence):
    with pytest.raises(error) as raised:
        moe.build_mapping(**{"topk_idx": IDS, "num_experts": 3, **changed})
    assert str(raised.value) == f"moe.build_mapping: {sentence}"
