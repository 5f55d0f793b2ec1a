# SPDX-License-Identifier: Apache-2.0
"""The definition of each op in plain torch: slow on purpose, exact in float64, differentiable by autograd."""

from . import block_codec, moe, paged_kv, peer_all_reduce, quantized_collectives
from .attention import attention, attention_scores, attention_varlen
from .block_sparse import dds, dsd, sdd, topology_moe
from .cross_entropy import cross_entropy, linear_cross_entropy
from .dropout import dropout_factors, philox
from .glu import geglu, swiglu
from .lora import lora, lora_expand, lora_shrink
from .merge_attention import merge_attention
from .norm import layer_norm, rms_norm
from .quantized_linear import dequantize_weight, quantize_weight, quantized_linear
from .rope import rope
from .sampling import sample, sampling_weights
from .semi_structured import semi_structured_linear, semi_structured_mask
from .speculative import verify_chain, verify_tree

__all__ = [
    "attention",
    "attention_scores",
    "attention_varlen",
    "block_codec",
    "cross_entropy",
    "dds",
    "dequantize_weight",
    "dropout_factors",
    "dsd",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "lora",
    "lora_expand",
    "lora_shrink",
    "merge_attention",
    "moe",
    "paged_kv",
    "peer_all_reduce",
    "philox",
    "quantize_weight",
    "quantized_collectives",
    "quantized_linear",
    "rms_norm",
    "rope",
    "sample",
    "sampling_weights",
    "sdd",
    "semi_structured_linear",
    "semi_structured_mask",
    "swiglu",
    "topology_moe",
    "verify_chain",
    "verify_tree",
]
