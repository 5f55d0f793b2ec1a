# SPDX-License-Identifier: Apache-2.0
"""cross_entropy: values, gradients, edges, errors, and what torch asks of an op."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from fmkernels import _library, cross_entropy, reference
from fmkernels._library import ops
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("cross_entropy_forward")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5, 7), (2, 3, 1000), (2, 2, 4099)]  # less than a vector; whole vectors; a ragged tail
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 5.0},
    {"softcap": 30.0, "label_smoothing": 0.2, "z_loss": 0.1},
]
IGNORED = -100


def inputs(shape, dtype=torch.float32, device="cpu", seed=0, spread=4.0, level=0.0):
    """(logits, target); every fourth target is ignored, and the logits there are NaN."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator) * spread + level
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    target.view(-1)[1::4] = IGNORED
    logits[target == IGNORED] = math.nan
    return logits.to(device, dtype), target.to(device)


def gradient(function, logits, target, grad=None, **options):
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, target, **options)
    return torch.autograd.grad(loss, leaf, torch.ones_like(loss) if grad is None else grad.to(loss.dtype))[0]


def reference_gradient(logits, target, grad=None, **options):
    return gradient(reference.cross_entropy, logits.nan_to_num(), target, grad, **options)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_matches_reference(shape, dtype, options, backend):
    args = inputs(shape, dtype, backend.device)
    for reduction in ("none", "sum", "mean"):
        loss = backend.run(cross_entropy, *args, reduction=reduction, **options)
        assert loss.dtype == torch.float32
        assert_as_good_as_torch(loss, reference.cross_entropy, *args, reduction=reduction, **options)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
@pytest.mark.parametrize("level", [-3e4, -200.0, 200.0, 3e4])
def test_logits_far_from_zero(level, options, backend):
    args = inputs((4, 600), device=backend.device, level=level)
    loss = backend.run(cross_entropy, *args, reduction="none", **options)
    assert_as_good_as_torch(loss, reference.cross_entropy, *args, reduction="none", **options)
    actual = backend.run(gradient, cross_entropy, *args, **options)
    assert_as_good_as_torch(actual, reference_gradient, *args, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_the_loss_is_that_of_torch(smoothing):
    logits, target = inputs((64, 333))
    expected = F.cross_entropy(logits.nan_to_num(), target, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, target, label_smoothing=smoothing), expected)


def test_known_answers():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -math.inf, -math.inf]])
    loss = cross_entropy(logits, torch.tensor([2, 0]), reduction="none")
    torch.testing.assert_close(loss, torch.tensor([math.log(4.0), math.log(4.0 / 3.0)]))
    loss = cross_entropy(logits, torch.tensor([2, 0]), z_loss=1.0, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([math.log(4), math.log(4 / 3)]) + math.log(4) ** 2)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_sum_of_many_small_terms_beside_the_largest(backend):
    """Adding them to the 1 of the maximum, one after another, once cost four times the error of torch."""
    logits = torch.randn(2, 20000, generator=torch.Generator().manual_seed(3)).to(backend.device) * 4
    target = logits.argmax(-1)
    actual = backend.run(gradient, cross_entropy, logits, target)
    assert_as_good_as_torch(actual, reference_gradient, logits, target)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_one_class_has_no_loss(backend):
    logits, target = torch.randn(3, 1).to(backend.device), torch.zeros(3, dtype=torch.int64, device=backend.device)
    assert backend.run(cross_entropy, logits, target) == 0
    assert (backend.run(gradient, cross_entropy, logits, target) == 0).all()


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_match_those_of_the_reference(shape, dtype, options, backend):
    args = inputs(shape, dtype, backend.device)
    for reduction in ("mean", "none"):
        grad = torch.randn(shape[:-1]).to(backend.device) if reduction == "none" else None
        actual = backend.run(gradient, cross_entropy, *args, grad, reduction=reduction, **options)
        assert actual.dtype == dtype
        assert_as_good_as_torch(actual, reference_gradient, *args, grad, reduction=reduction, **options)
        assert (actual[args[1] == IGNORED] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4]], ids=str)
