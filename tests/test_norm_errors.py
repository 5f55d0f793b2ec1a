# SPDX-License-Identifier: Apache-2.0
"""rms_norm and layer_norm: errors, what torch asks of an op, and the modules."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_norm import DTYPES, EACH, FUNCTIONS, NATIVE, inputs
from torch.library import opcheck

from fmkernels import layer_norm, nn, rms_norm

# ---- errors ----------------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 3, 8), torch.zeros(8)
NARROW = torch.zeros(2, 3, 16)[..., ::2]
OVERLAPS = "is written and must have a place for each element, got stride 0 in dimension 0."
ERRORS = [
    ("x", None, TypeError, "x must be a tensor, got NoneType."),
    ("x", torch.zeros(()), ValueError, "x must be [..., hidden], got 0 dimensions []."),
    ("x", X[..., :0], ValueError, "x must have a hidden of at least 1, got 0."),
    ("x", X.double(), ValueError, "x must be float32 or bfloat16 or float16, got float64."),
    ("x", NARROW, ValueError, "x must have a contiguous last dimension, got stride 2."),
    ("x", X.to_sparse(), ValueError, "x must be a strided tensor, got layout torch.sparse_coo."),
    ("residual", 1.0, TypeError, "residual must be a tensor, got float."),
    ("residual", X[0], ValueError, "residual must have the shape of x, [2, 3, 8], got [3, 8]."),
    ("residual", X.half(), ValueError, "residual must have the dtype of x, float32, got float16."),
    ("residual", X.to("meta"), ValueError, "residual must be on the device of x, cpu, got meta."),
    ("residual", NARROW, ValueError, "residual must have a contiguous last dimension, got stride 2."),
    ("weight", [1.0], TypeError, "weight must be a tensor, got list."),
    ("weight", W[:7], ValueError, "weight must be [hidden], [8], got [7]."),
    ("weight", X, ValueError, "weight must be [hidden], [8], got [2, 3, 8]."),
    ("weight", W.half(), ValueError, "weight must be float32 for this x, got float16."),
    ("weight", torch.zeros(16)[::2], ValueError, "weight must have a contiguous last dimension, got stride 2."),
    ("weight", W.to("meta"), ValueError, "weight must be on the device of x, cpu, got meta."),
    ("bias", W[:1], ValueError, "bias must be [hidden], [8], got [1]."),
    ("eps", "0", TypeError, "eps must be a number, got str."),
    ("eps", -1e-6, ValueError, "eps must not be negative, got -1e-06."),
    ("eps", math.nan, ValueError, "eps must be finite in float32, got nan."),
    ("out", X, ValueError, "residual_out must be given with residual and out, got None."),
    ("residual_out", X, ValueError, "out must be given with residual_out, got None."),
]


@pytest.mark.parametrize(("name", "value", "error", "sentence"), ERRORS)
def test_wrong_arguments(name, value, error, sentence):
    with pytest.raises(error) as raised:
        layer_norm(**{"x": X, "weight": W, "bias": W, "residual": X, name: value})
    assert str(raised.value) == f"layer_norm: {sentence}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"out": X.half()}, "out must have the dtype of x, float32, got float16."),
        ({"out": X[:1]}, "out must have the shape of x, [2, 3, 8], got [1, 3, 8]."),
        ({"out": X[:1].expand(2, 3, 8)}, f"out {OVERLAPS}"),
        ({"out": X, "residual": X, "residual_out": X[:1].expand(2, 3, 8)}, f"residual_out {OVERLAPS}"),
        ({"out": X, "residual_out": X}, "residual must be given with residual_out and out, got None."),
        ({"out": X, "weight": W.clone().requires_grad_()}, "out cannot be given where a gradient is recorded."),
    ],
)
def test_wrong_outputs(arguments, sentence):
    with pytest.raises(ValueError, match=r"rms_norm: ") as raised:
        rms_norm(X, **arguments)
    assert str(raised.value) == f"rms_norm: {sentence}"


def test_dtypes_of_weight_and_bias_and_too_many_strides():
    with pytest.raises(ValueError, match=r"^layer_norm: bias must have the dtype of weight, float32, got bfloat16\.$"):
        layer_norm(X.bfloat16(), W, W.bfloat16())
    with pytest.raises(ValueError, match=r"must be float32 or bfloat16 for this x, got float16\.$"):
        rms_norm(X.bfloat16(), W.half())
    five = torch.zeros(2, 2, 2, 2, 2, 8).permute(4, 3, 2, 1, 0, 5)
    assert torch.equal(rms_norm(five[0]), five[0])
    with pytest.raises(ValueError, match=r"^rms_norm: the strides of .* into at most 4 dimensions, got 5\.$"):
        rms_norm(five)


HOSTILE = [torch.zeros(()), X[0], X[:1], X[..., :4], X[..., :0], X.double(), X.int(), NARROW, X.to_sparse()]


@pytest.mark.parametrize("name", ["grad_y", "grad_summed", "summed", "residual", "y"])
def test_the_ops_themselves_refuse_rows(name):
    forward = {"x": X, "residual": X, "weight": W, "bias": W, "eps": 1e-6, "centred": True}
    backward = {"grad_y": X, "grad_summed": X, "summed": X, "weight": W, "bias": W, "eps": 1e-6, "centred": True}
    shrunk = X.clone()
    shrunk.untyped_storage().resize_(shrunk.nbytes - 1)
    for value in (*HOSTILE, shrunk):
        if name in ("grad_y", "grad_summed", "summed"):
            with pytest.raises(RuntimeError):
                torch.ops.fmkernels.norm_backward(**{**backward, "weight_grad": True, name: value})
        if name in ("summed", "residual", "y"):
            with pytest.raises(RuntimeError):
                torch.ops.fmkernels.norm_forward_out(**{**forward, "y": X, "summed": X, name: value})


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_the_ops_themselves_refuse_weights(name):
    right = {"x": X, "residual": None, "weight": W, "bias": W, "eps": 1e-6, "centred": True}
    torch.ops.fmkernels.norm_forward(**right)
    for value in (torch.zeros(()), W[:7], torch.zeros(9), X, W.half(), W.double(), torch.zeros(16)[::2]):
        with pytest.raises(RuntimeError):
            torch.ops.fmkernels.norm_forward(**{**right, name: value})
        backward = {"grad_y": X, "grad_summed": None, "summed": X, **right, name: value}
        del backward["x"], backward["residual"]
        with pytest.raises(RuntimeError):
            torch.ops.fmkernels.norm_backward(**backward, weight_grad=True)
    with pytest.raises(RuntimeError, match="given together"):
        torch.ops.fmkernels.norm_forward_out(**right, y=X, summed=X)


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", NATIVE, ids=str)
@EACH
def test_opcheck(name, backend):
    x, residual, weights = inputs(name, (3, 5, 24), torch.bfloat16, backend.device)
    rest = (weights["weight"], weights.get("bias"), 1e-6, name == "layer_norm")
    for given in (residual, None) if name == "rms_norm" else (residual,):
        opcheck(torch.ops.fmkernels.norm_forward.default, (x, given, *rest))
        into = (torch.empty_like(x), None if given is None else torch.empty_like(x))
        opcheck(torch.ops.fmkernels.norm_forward_out.default, (x, given, *rest, *into))
        opcheck(torch.ops.fmkernels.norm_backward.default, (x, given, x, *rest, given is not None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = {
        "rms_norm": torch.compile(rms_norm, fullgraph=True, dynamic=dynamic, backend="aot_eager"),
        "layer_norm": torch.compile(layer_norm, fullgraph=True, dynamic=dynamic, backend="aot_eager"),
    }
    for name, tokens in (("layer_norm", 5), ("layer_norm", 9)) if dynamic else (("rms_norm", 5), ("layer_norm", 5)):
        x, residual, weights = inputs(name, (tokens, 40))
        leaves = [[t.clone().requires_grad_() for t in (x, residual, *weights.values())] for _ in range(2)]
        for function, own in zip((compiled[name], FUNCTIONS[name]), leaves, strict=True):
            y, summed = function(own[0], *own[2:], residual=own[1])
            (y.sum() + summed.square().sum()).backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(*leaves, strict=True))


def test_compile_writes_into_out():
    torch._dynamo.reset()
    x, _, weights = inputs("rms_norm", (5, 40))
    out = torch.empty_like(x)
    torch.compile(rms_norm, fullgraph=True, backend="aot_eager")(x, out=out, **weights)
    assert torch.equal(out, rms_norm(x, **weights))


def test_autocast_adds_a_half_to_a_float32_residual():
    x, residual, weights = inputs("rms_norm", (4, 32))
    expected = rms_norm(x.bfloat16().float(), residual=residual, **weights)
    with torch.autocast("cpu", torch.bfloat16):
        actual = rms_norm(x.bfloat16(), residual=residual, **weights)
        assert rms_norm(x.bfloat16(), **weights).dtype == torch.bfloat16
    assert all(map(torch.equal, actual, expected))
    with pytest.raises(ValueError, match="residual must have the dtype of x"):
        rms_norm(x.bfloat16(), residual=residual, **weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_modules_take_the_state_dicts_of_torch(eps, dtype):
    pairs = [(torch.nn.RMSNorm(48, eps, dtype=dtype), nn.RMSNorm(48, eps, dtype=dtype))]
    if eps is not None:
        pairs += [(torch.nn.LayerNorm(48, eps, dtype=dtype), nn.LayerNorm([48], eps, dtype=dtype))]
        pairs += [(torch.nn.LayerNorm(48, eps, False), nn.LayerNorm((48,), eps, elementwise_affine=False))]
    for theirs, module in pairs:
        for t in theirs.parameters():
            torch.nn.init.normal_(t)
        module.load_state_dict(theirs.state_dict(), strict=True)
        x = (1e-3 * torch.randn(5, 48)).to(theirs.weight.dtype if theirs.weight is not None else torch.float32)
        torch.testing.assert_close(module(x), theirs(x))
        y, summed = module(x, 2 * x)
        torch.testing.assert_close(y, theirs(summed))
        assert str(module) == str(theirs)


def test_modules_train_and_say_what_is_wrong():
    module, theirs = nn.RMSNorm(16), torch.nn.RMSNorm(16)
    x = torch.randn(7, 16)
    for m in (module, theirs):
        m(x).square().sum().mul(0.5).backward()
    torch.testing.assert_close(module.weight.grad, theirs.weight.grad)
    with pytest.raises(ValueError, match=r"^nn.RMSNorm: normalized_shape must be the width .* alone, got \(4, 4\)\.$"):
        nn.RMSNorm((4, 4))
    with pytest.raises(ValueError, match=r"^nn.LayerNorm: x must be \[\.\.\., 16\], got \[2, 8\]\.$"):
        nn.LayerNorm(16)(torch.zeros(2, 8))
    assert F.rms_norm(x, (16,), theirs.weight).shape == module(x).shape
