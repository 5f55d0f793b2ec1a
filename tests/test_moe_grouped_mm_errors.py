# SPDX-License-Identifier: Apache-2.0
"""moe.grouped_mm: what is refused, by whom, and what torch asks of an op."""

import pytest
import torch
from test_moe_grouped_mm import BACKENDS, gradients, inputs, of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fmkernels import _library, moe
from fmkernels.testing import EMULATED_NAMESPACE

# ---- errors ----------------------------------------------------------------------------------------------------------

A, B, OFFSETS, BIAS = inputs([2, 5], 6, 8, 12)
ERRORS = [
    ({"a": 1}, TypeError, "a must be a tensor, got int."),
    ({"a": A[0]}, ValueError, "a must be [M, K], got 1 dimensions [8]."),
    ({"a": A.double()}, ValueError, "a must be float32 or bfloat16 or float16, got float64."),
    ({"a": A.t().contiguous().t()}, ValueError, "a must have a contiguous last dimension, got stride 6."),
    ({"a": A[:, :7]}, ValueError, "b must have for this a K = 7, got 8."),
    ({"b": None}, TypeError, "b must be a tensor, got NoneType."),
    ({"b": B[0, 0]}, ValueError, "b must be [num_experts, K, N] or [M, N], got 1 dimensions [12]."),
    ({"b": B.half()}, ValueError, "b must have the dtype of a, float32, got float16."),
    ({"b": B.to("meta")}, ValueError, "b must be on the device of a, cpu, got meta."),
    (
        {"b": torch.zeros(2, 16, 24)[:, ::2, ::2]},
        ValueError,
        "b must be contiguous in its rows or columns, got strides ",
    ),
    ({"offsets": [2, 5]}, TypeError, "offsets must be a tensor, got list."),
    ({"offsets": OFFSETS.long()}, ValueError, "offsets must be int32, got int64."),
    ({"offsets": OFFSETS[None]}, ValueError, "offsets must be [num_experts], got 2 dimensions [1, 2]."),
    ({"offsets": of(2, 4, 5)}, ValueError, "offsets must have as many elements as b has experts, 2, got 3."),
    ({"offsets": of(4, 2)}, ValueError, "offsets must not decrease and be at most M, 6, got 2 after 4."),
    ({"offsets": of(2, 7)}, ValueError, "offsets must not decrease and be at most M, 6, got 7 after 2."),
    ({"offsets": of(-1, 5)}, ValueError, "offsets must not decrease and be at most M, 6, got -1 after 0."),
    ({"offsets": of(2, 3, 5, 6)[::2]}, ValueError, "offsets must have a contiguous last dimension, got stride 2."),
    ({"bias": 1}, TypeError, "bias must be a tensor, got int."),
    ({"bias": BIAS.half()}, ValueError, "bias must be float32 for this a, got float16."),
    ({"bias": BIAS[0]}, ValueError, "bias must be [num_experts, N], got 1 dimensions [12]."),
    ({"bias": BIAS[:1]}, ValueError, "bias must have as many rows as b has experts, 2, got 1."),
    ({"bias": BIAS[:, :3]}, ValueError, "bias must have N = 12, got 3."),
    ({"trans_b": 1}, TypeError, "trans_b must be True or False, got int."),
    ({"b": A, "bias": BIAS}, ValueError, "bias must be None for b [M, N], got "),
    ({"b": A, "a": A[0]}, ValueError, "a must be [K, M] for b [M, N], got 1 dimensions [8]."),
    ({"b": A, "a": A.t()[:, :5]}, ValueError, "b must have as many rows as a has columns, 5, got 6."),
    ({"b": A, "a": A.t(), "offsets": of(3, 2)}, ValueError, "offsets must not decrease and be at most M, 6, got 2 "),
    ({"b": A.half(), "a": A.t()}, ValueError, "b must have the dtype of a, float32, got float16."),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fake"])
@pytest.mark.parametrize(("changed", "error", "sentence"), ERRORS)
def test_wrong_arguments(changed, error, sentence, compiled):
    arguments = {"a": A, "b": B, "offsets": OFFSETS, "bias": None, "trans_b": False, **changed}
    if not compiled:
        with pytest.raises(error) as raised:
            moe.grouped_mm(arguments.pop("a"), arguments.pop("b"), arguments.pop("offsets"), **arguments)
        assert str(raised.value).startswith(f"moe.grouped_mm: {sentence}")
        return
    if "must not decrease" in sentence or "meta" in sentence:
        pytest.skip("a fake tensor has no values, and is on meta itself")
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        with pytest.raises(error) as raised:
            moe.grouped_mm(fake.pop("a"), fake.pop("b"), fake.pop("offsets"), **fake)
    assert str(raised.value).startswith(f"moe.grouped_mm: {sentence}")


@pytest.mark.parametrize("namespace", ["fmkernels", EMULATED_NAMESPACE])
def test_the_ops_themselves_refuse(namespace):
    if not _library.has_kernel("moe_grouped_mm", "cpu", namespace):
        pytest.skip("not built")
    ops = getattr(torch.ops, namespace)
    a, b = A.bfloat16(), B.bfloat16()
    wrong = [
        (ops.moe_grouped_mm, (a, b, OFFSETS.long(), None), "offsets must be int32"),
        (ops.moe_grouped_mm, (a, b[:1], OFFSETS, None), "offsets must have size 1 in dimension 0"),
        (ops.moe_grouped_mm, (a, b.half(), OFFSETS, None), "dtype of the first"),
        (ops.moe_grouped_mm, (a[:, :4], b, OFFSETS, None), "as many rows as a has columns"),
        (ops.moe_grouped_mm, (a.t(), b, OFFSETS, None), "a must have a contiguous last dimension"),
        (ops.moe_grouped_mm, (a, torch.zeros(2, 16, 24).bfloat16()[:, ::2, ::2], OFFSETS, None), "rows or in its col"),
        (ops.moe_grouped_mm, (a, b, OFFSETS, BIAS[:, :3]), "bias must have size 12"),
        (ops.moe_grouped_mm, (a, b, OFFSETS, BIAS.half()), "bias must be float32"),
        (ops.moe_grouped_mm, (a, b, OFFSETS, BIAS.t().contiguous().t()), "contiguous last dimension"),
        (ops.moe_grouped_mm_inner, (a, a[:3], OFFSETS), "as many rows"),
        (ops.moe_grouped_mm_inner, (a, a[0], OFFSETS), "b must have 2 dimensions"),
        (ops.moe_grouped_mm_inner, (a, a, OFFSETS[None]), "offsets must have 1 dimensions"),
        (ops.moe_grouped_sum, (a[:, ::2], OFFSETS), "contiguous last dimension"),
    ]
    if namespace == "fmkernels":
        wrong.append((ops.moe_grouped_sum, (a, of(5, 3)), "must not decrease"))
    else:
        wrong.append((ops.moe_grouped_mm, (A, B, OFFSETS, None), "must be float16 or bfloat16"))
    for op, arguments, sentence in wrong:
        with pytest.raises(RuntimeError, match=sentence):
            op(*arguments)


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "emulated"], ids=str)
def test_opcheck(backend):
    a, b, offsets, bias = inputs([2, 5], 6, 8, 16, torch.bfloat16, backend.device)
    for weights in (b, b.transpose(1, 2).contiguous().transpose(1, 2)):
        for given_bias in (None, bias):
            opcheck(torch.ops.fmkernels.moe_grouped_mm.default, (a, weights, offsets, given_bias))
    opcheck(torch.ops.fmkernels.moe_grouped_mm_inner.default, (a, a, offsets))
    opcheck(torch.ops.fmkernels.moe_grouped_sum.default, (a, offsets))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_is_one_graph(dynamic):
    torch._dynamo.reset()
    grouped_mm = torch.compile(moe.grouped_mm, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_rows in (6, 11):
        a, b, offsets, bias = inputs([2, 5], num_rows)
        assert torch.equal(grouped_mm(a, b, offsets, bias=bias), moe.grouped_mm(a, b, offsets, bias=bias))
        assert torch.equal(grouped_mm(a.t(), a, offsets), moe.grouped_mm(a.t(), a, offsets))
        actual, expected = (gradients(f, (a, b, bias), offsets) for f in (grouped_mm, moe.grouped_mm))
        assert all(map(torch.equal, actual, expected))


def test_a_training_step_compiles_to_one_graph():
    torch._dynamo.reset()
    step = torch.compile(moe.grouped_mm, fullgraph=True, backend="aot_eager")
    a, b, offsets, _ = inputs([2, 5], 6)
    b = b.transpose(1, 2).contiguous().requires_grad_()
    step(a, b, offsets, trans_b=True).square().sum().backward()
    grad, b.grad = b.grad, None
    moe.grouped_mm(a, b, offsets, trans_b=True).square().sum().backward()
    assert torch.equal(grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    a, b, offsets, bias = inputs([2, 5], 6)
    with torch.autocast("cpu", dtype):
        out = moe.grouped_mm(a, b, offsets, bias=bias)
    assert torch.equal(out, moe.grouped_mm(a.to(dtype), b.to(dtype), offsets, bias=bias))


def test_flops_are_counted():
    with FlopCounterMode(display=False) as counter:
        moe.grouped_mm(A, B, OFFSETS)
        moe.grouped_mm(A.t(), A, OFFSETS)
    assert counter.get_total_flops() == 2 * 6 * 8 * 12 + 2 * 6 * 8 * 8
