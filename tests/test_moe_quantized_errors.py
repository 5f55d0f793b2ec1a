# SPDX-License-Identifier: Apache-2.0
"""moe.quantize_experts, quantized_grouped_mm, quantized_moe_mlp: what is refused, and by whom."""

import pytest
import torch
from test_moe_quantized import inputs, layer, normal, of
from torch._subclasses.fake_tensor import FakeTensorMode

from fmkernels import QuantizedWeight, _library, moe
from fmkernels.testing import EMULATED_NAMESPACE

A, W, OFFSETS, BIAS = inputs([2, 5], 6, "int4 with zeros", 40)
ERRORS = [
    ({"a": 1}, TypeError, "a must be a tensor, got int."),
    ({"a": A[0]}, ValueError, "a must be [M, K], got 1 dimensions [40]."),
    ({"a": A.double()}, ValueError, "a must be float32 or bfloat16 or float16, got float64."),
    ({"a": A.to("meta")}, ValueError, "a must be on the device of weight, cpu, got meta."),
    ({"a": A[:, :39]}, ValueError, "a must have for this weight K = 40, got 39."),
    ({"a": A.t().contiguous().t()}, ValueError, "a must have a contiguous last dimension, got stride 6."),
    ({"weight": 1}, TypeError, "weight must be a QuantizedWeight, got int."),
    ({"offsets": [2, 5]}, TypeError, "offsets must be a tensor, got list."),
    ({"offsets": OFFSETS.long()}, ValueError, "offsets must be int32, got int64."),
    ({"offsets": OFFSETS[None]}, ValueError, "offsets must be [num_experts], got 2 dimensions [1, 2]."),
    ({"offsets": of(4, 2)}, ValueError, "offsets must not decrease and be at most M, 6, got 2 after 4."),
    ({"offsets": of(2, 7)}, ValueError, "offsets must not decrease and be at most M, 6, got 7 after 2."),
    ({"offsets": of(-1, 5)}, ValueError, "offsets must not decrease and be at most M, 6, got -1 after 0."),
    ({"offsets": of(2, 3, 5, 6)[::2]}, ValueError, "offsets must have a contiguous last dimension, got stride 2."),
    (
        {"offsets": of(2, 3, 5)},
        ValueError,
        "weight must have a multiple of 32 rows for each of the 3 experts of offsets, got 128.",
    ),
    (
        {"offsets": of()},
        ValueError,
        "weight must have a multiple of 32 rows for each of the 0 experts of offsets, got 128.",
    ),
    (
        {"offsets": of(0, 0, 0, 0, 0, 0, 0, 0)},
        ValueError,
        "weight must have a multiple of 32 rows for each of the 8 experts of offsets, got 128.",
    ),
    ({"bias": 1}, TypeError, "bias must be a tensor, got int."),
    ({"bias": BIAS.half()}, ValueError, "bias must be float32 for this a, got float16."),
    ({"bias": BIAS[0]}, ValueError, "bias must be [num_experts, N], got 1 dimensions [64]."),
    ({"bias": BIAS[:1]}, ValueError, "bias must have as many rows as offsets has experts, 2, got 1."),
    ({"bias": BIAS[:, :3]}, ValueError, "bias must have N = 64, got 3."),
    (
        {"a": A.clone().requires_grad_()},
        ValueError,
        "a must not require a gradient, which products of packed experts do not give.",
    ),
    (
        {"bias": BIAS.clone().requires_grad_()},
        ValueError,
        "bias must not require a gradient, which products of packed experts do not give.",
    ),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fake"])
@pytest.mark.parametrize(("changed", "error", "sentence"), ERRORS)
def test_wrong_arguments(changed, error, sentence, compiled):
    arguments = {"a": A, "weight": W, "offsets": OFFSETS, "bias": None, **changed}
    if not compiled:
        with pytest.raises(error) as raised:
            moe.quantized_grouped_mm(**arguments)
        assert str(raised.value) == f"moe.quantized_grouped_mm: {sentence}"
        return
    if "must not decrease" in sentence or "meta" in sentence:
        pytest.skip("a fake tensor has no values, and is on meta itself")
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        if fake["weight"] is W:
            tensors = (mode.from_tensor(t) for t in (W.values, W.scales, W.zeros))
            fake["weight"] = QuantizedWeight(*tensors, W.bits, W.group_size, *W.shape)
        with pytest.raises(error) as raised:
            moe.quantized_grouped_mm(**fake)
    assert str(raised.value) == f"moe.quantized_grouped_mm: {sentence}"


def test_gradients_are_not_refused_where_none_is_wanted():
    a = A.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(moe.quantized_grouped_mm(a, W, OFFSETS), moe.quantized_grouped_mm(A, W, OFFSETS))
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(moe.quantized_grouped_mm(A, W, OFFSETS), moe.quantized_grouped_mm(A, W, OFFSETS))
        dual = torch.autograd.forward_ad.make_dual(A, torch.ones_like(A))
        with pytest.raises(ValueError, match="a must not have a tangent, which products of packed experts do not give"):
            moe.quantized_grouped_mm(dual, W, OFFSETS)


X, GATE_UP, DOWN, WEIGHTS, IDX = layer()
HALF = layer(hidden=32)
LAYER_ERRORS = [
    ({"x": None}, TypeError, "x must be a tensor, got NoneType."),
    ({"x": X[0]}, ValueError, "x must be [num_tokens, hidden], got 1 dimensions [64]."),
    ({"x": X.int()}, ValueError, "x must be float32 or bfloat16 or float16, got int32."),
    ({"x": X.to("meta")}, ValueError, "w_gate_up must be on the device of x, meta, got cpu."),
    ({"w_gate_up": 3}, TypeError, "w_gate_up must be a QuantizedWeight, got int."),
    ({"w_down": X}, TypeError, "w_down must be a QuantizedWeight, got Tensor."),
    ({"w_gate_up": HALF[1]}, ValueError, "w_gate_up must have for this x hidden = 64 columns, got 32."),
    (
        {"w_down": moe.quantize_experts(normal(1, 96, 48))},
        ValueError,
        "w_down must have for each expert hidden = 64 rows, a multiple of 32, got 96.",
    ),
    (
        {"w_down": moe.quantize_experts(normal(3, 64, 48))},
        ValueError,
        "w_gate_up must have for each of the 3 experts of w_down 2 * width = 96 rows, a multiple of 32, got 384.",
    ),
    ({"x": X.clone().requires_grad_()}, ValueError, "x must not require a gradient, which products of packed"),
    ({"topk_weights": WEIGHTS.clone().requires_grad_()}, ValueError, "topk_weights must not require a gradient, which"),
    ({"topk_idx": IDX + 1}, ValueError, "topk_idx must be from -1 to 3, got 4."),
    ({"topk_idx": IDX.float()}, ValueError, "topk_idx must be int32 or int64, got float32."),
    ({"topk_idx": IDX[:3]}, ValueError, "topk_idx must have the tokens of x, 11, got 3."),
    ({"topk_weights": WEIGHTS.double()}, ValueError, "topk_weights must be float32, got float64."),
    (
        {"topk_weights": WEIGHTS[:, :1]},
        ValueError,
        "topk_weights must have the shape of topk_idx, [11, 2], got [11, 1].",
    ),
]


@pytest.mark.parametrize(("changed", "error", "sentence"), LAYER_ERRORS)
def test_wrong_arguments_of_the_layer(changed, error, sentence):
    names = ("x", "w_gate_up", "w_down", "topk_weights", "topk_idx")
    arguments = {**dict(zip(names, (X, GATE_UP, DOWN, WEIGHTS, IDX), strict=True)), **changed}
    with pytest.raises(error) as raised:
        moe.quantized_moe_mlp(**arguments)
    assert str(raised.value).startswith(f"moe.quantized_moe_mlp: {sentence}")


@pytest.mark.parametrize(
    ("weight", "options", "error", "sentence"),
    [
        (1, {}, TypeError, "moe.quantize_experts: weight must be a tensor, got int."),
        (X, {}, ValueError, "moe.quantize_experts: weight must be [num_experts, N, K], got 2 dimensions [11, 64]."),
        (normal(2, 33, 8), {}, ValueError, "moe.quantize_experts: weight must have a multiple of 32 rows an expert, "),
        (normal(0, 32, 8), {}, ValueError, "moe.quantize_experts: weight must have an expert, a row and a column, got"),
        (normal(2, 0, 8), {}, ValueError, "moe.quantize_experts: weight must have an expert, a row and a column, got"),
        (normal(2, 32, 8), {"bits": 5}, ValueError, "quantize_weight: bits must be 8 or 4, got 5."),
        (normal(2, 32, 8), {"bits": 4}, ValueError, "quantize_weight: group_size must be 32, 64 or 128 with bits=4"),
        (normal(2, 32, 8).int(), {}, ValueError, "quantize_weight: weight must be float32 or bfloat16 or float16, got"),
    ],
)
def test_what_cannot_be_quantised(weight, options, error, sentence):
    with pytest.raises(error) as raised:
        moe.quantize_experts(weight, **options)
    assert str(raised.value).startswith(sentence)


RIGHT = {"a": A.bfloat16(), "values": W.values, "scales": W.scales, "zeros": W.zeros, "offsets": OFFSETS, "bias": BIAS}
RIGHT |= {"bits": 4, "group_size": 32, "out_features": 128, "in_features": 40}
HOSTILE = [
    torch.zeros(()),
    torch.zeros(4),
    torch.zeros(2, 3, 32),
    torch.zeros(2, 2, 32)[:, ::2],
    A.to_sparse(),
    A.int(),
]


@pytest.mark.parametrize("namespace", ["fmkernels", EMULATED_NAMESPACE])
@pytest.mark.parametrize("name", list(RIGHT))
def test_the_ops_themselves_refuse(name, namespace):
    if not _library.has_kernel("moe_quantized_mm", "cpu", namespace):
        pytest.skip("not built")
    op = getattr(torch.ops, namespace).moe_quantized_mm
    op(**RIGHT)
    others = {"bits": (0, 8, 5), "group_size": (-1, 16, 64), "out_features": (0, -1, 2**40, 96), "in_features": (0, 30)}
    for value in others.get(name, HOSTILE):
        with pytest.raises(RuntimeError):
            op(**{**RIGHT, name: value})


def test_the_ops_refuse_what_is_of_their_backend_alone():
    if _library.has_kernel("moe_quantized_mm", "cpu", EMULATED_NAMESPACE):
        with pytest.raises(RuntimeError, match="must be float16 or bfloat16"):
            getattr(torch.ops, EMULATED_NAMESPACE).moe_quantized_mm(**{**RIGHT, "a": A})
    with pytest.raises(RuntimeError, match="offsets must not decrease"):
        torch.ops.fmkernels.moe_quantized_mm(**{**RIGHT, "offsets": of(5, 3)})


@pytest.mark.parametrize("name", ["a", "values", "scales", "zeros", "offsets", "bias"])
def test_the_ops_refuse_a_tensor_whose_storage_was_shrunk(name):
    shrunk = RIGHT[name].clone()
    shrunk.untyped_storage().resize_(shrunk.nbytes - 1)
    with pytest.raises(RuntimeError, match=r"storage of \d+ bytes, which does not hold its elements"):
        torch.ops.fmkernels.moe_quantized_mm(**{**RIGHT, name: shrunk})


def test_a_device_without_a_kernel_is_named(monkeypatch):
    monkeypatch.setattr(_library, "cuda_ops", frozenset())
    monkeypatch.setattr(_library, "cuda_error", None)
    with FakeTensorMode():
        tensors = torch.empty(2, 16, 32, device="cuda", dtype=torch.int32), torch.empty(2, 1, 32, device="cuda")
        w = QuantizedWeight(*tensors, None, 8, None, 64, 64)
        a = torch.empty(2, 64, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"moe\.quantized_grouped_mm: there is no kernel for cuda tensors"):
            moe.quantized_grouped_mm(a, w, torch.empty(2, device="cuda", dtype=torch.int32))
