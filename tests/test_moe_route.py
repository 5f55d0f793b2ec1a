# SPDX-License-Identifier: Apache-2.0
"""moe.route: choices bit by bit, weights, gradients, edges, errors, and what torch asks of an op."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fmkernels import moe, reference
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("moe_route")
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCORINGS = ["softmax", "sigmoid", "sqrt_softplus"]
GROUPS = [
    {},
    {"num_groups": 4, "topk_groups": 2},
    {"num_groups": 4, "topk_groups": 2, "group_score": "top2"},
    {"num_groups": 4, "topk_groups": 2, "group_score": "sum"},
]


def logits_of(num_tokens=9, num_experts=64, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_tokens, num_experts, generator=generator) * 3).to(dtype).to(device)


def bias_of(num_experts, device="cpu"):
    return (torch.randn(num_experts, generator=torch.Generator().manual_seed(1)) * 0.2).to(device)


def check(backend, logits, num_topk, bias=None, **options):
    weights, idx = backend.run(moe.route, logits, num_topk, bias=bias, **options)
    wide = None if bias is None else bias.double()
    expected = reference.moe.route(logits.double(), num_topk, bias=wide, **options)[1]
    assert torch.equal(idx, expected)
    assert (weights.dtype, idx.dtype) == (torch.float32, torch.int32)

    def weights_of(logits, bias):
        return reference.moe.route(logits, num_topk, bias=bias, **options)[0]

    assert_as_good_as_torch(weights, weights_of, logits, bias)
    return weights, idx


def gradient(logits, num_topk, function=moe.route, **options):
    leaf = logits.detach().requires_grad_()
    weights = function(leaf, num_topk, **options)[0]
    grad = torch.arange(weights.numel(), device=weights.device).view_as(weights).sub(5).to(weights.dtype)
    return torch.autograd.grad(weights, leaf, grad)[0]


# ---- values ----------------------------------------------------------------------------------------------------------


def test_a_choice_by_hand():
    logits = torch.tensor(
        [[1.0, 3.0, 3.0, -math.inf], [math.nan, 1.0, 2.0, 3.0], [-math.inf] * 4, [math.inf, 0.0, math.inf, 9.0]]
    )
    weights, idx = moe.route(logits, 3)
    assert idx.tolist() == [[1, 2, 0], [-1, -1, -1], [-1, -1, -1], [0, 2, 3]]
    assert_as_good_as_torch(weights[0], lambda x: torch.softmax(x, 0), torch.tensor([3.0, 3.0, 1.0]))
    assert weights[1:3].count_nonzero() == 0
    assert weights[3].tolist() == [0.5, 0.5, 0.0]


@EVERY_BACKEND
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(("num_experts", "num_topk"), [(64, 8), (7, 7), (100, 6), (250, 4), (1, 1)])
def test_weights_and_choices(num_experts, num_topk, scoring, renormalize, backend):
    logits = logits_of(num_experts=num_experts, device=backend.device)
    for bias in (None, bias_of(num_experts, backend.device)):
        check(backend, logits, num_topk, bias, scoring=scoring, renormalize=renormalize)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_logits_have_many_ties(dtype, backend):
    check(backend, logits_of(30, 200, dtype, backend.device), 16)
    few = torch.randint(0, 3, (30, 100), generator=torch.Generator().manual_seed(2)).to(dtype).to(backend.device)
    check(backend, few, 32, num_groups=5, topk_groups=4)
    check(backend, torch.where(few == 0, -few, few), 32)  # zeros of both signs are equal


@EVERY_BACKEND
def test_the_most_that_is_routed(backend):
    check(backend, logits_of(5, 1024, device=backend.device), 32)
    check(backend, logits_of(5, 384, device=backend.device), 8)
    check(backend, logits_of(5, 1000, device=backend.device), 32, bias_of(1000, backend.device), scoring="sigmoid")


@EVERY_BACKEND
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("options", GROUPS, ids=str)
def test_groups(options, scoring, backend):
    for num_experts, num_topk in ((64, 8), (20, 5)):
        logits = logits_of(num_experts=num_experts, device=backend.device)
        for bias in (None, bias_of(num_experts, backend.device)):
            _, idx = check(backend, logits, num_topk, bias, scoring=scoring, **options)
            if options:
                used = torch.nn.functional.one_hot((idx // (num_experts // 4)).long(), 4).amax(1).sum(1)
                assert (used <= 2).all()


def test_the_group_scores_differ():
    logits = torch.tensor([[5.0, -9.0, 4.0, 4.0, 3.9, 3.9]])  # by the best, by two, and, the last two groups, by three
    assert moe.route(logits, 2, num_groups=2, topk_groups=1)[1].tolist() == [[0, 2]]
    assert moe.route(logits, 2, num_groups=3, topk_groups=1)[1].tolist() == [[0, 1]]
    top2 = moe.route(logits, 2, scoring="sigmoid", num_groups=3, topk_groups=1, group_score="top2")
    assert top2[1].tolist() == [[2, 3]]
    for best in ("top2", "sum"):  # two of a group, where num_topk over topk_groups is two
        options = {"scoring": "sigmoid", "num_groups": 3, "topk_groups": 2, "group_score": best}
        assert torch.equal(moe.route(logits, 4, **options)[1], torch.tensor([[2, 3, 4, 5]], dtype=torch.int32))


@EVERY_BACKEND
@pytest.mark.parametrize("scoring", SCORINGS)
def test_scores_too_small_for_a_float_have_weights(scoring, backend):
    for far in (-300.0, -60.0, 80.0):
        logits = logits_of(device=backend.device) + far
        weights, _ = check(backend, logits, 4, scoring=scoring)
        assert_as_good_as_torch(weights.sum(-1), lambda x: torch.ones(9, dtype=x.dtype, device=x.device), logits)
        check(backend, logits, 4, scoring=scoring, renormalize=False)


@settings(max_examples=60)
@given(
    st.integers(0, 9),
    st.integers(1, 8),
    st.integers(1, 130),
    st.integers(1, 32),
    st.sampled_from(["max", "top2", "sum"]),
    st.sampled_from(SCORINGS),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_route(num_tokens, num_groups, group_size, num_topk, group_score, scoring, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_groups * group_size, generator=generator)
    logits[torch.rand(logits.shape, generator=generator) < 0.2] = -math.inf
    topk_groups = min(num_groups, 1 + seed % 4)
    options = {"num_groups": num_groups, "topk_groups": topk_groups, "group_score": group_score, "scoring": scoring}
    bias = bias_of(num_groups * group_size) if biased else None
    check(BACKENDS[0], logits, min(num_topk, topk_groups * group_size), bias, **options)


# ---- gradients -------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_matches_the_reference(dtype, scoring, renormalize, backend):
    options = {"scoring": scoring, "renormalize": renormalize}
    for num_experts, num_topk in ((64, 8), (37, 5)):
        logits = logits_of(num_experts=num_experts, dtype=dtype, device=backend.device)
        actual = backend.run(gradient, logits, num_topk, **options)
        assert actual.dtype == dtype
        wanted = lambda x: gradient(x, num_topk, reference.moe.route, **options)  # noqa: B023, E731
        assert_as_good_as_torch(actual, wanted, logits)


@EVERY_BACKEND
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_gradient_at_the_edges(scoring, renormalize, backend):
    logits = logits_of(6, 10, device=backend.device)
    logits[0, 3], logits[1, 4], logits[2], logits[3, 1:] = math.nan, math.inf, -math.inf, -math.inf
    logits[4] -= 200
    logits[5] += 200
    options = {"scoring": scoring, "renormalize": renormalize}
    actual = backend.run(gradient, logits, 3, **options)
    assert not actual.isnan().any()
    assert actual[[0, 2]].count_nonzero() == 0
    assert_as_good_as_torch(actual, lambda x: gradient(x, 3, reference.moe.route, **options).nan_to_num(), logits)


def test_a_second_derivative_is_refused():
    logits = logits_of().requires_grad_()
    (grad,) = torch.autograd.grad(moe.route(logits, 3)[0].square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- edges -----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("scoring", SCORINGS)
def test_nan_and_infinity_reach_their_token_alone(scoring, backend):
    logits, bias = logits_of(device=backend.device), bias_of(64, backend.device)
    for given_bias in (None, bias):
        clean = backend.run(moe.route, logits, 4, scoring=scoring, bias=given_bias)
        for value in (math.nan, math.inf, -math.inf):
            dirty = logits.clone()
            dirty[3, 7] = value
            actual = check(backend, dirty, 4, given_bias, scoring=scoring)
            others = torch.arange(9, device=logits.device) != 3
            assert all(torch.equal(a[others], c[others]) for a, c in zip(actual, clean, strict=True))
            assert (actual[1][3] == (-1 if math.isnan(value) else actual[1][3])).all()
    for value, place in ((math.inf, 7), (-math.inf, int(clean[1][0, 0]))):
        bias[place] = value
        idx = backend.run(moe.route, logits, 4, scoring=scoring, bias=bias)[1]
        assert ((idx == place).any(1) == (value > 0)).all()
    bias[5] = math.nan
    weights, idx = backend.run(moe.route, logits, 4, scoring=scoring, bias=bias)
    assert (idx == -1).all()
    assert (weights == 0).all()


@EVERY_BACKEND
def test_no_tokens(backend):
    logits = torch.zeros(0, 8, device=backend.device, requires_grad=True)
    weights, idx = backend.run(moe.route, logits, 3)
    assert weights.shape == idx.shape == (0, 3)
    assert backend.run(torch.autograd.grad, weights.sum(), logits)[0].shape == (0, 8)


@EVERY_BACKEND
def test_strides_repeats_threads_and_neighbours_change_no_bits(backend):
    logits = logits_of(80, 50, torch.bfloat16, backend.device)
    wide = torch.full((80, 61), math.nan, dtype=torch.bfloat16, device=backend.device)
    wide[:, 5:55] = logits
    expected = backend.run(moe.route, logits, 6, renormalize=False)
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for view in (logits, wide[:, 5:55]):
            actual = backend.run(moe.route, view, 6, renormalize=False)
            assert all(map(torch.equal, actual, expected))
            grads = (backend.run(gradient, t, 6, renormalize=False) for t in (view, logits))
            assert torch.equal(*grads)
    alone = backend.run(moe.route, logits[41:42], 6, renormalize=False)
    assert all(torch.equal(a, e[41:42]) for a, e in zip(alone, expected, strict=True))


# ---- errors ----------------------------------------------------------------------------------------------------------

LOGITS, BIAS = torch.zeros(3, 8), torch.zeros(8)
ERRORS = [
    ({"logits": None}, "logits must be a tensor, got NoneType."),
    ({"logits": LOGITS[0]}, "logits must be [num_tokens, num_experts], got 1 dimensions [8]."),
    ({"logits": LOGITS.double()}, "logits must be float32 or bfloat16 or float16, got float64."),
    ({"logits": LOGITS[:, ::2]}, "logits must have a contiguous last dimension, got stride 2."),
    ({"logits": torch.zeros(3, 1025)}, "logits must have from 1 to 1024 experts, got 1025."),
    ({"logits": LOGITS[:, :0]}, "logits must have from 1 to 1024 experts, got 0."),
    ({"num_topk": 0}, "num_topk must be at least 1, got 0."),
    ({"num_topk": 9}, "num_topk must be at most 8 for these experts and groups, got 9."),
    (
        {"num_topk": 33, "logits": torch.zeros(3, 64)},
        "num_topk must be at most 32 for these experts and groups, got 33.",
    ),
    ({"num_topk": 5, "num_groups": 2}, "num_topk must be at most 4 for these experts and groups, got 5."),
    ({"num_topk": 2.0}, "num_topk must be an integer, got float."),
    ({"scoring": "tanh"}, "scoring must be softmax or sigmoid or sqrt_softplus, got 'tanh'."),
    ({"renormalize": 1}, "renormalize must be True or False, got int."),
    ({"bias": BIAS[:7]}, "bias must have the experts of logits, 8, got 7."),
    ({"bias": BIAS.bfloat16()}, "bias must be float32, got bfloat16."),
    ({"bias": LOGITS}, "bias must be [num_experts], got 2 dimensions [3, 8]."),
    ({"num_groups": 3}, "num_groups must divide the 8 experts and be at most 32, got 3."),
    ({"num_groups": 0}, "num_groups must be at least 1, got 0."),
    ({"topk_groups": 2}, "topk_groups must be at most num_groups, 1, got 2."),
    ({"group_score": "mean"}, "group_score must be max or top2 or sum, got 'mean'."),
]


@pytest.mark.parametrize(("changed", "sentence"), ERRORS)
def test_wrong_arguments(changed, sentence):
    with pytest.raises((TypeError, ValueError)) as raised:
        moe.route(**{"logits": LOGITS, "num_topk": 2, **changed})
    assert str(raised.value) == f"moe.route: {sentence}"


def test_the_ops_themselves_refuse():
    right = (LOGITS, BIAS, 2, 0, True, 2, 1, 1)
    torch.ops.fmkernels.moe_route(*right)
    wrong = {0: [LOGITS[0], LOGITS.double(), LOGITS[:, ::2]], 1: [BIAS[:7], BIAS.half(), LOGITS], 2: [0, 5, 2**40]}
    wrong |= {3: [-1, 3], 5: [0, 3, 64], 6: [0, 3], 7: [0, 33]}
    for place, values in wrong.items():
        for value in values:
            with pytest.raises(RuntimeError):
                torch.ops.fmkernels.moe_route(*right[:place], value, *right[place + 1 :])
    weights, idx = moe.route(LOGITS, 2)
    backward = (weights, LOGITS, weights, idx, 0, True)
    torch.ops.fmkernels.moe_route_backward(*backward)
    for place, values in {
        0: [weights[:2], LOGITS],
        2: [weights.half(), LOGITS[:, ::4]],
        3: [idx + 7, idx - 2, idx.long()],
    }.items():
        for value in values:
            with pytest.raises(RuntimeError):
                torch.ops.fmkernels.moe_route_backward(*backward[:place], value, *backward[place + 1 :])


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_opcheck():
    logits, bias = logits_of(), bias_of(64)
    opcheck(torch.ops.fmkernels.moe_route.default, (logits, bias, 8, 1, True, 4, 2, 2))
    weights, idx = moe.route(logits, 8)
    opcheck(torch.ops.fmkernels.moe_route_backward.default, (weights, logits, weights, idx, 0, False))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic):
    torch._dynamo.reset()
    route = torch.compile(moe.route, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (9, 14):
        logits = logits_of(num_tokens)
        assert all(map(torch.equal, route(logits, 8), moe.route(logits, 8)))
        assert torch.equal(gradient(logits, 8, route), gradient(logits, 8))
