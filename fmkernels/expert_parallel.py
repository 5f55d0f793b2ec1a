# SPDX-License-Identifier: Apache-2.0
"""Experts that live on the ranks of a `torch.distributed` group: tokens to them and results back.

Expert e is on rank e // (num_experts / ranks). A token goes once to each rank that has an expert of it, and of each of
its slots a row comes back, so that the sum is taken at home, in the order of one process: a layer over any number of
ranks has the bits of `moe.moe_mlp`.
"""

from __future__ import annotations

from ._expert_parallel_calls import Pending, combine, dispatch
from ._expert_parallel_clip import clip_grad_norm_
from ._expert_parallel_handle import Handle
from ._expert_parallel_layer import run
from ._expert_parallel_mlp import moe_mlp
from ._expert_parallel_style import ExpertParallel

__all__ = ["ExpertParallel", "Handle", "Pending", "clip_grad_norm_", "combine", "dispatch", "moe_mlp", "run"]
