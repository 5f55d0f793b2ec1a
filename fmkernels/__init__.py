# SPDX-License-Identifier: Apache-2.0
"""Kernels for foundation models: attention, caches, sparsity, experts and collectives, on the CPU and on CUDA."""

from . import nn, paged_kv
from ._version import __version__
from .attention import attention, attention_varlen
from .block_mask import BlockMask, create_block_mask
from .merge_attention import merge_attention

__all__ = [
    "BlockMask",
    "__version__",
    "attention",
    "attention_varlen",
    "create_block_mask",
    "merge_attention",
    "nn",
    "paged_kv",
]
