# SPDX-License-Identifier: Apache-2.0
"""Normalisation layers: torch's own, over the fused kernels and with an optional residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _check as check
from ..norm import layer_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` with an optional residual that is added first; the same arguments, state dict and eps.

    y = norm(x),  or  y, s = norm(x, residual) with s = x + residual and y the norm of s

    Args:
        normalized_shape: the width of the last dimension, an integer or a sequence of one.
        eps: added to the mean of the squares; None: the machine epsilon of float32, in which both compute.
        elementwise_affine: whether there is a weight.
        device, dtype: of the weight. A float32 weight takes x in half dtypes too; the result has the dtype of x.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """

    def __init__(self, normalized_shape: Any, eps: float | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(_one_dimension("nn.RMSNorm", normalized_shape), eps, *args, **kwargs)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """x and residual are [..., hidden]."""
        _check_hidden("nn.RMSNorm", x, self.normalized_shape)
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps, residual)


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` with an optional residual that is added first; the same arguments and state dict.

    y = norm(x),  or  y, s = norm(x, residual) with s = x + residual and y the norm of s

    Args:
        normalized_shape: the width of the last dimension, an integer or a sequence of one.
        eps: added to the variance.
        elementwise_affine, bias: whether there are weights, and a bias among them.
        device, dtype: of the weights, as in `RMSNorm`.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """

    def __init__(self, normalized_shape: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(_one_dimension("nn.LayerNorm", normalized_shape), *args, **kwargs)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """x and residual are [..., hidden]."""
        _check_hidden("nn.LayerNorm", x, self.normalized_shape)
        return layer_norm(x, self.weight, self.bias, self.eps, residual)


def _one_dimension(op: str, normalized_shape: Any) -> Any:
    if isinstance(normalized_shape, int):
        return normalized_shape
    if not isinstance(normalized_shape, tuple | list) or len(normalized_shape) != 1:
        raise ValueError(
            f"{op}: normalized_shape must be the width of the last dimension alone, got {normalized_shape!r}."
        )
    return normalized_shape


def _check_hidden(op: str, x: Any, normalized_shape: tuple[int, ...]) -> None:
    check.is_tensor(op, "x", x)
    check.dtype(op, "x", x, check.FLOAT_DTYPES)
    if x.dim() < 1 or x.shape[-1] != normalized_shape[0]:
        raise ValueError(f"{op}: x must be [..., {normalized_shape[0]}], got {list(x.shape)}.")
