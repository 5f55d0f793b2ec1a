# SPDX-License-Identifier: Apache-2.0
"""moe.build_mapping, moe.permute, moe.combine: what is refused, by whom, and what torch asks of an op."""

import pytest
import torch
from test_moe import BACKENDS, IDS, gradients, ids, inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fmkernels import _library, moe, reference
from fmkernels.testing import EMULATED_NAMESPACE

X, Y, MAPPING, WEIGHTS = inputs(hidden=8)
ROWS = len(MAPPING.pos_to_token)
WIDE = torch.zeros(9, 16)[:, ::2]


def changed(**lists):
    return MAPPING._replace(**lists)


TOKENS, SLOTS = "mapping.pos_to_token", "mapping.token_topk_to_pos"
STRIDED = "must have a contiguous last dimension, got stride"
NOT_A_MAPPING = ("mapping", tuple(MAPPING), "mapping must be a Mapping of build_mapping, got tuple.")
PERMUTE_ERRORS = [
    ("x", None, "x must be a tensor, got NoneType."),
    ("x", X[0], "x must be [num_tokens, hidden], got 1 dimensions [8]."),
    ("x", X.double(), "x must be float32 or bfloat16 or float16, got float64."),
    ("x", WIDE, f"x {STRIDED} 2."),
    ("x", X[:3], f"{TOKENS} must be from -1 to 2, got 8."),
    ("x", X.to("meta"), f"{TOKENS} must be on the device of x, meta, got cpu."),
    ("mapping", changed(pos_to_token=MAPPING[0].long()), f"{TOKENS} must be int32, got int64."),
    ("mapping", changed(pos_to_token=MAPPING[0] - 1), f"{TOKENS} must be from -1 to 8, got -2."),
    ("mapping", changed(pos_to_token=MAPPING[1]), f"{TOKENS} must be [num_rows], got 2 dimensions [9, 3]."),
    ("mapping", changed(pos_to_token=MAPPING[0][::2]), f"{TOKENS} {STRIDED} 2."),
    NOT_A_MAPPING,
]
MANY = torch.full((9, 1025), -1, dtype=torch.int32)
COMBINE_ERRORS = [
    ("y", 1, "y must be a tensor, got int."),
    ("y", Y[None], f"y must be [num_rows, hidden], got 3 dimensions [1, {ROWS}, 8]."),
    ("y", Y.int(), "y must be float32 or bfloat16 or float16, got int32."),
    ("y", Y.t(), f"y {STRIDED} 8."),
    ("y", Y[:5], f"{SLOTS} must be from -1 to 4, got {MAPPING[1].max()}."),
    ("mapping", changed(token_topk_to_pos=MAPPING[1].long()), f"{SLOTS} must be int32, got int64."),
    ("mapping", changed(token_topk_to_pos=MAPPING[1][:, :2]), f"{SLOTS} must be contiguous, got strides [3, 1]."),
    ("mapping", changed(token_topk_to_pos=MANY), f"{SLOTS} must have at most 1024 columns, got 1025."),
    ("topk_weights", WEIGHTS.bfloat16(), "topk_weights must be float32, got bfloat16."),
    ("topk_weights", WEIGHTS[:, :2], f"topk_weights must have the shape of {SLOTS}, [9, 3], got [9, 2]."),
    ("topk_weights", WEIGHTS.t().contiguous().t(), f"topk_weights {STRIDED} 9."),
    NOT_A_MAPPING,
]


@pytest.mark.parametrize(("name", "value", "sentence"), PERMUTE_ERRORS)
def test_wrong_arguments_of_permute(name, value, sentence):
    with pytest.raises((TypeError, ValueError)) as raised:
        moe.permute(**{"x": X, "mapping": MAPPING, name: value})
    assert str(raised.value) == f"moe.permute: {sentence}"


@pytest.mark.parametrize(("name", "value", "sentence"), COMBINE_ERRORS)
def test_wrong_arguments_of_combine(name, value, sentence):
    with pytest.raises((TypeError, ValueError)) as raised:
        moe.combine(**{"y": Y, "mapping": MAPPING, "topk_weights": WEIGHTS, name: value})
    assert str(raised.value) == f"moe.combine: {sentence}"


