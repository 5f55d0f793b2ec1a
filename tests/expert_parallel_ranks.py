# SPDX-License-Identifier: Apache-2.0
"""A layer of experts whose tokens and weights the ranks of a group share."""

import torch

from fmkernels import moe


class Layer:
    """The same in every process: all tokens, all experts, the gradient of the output; and what one process makes of it.

    `ends` says where the tokens of a rank end.
    """

    NAMES = ("x", "w_gate_up", "w_down", "topk_weights")

    def __init__(self, ends, num_topk=3, num_experts=12, dtype=torch.float32, hidden=40, width=24, change=None):
        generator = torch.Generator().manual_seed(num_topk)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        num_tokens = ends[-1]
        self.ends, self.num_experts = (0, *ends), num_experts
        self.x, self.grad = normal(num_tokens, hidden), normal(num_tokens, hidden)
        self.w_gate_up = normal(num_experts, 2 * width, hidden) * 0.2
        self.w_down = normal(num_experts, hidden, width) * 0.2
        self.topk_weights = torch.rand(num_tokens, num_topk, generator=generator)
        self.topk_idx = torch.randint(-1, num_experts, (num_tokens, num_topk), generator=generator, dtype=torch.int32)
        if change is not None:
            change(self)

    def leaves(self, rank=None):
        """(x, w_gate_up, w_down, topk_weights), or what a rank has of them."""
        tensors = [getattr(self, name) for name in self.NAMES]
        if rank is not None:
            tensors = [self.part(name, t, rank) for name, t in zip(self.NAMES, tensors, strict=True)]
        return [t.detach().clone().requires_grad_() for t in tensors]

    def part(self, name, t, rank):
        if name in ("w_gate_up", "w_down"):
            count = self.num_experts // (len(self.ends) - 1)
            return t[rank * count : (rank + 1) * count]
        return t[self.ends[rank] : self.ends[rank + 1]]

    def alone(self, function=moe.moe_mlp, topk_idx=None):
        """The output and the gradients in one process."""
        leaves = self.leaves()
        out = function(*leaves, self.topk_idx if topk_idx is None else topk_idx)
        return [out.detach(), *torch.autograd.grad(out, leaves, self.grad)]

    def together(self, rank, function, **options):
        """Those of a rank, and those of one process that they should be."""
        leaves = self.leaves(rank)
        out = function(*leaves, self.part("topk_idx", self.topk_idx, rank), **options)
        grads = torch.autograd.grad(out, leaves, self.part("grad", self.grad, rank))
        return [out.detach(), *grads]

    def parts(self, results, rank):
        return [self.part(name, t, rank) for name, t in zip(("out", *self.NAMES), results, strict=True)]


def same(actual, wanted):
    """Bit by bit, NaN too."""
    return [torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(actual, wanted, strict=True)]
