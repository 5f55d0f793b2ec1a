# SPDX-License-Identifier: Apache-2.0
"""The definition of each op in plain torch: slow on purpose, exact in float64, differentiable by autograd."""

from .attention import attention, attention_scores, attention_varlen
from .dropout import dropout_factors, philox
from .lora import lora, lora_expand, lora_shrink
from .merge_attention import merge_attention
from .norm import layer_norm, rms_norm
from .quantized_linear import dequantize_weight, quantize_weight, quantized_linear
from .rope import rope

__all__ = [
    "attention",
    "attention_scores",
    "attention_varlen",
    "dequantize_weight",
    "dropout_factors",
    "layer_norm",
    "lora",
    "lora_expand",
    "lora_shrink",
    "merge_attention",
    "philox",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
    "rope",
]
