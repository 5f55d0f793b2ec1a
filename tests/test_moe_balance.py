# SPDX-License-Identifier: Apache-2.0
"""moe.load_balance_loss, moe.z_loss, moe.route_expert_choice, moe.apply_capacity."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_moe import ids
from test_moe_route import DTYPES, SCORINGS, logits_of
from torch.library import opcheck

from fmkernels import moe, reference
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("moe_load_balance")
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
EVERY_SCORING = pytest.mark.parametrize("scoring", SCORINGS)


def with_gradient(function, logits, *args, **options):
    """The result, or the first of them, and its gradient."""
    leaf = logits.detach().requires_grad_()
    out = function(leaf, *args, **options)
    out = out if isinstance(out, torch.Tensor) else out[0]
    grad = torch.arange(out.numel(), device=out.device).view(out.shape).sub(3).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def check_loss(backend, name, logits, *args, **options):
    function, definition = getattr(moe, name), getattr(reference.moe, name)
    actual = backend.run(with_gradient, function, logits, *args, **options)
    assert torch.equal(actual[0], backend.run(function, logits, *args, **options))
    assert (actual[0].dtype, actual[1].dtype) == (torch.float32, logits.dtype)
    assert_as_good_as_torch(actual, lambda x: with_gradient(definition, x, *args, **options), logits)
    return actual


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_even_experts_have_the_loss_one():
    idx = torch.arange(8, dtype=torch.int32).view(4, 2)
    assert moe.load_balance_loss(torch.zeros(4, 8), idx).item() == 1.0
    assert moe.load_balance_loss(torch.zeros(4, 8), idx[:, :1].contiguous()).item() == 1.0
    one_sided = torch.tensor([[9.0, 0.0]]).expand(4, 2)
    assert moe.load_balance_loss(one_sided, torch.zeros(4, 1, dtype=torch.int32)).item() > 1.99
    assert moe.z_loss(torch.zeros(4, 8)).item() == pytest.approx(math.log(8) ** 2)


@EVERY_BACKEND
@EVERY_SCORING
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 64), (150, 37)], ids=str)  # one block of tokens, and three
def test_load_balance_matches_the_reference(shape, dtype, scoring, backend):
    logits = logits_of(*shape, dtype, backend.device)
    topk_idx = ids(shape[0], 3, shape[1], backend.device)
    topk_idx[4] = -1  # does not count
    loss, grad = check_loss(backend, "load_balance_loss", logits, topk_idx, scoring=scoring)
    assert grad[4].count_nonzero() == 0
    logits[4] = math.nan
    poisoned = backend.run(with_gradient, moe.load_balance_loss, logits, topk_idx, scoring=scoring)
    assert torch.equal(poisoned[0], loss)
    assert torch.equal(poisoned[1], grad)


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 64), (300, 37), (1, 1)], ids=str)
def test_z_loss_matches_the_reference(shape, dtype, backend):
    check_loss(backend, "z_loss", logits_of(*shape, dtype, backend.device))


@EVERY_BACKEND
@EVERY_SCORING
def test_losses_at_the_edges(scoring, backend):
    logits = logits_of(8, 10, device=backend.device)
    logits[1, 2:5], logits[2] = -math.inf, logits[2] - 300
    logits[3] += 80
    topk_idx = ids(8, 2, 10, backend.device, lowest=0)
    check_loss(backend, "load_balance_loss", logits, topk_idx, scoring=scoring)
    check_loss(backend, "z_loss", logits)
    logits[5, 5] = math.nan
    for name, args in (("load_balance_loss", (topk_idx,)), ("z_loss", ())):
        loss, grad = backend.run(with_gradient, getattr(moe, name), logits, *args)
        assert loss.isnan()
        assert grad.isnan().any(1).tolist() == [row == 5 for row in range(8)]
    none = torch.full((8, 2), -1, dtype=torch.int32, device=backend.device)
    loss, grad = backend.run(with_gradient, moe.load_balance_loss, logits, none, scoring=scoring)
    assert (loss.item(), grad.count_nonzero().item()) == (0.0, 0)
    for name, args in (("load_balance_loss", (topk_idx[:0],)), ("z_loss", ())):
        loss, grad = backend.run(with_gradient, getattr(moe, name), logits[:0], *args)
        assert (loss.item(), grad.shape) == (0.0, (0, 10))


@EVERY_BACKEND
def test_losses_repeat(backend):
    logits, topk_idx = logits_of(200, 40, torch.bfloat16, backend.device), ids(200, 3, 40, backend.device)
    results = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        balance = backend.run(with_gradient, moe.load_balance_loss, logits, topk_idx)
        results.append((*balance, *backend.run(with_gradient, moe.z_loss, logits)))
    assert all(map(torch.equal, *results))


# ---- experts choose --------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@EVERY_SCORING
@pytest.mark.parametrize("capacity", [0, 1, 7, 40, 99])
def test_expert_choice_matches_the_reference(capacity, scoring, backend):
    logits = logits_of(40, 12, device=backend.device)
    logits[3, 4], logits[5, 6], logits[7], logits[8, 2] = math.nan, -math.inf, -math.inf, math.inf
    weights, idx = backend.run(moe.route_expert_choice, logits, capacity, scoring=scoring)
    assert torch.equal(idx, reference.moe.route_expert_choice(logits.double(), capacity, scoring=scoring)[1])
    assert_as_good_as_torch(
        weights, lambda x: reference.moe.route_expert_choice(x, capacity, scoring=scoring)[0], logits
    )
    assert ((idx >= 0).sum(0) <= capacity).all()


@EVERY_BACKEND
def test_of_equal_tokens_an_expert_takes_the_first(backend):
    logits = torch.zeros(700, 3, device=backend.device)  # more than two tiles of a block
    logits[::9, 1] = 2.0
    for capacity in (5, 90, 600):
        actual = backend.run(moe.route_expert_choice, logits, capacity, scoring="sigmoid")
        assert torch.equal(actual[1], reference.moe.route_expert_choice(logits, capacity, scoring="sigmoid")[1])


@EVERY_BACKEND
@EVERY_SCORING
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_gradient_of_expert_choice(dtype, scoring, backend):
    logits = logits_of(20, 48, dtype, backend.device)
    _, actual = backend.run(with_gradient, moe.route_expert_choice, logits, 4, scoring=scoring)
    definition = reference.moe.route_expert_choice
    assert_as_good_as_torch(actual, lambda x: with_gradient(definition, x, 4, scoring=scoring)[1], logits)


@EVERY_BACKEND
def test_what_experts_choose_is_permuted_and_combined(backend):
    logits, x = logits_of(12, 6, device=backend.device), torch.randn(12, 16, device=backend.device)

    def layer():
        weights, idx = moe.route_expert_choice(logits, 4)
        mapping = moe.build_mapping(idx, 6, alignment=8, num_rows=6 * 8)
        return moe.combine(moe.permute(x, mapping), mapping, weights), weights, mapping

    out, weights, mapping = backend.run(layer)
    assert mapping.pos_to_token.shape == (48,)
    assert_as_good_as_torch(out, lambda x, w: x * w.sum(-1, keepdim=True), x, weights)


# ---- capacity --------------------------------------------------------------------------------------------------------


def check_capacity(backend, weights, topk_idx, num_experts, capacity, policy):
    args = (weights, topk_idx, num_experts, capacity)
    kept_weights, kept_idx = backend.run(moe.apply_capacity, *args, policy=policy)
    expected = reference.moe.apply_capacity(*args, policy=policy)
    assert torch.equal(kept_idx, expected[1])
    assert torch.equal(kept_weights, expected[0])
    return kept_idx


@EVERY_BACKEND
@pytest.mark.parametrize("policy", ["position", "weight"])
@pytest.mark.parametrize("shape", [(9, 3, 5), (900, 3, 7), (0, 2, 3), (4, 0, 3)], ids=str)
def test_capacity_matches_the_reference(shape, policy, backend):
    num_tokens, num_topk, num_experts = shape
    topk_idx = ids(*shape, backend.device)
    generator = torch.Generator().manual_seed(4)
    weights = torch.randint(-4, 9, (num_tokens, num_topk), generator=generator).float().div(8).to(backend.device)
    for capacity in (0, 1, 3, 200, 5000):
        for few in (topk_idx, topk_idx.long()):
            kept = check_capacity(backend, weights, few, num_experts, capacity, policy)
            counts = torch.bincount(kept[kept >= 0], minlength=num_experts)
            assert (counts <= capacity).all()


@EVERY_BACKEND
def test_weights_that_are_no_numbers_are_dropped_first(backend):
    weights = torch.tensor([[math.nan, -math.inf], [0.0, -0.0], [math.inf, -1.0]], device=backend.device)
    topk_idx = torch.zeros(3, 2, dtype=torch.int32, device=backend.device)
    for capacity, places in ((1, [4]), (2, [2, 4]), (3, [2, 3, 4]), (4, [2, 3, 4, 5])):
        kept = backend.run(moe.apply_capacity, weights, topk_idx, 1, capacity, policy="weight")[1]
        assert (kept.flatten() == 0).nonzero().flatten().tolist() == places


@settings(max_examples=30)
@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 9), st.integers(0, 12), st.integers(0, 99))
def test_any_capacity(num_tokens, num_topk, num_experts, capacity, seed):
    topk_idx = ids(num_tokens, num_topk, num_experts, seed=seed)
    weights = torch.rand(topk_idx.shape, generator=torch.Generator().manual_seed(seed))
    for policy in ("position", "weight"):
        check_capacity(BACKENDS[0], weights, topk_idx, num_experts, capacity, policy)


@EVERY_BACKEND
def test_what_is_dropped_has_no_gradient(backend):
    topk_idx = ids(20, 3, 4, backend.device)
    weights = torch.rand(20, 3, device=backend.device, requires_grad=True)
    kept_weights, kept_idx = backend.run(moe.apply_capacity, weights, topk_idx, 4, 5, policy="weight")
    (grad,) = torch.autograd.grad(kept_weights.sum(), weights)
    assert torch.equal(grad, (kept_idx >= 0).float())


# ---- errors ----------------------------------------------------------------------------------------------------------

LOGITS, IDX, WEIGHTS = torch.zeros(3, 8), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2)
STRIDED = "must have a contiguous last dimension, got stride"
ERRORS = [
    (moe.load_balance_loss, (None, IDX), "logits must be a tensor, got NoneType."),
    (moe.load_balance_loss, (LOGITS.double(), IDX), "logits must be float32 or bfloat16 or float16, got float64."),
    (moe.load_balance_loss, (LOGITS, IDX.long()), "topk_idx must be int32, got int64."),
    (moe.load_balance_loss, (LOGITS, IDX[0]), "topk_idx must be [num_tokens, num_topk], got 1 dimensions [2]."),
    (moe.load_balance_loss, (LOGITS, IDX[:2]), "topk_idx must have the tokens of logits, 3, got 2."),
    (moe.load_balance_loss, (LOGITS, IDX[:, :1]), "topk_idx must be contiguous, got strides [2, 1]."),
    (moe.load_balance_loss, (LOGITS, IDX + 8), "topk_idx must be from -1 to 7, got 8."),
    (moe.z_loss, (LOGITS[:, ::2],), f"logits {STRIDED} 2."),
    (moe.z_loss, (LOGITS[0],), "logits must be [num_tokens, num_experts], got 1 dimensions [8]."),
    (moe.route_expert_choice, (LOGITS.int(), 1), "logits must be float32 or bfloat16 or float16, got int32."),
    (moe.route_expert_choice, (LOGITS, -1), "capacity must be at least 0, got -1."),
    (moe.apply_capacity, (WEIGHTS, IDX, 0, 1), "num_experts must be at least 1, got 0."),
    (moe.apply_capacity, (WEIGHTS, IDX, 1025, 1), "num_experts must be at most 1024, got 1025."),
    (moe.apply_capacity, (WEIGHTS, IDX, 4, 1.5), "capacity must be an integer, got float."),
    (moe.apply_capacity, (WEIGHTS, IDX + 4, 4, 1), "topk_idx must be from -1 to 3, got 4."),
    (moe.apply_capacity, (WEIGHTS.half(), IDX, 4, 1), "topk_weights must be float32, got float16."),
    (moe.apply_capacity, (WEIGHTS[:2], IDX, 4, 1), "topk_weights must have the shape of topk_idx, [3, 2], got [2, 2]."),
    (moe.apply_capacity, (1, IDX, 4, 1), "topk_weights must be a tensor, got int."),
]


@pytest.mark.parametrize(("function", "args", "sentence"), ERRORS)
def test_wrong_arguments(function, args, sentence):
    for options in [{"policy": "position"}, {"policy": "weight"}] if function is moe.apply_capacity else [{}]:
        with pytest.raises((TypeError, ValueError)) as raised:
            function(*args, **options)
        assert str(raised.value) == f"moe.{function.__name__}: {sentence}"


def test_wrong_names():
    for function, args in ((moe.load_balance_loss, (LOGITS, IDX)), (moe.route_expert_choice, (LOGITS, 1))):
        with pytest.raises(ValueError, match="scoring must be softmax or sigmoid or sqrt_softplus, got 'relu'"):
            function(*args, scoring="relu")
    with pytest.raises(ValueError, match=r"moe.apply_capacity: policy must be position or weight, got 'random'"):
        moe.apply_capacity(WEIGHTS, IDX, 4, 1, policy="random")


def test_the_ops_themselves_refuse():
    ops, one = torch.ops.fmkernels, torch.ones(())
    for call in (
        lambda: ops.moe_load_balance(LOGITS, IDX + 8, 0),
        lambda: ops.moe_load_balance(LOGITS, IDX, 3),
        lambda: ops.moe_load_balance_backward(torch.ones(2), LOGITS, IDX, torch.zeros(8), 0),
        lambda: ops.moe_load_balance_backward(one, LOGITS, IDX, torch.zeros(7), 0),
        lambda: ops.moe_z_loss(LOGITS.t()),
        lambda: ops.moe_z_loss_backward(one.double(), LOGITS, torch.zeros(3)),
        lambda: ops.moe_z_loss_backward(one, LOGITS, torch.zeros(2)),
        lambda: ops.moe_route_expert_choice(LOGITS, -1, 0),
        lambda: ops.moe_route_expert_choice(LOGITS[0], 1, 0),
        lambda: ops.moe_capacity(IDX + 4, None, 4, 1),
        lambda: ops.moe_capacity(IDX, WEIGHTS[:2], 4, 1),
        lambda: ops.moe_capacity(IDX, None, 4, -1),
        lambda: ops.moe_capacity(IDX, None, 2000, 1),
    ):
        with pytest.raises(RuntimeError):
            call()


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.name != "cpu"], ids=str)
def test_ids_out_of_range_are_skipped_on_the_device(backend):
    ops = getattr(torch.ops, backend.namespace)
    logits, topk_idx = logits_of(30, 5, device=backend.device), ids(30, 3, 9, backend.device, lowest=-4)
    legal = torch.where((topk_idx >= 0) & (topk_idx < 5), topk_idx, -1)
    for weights in (None, torch.rand(30, 3, device=backend.device)):
        assert torch.equal(*(backend.run(ops.moe_capacity, t, weights, 5, 4) for t in (topk_idx, legal)))
    losses = [backend.run(ops.moe_load_balance, logits, t, 0) for t in (topk_idx, legal)]
    assert all(map(torch.equal, *losses))
    one = torch.ones((), device=backend.device)
    grads = [backend.run(ops.moe_load_balance_backward, one, logits, t, losses[0][1], 0) for t in (topk_idx, legal)]
    assert torch.equal(*grads)


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_opcheck():
    logits, topk_idx, one = logits_of(), ids(9, 3, 64), torch.ones(())
    opcheck(torch.ops.fmkernels.moe_load_balance.default, (logits, topk_idx, 1))
    opcheck(torch.ops.fmkernels.moe_load_balance_backward.default, (one, logits, topk_idx, torch.rand(64), 1))
    opcheck(torch.ops.fmkernels.moe_z_loss.default, (logits,))
    opcheck(torch.ops.fmkernels.moe_z_loss_backward.default, (one, logits, torch.rand(9)))
    opcheck(torch.ops.fmkernels.moe_route_expert_choice.default, (logits, 3, 0))
    for weights in (None, torch.rand(9, 3)):
        opcheck(torch.ops.fmkernels.moe_capacity.default, (topk_idx, weights, 64, 2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic):
    torch._dynamo.reset()
    options = {"dynamic": dynamic, "backend": "aot_eager"}
    load_balance_loss = torch.compile(moe.load_balance_loss, fullgraph=True, **options)
    z_loss = torch.compile(moe.z_loss, fullgraph=True, **options)
    route_expert_choice = torch.compile(moe.route_expert_choice, fullgraph=True, **options)
    apply_capacity = torch.compile(moe.apply_capacity, fullgraph=True, **options)
    for num_tokens in (9, 14):
        logits, topk_idx = logits_of(num_tokens), ids(num_tokens, 3, 64)
        weights = torch.rand(num_tokens, 3)
        for compiled, eager, args in (
            (load_balance_loss, moe.load_balance_loss, (topk_idx,)),
            (z_loss, moe.z_loss, ()),
            (route_expert_choice, moe.route_expert_choice, (3,)),
        ):
            results = [with_gradient(function, logits, *args) for function in (compiled, eager)]
            assert all(map(torch.equal, *results))
        for policy in ("position", "weight"):
            args = (weights, topk_idx, 64, 1)
            results = [f(*args, policy=policy) for f in (apply_capacity, moe.apply_capacity)]
            assert all(map(torch.equal, *results))
