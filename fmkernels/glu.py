# SPDX-License-Identifier: Apache-2.0
"""Gated linear units: the activation of a transformer's feed-forward block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._library import call, needs_grad, ops, register_fake

_SILU, _GELU, _GELU_TANH = 0, 1, 2


def swiglu(gate: Tensor, up: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up, with silu(g) = g * sigmoid(g), in one pass.

    Args:
        gate: [..., width], or packed [..., 2 * width], gate then up, where up is None; float32, bfloat16 or float16,
            any strides with a contiguous last dimension (leading dimensions that do not merge into one stride: at most
            four).
        up: shape and dtype of gate, or None.
        out: [..., width], dtype of gate, to write to; it may be gate or up. No gradient flows then.

    Returns:
        [..., width], dtype of gate; float32 until it is rounded once.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Differentiable once in both. Deterministic. After Shazeer 2020.
    """
    return _glu("swiglu", gate, up, _SILU, out)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """gelu(gate) * up, with gelu(g) = g * Phi(g), in one pass.

    Args:
        gate: [..., width], or packed [..., 2 * width], as in `swiglu`.
        up: shape and dtype of gate, or None.
        approximate: "none": Phi is the distribution function of the normal distribution. "tanh": its approximation
            (1 + tanh(sqrt(2 / pi) (g + 0.044715 g^3))) / 2. As in `torch.nn.functional.gelu`.
        out: where to write to, as in `swiglu`.

    Returns:
        [..., width], dtype of gate.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Differentiable once in both. Deterministic. After Hendrycks and Gimpel 2016 and
    Shazeer 2020.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate must be 'none' or 'tanh', got {approximate!r}.")
    return _glu("geglu", gate, up, _GELU if approximate == "none" else _GELU_TANH, out)


def _glu(op: str, gate: Tensor, up: Tensor | None, activation: int, out: Tensor | None) -> Tensor:
    checks = _check_swiglu if activation == _SILU else _check_geglu
    wants_grad = needs_grad(gate, up)
    if out is None:
        return call(_Glu.apply if wants_grad else ops.glu_forward, (gate, up, activation), checks)
    if wants_grad:
        raise ValueError(f"{op}: out cannot be given where a gradient is recorded.")
    call(ops.glu_forward_out, (gate, up, activation, out), checks)
    return out


def _check_swiglu(gate: Any, up: Any, activation: int, out: Any = None) -> None:
    _check_tensors("swiglu", gate, up, out)


def _check_geglu(gate: Any, up: Any, activation: int, out: Any = None) -> None:
    _check_tensors("geglu", gate, up, out)


def _check_tensors(op: str, gate: Any, up: Any, out: Any) -> None:
    check.is_tensor(op, "gate", gate)
    check.dtype(op, "gate", gate, check.FLOAT_DTYPES)
    if gate.dim() < 1:
        raise ValueError(f"{op}: gate must be [..., width], got 0 dimensions [].")
    if up is None and gate.shape[-1] % 2 != 0:
        raise ValueError(f"{op}: gate must have an even last dimension where there is no up, got {gate.shape[-1]}.")
    for name, t in (("gate", gate), ("up", up), ("out", out)):
        if t is None:
            continue
        check.is_tensor(op, name, t)
        check.same_device(op, name, t, "gate", gate)
        check.same_dtype(op, name, t, "gate", gate)
        if name == "up":
            check.shape(op, name, t, "gate", gate)
        elif name == "out" and t.shape != _shape_of(gate, up):
            raise ValueError(f"{op}: out must be {list(_shape_of(gate, up))} for this gate, got {list(t.shape)}.")
        check.last_dim_contiguous(op, name, t)
        if name == "out":
            check.written(op, name, t)
    check.rows_merge(op, [t for t in (gate, up, out) if t is not None])
    check.kernel_exists(op, "glu_forward", gate)


def _shape_of(gate: Tensor, up: Tensor | None) -> torch.Size:
    return gate.shape if up is not None else torch.Size((*gate.shape[:-1], gate.shape[-1] // 2))


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None, activation: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ops.glu_forward(gate, up, activation)

    @staticmethod
    @once_differentiable  # the op of the gradients has none itself: a second one is an error and not a wrong number
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = ops.glu_backward(check.rows_of_gradient(grad), gate, up, ctx.activation)
        return grad_gate, None if up is None else grad_up, None


@register_fake("glu_forward")
def _(gate, up, activation):
    (_check_swiglu if activation == _SILU else _check_geglu)(gate, up, activation)
    return gate.new_empty(_shape_of(gate, up))


@register_fake("glu_forward_out")
def _(gate, up, activation, out):
    (_check_swiglu if activation == _SILU else _check_geglu)(gate, up, activation, out)


@register_fake("glu_backward")
def _(grad, gate, up, activation):
    return gate.new_empty(gate.shape), gate.new_empty((0,) if up is None else up.shape)
