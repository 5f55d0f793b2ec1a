# SPDX-License-Identifier: Apache-2.0
"""A linear layer that multiplies with a 2:4 sparse form of its weight, in training and after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _check as check
from .._library import needs_grad, under_autocast
from ..semi_structured import masked_linear, semi_structured_linear
from ..semi_structured_matrix import ROW_TILE, SemiStructured, check_dense


class SemiStructuredLinear(nn.Linear):
    """What `torch.nn.Linear` computes, of the best half of its weight: two of each four, along rows and columns.

        y = semi_structured_linear(x, SemiStructured.from_dense(weight, both_directions=True), bias)

    The weight stays a dense parameter, and the state dict is that of the layer it replaces. Where gradients are wanted
    each call masks the weight anew; the gradient of x goes through the packed transpose, that of the weight is dense,
    so that what is masked may come back (straight-through). Without gradients the packed form is kept until the weight
    changes: torch counts changes in place, but not those through `weight.data`. Under torch.compile it is packed in
    each call, since the graph cannot ask what torch has counted.

    Args:
        in_features, out_features, bias, device, dtype: as of `torch.nn.Linear`; features are multiples of 16.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = "nn.SemiStructuredLinear"
        for name, number in (("in_features", in_features), ("out_features", out_features)):
            check.integer(op, name, number, ROW_TILE)
            if number % ROW_TILE:
                raise ValueError(f"{op}: {name} must be a multiple of {ROW_TILE}, got {number}.")
        check.flag(op, "bias", bias)
        super().__init__(in_features, out_features, bias, device, dtype)
        check.dtype(op, "dtype", self.weight, check.FLOAT_DTYPES)
        self._kept: tuple[Any, SemiStructured] | None = None

    @classmethod
    def from_linear(cls, module: nn.Linear) -> SemiStructuredLinear:
        """The sparse form of a layer, whose parameters it shares."""
        op = "nn.SemiStructuredLinear.from_linear"
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{op}: module must be a torch.nn.Linear, got {type(module).__name__}.")
        check_dense(op, "the weight of module", module.weight)
        result = cls.__new__(cls)
        nn.Module.__init__(result)
        result.in_features, result.out_features = module.in_features, module.out_features
        result.weight, result.bias = module.weight, module.bias
        result._kept = None
        result.train(module.training)
        return result

    def packed(self) -> SemiStructured:
        """The form that the layer multiplies with, packed in both directions."""
        w = self.weight
        if torch.compiler.is_compiling() or w.is_inference():  # neither has a count of changes
            return SemiStructured.from_dense(w, both_directions=True)
        key = (w._version, w.data_ptr(), w.dtype, w.device)
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False):  # what is kept may serve training later
                self._kept = (key, SemiStructured.from_dense(w, both_directions=True))
        return self._kept[1]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] gives [..., out_features]."""
        if needs_grad(self.weight):
            op = "nn.SemiStructuredLinear"
            check.is_tensor(op, "x", x)
            if x.dim() == 0 or x.shape[-1] != self.in_features:
                raise ValueError(f"{op}: x must be [..., {self.in_features}], got {list(x.shape)}.")
            if not under_autocast(x):
                check.same_dtype(op, "x", x, "the weight", self.weight)
            check.same_device(op, "x", x, "the weight", self.weight)
            return masked_linear(x, self.weight, self.bias)
        return semi_structured_linear(x, self.packed(), self.bias)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # made again where the copy is used
