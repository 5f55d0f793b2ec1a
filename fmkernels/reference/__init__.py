# SPDX-License-Identifier: Apache-2.0
"""The definition of each op in plain torch: slow on purpose, exact in float64, differentiable by autograd."""

from . import paged_kv
from .attention import attention, attention_scores, attention_varlen
from .dropout import dropout_factors, philox
from .merge_attention import merge_attention

__all__ = [
    "attention",
    "attention_scores",
    "attention_varlen",
    "dropout_factors",
    "merge_attention",
    "paged_kv",
    "philox",
]
