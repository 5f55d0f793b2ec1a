# SPDX-License-Identifier: Apache-2.0
"""moe.moe_mlp: values, gradients, edges, errors, and one graph."""

import pytest
import torch

from fmkernels import moe, reference
from fmkernels.nn import Experts, WeightGradStore
from fmkernels.testing import FLOAT_DTYPES, assert_as_good_as_torch, backends

BACKENDS = backends("moe_mlp")
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
EVERY_DTYPE = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, dtype) for b in BACKENDS for dtype in (FLOAT_DTYPES if b.name == "cpu" else FLOAT_DTYPES[1:])],
    ids=lambda value: str(value).split(".")[-1],
)


def inputs(num_tokens=11, num_topk=2, num_experts=5, hidden=40, width=24, dtype=torch.float32, device="cpu"):
    """(x, w_gate_up, w_down, topk_weights, topk_idx), with -1 and an expert twice among the choices."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return (torch.randn(shape, generator=generator) * max(shape[-1], 1) ** -0.5).to(dtype).to(device)

    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype).to(device)
    weights = torch.rand(num_tokens, num_topk, generator=generator).to(device)
    idx = torch.randint(-1, num_experts, (num_tokens, num_topk), generator=generator, dtype=torch.int32).to(device)
    return x, normal(num_experts, 2 * width, hidden), normal(num_experts, hidden, width), weights, idx


def gradients(function, x, w_gate_up, w_down, weights, idx):
    leaves = [t.detach().requires_grad_() for t in (x, w_gate_up, w_down, weights)]
    out = function(*leaves, idx)
    grad = torch.randint(-4, 5, out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype).to(out.device)
    return torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize(("num_tokens", "num_topk"), [(11, 2), (1, 1), (90, 3)])
@EVERY_DTYPE
def test_matches_the_reference(num_tokens, num_topk, dtype, backend):
    args = inputs(num_tokens, num_topk, dtype=dtype, device=backend.device)
    out = backend.run(moe.moe_mlp, *args)
    assert_as_good_as_torch(out, reference.moe.moe_mlp, *args, computed_in=dtype)


@EVERY_DTYPE
def test_gradients_match_the_reference(dtype, backend):
    args = inputs(dtype=dtype, device=backend.device)
    actual = backend.run(gradients, moe.moe_mlp, *args)
    for i in range(4):
        wanted = lambda *t, i=i: gradients(reference.moe.moe_mlp, *t)[i]  # noqa: E731
        assert_as_good_as_torch(actual[i], wanted, *args, computed_in=dtype)


@EVERY_BACKEND
def test_a_token_has_the_same_bits_whatever_the_others_are(backend):
    x, w_gate_up, w_down, weights, idx = inputs(60, dtype=torch.bfloat16, device=backend.device)
    out = backend.run(moe.moe_mlp, x, w_gate_up, w_down, weights, idx)
    assert torch.equal(backend.run(moe.moe_mlp, x, w_gate_up, w_down, weights, idx), out)
    for rows in (slice(0, 1), slice(13, 20)):
        part = backend.run(moe.moe_mlp, x[rows], w_gate_up, w_down, weights[rows], idx[rows])
        assert torch.equal(part, out[rows])


@EVERY_DTYPE
def test_it_has_the_bits_of_its_parts(dtype, backend):
    """With and without what backward keeps; experts with few rows, and with several panels of them; several chains."""
    sizes = (70, 3, 5, 40, 24) if backend.name == "emulated" else (330, 3, 7, 300, 270)
    x, w_gate_up, w_down, weights, idx = inputs(*sizes, dtype=dtype, device=backend.device)
    idx[idx >= 4] = 4
    idx[2:, :] = torch.where(idx[2:, :] == 1, 4, idx[2:, :])

    def parts():
        mapping = moe.build_mapping(idx, sizes[2])
        inner = moe.grouped_mm_gated(x, w_gate_up, mapping, trans_b=True)
        return moe.combine(moe.grouped_mm(inner, w_down, mapping.expert_offsets[0], trans_b=True), mapping, weights)

    out = backend.run(moe.moe_mlp, x, w_gate_up, w_down, weights, idx)
    assert torch.equal(out, backend.run(parts))
    assert torch.equal(out, backend.run(moe.moe_mlp, x.clone().requires_grad_(), w_gate_up, w_down, weights, idx))
    by_rows = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w_gate_up, w_down))
    assert torch.equal(out, backend.run(moe.moe_mlp, x, *by_rows, weights, idx))


@EVERY_BACKEND
def test_gradients_without_columns_of_x_are_zeros(backend):
    args = inputs(hidden=0, dtype=torch.bfloat16, device=backend.device)
    actual = backend.run(gradients, moe.moe_mlp, *args)
    assert [grad.shape for grad in actual] == [t.shape for t in args[:4]]
    assert not any(grad.any() for grad in actual)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_change_no_bits(num_threads):
    """Of many rows tasks are blocks of them; of few, parts of the columns."""
    calls = [inputs(400, 2, 5, 256, 130), inputs(40, 2, 2, 256, 530)]
    before, expected = torch.get_num_threads(), [moe.moe_mlp(*args) for args in calls]
    torch.set_num_threads(num_threads)
    try:
        actual = [moe.moe_mlp(*args) for args in calls]
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("num_topk", [1, 8])
def test_what_backward_keeps_holds_no_rows_of_hidden(num_topk):
    """Inputs, lists, and gate and up: nothing of num_slots times hidden, of which there are four without the fusion."""
    num_tokens, num_experts, hidden, width = 50, 8, 512, 8
    args = inputs(num_tokens, num_topk, num_experts, hidden, width)
    leaves = [t.clone().requires_grad_() for t in args[:4]]
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        moe.moe_mlp(*leaves, args[4])
    given = {t.untyped_storage().data_ptr() for t in (*leaves, args[4])}
    own = sum(size for pointer, size in kept.items() if pointer not in given)
    num_slots = num_tokens * num_topk
    assert own == 4 * (num_slots * 2 * width + 2 * num_slots + 2 * num_experts)
    assert own < 4 * num_slots * hidden


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("autocast", [False, True])
def test_deferred_gradients_have_the_same_bits(autocast, needed):
    x, w_gate_up, w_down, weights, idx = inputs(num_topk=3)
    x.requires_grad_()
    store, results = WeightGradStore(), []
    for given_store in (None, store):
        experts = Experts(5, 40, 24, weight_grad_store=given_store)
        parameters = experts.gate_up_proj, experts.down_proj
        for parameter, values, is_needed in zip(parameters, (w_gate_up, w_down), needed, strict=True):
            parameter.data.copy_(values)
            parameter.requires_grad_(is_needed)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = experts(x, weights, idx)
            out.float().square().sum().backward()
        if given_store is not None:
            assert all(p.grad is None for p in parameters)
            assert len(store) == 2 * sum(needed)
            store.pop()()
        results.append((out.detach(), *(p.grad for p in parameters)))
    for actual, expected in zip(*results, strict=True):
        assert actual is expected is None or torch.equal(actual, expected)


@EVERY_BACKEND
def test_no_tokens_no_experts_and_nan(backend):
    x, w_gate_up, w_down, weights, idx = inputs(dtype=torch.bfloat16, device=backend.device)
    assert backend.run(moe.moe_mlp, x[:0], w_gate_up, w_down, weights[:0], idx[:0]).shape == (0, 40)
    assert not backend.run(moe.moe_mlp, x, w_gate_up, w_down, weights, torch.full_like(idx, -1)).any()
    x[3], idx[3] = torch.nan, 0
    out = backend.run(moe.moe_mlp, x, w_gate_up, w_down, weights, idx)
    assert out[3].isnan().all()
    assert out[:3].isfinite().all()
    assert out[4:].isfinite().all()


def test_one_expert_has_all_tokens_and_chooses_twice():
    args = (*inputs(30)[:4], torch.full((30, 2), 4, dtype=torch.int64))
    assert_as_good_as_torch(moe.moe_mlp(*args), reference.moe.moe_mlp, *args)


X, GATE_UP, DOWN, WEIGHTS, IDX = inputs()
ERRORS = [
    ({"x": None}, TypeError, "x must be a tensor, got NoneType."),
    ({"x": X[0]}, ValueError, "x must be [num_tokens, hidden], got 1 dimensions [40]."),
    ({"x": X.int()}, ValueError, "x must be float32 or bfloat16 or float16, got int32."),
    ({"w_gate_up": GATE_UP.half()}, ValueError, "w_gate_up must have the dtype of x, float32, got float16."),
    ({"w_gate_up": GATE_UP[:, :, :8]}, ValueError, "w_gate_up must have for this x hidden = 40, got 8."),
    ({"w_gate_up": GATE_UP[:, :47]}, ValueError, "w_gate_up must have from 1 to 1024 experts and an even"),
    ({"w_down": DOWN[0]}, ValueError, "w_down must be [num_experts, hidden, width], got 2 dimensions [40, 24]."),
    ({"w_down": DOWN[:4]}, ValueError, "w_down must be [5, 40, 24] for this w_gate_up, got [4, 40, 24]."),
    ({"topk_idx": IDX + 1}, ValueError, "topk_idx must be from -1 to 4, got 5."),
    ({"topk_idx": IDX.float()}, ValueError, "topk_idx must be int32 or int64, got float32."),
    ({"topk_idx": IDX[:3]}, ValueError, "topk_idx must have the tokens of x, 11, got 3."),
    ({"topk_weights": WEIGHTS.double()}, ValueError, "topk_weights must be float32, got float64."),
    (
        {"topk_weights": WEIGHTS[:, :1]},
        ValueError,
        "topk_weights must have the shape of topk_idx, [11, 2], got [11, 1].",
    ),
]


@pytest.mark.parametrize(("changed", "error", "sentence"), ERRORS)
def test_wrong_arguments(changed, error, sentence):
    names = ("x", "w_gate_up", "w_down", "topk_weights", "topk_idx")
    arguments = {**dict(zip(names, (X, GATE_UP, DOWN, WEIGHTS, IDX), strict=True)), **changed}
    with pytest.raises(error) as raised:
        moe.moe_mlp(**arguments)
    assert str(raised.value).startswith(f"moe.moe_mlp: {sentence}")


def test_compile_is_one_graph():
    torch._dynamo.reset()
    moe_mlp = torch.compile(moe.moe_mlp, fullgraph=True, backend="aot_eager")
    for num_tokens in (11, 17):
        args = inputs(num_tokens)
        assert torch.equal(moe_mlp(*args), moe.moe_mlp(*args))
        assert all(map(torch.equal, gradients(moe_mlp, *args), gradients(moe.moe_mlp, *args)))


def test_opcheck_and_flops():
    for keeps in (False, True):
        torch.library.opcheck(torch.ops.fmkernels.moe_mlp.default, (*inputs(), keeps))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        moe.moe_mlp(*inputs())
    assert counter.get_total_flops() == 6 * 22 * 40 * 24