def test_loss_and_gradient_in_place(options, dtype, backend):
    """The op behind linear_cross_entropy: what the two others give."""
    logits, target = inputs((2, 3, 1000), dtype, backend.device)
    grad = torch.randn(2, 3).to(backend.device)
    scalars = (IGNORED, *(options.get(name, 0.0) for name in ("label_smoothing", "z_loss", "softcap")))
    overwritten = logits.clone()
    loss = backend.run(lambda: ops.cross_entropy_gradient_(overwritten, grad, target, *scalars))
    assert torch.equal(loss, backend.run(cross_entropy, logits, target, reduction="none", **options))
    expected = backend.run(gradient, cross_entropy, logits, target, grad, reduction="none", **options)
    assert torch.equal(overwritten, expected)


def test_only_the_logits_are_kept():
    logits = torch.randn(8, 1000, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cross_entropy(logits, torch.arange(8)).backward()
    assert [t.data_ptr() == logits.data_ptr() for t in kept if t.numel() > 8] == [True]


def test_a_second_derivative_is_refused_and_not_wrong():
    logits = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(cross_entropy(logits, torch.arange(3)), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row(dtype, backend):
    logits = torch.randn(6, 1500).to(backend.device, dtype)
    target = torch.zeros(6, dtype=torch.int64, device=backend.device)
    clean = backend.run(cross_entropy, logits, target, reduction="none")
    logits[1, 1400], logits[2, 3], logits[3], logits[4, :1200] = math.nan, math.inf, -math.inf, -math.inf
    loss = backend.run(cross_entropy, logits, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, True, True, False, False]
    assert loss[4] == math.inf  # the target is one of the classes that have no probability
    assert torch.equal(loss[[0, 5]], clean[[0, 5]])
    grad = backend.run(gradient, cross_entropy, logits, target, reduction="none")
    assert grad.isnan().all(-1).tolist() == [False, True, True, True, False, False]
    assert_as_good_as_torch(grad, reference_gradient_with_nan, logits, target)


def reference_gradient_with_nan(logits, target):
    return gradient(reference.cross_entropy, logits, target, reduction="none")


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("masked", [torch.finfo(torch.float32).min, -1e9], ids=["finfo.min", "-1e9"])
@pytest.mark.parametrize("where", ["first", "target", "first and target"])
def test_a_masked_class_leaves_the_mean_over_classes_its_digits(where, masked, smoothing, backend):
    """Logits were summed relative to the first, and a first one of finfo.min made the loss -infinity."""
    logits = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)) + 40
    target = torch.tensor([5, 700, 1499])
    value = masked if where != "first and target" else masked / 2  # a sum of two of finfo.min would overflow
    if where != "target":
        logits[:, 0] = value
    if where != "first":
        logits.scatter_(1, target[:, None], value)
    logits, target = logits.to(backend.device), target.to(backend.device)
    options = {"label_smoothing": smoothing, "reduction": "none"}
    loss = backend.run(cross_entropy, logits, target, **options)
    assert_as_good_as_torch(loss, reference.cross_entropy, logits, target, **options)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize(
    ("vocab", "masked"), [(1500, slice(1024)), (64, slice(0, None, 2))], ids=["begin", "every other"]
)
def test_many_masked_classes_have_a_mean_of_minus_infinity_and_not_of_infinity(vocab, masked, backend):
    """They are more than a first chunk of the CPU, and all of those in whose midst a GPU looks for an anchor."""
    logits, target = torch.randn(2, vocab), torch.full((2,), vocab - 1)
    logits[:, masked] = torch.finfo(torch.float32).min
    options = {"label_smoothing": 0.1, "reduction": "none"}
    assert (F.cross_entropy(logits, target, **options) == math.inf).all()
    loss = backend.run(cross_entropy, logits.to(backend.device), target.to(backend.device), **options)
    assert (loss == math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_all_ignored(backend):
    logits, target = torch.randn(4, 9).to(backend.device), torch.full((4,), IGNORED, device=backend.device)
    assert backend.run(cross_entropy, logits, target).isnan()
    assert backend.run(cross_entropy, logits, target, reduction="sum") == 0
    assert (backend.run(gradient, cross_entropy, logits, target) == 0).all()


def test_ignore_index_may_be_a_class():
    logits, target = torch.randn(4, 9), torch.tensor([3, 0, 3, 8])
    loss = cross_entropy(logits, target, ignore_index=3, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, ignore_index=3, reduction="none"))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["shifted", "transposed", "expanded", "offset by one element"])
