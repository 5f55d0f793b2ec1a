# SPDX-License-Identifier: Apache-2.0
"""Self-tests of the ops over a vocabulary, for `doctor`: one small case each against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from ._library import ops
from .cross_entropy import cross_entropy
from .sampling import sample
from .speculative import verify_chain
from .testing import Backend, assert_as_good_as_torch


def _logits(backend: Backend) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([5, -100, 300])
    return (torch.randn(3, 301, generator=generator) * 3).to(backend.device), target.to(backend.device)


def _loss_gradient(function: Callable[..., Tensor], logits: Tensor, target: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(function(leaf, target, reduction="sum"), leaf)[0]


def _test_cross_entropy(backend: Backend) -> None:
    assert_as_good_as_torch(cross_entropy(*_logits(backend)), reference.cross_entropy, *_logits(backend))


def _test_cross_entropy_backward(backend: Backend) -> None:
    actual = _loss_gradient(cross_entropy, *_logits(backend))
    assert_as_good_as_torch(actual, lambda *inputs: _loss_gradient(reference.cross_entropy, *inputs), *_logits(backend))


def _test_cross_entropy_gradient(backend: Backend) -> None:
    logits, target = _logits(backend)
    overwritten = logits.clone()
    loss = ops.cross_entropy_gradient_(overwritten, torch.ones_like(logits[:, 0]), target, -100, 0.0, 0.0, 0.0)

    def expected(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        gradient = _loss_gradient(reference.cross_entropy, logits, target)
        return reference.cross_entropy(logits, target, reduction="none"), gradient

    assert_as_good_as_torch((loss, overwritten), expected, logits, target)


def _assert_tokens(actual: Tensor, expected: Tensor) -> None:
    wrong = int((actual != expected).sum())
    assert wrong == 0, f"output 0: error in {wrong} tokens of {expected.numel()}"


def _test_sampling(backend: Backend) -> None:
    logits, numbers = _logits(backend)[0], torch.arange(3, device=backend.device)
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.001}
    expected = reference.sample(logits, seed=numbers, offset=numbers, **options)
    _assert_tokens(sample(logits, seed=numbers, offset=numbers, **options), expected)


def _test_speculative(backend: Backend) -> None:
    logits, numbers = _logits(backend)[0], torch.arange(3, device=backend.device)
    target = torch.softmax(torch.stack([logits, logits.flip(0), logits.flip(1)], 1), -1)
    draft = torch.softmax(torch.stack([logits * 0.9, logits], 1), -1)
    tokens = torch.stack([logits.argmax(-1), logits.argmin(-1)], 1)
    args, randoms = (tokens, target), {"seed": numbers, "offset": numbers, "draft_probs": draft}
    _assert_tokens(verify_chain(*args, **randoms)[0], reference.verify_chain(*args, **randoms)[0])


SELF_TESTS: dict[str, Callable[[Backend], None]] = {
    "cross_entropy_forward": _test_cross_entropy,
    "cross_entropy_backward": _test_cross_entropy_backward,
    "cross_entropy_gradient_": _test_cross_entropy_gradient,
    "sampling_tokens": _test_sampling,
    "speculative_verify": _test_speculative,
}
