# SPDX-License-Identifier: Apache-2.0
"""Kernels for foundation models: attention, caches, sparsity, experts and collectives, on the CPU and on CUDA."""

from . import nn
from ._version import __version__
from .attention import attention, attention_varlen
from .block_mask import BlockMask, create_block_mask
from .merge_attention import merge_attention
from .page_pool import OutOfPages, PagePool

__all__ = [
    "BlockMask",
    "OutOfPages",
    "PagePool",
    "__version__",
    "attention",
    "attention_varlen",
    "create_block_mask",
    "merge_attention",
    "nn",
]
