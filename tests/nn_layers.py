# SPDX-License-Identifier: Apache-2.0
"""What the tests of several layers need: their gradients, the ops that ran, and nn.MoE in plain torch."""

from collections import Counter

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fmkernels import reference
from fmkernels.nn import WeightGradStore


class CountOps(TorchDispatchMode):
    """`counts` has how often each op of fmkernels ran."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fmkernels":
            self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


def assert_ddp_may_wait(make, batch):
    """make(store), the same module on every rank, has its gradients under DDP with and without a store, bit for bit."""
    results = []
    for store in (None, WeightGradStore()):
        module = DistributedDataParallel(make(store))
        for _ in range(3):  # the buckets are rebuilt after the first
            module.zero_grad()
            module(batch).square().mean().backward()
            if store is not None:
                store.pop()()
        results.append(gradients(module))
    assert_same_bits(*results)


def moe_definition(module):
    """(output, balance, z) of x and the tensors of the state, in plain torch and in their dtype; the router in float32
    where that is more."""
    names = list(module.state_dict())

    def run(x, *tensors):
        state = dict(zip(names, tensors, strict=True))
        rows = x.flatten(0, -2)
        exact = torch.promote_types(x.dtype, torch.float32)
        logits = rows.to(exact) @ state["gate.weight"].to(exact).t()
        bias = state.get("gate.e_score_correction_bias")
        weights, idx = reference.moe.route(logits, module.num_topk, bias=bias, **module.options)
        scoring = module.options["scoring"]
        losses = reference.moe.load_balance_loss(logits, idx, scoring=scoring), reference.moe.z_loss(logits)
        if module.capacity_factor is not None:
            capacity = module.capacity(len(rows))
            weights, idx = reference.moe.apply_capacity(
                weights, idx, module.num_experts, capacity, policy=module.policy
            )
        stacks = state["experts.gate_up_proj"], state["experts.down_proj"]
        out = reference.moe.moe_mlp(rows, *stacks, weights * module.routed_scale, idx)
        if module.shared_experts is not None:
            gate, up, down = (state[f"shared_experts.{part}_proj.weight"].t() for part in ("gate", "up", "down"))
            out = out + (torch.nn.functional.silu(rows @ gate) * (rows @ up)) @ down
        return out.view(x.shape), *losses

    return run