def test_training_looks_at_both_lists():
    with pytest.raises(ValueError, match=r"moe.permute: mapping.token_topk_to_pos must have the tokens of x, 9, got 8"):
        moe.permute(X.clone().requires_grad_(), changed(token_topk_to_pos=MAPPING[1][:8]))
    with pytest.raises(ValueError, match=rf"moe.combine: mapping.pos_to_token must have the rows of y, {ROWS}, got 4"):
        moe.combine(Y.clone().requires_grad_(), changed(pos_to_token=MAPPING[0][:4]), WEIGHTS)


@pytest.mark.parametrize("reason", [None, "built without CUDA kernels"])
def test_a_device_without_a_kernel_is_named_and_why(reason, monkeypatch):
    monkeypatch.setattr(_library, "cuda_ops", frozenset())
    monkeypatch.setattr(_library, "cuda_error", reason)
    sentence = "there is no kernel for cuda tensors" + ("" if reason is None else f": {reason}")
    with FakeTensorMode():
        mapping = moe.Mapping(*(torch.empty(t.shape, dtype=torch.int32, device="cuda") for t in MAPPING))
        x, y, weights = (torch.empty(t.shape, device="cuda") for t in (X, Y, WEIGHTS))
        for call in (
            lambda: moe.build_mapping(mapping[1], 5),
            lambda: moe.permute(x, mapping),
            lambda: moe.combine(y, mapping, weights),
        ):
            with pytest.raises(ValueError, match=sentence):
                call()


HOSTILE = [
    torch.zeros(()),
    torch.zeros(4),
    torch.zeros(0, 0),
    X[:2],
    X[:, :2],
    X.double(),
    X.half(),
    WIDE,
    X.to_sparse(),
]
HOSTILE_LISTS = [torch.zeros(()), MAPPING[0].long(), MAPPING[0][::2], MAPPING[1], MAPPING[0] + 100, MAPPING[0] - 9]


def test_the_ops_themselves_refuse():
    ops = torch.ops.fmkernels
    right = {"grad": X, "y": Y, "pos_to_token": MAPPING[0], "token_topk_to_pos": MAPPING[1], "topk_weights": WEIGHTS}
    ops.moe_combine_backward(**right)
    for name in right:
        for value in HOSTILE if right[name].is_floating_point() else HOSTILE_LISTS:
            if value.shape == right[name].shape and value.dtype == right[name].dtype and value.is_contiguous():
                continue
            with pytest.raises(RuntimeError):
                ops.moe_combine_backward(**{**right, name: value})
    for value in [MAPPING[0] + 100, MAPPING[0] - 9]:
        with pytest.raises(RuntimeError, match=r"pos_to_token must be from -1 to 8, got"):
            ops.moe_permute(X, value)
        with pytest.raises(RuntimeError, match=rf"token_topk_to_pos must be from -1 to {ROWS - 1}, got"):
            ops.moe_combine(Y, value[:1, None], None)
    for name, value in (("num_experts", 0), ("num_experts", 1025), ("alignment", 0), ("alignment", 2**40)):
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            ops.moe_build_mapping(**{"topk_idx": IDS, "num_experts": 3, "alignment": 1, "num_rows": -1, name: value})
    for value in (IDS + 1, IDS - 1, IDS.long() + 2**40, IDS.float(), IDS[0], IDS.t()):
        with pytest.raises(RuntimeError, match="topk_idx must"):
            ops.moe_build_mapping(value, 3, 1, -1)
    for num_rows in (0, 2, 2**31, 2**62):
        with pytest.raises(RuntimeError, match="num_rows must"):
            ops.moe_build_mapping(IDS, 3, 1, num_rows)
    shrunk = MAPPING[0].clone()
    shrunk.untyped_storage().resize_(shrunk.nbytes - 1)
    with pytest.raises(RuntimeError, match=r"storage of \d+ bytes, which does not hold its elements"):
        ops.moe_permute(X, shrunk)


# ---- what only the device sees ---------------------------------------------------------------------------------------


DEVICES = [backend for backend in BACKENDS if backend.name != "cpu"]  # the CPU refuses such values
EVERY_DEVICE = pytest.mark.parametrize("backend", DEVICES, ids=str)


