# SPDX-License-Identifier: Apache-2.0
"""A linear layer for each group of rows, and its product whose weight gradient waits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import _check as check
from .._library import autocast, needs_grad, ops
from ..moe import grouped_mm
from .weight_grad import DeferredWeightGrad, WeightGradStore, stand_in

_OP = "nn.GroupedLinear"


class GroupedLinear(DeferredWeightGrad, nn.Module):
    """A linear layer for each group of rows, which stand one after another: `fmkernels.moe.grouped_mm`.

        y = fmkernels.moe.grouped_mm(x, weight, offsets, bias=bias, trans_b=True)

    The parameters are `weight` [num_groups, out_features, in_features] and `bias` [num_groups, out_features].

    Args:
        num_groups: how many layers.
        in_features, out_features, bias: as of `torch.nn.Linear`.
        weight_grad_store: where backward leaves the gradient of the weight for later; None: it is computed in backward.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    New weights are uniform as those of torch.nn.Linear. Devices, dtypes, determinism: as `fmkernels.moe.grouped_mm`.
    """

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_grad_store: WeightGradStore | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_groups": num_groups, "in_features": in_features, "out_features": out_features}
        for name, number in sizes.items():
            check.integer(_OP, name, number, 1)
        check.flag(_OP, "bias", bias)
        self._set_store(_OP, weight_grad_store)
        self.num_groups, self.in_features, self.out_features = num_groups, in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_groups, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_groups, out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New values, as new layers have."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [num_rows, in_features] gives [num_rows, out_features]; group g ends at row offsets[g], int32."""
        if self.weight_grad_store is not None and needs_grad(self.weight):
            x, values = autocast(2, x, self.weight.detach())
            left: list[tuple[Callable[[], Tensor], ...]] = []
            weight = stand_in(self.weight_grad_store, self, ("weight",), left)
            return _Deferred.apply(x, self.bias, weight, values, offsets, left)
        return grouped_mm(x, self.weight, offsets, bias=self.bias, trans_b=True)

    def extra_repr(self) -> str:
        return (
            f"num_groups={self.num_groups}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


class _Deferred(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        stand_in: Tensor,
        values: Tensor,
        offsets: Tensor,
        left: list[tuple[Callable[[], Tensor], ...]],
    ) -> Tensor:
        y = grouped_mm(x, values, offsets, bias=bias, trans_b=True)
        ctx.save_for_backward(x, values, stand_in, offsets)
        ctx.left = left
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, stand_in, offsets = ctx.saved_tensors
        grad = check.rows_of_gradient(grad)
        ctx.left[:] = [(lambda: ops.moe_grouped_mm_inner(grad, x, offsets),)]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ops.moe_grouped_mm(grad, values, offsets, None)
        if ctx.needs_input_grad[1]:
            grad_bias = ops.moe_grouped_sum(grad, offsets).to(ctx.bias_dtype)
        return grad_x, grad_bias, torch.empty_like(stand_in), None, None, None
