# SPDX-License-Identifier: Apache-2.0
"""The definition of each op in plain torch: slow on purpose, exact in float64, differentiable by autograd."""

from .attention import attention, attention_scores, attention_varlen
from .dropout import dropout_factors, philox
from .glu import geglu, swiglu
from .merge_attention import merge_attention
from .norm import layer_norm, rms_norm
from .rope import rope

__all__ = [
    "attention",
    "attention_scores",
    "attention_varlen",
    "dropout_factors",
    "geglu",
    "layer_norm",
    "merge_attention",
    "philox",
    "rms_norm",
    "rope",
    "swiglu",
]
