# SPDX-License-Identifier: Apache-2.0
"""The definition of each op in plain torch: slow on purpose, exact in float64, differentiable by autograd."""

from .attention import attention, attention_scores, attention_varlen
from .cross_entropy import cross_entropy, linear_cross_entropy
from .dropout import dropout_factors, philox
from .merge_attention import merge_attention
from .sampling import sample, sampling_weights
from .speculative import verify_chain, verify_tree

__all__ = [
    "attention",
    "attention_scores",
    "attention_varlen",
    "cross_entropy",
    "dropout_factors",
    "linear_cross_entropy",
    "merge_attention",
    "philox",
    "sample",
    "sampling_weights",
    "verify_chain",
    "verify_tree",
]
