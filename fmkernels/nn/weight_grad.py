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


class HeldParameters:
    """In the place of a store, for parameters of a module, which must have them still when gradients are computed.

    `fully_shard` replaces them when backward of the module ends: what they were would get the gradients, unseen.
    """

    def __init__(
        self, store: WeightGradStore, module: nn.Module, names: tuple[str, ...], beside: tuple[str, ...] = ()
    ) -> None:
        self._store, self._module = store, module
        self._parameters, self._beside = ({name: getattr(module, name) for name in of} for of in (names, beside))

    def put(self, parameter: Tensor, gradient: Callable[[], Tensor]) -> None:
        """As of the store; what the module has `beside` the parameter must stay too."""
        name = next(name for name, held in self._parameters.items() if held is parameter)
        wanted = {name: parameter} | self._beside

        def compute() -> Tensor:
            if any(getattr(self._module, name) is not held for name, held in wanted.items()):
                raise RuntimeError(
                    f"nn.{type(self._module).__name__}: the {name} must stay until its gradient is computed, "
                    "it was replaced."
                )
            return gradient()

        self._store.put(parameter, compute)


def stand_in(
    store: WeightGradStore, module: nn.Module, name: str, left: list[Callable[[], Tensor]], beside: tuple[str, ...] = ()
) -> Tensor:
    """An input of an autograd.Function in the place of a parameter, whose gradient goes to the store.

    The parameter itself is no input: its hooks would run at the end of backward, without a gradient. This empty tensor
    stands for it, whose hook runs where autograd asks for gradients of parameters, and not where it asks for those of
    inputs alone, as a pipeline does of made-up inputs when it infers shapes. Backward leaves in `left` how the gradient
    is computed. Until it is, neither the parameter nor what is `beside` it may be replaced.
    """
    parameter, held = getattr(module, name), HeldParameters(store, module, (name,), beside)

    def put(_grad: Tensor) -> None:
        compute = left.pop()
        held.put(parameter, lambda: compute().to(parameter.dtype))

    result = torch.empty(0, requires_grad=True)
    result.register_hook(put)
    return result
