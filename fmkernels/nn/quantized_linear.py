# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose weight has 8 or 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _check as check
from ..quantized_linear import multiply
from ..quantized_weight import QuantizedWeight, quantize_weight


class QuantizedLinear(nn.Module):
    """What `torch.nn.Linear` computes, of a weight that is stored as integers.

        y = quantized_linear(x, weight, bias)

    The weight is constant: its tensors are buffers, `values`, `scales` and, with zero points, `zeros`. The bias is a
    parameter, and gradients flow into it and into x, which is what training adapters beside the layer needs.

    Args:
        in_features, out_features, bias: as of `torch.nn.Linear`.
        bits, group_size, symmetric: as of `fmkernels.quantize_weight`.
        device: of the buffers.
        dtype: of the bias. The scales stay float32 whatever the module is cast to.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    A new layer has a weight of zeros: load a state dict, or make one with `from_linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("in_features", in_features), ("out_features", out_features)):
            check.integer("nn.QuantizedLinear", name, number, 1)
        check.flag("nn.QuantizedLinear", "bias", bias)
        zeros = torch.zeros(out_features, in_features, device=device)
        self._set(quantize_weight(zeros, bits=bits, group_size=group_size, symmetric=symmetric))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(
        cls, module: nn.Linear, *, bits: int = 8, group_size: int | None = None, symmetric: bool = True
    ) -> QuantizedLinear:
        """The quantised form of a layer, on its device; it shares the layer's bias."""
        if not isinstance(module, nn.Linear):
            raise TypeError(
                f"nn.QuantizedLinear.from_linear: module must be a torch.nn.Linear, got {type(module).__name__}."
            )
        result = cls.__new__(cls)
        nn.Module.__init__(result)
        result._set(quantize_weight(module.weight, bits=bits, group_size=group_size, symmetric=symmetric))
        result.bias = module.bias
        result.train(module.training)
        return result

    def _set(self, weight: QuantizedWeight) -> None:
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bits, self.group_size = weight.bits, weight.group_size
        for name in ("values", "scales", "zeros"):
            self.register_buffer(name, getattr(weight, name))

    @property
    def weight(self) -> QuantizedWeight:
        """Of the buffers."""
        return QuantizedWeight(
            self.values, self.scales, self.zeros, self.bits, self.group_size, self.out_features, self.in_features
        )

    def _apply(self, fn, recurse=True):
        """As of every module, but the scales stay float32: `module.bfloat16()` is about what it computes with."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            self.scales = scales.to(self.scales.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] gives [..., out_features]."""
        tensors = self.values, self.scales, self.zeros, self.bias
        return multiply(x, *tensors, self.bits, self.group_size or 0, self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, group_size={self.group_size}"
        )
