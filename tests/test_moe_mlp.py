# SPDX-License-Identifier: Apache-2.0
"""moe.moe_mlp: values, gradients, edges, errors, and one graph."""

import pytest
import torch

from fmkernels import moe, reference
from fmkernels.testing import FLOAT_DTYPES, assert_as_good_as_torch, backends

BACKENDS = [b for b in backends("moe_grouped_mm") if b in backends("glu_forward")]
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
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype).to(device)

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
