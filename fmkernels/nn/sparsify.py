# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a model become block-sparse: `sparsify`, and what it may know of their inputs: `calibration`."""

from __future__ import annotations

import collections
import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import _check as check
from ..block_patterns import block_norms, largest_blocks
from ..block_sparse_matrix import BlockSparse
from ..block_topology import BlockTopology, _checked_block
from .block_sparse_linear import BlockSparseLinear

DAMPING = 0.01  # of the mean of the diagonal of a layer's moments


@contextmanager
def calibration(model: nn.Module, layers: str = "*") -> Iterator[dict[str, Tensor]]:
    """Watches what the linear layers of a model are given, for `sparsify`.

        with torch.no_grad(), fmkernels.nn.calibration(model, "*.mlp.*") as moments:
            for batch in text:
                model(batch)

    Args:
        model: whose `torch.nn.Linear` are watched.
        layers: a pattern of their names, as of `fnmatch`: "*" stands for any text.

    Returns:
        A context manager. Its value maps the name of a layer to x^T x, summed over all rows x that it was given,
        [in_features, in_features] float32.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    moments: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, module: nn.Linear) -> None:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            flat = (*args, *kwargs.values())[0].detach().reshape(-1, module.in_features).float()
            with torch.autocast(flat.device.type, enabled=False):
                product = flat.mT @ flat
            moments[name] = moments[name] + product if name in moments else product

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    for name, module in _chosen("nn.calibration", model, layers):
        watch(name, module)
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def sparsify(
    model: nn.Module,
    density: float,
    block: int | tuple[int, int] = 64,
    *,
    layers: str = "*",
    moments: dict[str, Tensor] | None = None,
) -> list[str]:
    """Prunes linear layers of a model to some of their blocks, in place.

    Each `torch.nn.Linear` that `layers` names becomes a `fmkernels.nn.BlockSparseLinear` with `density` of its blocks.

    - Without `moments` the blocks of largest norm stay, with the values that they have.
    - With them those stay whose loss would change the layer's output most, and their values are refitted: each row of
      blocks becomes the least-squares solution for the output that the dense layer gave on the calibration text.

    Args:
        model: changed in place. Layers whose weight another module holds too (tied embeddings) are left alone.
        density: blocks that stay over all, of each layer, from 0 to 1.
        block: (rows, columns) of a block, each 16, 32, 64 or 128; an integer: both.
        layers: a pattern of names, as of `fnmatch`: "*" stands for any text, "*.mlp.*" for what is in an mlp.
        moments: as `calibration` gives them, with all the layers that are named.

    Returns:
        The names of the layers that were changed. An optimizer made before still holds the dense parameters: make it
        anew.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. The model is then as it was.

    Deterministic. The choice is the block form of the optimal brain surgeon of Hassibi and Stork 1993, each block taken
    alone; the refit is that of Frantar and Alistarh 2023, SparseGPT, solved exactly.
    """
    op = "nn.sparsify"
    check.share(op, "density", density)
    block = _checked_block(block)
    chosen = _chosen(op, model, layers)
    if not chosen:
        raise ValueError(
            f"{op}: layers must name a torch.nn.Linear of the model whose weight is its own, got {layers!r}."
        )
    for name, module in chosen:
        if moments is None:
            continue
        if name not in moments:
            raise ValueError(f"{op}: moments must have all layers, got none of {name!r}: was it run?")
        expected = [module.in_features] * 2
        if list(moments[name].shape) != expected:
            raise ValueError(f"{op}: moments of {name!r} must be {expected}, got {list(moments[name].shape)}.")
        if not torch.isfinite(moments[name]).all():
            raise ValueError(f"{op}: moments of {name!r} must be finite, got NaN or infinity.")
    made = {}
    for name, module in chosen:
        made[name] = _pruned(module, density, block, None if moments is None else moments[name])
    for name, module in made.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)
    return list(made)


def _chosen(op: str, model: nn.Module, layers: str) -> list[tuple[str, nn.Linear]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(layers, str):
        raise TypeError(f"{op}: layers must be a pattern of names, got {type(layers).__name__}.")
    places = [model, *(child for parent in model.modules() for child in parent._modules.values() if child is not None)]
    held = collections.Counter(id(parameter) for module in places for parameter in module.parameters(recurse=False))
    return [
        (name, module)
        for name, module in model.named_modules()
        if name and type(module) is nn.Linear and held[id(module.weight)] == 1 and fnmatch.fnmatchcase(name, layers)
    ]


def _pruned(module: nn.Linear, density: float, block: tuple[int, int], moments: Tensor | None) -> BlockSparseLinear:
    weight = module.weight.detach()
    if moments is None:
        mask = largest_blocks(block_norms(weight, block), density)
        return BlockSparseLinear.from_linear(module, BlockTopology.from_mask(mask, block, tuple(weight.shape)))
    moments = moments.to(weight.device, torch.float64)
    damping = (DAMPING * moments.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
    damped = moments + damping * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    exact = weight.to(moments.dtype)
    mask = largest_blocks(block_norms(_losses(exact, damped, block[1]), block), density)
    topology = BlockTopology.from_mask(mask, block, tuple(weight.shape))
    result = BlockSparseLinear.from_linear(module, topology)
    dense = _refitted(exact, moments, damped, mask, block).to(weight.dtype)
    result.weight.copy_(BlockSparse.from_dense(dense, mask=topology).values)
    return result


def _losses(weight: Tensor, damped: Tensor, width: int) -> Tensor:
    """[rows, columns], whose norm over a block is the error of the output when that block is lost and the others refit.

    With w the rows of a block and B its columns, the squared error is w ((damped^-1)_BB)^-1 w^T.
    """
    identity = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    inverse_root = torch.linalg.solve_triangular(torch.linalg.cholesky(damped), identity, upper=False)
    parts = []
    for columns, part in zip(inverse_root.split(width, dim=1), weight.split(width, dim=1), strict=True):
        # (damped^-1)_BB is the square of these columns: with q r their factors, its inverse is r^-1 r^-T.
        r = torch.linalg.qr(columns, mode="r").R
        parts.append(torch.linalg.solve_triangular(r, part, upper=True, left=False))
    return torch.cat(parts, dim=1)


def _refitted(weight: Tensor, moments: Tensor, damped: Tensor, mask: Tensor, block: tuple[int, int]) -> Tensor:
    """The weight with only the blocks of the mask, changed so that moments see the least of the loss.

    Of one row of blocks, with S the columns that stay and R the others: w_S + w_R moments_RS (damped_SS)^-1.
    """
    is_kept = mask.repeat_interleave(block[1], dim=1)[:, : weight.shape[1]]
    out = torch.zeros_like(weight)
    for row, rows in enumerate(weight.split(block[0])):
        kept = is_kept[row].nonzero()[:, 0]
        lost = (~is_kept[row]).nonzero()[:, 0]
        if len(kept) == 0:
            continue
        missing = rows[:, lost] @ moments[lost][:, kept]
        root = torch.linalg.cholesky(damped[kept][:, kept])
        first = row * block[0]
        out[first : first + len(rows), kept] = rows[:, kept] + torch.cholesky_solve(missing.mT, root).mT
    return out
