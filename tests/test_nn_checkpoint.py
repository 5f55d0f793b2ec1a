# SPDX-License-Identifier: Apache-2.0
"""nn.checkpoint_policy: attention runs forward once, and gradients keep their bits."""

from collections import Counter

import pytest
import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fmkernels
from fmkernels.nn import Attention, checkpoint_policy

FORWARD = torch.ops.fmkernels.attention_forward.default
MM = torch.ops.aten.mm.default


class CountOps(TorchDispatchMode):
    """Counts what is computed: entered before checkpoint's own mode, it does not see what that takes from its cache."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


class Packed(torch.nn.Linear):
    """A block over attention_varlen, two sequences in one row of tokens."""

    def forward(self, x):
        q, k, v = super().forward(x).unflatten(-1, (3, 4, 16)).unbind(-3)
        ends = torch.tensor([0, 10, 33], dtype=torch.int32)
        return fmkernels.attention_varlen(q, k, v, ends, ends, 23, 23, causal=True).flatten(-2)


BLOCKS = {
    "attention": (lambda: Attention(64, 4, 2), (2, 33, 64), FORWARD),
    "attention_varlen": (lambda: Packed(64, 192), (33, 64), torch.ops.fmkernels.attention_varlen_forward.default),
}


def checkpointed(block, **options):
    return lambda x: checkpoint(block, x, use_reentrant=False, **options)


def gradients(block, function, x, counter=None):
    """Of x and of the parameters, and how often each op ran, by `counter`."""
    block.zero_grad()
    x = x.clone().requires_grad_()
    with counter or CountOps() as counted:
        function(x).square().sum().backward()
    return [x.grad, *(p.grad for p in block.parameters())], getattr(counted, "counts", None)


@pytest.mark.parametrize("name", BLOCKS)
def test_attention_runs_once_and_gradients_keep_their_bits(name):
    make, shape, forward = BLOCKS[name]
    block, x = make(), torch.randn(shape)
    plain, count_plain = gradients(block, block, x)
    whole, count_whole = gradients(block, checkpointed(block), x)
    kept, count_kept = gradients(block, checkpointed(block, context_fn=checkpoint_policy()), x)
    assert [count[forward] for count in (count_plain, count_whole, count_kept)] == [1, 2, 1]
    assert all(map(torch.equal, plain, whole))
    assert all(map(torch.equal, plain, kept))


def test_products_run_again_unless_they_are_saved_too():
    block, x = Attention(64, 4, 2), torch.randn(2, 33, 64)
    plain, count_plain = gradients(block, block, x)
    _, count = gradients(block, checkpointed(block, context_fn=checkpoint_policy()), x)
    saved, count_saved = gradients(block, checkpointed(block, context_fn=checkpoint_policy(MM)), x)
    assert count[MM] == count_plain[MM] + 3  # q_proj, k_proj, v_proj
    assert count_saved[MM] == count_plain[MM]
    assert all(map(torch.equal, plain, saved))


def test_one_policy_serves_several_blocks():
    first, second, x = Attention(64, 4), Attention(64, 4), torch.randn(2, 33, 64)
    policy = checkpoint_policy()
    both = torch.nn.Sequential(first, second)
    plain, _ = gradients(both, both, x)
    inner = checkpointed(second, context_fn=policy)
    kept, count = gradients(both, lambda x: inner(checkpointed(first, context_fn=policy)(x)), x)
    assert count[FORWARD] == 2
    assert all(map(torch.equal, plain, kept))


@pytest.mark.parametrize("options", [{}, {"context_fn": checkpoint_policy}], ids=["no policy", "policy"])
def test_compiled(options):
    """The policy is made inside of what is compiled, and says there what it says outside."""
    block, x = Attention(64, 4, 2), torch.randn(2, 33, 64)

    def run(x):
        made = {name: make() for name, make in options.items()}
        return checkpoint(block, x, use_reentrant=False, **made)

    expected, count = gradients(block, run, x)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiled(x.clone().requires_grad_())  # the profiler would count what is traced
    profiler = profile(acc_events=True)
    actual, _ = gradients(block, compiled, x, counter=profiler)
    counted = {event.key: event.count for event in profiler.key_averages()}
    assert counted["fmkernels::attention_forward"] == count[FORWARD] == (1 if options else 2)
    assert all(map(torch.equal, expected, actual))


@pytest.mark.parametrize("op", [torch.ops.aten.mm, "mm"], ids=["packet", "name"])
def test_wrong_argument(op):
    with pytest.raises(TypeError) as raised:
        checkpoint_policy(op)
    expected = "nn.checkpoint_policy: also_save must be overloads of ops, such as torch.ops.aten.mm.default, got "
    assert str(raised.value) == f"{expected}{type(op).__name__}."
