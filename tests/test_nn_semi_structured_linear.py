# SPDX-License-Identifier: Apache-2.0
"""fmkernels.nn.SemiStructuredLinear: what it computes in training and after it, its state, and when it packs anew."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from fmkernels import SemiStructured, semi_structured_linear, semi_structured_mask
from fmkernels.nn import SemiStructuredLinear

OUT, IN = 32, 48


def layer(bias=True, seed=0):
    torch.manual_seed(seed)
    return SemiStructuredLinear(IN, OUT, bias)


def masked(module):
    return module.weight.detach() * semi_structured_mask(module.weight, both_directions=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN)])
def test_training_has_the_gradients_of_the_masked_weight_straight_through(shape, bias):
    module = layer(bias)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], OUT)
    y = module(x)
    y.backward(grad)
    dense = masked(module).requires_grad_()
    other_bias = module.bias.detach().requires_grad_() if bias else None
    other_x = x.detach().requires_grad_()
    expected = F.linear(other_x, dense, other_bias)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, other_x.grad)
    torch.testing.assert_close(module.weight.grad, dense.grad)  # dense: what is masked has one too
    assert (module.weight.grad != 0).all()
    if bias:
        torch.testing.assert_close(module.bias.grad, other_bias.grad)


def test_evaluation_is_bit_for_bit_what_training_computes():
    module, x = layer(), torch.randn(7, IN)
    trained = module(x).detach()
    with torch.no_grad():
        assert torch.equal(module(x), trained)
    module.weight.requires_grad_(False)  # under adapters: x and bias have gradients still
    y = module(x.requires_grad_())
    assert torch.equal(y.detach(), trained)
    y.sum().backward()
    torch.testing.assert_close(x.grad, masked(module).sum(0).expand(7, IN))
    assert module.weight.grad is None


def test_it_packs_once_for_each_version_of_the_weight():
    module, x = layer(), torch.randn(7, IN)
    with torch.no_grad():
        module(x)
        kept = module.packed()
        module(x)
        assert module.packed() is kept
        module.weight.mul_(2.0)
        assert module.packed() is not kept
        torch.testing.assert_close(module(x), F.linear(x, masked(module), module.bias))
        module.load_state_dict(layer(seed=1).state_dict())
        torch.testing.assert_close(module(x), F.linear(x, masked(module), module.bias))
        half = module.to(torch.bfloat16)
        assert half(x.bfloat16()).dtype == torch.bfloat16


def test_a_few_steps_train():
    """The loss of a mapping that a 2:4 matrix can be falls by much, and what is kept changes on the way."""
    torch.manual_seed(0)
    target = SemiStructured.from_dense(torch.randn(OUT, IN), both_directions=True)
    module = layer(seed=1)
    before = semi_structured_mask(module.weight, both_directions=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    losses = []
    for _ in range(60):
        x = torch.randn(256, IN)
        loss = (module(x) - semi_structured_linear(x, target)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert not torch.equal(semi_structured_mask(module.weight, both_directions=True), before)


def test_state_is_that_of_a_linear_layer():
    linear = torch.nn.Linear(IN, OUT)
    module = layer()
    module.load_state_dict(linear.state_dict())
    assert module.state_dict().keys() == linear.state_dict().keys()
    linear.load_state_dict(module.state_dict())
    assert torch.equal(linear.weight, module.weight)
    x = torch.randn(3, IN)
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(copy.deepcopy(module)(x), expected)
        saved = io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        assert torch.equal(torch.load(saved, weights_only=False)(x), expected)


def test_from_linear_shares_the_parameters():
    linear = torch.nn.Linear(IN, OUT, bias=False).eval()
    module = SemiStructuredLinear.from_linear(linear)
    assert module.weight is linear.weight
    assert module.bias is None
    assert not module.training
    assert repr(module) == f"SemiStructuredLinear(in_features={IN}, out_features={OUT}, bias=False)"
    assert SemiStructuredLinear(IN, OUT, device="meta").weight.is_meta


@pytest.mark.parametrize("grad", [True, False])
def test_compile_and_autocast(grad):
    module, x = layer(), torch.randn(3, IN)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        assert torch.equal(compiled(x), module(x))
        if grad:
            (actual,), (expected,) = (torch.autograd.grad(f(x).sum(), module.weight) for f in (compiled, module))
            assert torch.equal(actual, expected)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        expected = F.linear(x.bfloat16(), masked(module).bfloat16(), module.bias.bfloat16())
        torch.testing.assert_close(y, expected, atol=0.02, rtol=0.02)
    if grad:
        y.float().sum().backward()
        assert module.weight.grad.dtype == torch.float32


def test_wrong_arguments_are_told_in_one_sentence():
    op = "nn.SemiStructuredLinear"
    for call, error, sentence in [
        (lambda: SemiStructuredLinear(40, 32), ValueError, f"{op}: in_features must be a multiple of 16, got 40."),
        (lambda: SemiStructuredLinear(32, 8), ValueError, f"{op}: out_features must be at least 16, got 8."),
        (lambda: SemiStructuredLinear(32, 32, bias=1), TypeError, f"{op}: bias must be True or False, got int."),
        (
            lambda: SemiStructuredLinear(32, 32, dtype=torch.float64),
            ValueError,
            f"{op}: dtype must be float32 or bfloat16 or float16, got float64.",
        ),
        (
            lambda: SemiStructuredLinear.from_linear(torch.nn.ReLU()),
            TypeError,
            f"{op}.from_linear: module must be a torch.nn.Linear, got ReLU.",
        ),
        (
            lambda: SemiStructuredLinear.from_linear(torch.nn.Linear(20, 32)),
            ValueError,
            f"{op}.from_linear: the weight of module must have a multiple of 16 rows and of 16 columns, got [32, 20].",
        ),
        (lambda: layer()(torch.zeros(3, 40)), ValueError, f"{op}: x must be [..., 48], got [3, 40]."),
        (lambda: layer()(None), TypeError, f"{op}: x must be a tensor, got NoneType."),
        (
            lambda: layer()(torch.zeros(3, 48).half()),
            ValueError,
            f"{op}: x must have the dtype of the weight, float32, got float16.",
        ),
    ]:
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == sentence


def test_what_inference_mode_has_packed_serves_training():
    """It was an inference tensor, which backward may not save."""
    module = SemiStructuredLinear(64, 32)
    module.requires_grad_(False)
    x = torch.randn(3, 64)
    with torch.inference_mode():
        expected = module(x)
        made_there = SemiStructuredLinear(64, 32)
        assert torch.equal(made_there(x), made_there(x))
    x.requires_grad_()
    y = module(x)
    y.sum().backward()
    assert torch.equal(y.detach(), expected)
    assert x.grad is not None
