# SPDX-License-Identifier: Apache-2.0
"""Weight gradients that backward leaves for later: `WeightGradStore`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class WeightGradStore:
    """The weight gradients that backward did not compute, in the order in which it came by them.

    A layer's backward is two products: the gradient of its input, for which the layer before it waits, and that of its
    weight, for which nobody does. A layer that is given a store puts the second one there, and a pipeline schedule runs
    it where a rank would idle. Each gradient is computed once:

        store = fmkernels.nn.WeightGradStore()
        module = fmkernels.nn.BlockSparseLinear(1024, 1024, topology=topology, weight_grad_store=store)
        stage = torch.distributed.pipelining.PipelineStage(module, 0, 2, device, dw_builder=store.pop)

    Without a pipeline: `loss.backward()`, then `layer.backward_dw()` of each layer, or `store.pop()()`, once for all
    that share the store; then the optimizer's step. Until then the inputs and the output gradients are kept.

    The gradients have the bits that an ordinary backward gives. They are accumulated by autograd, so the hooks of the
    parameter run, those of DistributedDataParallel too. fully_shard (FSDP2) reduces gradients when backward of a module
    ends, when these are not there yet: with both on one module the later call raises. Not for torch.compile.

    After Qi et al. 2024, Zero Bubble Pipeline Parallelism.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def put(self, parameter: Tensor, gradient: Callable[[], Tensor]) -> None:
        """Leaves `parameter.grad += gradient()` for later."""
        self._waiting.append((parameter, gradient))

    def pop(self) -> Callable[[], None]:
        """All that was put since the last `pop`, as one function to call: a `dw_builder` of `PipelineStage`."""
        waiting, self._waiting = self._waiting, []

        def run() -> None:
            while waiting:
                parameter, gradient = waiting.pop(0)
                torch.autograd.backward(parameter, gradient())

        return run

    def __len__(self) -> int:
        """How many gradients wait."""
        return len(self._waiting)


class DeferredWeightGrad:
    """Mixin of a module that may be given a store for the gradient of its weight."""

    weight_grad_store: WeightGradStore | None

    def _set_store(self, name: str, store: WeightGradStore | None) -> None:
        if store is not None and not isinstance(store, WeightGradStore):
            raise TypeError(f"{name}: weight_grad_store must be a WeightGradStore, got {type(store).__name__}.")
        self.weight_grad_store = store

    def backward_dw(self) -> None:
        """Computes the weight gradients that wait in the store of this module, and of others that share it."""
        if self.weight_grad_store is not None:
            self.weight_grad_store.pop()()


def stand_in(
    store: WeightGradStore,
    module: nn.Module,
    names: tuple[str, ...],
    left: list[tuple[Callable[[], Tensor], ...]],
    beside: tuple[str, ...] = (),
) -> Tensor:
    """An input of an autograd.Function in the place of parameters of a module, whose gradients go to the store.

    The parameters are no inputs: their hooks would run at the end of backward, without a gradient. This empty tensor
    stands for them, whose hook runs where autograd asks for gradients of parameters, and not where it asks for those of
    inputs alone, as a pipeline does of made-up inputs when it infers shapes. Backward leaves in `left` how the gradient
    of each is computed. Until it is, neither the parameter nor what is `beside` it may be replaced, as `fully_shard`
    does when backward of the module ends: what it was would get the gradient, unseen.
    """
    held = {name: getattr(module, name) for name in (*names, *beside)}

    def later(name: str, gradient: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def compute() -> Tensor:
            if any(getattr(module, part) is not held[part] for part in (name, *beside)):
                raise RuntimeError(
                    f"nn.{type(module).__name__}: the {name} must stay until its gradient is computed, it was replaced."
                )
            return gradient().to(held[name].dtype)

        return compute

    def put(_grad: Tensor) -> None:
        for name, gradient in zip(names, left.pop(), strict=True):
            if held[name].requires_grad:
                store.put(held[name], later(name, gradient))

    result = torch.empty(0, requires_grad=True)
    result.register_hook(put)
    return result