def test_strides_change_no_bits(layout, dtype, backend):
    logits, target = inputs((3, 5, 136), dtype, backend.device)
    logits = logits.nan_to_num()
    if layout == "shifted":
        logits, target = logits[:, :-1], target[:, 1:]
    elif layout == "transposed":
        logits, target = logits.transpose(0, 1), target.t()
    elif layout == "expanded":
        logits, target = logits[:1].expand_as(logits), target[:, :1].expand_as(target)
    else:
        logits = torch.cat([logits.new_full((1,), math.nan), logits.flatten()])[1:].view_as(logits)
    for function in (cross_entropy, lambda *args, **kw: gradient(cross_entropy, *args, **kw)):
        actual = backend.run(function, logits, target, reduction="none")
        expected = backend.run(function, logits.contiguous(), target.contiguous(), reduction="none")
        # vectors and single elements are summed in another order on a GPU
        torch.testing.assert_close(actual, expected, **({} if layout.startswith("offset") else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("shape", [(0, 7), (0, 3, 7), (2, 0, 7)], ids=str)
def test_empty_inputs(shape):
    logits = torch.randn(shape, requires_grad=True)
    target = torch.zeros(shape[:-1], dtype=torch.int64)
    assert cross_entropy(logits, target, reduction="none").shape == shape[:-1]
    assert cross_entropy(logits, target).isnan()
    cross_entropy(logits, target, reduction="sum").backward()
    assert logits.grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_threads_and_neighbours_change_no_bits(backend):
    logits, target = inputs((40, 1003), device=backend.device)
    results = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        results.append(backend.run(cross_entropy, logits, target, reduction="none"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    alone = backend.run(cross_entropy, logits[7:8], target[7:8], reduction="none")
    assert torch.equal(alone, results[0][7:8])


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "cpu"], ids=str)
def test_a_gpu_takes_a_target_that_is_no_class_as_ignored(backend, monkeypatch):
    logits, target = torch.randn(4, 50).to(backend.device), torch.tensor([3, 50, -1, 49]).to(backend.device)
    loss = backend.run(cross_entropy, logits, target, reduction="none")
    assert_as_good_as_torch(loss, reference.cross_entropy, logits, target, reduction="none")
    assert (backend.run(gradient, cross_entropy, logits, target, reduction="sum")[1:3] == 0).all()
    monkeypatch.setattr(_library, "check_values", True)  # as FMKERNELS_CHECK=1
    with pytest.raises(ValueError, match="target must be from 0 to 49 or ignore_index, -100, got 50"):
        backend.run(cross_entropy, logits, target)


# ---- errors ----------------------------------------------------------------------------------------------------------

LOGITS, TARGET = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
LAYOUTS = "[tokens, vocab] or [batch, tokens, vocab]"
ERRORS = [
    ({"logits": None}, TypeError, "logits must be a tensor, got NoneType."),
    ({"logits": LOGITS[0]}, ValueError, f"logits must be {LAYOUTS}, got 1 dimensions [5]."),
    ({"logits": LOGITS.double()}, ValueError, "logits must be float32 or bfloat16 or float16, got float64."),
    ({"logits": LOGITS[:, :0]}, ValueError, "logits must have a vocabulary of at least 1, got 0."),
    ({"logits": torch.zeros(2, 6)[:, ::2]}, ValueError, "logits must have a contiguous last dimension, got stride 2."),
    ({"target": [0, 1]}, TypeError, "target must be a tensor, got list."),
    ({"target": TARGET.int()}, ValueError, "target must be int64, got int32."),
    ({"target": TARGET[:1]}, ValueError, "target must have the shape [2] for this logits, got [1]."),
    ({"target": TARGET.to("meta")}, ValueError, "target must be on the device of logits, cpu, got meta."),
    ({"target": TARGET + 5}, ValueError, "target must be from 0 to 4 or ignore_index, -100, got 5."),
    ({"target": TARGET - 1}, ValueError, "target must be from 0 to 4 or ignore_index, -100, got -1."),
    ({"ignore_index": 0.5}, TypeError, "ignore_index must be an integer, got float."),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be at most 1, got 1.5."),
    ({"label_smoothing": -0.5}, ValueError, "label_smoothing must not be negative, got -0.5."),
    ({"z_loss": "a"}, TypeError, "z_loss must be a number, got str."),
    ({"z_loss": -1.0}, ValueError, "z_loss must not be negative, got -1.0."),
    ({"softcap": math.nan}, ValueError, "softcap must be finite in float32, got nan."),
    ({"softcap": 1e-46}, ValueError, "softcap must be 0 or a number that is not 0 in float32, got 1e-46."),
    ({"reduction": "max"}, ValueError, "reduction must be mean, sum or none, got 'max'."),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "sentence"), ERRORS)
def test_wrong_arguments(wrong, error, sentence):
    with pytest.raises(error) as raised:
        cross_entropy(**{"logits": LOGITS, "target": TARGET, **wrong})
    assert str(raised.value) == f"cross_entropy: {sentence}"


HOSTILE = {
    "logits": [torch.zeros(()), LOGITS[0], LOGITS[:1], LOGITS[:, :0], LOGITS.double(), torch.zeros(2, 10)[:, ::2]],
    "target": [torch.zeros((), dtype=torch.int64), TARGET[:1], TARGET.int(), TARGET + 5, TARGET - 1, LOGITS],
    "grad_loss": [torch.zeros(()), torch.zeros(1), torch.zeros(2).double(), LOGITS],
    "max": [torch.zeros(3), torch.zeros(2).half(), torch.zeros(4)[::2]],
    "sum_exp": [torch.zeros(3), torch.zeros(2).half(), torch.zeros(4)[::2]],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_ops_themselves_refuse(name):
    rows = {key: torch.zeros(2) for key in ("grad_loss", "max", "sum_exp")}
    scalars = {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
    right = {"logits": LOGITS, "target": TARGET, **rows, **scalars}
    names = {
        "cross_entropy_forward": ["logits", "target"],
        "cross_entropy_backward": ["grad_loss", "logits", "target", "max", "sum_exp"],
        "cross_entropy_gradient_": ["logits", "grad_loss", "target"],
    }
    for op, arguments in names.items():
        if name in arguments:
            for value in HOSTILE[name]:
                with pytest.raises(RuntimeError):
                    getattr(ops, op)(**{key: {**right, name: value}[key] for key in [*arguments, *scalars]})
    with pytest.raises(RuntimeError, match="logits must be contiguous where they are overwritten"):
        ops.cross_entropy_gradient_(torch.zeros(1, 5).expand(2, 5), rows["grad_loss"], TARGET, *scalars.values())


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.namespace == "fmkernels"], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_opcheck(shape, backend):
    logits, target = inputs(shape, torch.bfloat16, backend.device)
    logits, scalars = logits.nan_to_num(), (IGNORED, 0.1, 0.01, 5.0)
    opcheck(torch.ops.fmkernels.cross_entropy_forward.default, (logits, target, *scalars))
    loss, largest, sum_exp = ops.cross_entropy_forward(logits, target, *scalars)
    backward = (torch.ones_like(loss), logits, target, largest, sum_exp, *scalars)
    opcheck(torch.ops.fmkernels.cross_entropy_backward.default, backward)
    in_place = (logits.clone(), torch.ones_like(loss), target, *scalars)
    opcheck(torch.ops.fmkernels.cross_entropy_gradient_.default, in_place)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_is_one_graph(reduction, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_tokens in (5, 9):
        args = inputs((num_tokens, 33))
        for function in (lambda f, *a: f(*a, reduction=reduction), lambda f, *a: gradient(f, *a, reduction=reduction)):
            assert torch.equal(function(compiled, *args), function(cross_entropy, *args))
