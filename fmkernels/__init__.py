# SPDX-License-Identifier: Apache-2.0
"""Kernels for foundation models: attention, caches, sparsity, experts and collectives, on the CPU and on CUDA."""

from . import nn
from ._version import __version__
from .attention import attention, attention_varlen
from .block_mask import BlockMask, create_block_mask
from .glu import geglu, swiglu
from .merge_attention import merge_attention
from .norm import layer_norm, rms_norm
from .rope import rope
from .rope_cache import rope_cache

__all__ = [
    "BlockMask",
    "__version__",
    "attention",
    "attention_varlen",
    "create_block_mask",
    "geglu",
    "layer_norm",
    "merge_attention",
    "nn",
    "rms_norm",
    "rope",
    "rope_cache",
    "swiglu",
]
