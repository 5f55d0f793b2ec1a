# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm by their definition."""

from __future__ import annotations

from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`fmkernels.rms_norm`; every tensor in the dtype to compute in."""
    return _norm(x, residual, weight, None, eps, centred=False)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fmkernels.layer_norm`; every tensor in the dtype to compute in."""
    return _norm(x, residual, weight, bias, eps, centred=True)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool
) -> Tensor | tuple[Tensor, Tensor]:
    summed = x if residual is None else x + residual
    deviation = summed - summed.mean(-1, keepdim=True) if centred else summed
    y = deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y if residual is None else (y, summed)
