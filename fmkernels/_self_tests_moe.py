# SPDX-License-Identifier: Apache-2.0
"""Self-tests of the ops of a mixture of experts, for `doctor`: one small case each against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import moe, reference
from .testing import Backend, assert_as_good_as_torch

NUM_TOKENS, NUM_TOPK, NUM_EXPERTS, HIDDEN = 7, 2, 5, 24


def _normal(backend: Backend, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(backend.device)


def _ids(backend: Backend) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (NUM_TOKENS, NUM_TOPK)
    return torch.randint(-1, NUM_EXPERTS, shape, generator=generator, dtype=torch.int32).to(backend.device)


def _mapping(backend: Backend) -> moe.Mapping:
    return moe.Mapping(*reference.moe.build_mapping(_ids(backend), NUM_EXPERTS, alignment=4))


def _assert_same(actual: Tensor, expected: Tensor) -> None:
    wrong = int((actual != expected).sum())
    assert wrong == 0, f"output 0: error in {wrong} numbers of {expected.numel()}"


def _gradients(function: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return torch.autograd.grad(out, leaves, torch.arange(out.numel(), device=out.device).view_as(out).to(out.dtype))


def _test_mapping(backend: Backend) -> None:
    actual = moe.build_mapping(_ids(backend), NUM_EXPERTS, alignment=4)
    for result, expected in zip(actual, _mapping(backend), strict=True):
        _assert_same(result, expected)


def _test_permute(backend: Backend) -> None:
    x, mapping = _normal(backend, NUM_TOKENS, HIDDEN), _mapping(backend)
    assert_as_good_as_torch(moe.permute(x, mapping), lambda x: reference.moe.permute(x, mapping), x)


def _rows_and_weights(backend: Backend) -> tuple[Tensor, Tensor, moe.Mapping]:
    mapping = _mapping(backend)
    y = _normal(backend, len(mapping.pos_to_token), HIDDEN)
    return y, _normal(backend, NUM_TOKENS, NUM_TOPK, seed=2), mapping


def _test_combine(backend: Backend) -> None:
    y, weights, mapping = _rows_and_weights(backend)
    expected = lambda y, weights: reference.moe.combine(y, mapping, weights)  # noqa: E731
    assert_as_good_as_torch(moe.combine(y, mapping, weights), expected, y, weights)


def _test_combine_backward(backend: Backend) -> None:
    y, weights, mapping = _rows_and_weights(backend)
    actual = _gradients(lambda y, weights: moe.combine(y, mapping, weights), y, weights)
    expected = lambda *inputs: _gradients(lambda y, w: reference.moe.combine(y, mapping, w), *inputs)  # noqa: E731
    assert_as_good_as_torch(actual, expected, y, weights)


def _test_route(backend: Backend) -> None:
    logits = _normal(backend, NUM_TOKENS, 40)
    weights, idx = moe.route(logits, 4, scoring="sigmoid")
    assert_as_good_as_torch(weights, lambda x: reference.moe.route(x, 4, scoring="sigmoid")[0], logits)
    _assert_same(idx, reference.moe.route(logits, 4, scoring="sigmoid")[1])


def _test_gradient(name: str, *args: Any, first: bool = False) -> Callable[[Backend], None]:
    """Of a function of logits, or of the first of its results."""

    def test(backend: Backend) -> None:
        logits, rest = _normal(backend, NUM_TOKENS, NUM_EXPERTS), [_ids(backend) if a is _ids else a for a in args]

        def of(room: Any) -> Callable[[Tensor], Tensor]:
            return lambda x: getattr(room, name)(x, *rest)[0] if first else getattr(room, name)(x, *rest) * 3

        def gradient(room: Any, x: Tensor) -> Tensor:
            leaf = x.detach().requires_grad_()
            out = of(room)(leaf)
            grad = torch.arange(out.numel(), device=out.device).view_as(out).to(out.dtype) + 1
            return torch.autograd.grad(out, leaf, grad)[0]

        assert_as_good_as_torch(gradient(moe, logits), lambda x: gradient(reference.moe, x), logits)

    return test


def _test_loss(name: str, *args: Any) -> Callable[[Backend], None]:
    def test(backend: Backend) -> None:
        logits, rest = _normal(backend, NUM_TOKENS, NUM_EXPERTS), [_ids(backend) if a is _ids else a for a in args]
        actual, expected = (lambda x, room=room: getattr(room, name)(x, *rest) for room in (moe, reference.moe))
        assert_as_good_as_torch(actual(logits), expected, logits)

    return test


def _test_expert_choice(backend: Backend) -> None:
    logits = _normal(backend, NUM_TOKENS, NUM_EXPERTS)
    weights, idx = moe.route_expert_choice(logits, 3)
    assert_as_good_as_torch(weights, lambda x: reference.moe.route_expert_choice(x, 3)[0], logits)
    _assert_same(idx, reference.moe.route_expert_choice(logits, 3)[1])


def _test_capacity(backend: Backend) -> None:
    weights, idx = _normal(backend, NUM_TOKENS, NUM_TOPK), _ids(backend)
    for policy in ("position", "weight"):
        actual, expected = (
            room.apply_capacity(weights, idx, NUM_EXPERTS, 2, policy=policy)[1] for room in (moe, reference.moe)
        )
        _assert_same(actual, expected)


def _experts(backend: Backend) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(a, b, bias, offsets); CUDA multiplies halves alone."""
    dtype = torch.float32 if backend.name == "cpu" else torch.bfloat16
    a = _normal(backend, NUM_TOKENS, HIDDEN).to(dtype)
    b = _normal(backend, NUM_EXPERTS, HIDDEN, 16, seed=2).to(dtype)
    offsets = torch.tensor([2, 2, 3, 6, 6], dtype=torch.int32, device=a.device)
    return a, b, _normal(backend, NUM_EXPERTS, 16, seed=3), offsets


