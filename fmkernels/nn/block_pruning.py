# SPDX-License-Identifier: Apache-2.0
"""Training changes which blocks a sparse model has: `BlockPruning`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _check as check
from .._library import as_rows
from ..block_patterns import block_norms
from ..block_topology import BlockTopology
from .block_sparse_linear import BlockSparseLinear

_OP = "nn.BlockPruning"


class BlockPruning:
    """Prunes the block-sparse layers of a model while it trains, and lets blocks grow where they are missed.

        pruning = fmkernels.nn.BlockPruning(model, optimizer, 0.25, end=10_000, every=100, regrow=0.3)
        for batch in data:
            loss(model(batch)).backward()
            optimizer.step()
            pruning.step()
            optimizer.zero_grad()

    Every `every` steps from step `begin` on, and at step `end`, each `fmkernels.nn.BlockSparseLinear` loses the blocks
    of least norm until it has the density of the schedule, which goes from its first one to `density` by a cubic. Then
    a share of what is left, `regrow`, which fades with a cosine, makes room for blocks that the layer does not have:
    with `by="gradient"` those to which the dense gradient of that step is largest, with `by="random"` any. A new block
    is zeros; blocks that stay keep their values and optimizer state, bit by bit. A layer that begins sparse and has
    `density` already trains sparse to sparse.

    Args:
        model: has at least one `fmkernels.nn.BlockSparseLinear`.
        optimizer: that holds their weights; its states of a weight's shape go with the blocks.
        density: at the end, of each layer, from 0 to 1.
        end: the last step that may change blocks.
        begin: the first one.
        every: steps from change to change.
        regrow: share of the blocks, from 0 to 1, that are exchanged at first; 0: none, which is gradual pruning.
        by: "gradient" or "random".
        seed: of random regrowth.
        group: the process group whose ranks hold the same layers, over which the dense gradients are summed so that all
            ranks choose alike. Where torch.distributed runs with more than one rank it must be given.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    Deterministic. In the steps that regrow by gradient a layer holds its input and one dense gradient; hooks watch for
    them, which a compiled model does not run: there only by="random" works. With another number of blocks the weight is
    another parameter (see `BlockSparseLinear.set_topology`): wrap with DistributedDataParallel when pruning has ended,
    or begin with the final density. After Zhu and Gupta 2017, To prune, or not to prune, and Evci et al. 2020, Rigging
    the lottery, with blocks in place of weights.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        density: float,
        *,
        end: int,
        begin: int = 0,
        every: int = 100,
        regrow: float = 0.0,
        by: str = "gradient",
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{_OP}: model must be a torch.nn.Module, got {type(model).__name__}.")
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, BlockSparseLinear)}
        if not self.layers:
            raise ValueError(f"{_OP}: model must have a fmkernels.nn.BlockSparseLinear, got none.")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{_OP}: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        held = {id(parameter) for of in optimizer.param_groups for parameter in of["params"]}
        for name, layer in self.layers.items():
            if id(layer.weight) not in held:
                raise ValueError(f"{_OP}: optimizer must hold the weights of all layers, got none of {name!r}.")
        for name, value in (("density", density), ("regrow", regrow)):
            check.share(_OP, name, value)
        for name, value, minimum in (("begin", begin, 0), ("end", end, begin), ("every", every, 1), ("seed", seed, 0)):
            check.integer(_OP, name, value, minimum)
        if by not in ("gradient", "random"):
            raise ValueError(f"{_OP}: by must be 'gradient' or 'random', got {by!r}.")
        if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(f"{_OP}: group must be the ranks that hold the same layers, got None in a process group.")
        self.optimizer, self.density, self.regrow, self.by, self.group = optimizer, density, regrow, by, group
        self.begin, self.end, self.every = begin, end, every
        self.first_densities = {name: layer.topology.density for name, layer in self.layers.items()}
        self.num_steps = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._gradients: dict[str, Tensor] = {}  # of dense weights, summed over the calls of a step
        self._handles: list[Any] = []
        self._watch()

    def density_at(self, step: int, first: float) -> float:
        """The density that the schedule has at a step, of a layer that began with `first`."""
        return self.density + (first - self.density) * (1 - self._done(step)) ** 3

    def _done(self, step: int) -> float:
        """How much of the schedule lies behind, from 0 to 1."""
        if step >= self.end:
            return 1.0
        return max(0, step - self.begin) / max(1, self.end - self.begin)

    def changes_at(self, step: int) -> bool:
        """Whether that step, counted from 0, changes blocks."""
        is_due = step == self.end or (step - self.begin) % self.every == 0
        return self.begin <= step <= self.end and is_due

    @torch.no_grad()
    def step(self) -> bool:
        """To be called after each step of the optimizer. Returns whether blocks have changed."""
        step = self.num_steps
        self.num_steps += 1
        if not self.changes_at(step):
            self._watch()
            return False
        if self._handles and not self._gradients:
            raise RuntimeError(
                f"{_OP}: no layer was given a gradient in this step: step() must come after backward, and by='random' "
                "is for compiled models."
            )
        share = self.regrow * (1 + math.cos(math.pi * self._done(step))) / 2
        has_changed = False
        for name, layer in self.layers.items():
            has_changed |= self._change(name, layer, self.density_at(step, self.first_densities[name]), share)
        self._watch()
        return has_changed

    def _change(self, name: str, layer: BlockSparseLinear, density: float, share: float) -> bool:
        topology = layer.topology
        num_places = topology.num_places
        num_blocks = round(density * num_places)
        num_new = min(round(share * num_blocks), num_places - num_blocks)
        place = topology.places
        is_listed = place < num_places
        place, norms = place[is_listed], torch.linalg.vector_norm(layer.weight.float(), dim=(1, 2))[is_listed]
        stay = place[norms.argsort(descending=True, stable=True)[: num_blocks - num_new]]
        mask = torch.zeros(num_places, dtype=torch.bool, device=place.device)
        mask[stay] = True
        if len(stay) < num_blocks:
            scores = self._scores(name, layer).flatten()
            scores[stay] = -1.0  # these places are taken; all other scores are 0 or more
            mask[scores.argsort(descending=True, stable=True)[: num_blocks - len(stay)]] = True
        grid = mask.view(topology.num_block_rows, topology.num_block_columns)
        if torch.equal(grid, topology.to_mask()):
            return False
        layer.set_topology(BlockTopology.from_mask(grid, topology.block, topology.shape), self.optimizer)
        return True

    def _scores(self, name: str, layer: BlockSparseLinear) -> Tensor:
        """[rows of blocks, columns of blocks] float32: how much a block is missed."""
        shape = layer.topology.num_block_rows, layer.topology.num_block_columns
        if not self._handles:
            return torch.rand(shape, generator=self._generator).to(layer.weight.device)
        gradient = self._gradients.pop(name, None)
        if gradient is None:  # the layer had no part in this step
            gradient = torch.zeros(layer.topology.shape, device=layer.weight.device)
        if self.group is not None:
            dist.all_reduce(gradient, group=self.group)
        return torch.nan_to_num(block_norms(gradient, layer.topology.block))

    def _watch(self) -> None:
        """Hooks in the layers if the next step needs their dense gradients, else none."""
        for handle in self._handles:
            handle.remove()
        self._gradients.clear()
        is_needed = self.by == "gradient" and self.regrow > 0 and self.changes_at(self.num_steps)
        layers = self.layers.items() if is_needed else ()
        self._handles = [layer.register_forward_hook(self._hook(name), with_kwargs=True) for name, layer in layers]

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> None:
            if not y.requires_grad:
                return
            x = (*args, *kwargs.values())[0].detach()

            def add(grad: Tensor) -> None:
                left, right = (as_rows(t).float() for t in (grad, x))
                product = left.mT @ right
                self._gradients[name] = self._gradients[name] + product if name in self._gradients else product

            y.register_hook(add)

        return hook

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs, beside the model's and the optimizer's."""
        return {
            "num_steps": self.num_steps,
            "first_densities": dict(self.first_densities),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state["first_densities"]) != set(self.layers):
            raise ValueError(
                f"{_OP}.load_state_dict: state must be of the layers {sorted(self.layers)}, "
                f"got {sorted(state['first_densities'])}."
            )
        self.num_steps = state["num_steps"]
        self.first_densities = dict(state["first_densities"])
        self._generator.set_state(state["generator"])
        self._watch()
