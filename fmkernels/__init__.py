# SPDX-License-Identifier: Apache-2.0
"""Kernels for foundation models: attention, caches, sparsity, experts and collectives, on the CPU and on CUDA."""

from . import block_codec, moe, nn, paged_kv, quantized_collectives
from ._version import __version__
from .attention import attention, attention_varlen
from .block_mask import BlockMask, create_block_mask
from .block_patterns import banded_blocks, block_norms, butterfly_blocks, largest_blocks, random_blocks
from .block_sparse import dds, dsd, sdd
from .block_sparse_matrix import BlockSparse
from .block_topology import BlockTopology, topology_moe
from .cross_entropy import cross_entropy
from .glu import geglu, swiglu
from .linear_cross_entropy import linear_cross_entropy
from .lora import lora, lora_expand, lora_shrink
from .merge_attention import merge_attention
from .norm import layer_norm, rms_norm
from .page_pool import OutOfPages, PagePool
from .peer_all_reduce import PeerWorkspace
from .quantized_linear import dequantize_weight, quantized_linear
from .quantized_weight import QuantizedWeight, quantize_weight
from .rope import rope
from .rope_cache import rope_cache
from .sampling import sample
from .semi_structured import semi_structured_linear
from .semi_structured_matrix import SemiStructured, semi_structured_mask
from .speculative import verify_chain, verify_tree

__all__ = [
    "BlockMask",
    "BlockSparse",
    "BlockTopology",
    "OutOfPages",
    "PagePool",
    "PeerWorkspace",
    "QuantizedWeight",
    "SemiStructured",
    "__version__",
    "attention",
    "attention_varlen",
    "banded_blocks",
    "block_codec",
    "block_norms",
    "butterfly_blocks",
    "create_block_mask",
    "cross_entropy",
    "dds",
    "dequantize_weight",
    "dsd",
    "geglu",
    "largest_blocks",
    "layer_norm",
    "linear_cross_entropy",
    "lora",
    "lora_expand",
    "lora_shrink",
    "merge_attention",
    "moe",
    "nn",
    "paged_kv",
    "quantize_weight",
    "quantized_collectives",
    "quantized_linear",
    "random_blocks",
    "rms_norm",
    "rope",
    "rope_cache",
    "sample",
    "sdd",
    "semi_structured_linear",
    "semi_structured_mask",
    "swiglu",
    "topology_moe",
    "verify_chain",
    "verify_tree",
]
