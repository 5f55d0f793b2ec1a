# SPDX-License-Identifier: Apache-2.0
"""Modules over the ops, whose state dicts are those of the modules they replace, and what training with them needs."""

from .attention import Attention
from .block_pruning import BlockPruning
from .block_sparse_linear import BlockSparseLinear
from .checkpoint import checkpoint_policy
from .experts import Experts
from .glu import SwiGLU
from .grouped_linear import GroupedLinear
from .moe import MoE, MoELosses
from .norm import LayerNorm, RMSNorm
from .quantized_block_sparse_linear import QuantizedBlockSparseLinear
from .quantized_linear import QuantizedLinear
from .rope import RotaryEmbedding
from .semi_structured_linear import SemiStructuredLinear
from .sparsify import calibration, sparsify
from .weight_grad import WeightGradStore

__all__ = [
    "Attention",
    "BlockPruning",
    "BlockSparseLinear",
    "Experts",
    "GroupedLinear",
    "LayerNorm",
    "MoE",
    "MoELosses",
    "QuantizedBlockSparseLinear",
    "QuantizedLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "SemiStructuredLinear",
    "SwiGLU",
    "WeightGradStore",
    "calibration",
    "checkpoint_policy",
    "sparsify",
]
