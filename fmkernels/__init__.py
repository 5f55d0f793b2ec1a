# SPDX-License-Identifier: Apache-2.0
"""Kernels for foundation models: attention, caches, sparsity, experts and collectives, on the CPU and on CUDA."""

from . import nn
from ._version import __version__
from .attention import attention, attention_varlen
from .block_mask import BlockMask, create_block_mask
from .cross_entropy import cross_entropy
from .linear_cross_entropy import linear_cross_entropy
from .merge_attention import merge_attention
from .sampling import sample
from .speculative import verify_chain, verify_tree

__all__ = [
    "BlockMask",
    "__version__",
    "attention",
    "attention_varlen",
    "create_block_mask",
    "cross_entropy",
    "linear_cross_entropy",
    "merge_attention",
    "nn",
    "sample",
    "verify_chain",
    "verify_tree",
]
