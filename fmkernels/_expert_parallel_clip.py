# SPDX-License-Identifier: Apache-2.0
"""Gradients of one model on several meshes, cut to one norm: `expert_parallel.clip_grad_norm_`."""

from __future__ import annotations

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

    Torch's own has one mesh; experts have another than the rest of a model.

    Args:
        parameters: those whose gradients are scaled, in place, by max_norm / norm where the norm is larger. Plain
            tensors have the same gradient on all ranks, as after DistributedDataParallel.
        max_norm: not negative.
        norm_type: the p of the p-norm, also math.inf.
        error_if_nonfinite: raise a RuntimeError where the norm is no finite number.

    Returns:
        The norm of all gradients as one vector, before, a tensor without dimensions; the same on all ranks.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    A collective of all ranks of the meshes. Deterministic. The host does not wait, except for error_if_nonfinite.
    """
    check.number(OP, "max_norm", max_norm, non_negative=True)
    check.flag(OP, "error_if_nonfinite", error_if_nonfinite)
    by_mesh: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        check.is_tensor(OP, "parameters", parameter)
        grad = parameter.grad
        if grad is not None:
            by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    if not by_mesh:
        return torch.zeros(())
    norms = [_local(torch.nn.utils.get_total_norm(grads, norm_type), whole=True) for grads in by_mesh.values()]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"{OP}: the norm of the gradients must be finite, got {norm.item()}.")
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch does
    for grads in by_mesh.values():
        shards = [_local(grad) for grad in grads]
        torch._foreach_mul_(shards, factor.to(shards[0].device))
    return norm


def _local(t: Tensor, whole: bool = False) -> Tensor:
    if not isinstance(t, DTensor):
        return t
    return t.full_tensor() if whole else t.to_local()