def _test_grouped_mm(backend: Backend) -> None:
    a, b, bias, offsets = _experts(backend)
    expected = lambda a, b, bias: reference.moe.grouped_mm(a, b, offsets, bias=bias)  # noqa: E731
    assert_as_good_as_torch(moe.grouped_mm(a, b, offsets, bias=bias), expected, a, b, bias)


def _test_grouped_mm_inner(backend: Backend) -> None:
    a, _, _, offsets = _experts(backend)
    expected = lambda a: reference.moe.grouped_mm(a.t(), a, offsets)  # noqa: E731
    assert_as_good_as_torch(moe.grouped_mm(a.t(), a, offsets), expected, a)


def _test_grouped_sum(backend: Backend) -> None:
    """The gradient of a bias."""
    a, b, bias, offsets = _experts(backend)
    actual = _gradients(lambda bias: moe.grouped_mm(a, b, offsets, bias=bias), bias)
    expected = lambda bias: _gradients(lambda x: reference.moe.grouped_mm(a, b, offsets, bias=x), bias)  # noqa: E731
    assert_as_good_as_torch(actual, expected, bias)


def _test_quantized_mm(backend: Backend) -> None:
    a, _, _, offsets = _experts(backend)
    weight = moe.quantize_experts(_normal(backend, len(offsets), 64, a.shape[1]), bits=4, group_size=32)
    expected = lambda a: reference.moe.quantized_grouped_mm(a, weight, offsets)  # noqa: E731
    assert_as_good_as_torch(moe.quantized_grouped_mm(a, weight, offsets), expected, a)


def _test_gated_mm(backend: Backend) -> None:
    _, b, _, _ = _experts(backend)
    x = _normal(backend, NUM_TOKENS, HIDDEN).to(b.dtype)
    mapping = _mapping(backend)
    expected = lambda x, b: reference.moe.grouped_mm_gated(x, b, mapping)  # noqa: E731
    assert_as_good_as_torch(moe.grouped_mm_gated(x, b, mapping), expected, x, b)


def _layer(backend: Backend) -> tuple[tuple[Tensor, ...], Tensor]:
    a, b, _, _ = _experts(backend)
    down = _normal(backend, NUM_EXPERTS, HIDDEN, 8, seed=5).to(a.dtype)
    return (a, b.transpose(1, 2).contiguous(), down, _normal(backend, NUM_TOKENS, NUM_TOPK, seed=2)), _ids(backend)


def _test_mlp(backend: Backend) -> None:
    tensors, idx = _layer(backend)
    expected = lambda *given: reference.moe.moe_mlp(*given, idx)  # noqa: E731
    assert_as_good_as_torch(moe.moe_mlp(*tensors, idx), expected, *tensors, computed_in=tensors[0].dtype)


def _test_gated_backward(backend: Backend) -> None:
    tensors, idx = _layer(backend)
    actual = _gradients(lambda *given: moe.moe_mlp(*given, idx), *tensors)
    for i in range(4):
        expected = lambda *given, i=i: _gradients(lambda *t: reference.moe.moe_mlp(*t, idx), *given)[i]  # noqa: E731
        assert_as_good_as_torch(actual[i], expected, *tensors, computed_in=tensors[0].dtype)


SELF_TESTS: dict[str, Callable[[Backend], None]] = {
    "moe_build_mapping": _test_mapping,
    "moe_permute": _test_permute,
    "moe_combine": _test_combine,
    "moe_combine_backward": _test_combine_backward,
    "moe_route": _test_route,
    "moe_route_backward": _test_gradient("route", 2, first=True),
    "moe_load_balance": _test_loss("load_balance_loss", _ids),
    "moe_load_balance_backward": _test_gradient("load_balance_loss", _ids),
    "moe_z_loss": _test_loss("z_loss"),
    "moe_z_loss_backward": _test_gradient("z_loss"),
    "moe_route_expert_choice": _test_expert_choice,
    "moe_capacity": _test_capacity,
    "moe_grouped_mm": _test_grouped_mm,
    "moe_grouped_mm_inner": _test_grouped_mm_inner,
    "moe_grouped_sum": _test_grouped_sum,
    "moe_quantized_mm": _test_quantized_mm,
    "moe_gated_mm": _test_gated_mm,
    "moe_gated_backward": _test_gated_backward,
    "moe_mlp": _test_mlp,
}
