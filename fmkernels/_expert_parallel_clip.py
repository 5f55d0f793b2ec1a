# SPDX-License-Identifier: Apache-2.0
"""Gradients of one model on several meshes, cut to one norm: `expert_parallel.clip_grad_norm_`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import _check as check

OP = "expert_parallel.clip_grad_norm_"


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` of parameters that are plain tensors, or DTensors of several meshes.

    Torch's own has one mesh; experts have another than the rest of a model. Each mesh has a gradient on all its ranks
    or on none.

    Args:
        parameters: those whose gradients are scaled, in place, by max_norm / norm where the norm is larger. Plain
            tensors have the same gradient on all ranks, as after DistributedDataParallel.
        max_norm: not negative; math.inf to measure alone.
        norm_type: the p of the p-norm, also math.inf.
        error_if_nonfinite: raise a RuntimeError where the norm is no finite number.

    Returns:
        The norm of all gradients as one vector, before, a tensor without dimensions; the same on all ranks.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    A collective of all ranks of the meshes. Deterministic. The host does not wait, except for error_if_nonfinite.
    """
    if max_norm != math.inf:
        check.number(OP, "max_norm", max_norm, non_negative=True)
    check.flag(OP, "error_if_nonfinite", error_if_nonfinite)
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        check.is_tensor(OP, "parameters", parameter)
        grad = parameter.grad
        if grad is not None:
            by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(parameter)
    if not by_mesh:
        return torch.zeros(())
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group], norm_type) for group in by_mesh.values()]
    norms = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"{OP}: the norm of the gradients must be finite, got {norm.item()}.")
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
