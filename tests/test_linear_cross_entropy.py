# SPDX-License-Identifier: Apache-2.0
"""linear_cross_entropy: values and gradients over one chunk and over many, its memory, errors, and torch.compile."""

import importlib
import math
import subprocess
import sys

import pytest
import torch

from fmkernels import linear_cross_entropy, reference
from fmkernels.testing import assert_as_good_as_torch, backends

module = importlib.import_module("fmkernels.linear_cross_entropy")
BACKENDS = backends("cross_entropy_gradient_")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [{}, {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 8.0}]
VOCAB, DIM = 131, 24


@pytest.fixture(params=[1 << 20, 7 * VOCAB, 1], ids=["one chunk", "chunks of 7", "chunks of 1"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", {"cpu": request.param, "cuda": request.param})


def inputs(dtype=torch.float32, device="cpu", shape=(2, 15), seed=0):
    """(hidden, weight, bias, target)"""
    generator = torch.Generator().manual_seed(seed)
    floats = [torch.randn(size, generator=generator) for size in ((*shape, DIM), (VOCAB, DIM), (VOCAB,))]
    target = torch.randint(VOCAB, shape, generator=generator)
    target.view(-1)[1::4] = -100
    return *(x.to(device, dtype) for x in floats), target.to(device)


def run(function, hidden, weight, bias, target, grad=None, **options):
    """(loss, gradients of hidden, weight and, where there is one, bias)"""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    loss = function(*leaves[:2], target, bias=leaves[2] if len(leaves) == 3 else None, **options)
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.ones_like(loss) if grad is None else grad.to(loss))


def expected(hidden, weight, bias, target, grad=None, **options):
    return run(reference.linear_cross_entropy, hidden, weight, bias, target, grad, **options)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients_match_the_reference(dtype, with_bias, reduction, backend):
    hidden, weight, bias, target = inputs(dtype, backend.device)
    args = (hidden, weight, bias if with_bias else None, target)
    grad = torch.rand(target.shape if reduction == "none" else ()).to(backend.device)
    for options in OPTIONS:
        actual = backend.run(run, linear_cross_entropy, *args, grad, reduction=reduction, **options)
        assert [x.dtype for x in actual[1:]] == [dtype] * (2 + with_bias)
        # Logits are rounded to the dtype of hidden, and their gradients: the reference may compute in it.
        assert_as_good_as_torch(actual, expected, *args, grad, reduction=reduction, computed_in=dtype, **options)
        loss = backend.run(linear_cross_entropy, hidden, weight, target, bias=args[2], reduction=reduction, **options)
        torch.testing.assert_close(loss, actual[0])  # the one without gradients


@pytest.mark.usefixtures("_chunks")
def test_runs_are_the_same_bits_and_graphs_can_be_kept():
    args = inputs()
    first = run(linear_cross_entropy, *args)
    assert all(map(torch.equal, first, run(linear_cross_entropy, *args)))
    leaves = [x.requires_grad_() for x in args[:3]]
    loss = linear_cross_entropy(*leaves[:2], args[3], bias=leaves[2])
    for _ in range(2):
        grads = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(map(torch.equal, grads, first[1:]))


@pytest.mark.parametrize("wanted", range(3))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_some_inputs_want_a_gradient(wanted, reduction):
    *floats, target = inputs()
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(floats)]
    linear_cross_entropy(*leaves[:2], target, bias=leaves[2], reduction=reduction).sum().backward()
    truth = expected(*floats, target, reduction=reduction)[1 + wanted]
    torch.testing.assert_close(leaves[wanted].grad, truth)
    assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != wanted)