@EVERY_DEVICE
@pytest.mark.parametrize("num_tokens", [30, 900])
def test_ids_out_of_range_are_skipped(num_tokens, backend):
    ops = getattr(torch.ops, backend.namespace)
    topk_idx = ids(num_tokens, 3, 9, backend.device, lowest=-4)
    expected = reference.moe.build_mapping(topk_idx.clamp(min=-1), 5, alignment=8)
    assert all(map(torch.equal, backend.run(ops.moe_build_mapping, topk_idx, 5, 8, -1), expected))
    far = torch.where(topk_idx >= 5, topk_idx.long() * 2**32, topk_idx)
    assert all(map(torch.equal, backend.run(ops.moe_build_mapping, far, 5, 8, -1), expected))


@EVERY_DEVICE
@pytest.mark.parametrize("num_tokens", [30, 900])
def test_slots_past_the_rows_have_none(num_tokens, backend):
    ops = getattr(torch.ops, backend.namespace)
    topk_idx = ids(num_tokens, 3, 5, backend.device)
    whole = reference.moe.build_mapping(topk_idx, 5, alignment=4)
    actual = backend.run(ops.moe_build_mapping, topk_idx, 5, 4, 41)
    assert torch.equal(actual[0], whole[0][:41])
    assert torch.equal(actual[1], torch.where(whole[1] < 41, whole[1], -1))
    assert torch.equal(actual[2], whole[2].clamp(max=41))


@EVERY_DEVICE
def test_rows_and_tokens_out_of_range_are_left_out(backend):
    ops = getattr(torch.ops, backend.namespace)
    x, y, mapping, weights = inputs(device=backend.device)
    lists = [t.clone() for t in mapping[:2]]
    lists[0][1], lists[0][2], lists[1][0, 0], lists[1][3, 1] = 9, -(2**31), 10**6, -7
    legal = [torch.where((t >= 0) & (t < count), t, -1) for t, count in zip(lists, (9, len(y)), strict=True)]
    assert torch.equal(*(backend.run(ops.moe_permute, x, t[0]) for t in (lists, legal)))
    assert torch.equal(*(backend.run(ops.moe_combine, y, t[1], weights) for t in (lists, legal)))
    grads = [backend.run(ops.moe_combine_backward, x, y, *t, weights) for t in (lists, legal)]
    assert all(map(torch.equal, *grads))


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.namespace != EMULATED_NAMESPACE], ids=str)
def test_opcheck(backend):
    x, y, mapping, weights = inputs(dtype=torch.bfloat16, device=backend.device)
    topk_idx = ids(9, 3, 5, backend.device)
    opcheck(torch.ops.fmkernels.moe_build_mapping.default, (topk_idx, 5, 8, -1))
    opcheck(torch.ops.fmkernels.moe_build_mapping.default, (topk_idx.long(), 5, 1, 40))
    opcheck(torch.ops.fmkernels.moe_permute.default, (x, mapping.pos_to_token))
    for topk_weights in (weights, None):
        opcheck(torch.ops.fmkernels.moe_combine.default, (y, mapping.token_topk_to_pos, topk_weights))
    opcheck(torch.ops.fmkernels.moe_combine_backward.default, (x, y, *mapping[:2], weights))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic):
    torch._dynamo.reset()
    options = {"dynamic": dynamic, "backend": "aot_eager"}
    build_mapping = torch.compile(moe.build_mapping, fullgraph=True, **options)
    permute = torch.compile(moe.permute, fullgraph=True, **options)
    combine = torch.compile(moe.combine, fullgraph=True, **options)
    for num_tokens in (9, 14):
        x, y, mapping, weights = inputs(num_tokens)
        topk_idx = ids(num_tokens, 3, 5)
        assert all(map(torch.equal, build_mapping(topk_idx, 5, alignment=4), mapping))
        assert torch.equal(permute(x, mapping), moe.permute(x, mapping))
        assert torch.equal(combine(y, mapping, weights), moe.combine(y, mapping, weights))
        assert all(map(torch.equal, *(gradients(f, (x,), mapping) for f in (permute, moe.permute))))
        assert all(map(torch.equal, *(gradients(f, (y, weights), mapping) for f in (combine, moe.combine))))


def test_a_layer_compiles_to_one_graph():
    torch._dynamo.reset()

    def layer(x, topk_idx, topk_weights):
        mapping = moe.build_mapping(topk_idx, 5, alignment=8)
        rows = moe.permute(x, mapping)
        return moe.combine(rows * (mapping.pos_to_token >= 0)[:, None], mapping, topk_weights)

    x, _, _, weights = inputs()
    args = (x, ids(9, 3, 5), weights)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), layer(*args))
