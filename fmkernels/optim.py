# SPDX-License-Identifier: Apache-2.0
"""Optimizers that average over ranks what they need of them, as codes (`fmkernels.quantized_collectives`)."""

# No `from __future__ import annotations`: DDP compares the annotation of `bucket` with dist.GradBucket itself.
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import _check as check
from ._collectives_parameters import Averaging, check_parameters

__all__ = ["QAdam"]

_STATE = ("exp_avg", "exp_avg_sq", "error")  # float32 whatever the parameter is


class QAdam(torch.optim.Optimizer):
    """Adam that after a warm-up keeps its second moment and averages the momentum of all ranks as codes.

        optimizer = QAdam(model.parameters(), lr=1e-3, warmup_steps=1000)  # Bagua's QAdam
        optimizer = QAdam(model.parameters(), lr=1e-3, warmup_steps=1000, bits=1, error_feedback=True)  # 1-bit Adam
        optimizer.register(ddp)

    The first `warmup_steps` steps are those of AdamW with gradients averaged exactly, zeros where a parameter has none:
    it decays, where AdamW passes it over. From then on gradients are local:

        m = Q-average over ranks of (beta1 m + (1 - beta1) g_rank),   p -= lr / (1 - beta1^t) m / (sqrt(v_hat) + eps)

    with v_hat, and its bias correction, as the warm-up left them. m has the same bits on every rank, and so has p.

    An element whose second moment is 0 after the warm-up has had no gradient in it: m / eps would be no step but a
    jump, and 1 bit has no code for its 0. Such an element has no momentum from then on and stays where it is, but for
    weight decay.

    Args:
        params: as of any optimizer: tensors or groups of them, float32, bfloat16 or float16, on one device, the same on
            every rank in the same order. Where a rank has no gradient it takes part with zeros. What is frozen, without
            requires_grad, is left out; what is no longer frozen after the warm-up has no second moment.
        lr: learning rate.
        betas: of the momentum and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, as in AdamW.
        warmup_steps: at least 1; a fifth of the training and less is usual, enough for v to settle.
        group: a process group, of the ranks of the DDP model; None: the default group.
        bits: of the momentum, 8, 6, 4, 1 or "float8_e4m3fn".
        error_feedback: keep what rounding loses in the state of each parameter, and add it in the next step.
        **options: block, algorithm, node_size, inter_bits, hadamard, chunk_numel, rounding and seed, as of
            `quantized_collectives.all_reduce`; draws are of `num_steps`.

    Without DDP `step` averages the gradients of the warm-up itself. `register` leaves that to DDP, which does it during
    the backward pass, and makes DDP leave gradients alone afterwards; `no_sync` keeps its meaning. Local gradients are
    clipped locally. All ranks make every step: a GradScaler, which skips one where a rank overflows, does not go along.

    Momentum, second moment and error are float32 and in `state_dict`, which is that of one rank: with error feedback
    every rank saves and loads its own. Parameters of fully_shard, whose gradients it has scattered, are refused.

    Raises ValueError and TypeError for arguments, also where ranks disagree, and RuntimeError when a rank is gone.
    Deterministic. Tang et al. 2021, 1-bit Adam; Gan et al. 2021, Bagua.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int,
        group: Any = None,
        bits: int | str = 8,
        error_feedback: bool = False,
        **options: Any,
    ) -> None:
        check.integer("QAdam", "warmup_steps", warmup_steps, 1)
        if bits is None:
            raise ValueError("QAdam: bits must be one of 8, 6, 4, 1, float8_e4m3fn, got None.")
        self.num_steps, self.warmup_steps, self._is_registered = 0, warmup_steps, False
        self._has_agreed = False
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        first = check_parameters("QAdam", self._parameters())[0]
        self._average = Averaging("QAdam", group, bits, error_feedback, options, first)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Before the first step: later ones have no second moment."""
        if self.num_steps:
            raise ValueError(f"QAdam: a group must be added before the first step, there were {self.num_steps}.")
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not isinstance(group[name], int | float | Tensor) or not group[name] >= 0.0:
                raise ValueError(f"QAdam: {name} must be a number of at least 0, got {group[name]}.")
        betas = group["betas"]
        if not isinstance(betas, Sequence) or len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"QAdam: betas must be two numbers of at least 0 and below 1, got {betas}.")
        parameters = list(self._parameters())  # none, where groups before this one and itself are empty
        for tensor in check_parameters("QAdam", parameters) if parameters else ():
            if isinstance(tensor, DTensor):
                raise TypeError(
                    "QAdam: parameters must be whole tensors, one is a DTensor, whose gradients are shards."
                )

    # ---- with DDP ----

    def register(self, model: nn.parallel.DistributedDataParallel) -> None:
        """Makes `hook` the communication hook of the model, which can have one: DDP then averages in the warm-up."""
        ours, theirs = (dist.get_process_group_ranks(group) for group in (self._average.group, model.process_group))
        if sorted(ours) != sorted(theirs):
            raise ValueError(
                f"QAdam: model must have the ranks of group, {sorted(ours)}, its process_group has {sorted(theirs)}."
            )
        model.register_comm_hook(self, QAdam.hook)
        self._is_registered = True

    @staticmethod
    def hook(state: "QAdam", bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Averages the gradients of a bucket during the warm-up, and afterwards leaves them as they are."""
        buffer, group = bucket.buffer(), state._average.group
        if state.num_steps < state.warmup_steps:
            work = dist.all_reduce(buffer.mul_(1 / group.size()), group=group, async_op=True)  # as DDP
            return work.get_future().then(lambda future: future.value()[0])
        future = torch.futures.Future(devices=[buffer.device] if buffer.device.type == "cuda" else None)
        future.set_result(buffer)
        return future

    # ---- a step ----

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a closure is called first, and what it returns is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._groups()
        parameters = [p for group in groups for p in group["params"]]
        if not parameters:
            raise ValueError("QAdam: parameters must have one to train, all are frozen.")
        self._make_state(parameters)
        is_warmup, feedback = self.num_steps < self.warmup_steps, self._average.error_feedback
        grads = {p: self._gradient(p) for p in parameters}
        if is_warmup and not self._is_registered:
            self._average.exact(grads.values())
        for group in groups:
            self._add_to_moments(group, [grads[p] for p in group["params"]], is_warmup)
        if not is_warmup:
            states = {str(i): self.state[p] for i, p in enumerate(parameters)}
            errors = {name: state["error"] for name, state in states.items()} if feedback else None
            self._average({name: state["exp_avg"] for name, state in states.items()}, errors, self.num_steps)
            for state in states.values():
                state["exp_avg"].masked_fill_(state["exp_avg_sq"] == 0, 0.0)
        self.num_steps += 1
        torch._foreach_add_([self.state[p]["step"] for p in parameters], 1.0)
        for group in groups:
            self._move(group)
        return loss

    def _parameters(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def _groups(self) -> list[dict[str, Any]]:
        """Those that have something to train, without what is frozen."""
        groups = [group | {"params": [p for p in group["params"] if p.requires_grad]} for group in self.param_groups]
        return [group for group in groups if group["params"]]

    def _make_state(self, parameters: list[Tensor]) -> None:
        if not self._has_agreed:
            self._average.check_agreement(parameters, warmup_steps=self.warmup_steps, num_steps=self.num_steps)
            self._has_agreed = True
        names = _STATE if self._average.error_feedback else _STATE[:2]
        for p in parameters:
            state = self.state[p]
            state.setdefault("step", torch.tensor(float(self.num_steps)))
            for name in names:
                if name not in state:
                    state[name] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)

    @staticmethod
    def _gradient(p: Tensor) -> Tensor:
        if p.grad is None:
            return torch.zeros(p.shape, dtype=torch.float32, device=p.device)
        if p.grad.is_sparse:
            raise ValueError("QAdam: gradients must be dense, one is sparse.")
        return p.grad.float()

    def _add_to_moments(self, group: dict[str, Any], grads: list[Tensor], is_warmup: bool) -> None:
        states, (beta1, beta2) = [self.state[p] for p in group["params"]], map(float, group["betas"])
        torch._foreach_lerp_([state["exp_avg"] for state in states], grads, 1 - beta1)
        if is_warmup:
            squares = [state["exp_avg_sq"] for state in states]
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)

    def _move(self, group: dict[str, Any]) -> None:
        parameters, (beta1, beta2) = group["params"], map(float, group["betas"])
        lr, eps, weight_decay = (float(group[name]) for name in ("lr", "eps", "weight_decay"))
        correction1 = 1 - beta1**self.num_steps
        correction2 = 1 - beta2 ** min(self.num_steps, self.warmup_steps)
        if weight_decay:
            torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        roots = torch._foreach_sqrt([self.state[p]["exp_avg_sq"] for p in parameters])
        torch._foreach_div_(roots, correction2**0.5)
        torch._foreach_add_(roots, eps)
        momenta = [self.state[p]["exp_avg"] for p in parameters]
        torch._foreach_addcdiv_(parameters, momenta, roots, -lr / correction1)

    # ---- checkpoints ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave on this rank. Without errors in it, those of error feedback begin with zeros."""
        states = state_dict["state"]
        if not self._average.error_feedback and any("error" in state for state in states.values()):
            raise ValueError("QAdam: state_dict must have no errors where error_feedback is off, it has.")
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, p in zip(saved, self._parameters(), strict=True):
            for name in _STATE:  # torch has given them the dtype of the parameter
                if name in states.get(index, ()):
                    tensor = states[index][name].detach().to(p.device, torch.float32, copy=True)
                    self.state[p][name] = tensor.contiguous()
        self.num_steps = max((int(state["step"]) for state in states.values()), default=0)
        self._has_agreed = False