def test_a_loss_scale_reaches_gradients_that_float16_would_lose():
    """A softmax of 1 / 131 over 2^12 tokens is below the numbers of float16, and 2^16 times it is not."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(1 << 12, DIM, generator=generator) * 0.01).half().requires_grad_()
    weight = (torch.randn(VOCAB, DIM, generator=generator) * 0.01).half()
    target = torch.randint(VOCAB, (1 << 12,), generator=generator)
    (linear_cross_entropy(hidden, weight, target) * 65536).backward()
    truth = hidden.detach().float().requires_grad_()
    (reference.linear_cross_entropy(truth, weight.float(), target) * 65536).backward()
    assert (hidden.grad.float() - truth.grad).abs().max() < 0.01 * truth.grad.abs().max()


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_a_sum_over_tokens_does_not_overflow_float16_before_its_factor(autocast, backend):
    """The gradient of the mean is -1875; that of the sum, which waits for 1 / tokens, is 64 times as large."""
    hidden = torch.full((64, 4), 2000.0, dtype=torch.float16, device=backend.device)
    weight = torch.zeros(16, 4, dtype=torch.float16, device=backend.device)
    target = torch.zeros(64, dtype=torch.int64, device=backend.device)
    with torch.autocast(backend.device, torch.float16, enabled=autocast):
        _, _, grad_weight = backend.run(run, linear_cross_entropy, hidden, weight, None, target)
    assert (grad_weight[0] == -1875).all()
    assert (grad_weight[1:] == 125).all()


def test_strided_and_empty_inputs():
    hidden, weight, bias, target = inputs()
    sliced = run(linear_cross_entropy, hidden[:, :-1], weight, bias, target[:, 1:])
    copied = run(linear_cross_entropy, hidden[:, :-1].contiguous(), weight, bias, target[:, 1:].contiguous())
    assert all(map(torch.equal, sliced, copied))
    loss, *grads = run(linear_cross_entropy, hidden[:, :0], weight, bias, target[:, :0], reduction="sum")
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)
    loss, *grads = run(linear_cross_entropy, hidden, weight, bias, torch.full_like(target, -100))
    assert loss.isnan()
    assert all((grad == 0).all() for grad in grads)


def test_nan_stays_in_its_token():
    hidden, weight, bias, target = inputs()
    target[target == -100] = 0
    hidden[1, 3, 2] = math.nan
    loss, grad_hidden, *_ = run(linear_cross_entropy, hidden, weight, bias, target, reduction="none")
    assert loss.isnan().nonzero().tolist() == [[1, 3]]
    assert grad_hidden.isnan().any(-1).nonzero().tolist() == [[1, 3]]


def test_autocast_computes_in_its_dtype():
    hidden, weight, bias, target = inputs()
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(*leaves[:2], target, bias=leaves[2])
    grads = torch.autograd.grad(loss, leaves)
    assert [x.dtype for x in grads] == [torch.float32] * 3
    halves = run(linear_cross_entropy, *(x.detach().bfloat16() for x in leaves), target)
    assert all(torch.equal(a, b.float()) for a, b in zip((loss, *grads), halves, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_autocast_leaves_other_dtypes_alone(dtype):
    """They were cast, and computed with."""
    hidden, weight, _, target = inputs()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"^linear_cross_entropy: hidden must be float32 or bfloat16 or float16, got "),
    ):
        linear_cross_entropy(hidden.to(dtype), weight, target)


STEP = """
import torch
from fmkernels import linear_cross_entropy

torch.set_num_threads(1)

def peak():  # in KiB, of this process alone
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def step(num_tokens):
    hidden = torch.randn(num_tokens, 8, requires_grad=True)
    weight = torch.randn(16384, 8, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(num_tokens, dtype=torch.int64)).backward()
    return peak()

before = step(8)
print(step(2048) - before, step(6144) - before)
"""


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    output = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True).stdout
    once, three_times = (int(kib) * 1024 for kib in output.split())
    assert once < 2048 * 16384 * 4 / 2, "logits of all tokens were there"
    assert three_times < once + 6144 * 8 * 4 * 8 + (2 << 20), "it grows by more than what belongs to each token"


LAYOUTS = "[tokens, dim] or [batch, tokens, dim]"
ERRORS = [
    ("hidden", None, TypeError, "hidden must be a tensor, got NoneType."),
    ("hidden", torch.zeros(8), ValueError, f"hidden must be {LAYOUTS}, got 1 dimensions [8]."),
    ("hidden", torch.zeros(3, 8).double(), ValueError, "hidden must be float32 or bfloat16 or float16, got float64."),
    ("weight", 1, TypeError, "weight must be a tensor, got int."),
    ("weight", torch.zeros(5, 7), ValueError, "weight must have as many columns as hidden, 8, got 7."),
    ("weight", torch.zeros(5, 8).half(), ValueError, "weight must have the dtype of hidden, float32, got float16."),
    ("weight", torch.zeros(0, 8), ValueError, "weight must have a vocabulary of at least 1, got 0."),
    ("weight", torch.zeros(8), ValueError, "weight must be [vocab, dim], got 1 dimensions [8]."),
    ("bias", torch.zeros(4), ValueError, "bias must have as many elements as weight has rows, 5, got 4."),
    ("bias", torch.zeros(5, 1), ValueError, "bias must be [vocab], got 2 dimensions [5, 1]."),
    ("target", torch.zeros(3), ValueError, "target must be int64, got float32."),
    ("target", torch.zeros(2).long(), ValueError, "target must have the shape [3] for this hidden, got [2]."),
    ("target", torch.tensor([0, 5, 0]), ValueError, "target must be from 0 to 4 or ignore_index, -100, got 5."),
    ("reduction", None, ValueError, "reduction must be mean, sum or none, got None."),
    ("softcap", -1.0, ValueError, "softcap must not be negative, got -1.0."),
]  # fmt: skip


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("name", "value", "error", "sentence"), ERRORS)
def test_wrong_arguments(name, value, error, sentence, grad):
    right = {"hidden": torch.zeros(3, 8), "weight": torch.zeros(5, 8), "target": torch.zeros(3).long()}
    right["weight"].requires_grad_(grad)
    with pytest.raises(error) as raised:
        linear_cross_entropy(**{**right, name: value})
    assert str(raised.value) == f"linear_cross_entropy: {sentence}"


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_is_one_graph(reduction, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", {"cpu": 8 * VOCAB})
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for num_tokens in (5, 20):
        args = inputs(shape=(num_tokens,))
        actual, truth = (run(f, *args, reduction=reduction) for f in (compiled, linear_cross_entropy))
        assert all(map(torch.equal, actual, truth))
