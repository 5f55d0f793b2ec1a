# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention on emulated GPUs: every tile, what its checks see, and the bits of every run."""

import math
from dataclasses import replace

import pytest
import torch
from faults import missing_synchronisations
from test_attention_backward import check, gradients, inputs_of
from test_attention_emulated import HOSTILE

from fmkernels import attention, create_block_mask, reference
from fmkernels.testing import Case, backends

EMULATED = [backend for backend in backends("attention_backward") if backend.name == "emulated"]
pytestmark = pytest.mark.skipif(not EMULATED, reason="the emulated backend is not built")

TILE = Case("tile", batch=1, seq_q=140, seq_k=170, heads=2, kv_heads=1, dtype=torch.bfloat16, causal=True)


@pytest.mark.parametrize(
    ("architecture", "dtype"), [(80, torch.bfloat16), (80, torch.float16), (86, torch.bfloat16), (86, torch.float32)]
)
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 192, 256])
def test_every_tile(head_dim, dtype, architecture):
    """Blocks that are plain, cut by the diagonal, by a window and by the end; sm_86 has the least shared memory."""
    backend = replace(EMULATED[0], architecture=architecture)
    case = replace(TILE, head_dim=head_dim, dtype=dtype)
    check(backend, case)
    check(backend, replace(case, causal=False, window=(60, 20), v_head_dim=64, bias="hqk", softcap=3.0))


@pytest.mark.parametrize("architecture", [90, 120])
def test_later_architectures(architecture):
    check(replace(EMULATED[0], architecture=architecture), replace(TILE, head_dim=128, sinks=True))


@pytest.mark.parametrize("prefix", HOSTILE, ids=str)
def test_prefix_sums_that_lie_reach_nothing_outside_the_tensors(prefix):
    import emulator

    case = Case("hostile", heads=2, kv_heads=1, seqlens=((5, 9), (4, 0), (31, 31)), dtype=torch.float16)
    (q, k, v, cu_q, cu_k, longest_q, longest_k), _ = case.inputs()
    lie, lse = torch.tensor(prefix, dtype=torch.int32), torch.zeros(2, q.shape[0])
    backward = torch.ops.fmkernels_emulated.attention_varlen_backward.default
    for prefixes in ((lie, cu_k), (cu_q, lie), (lie, lie)):
        reports = ()
        try:
            with emulator.watch():
                rest = (*prefixes, longest_q, longest_k, None, None, False, -1, -1, 0.25, 0.0, 0.0, None)
                backward(q, lse, q, k, v, q, lse, *rest)
        except emulator.FaultError as error:
            reports = error.reports
        # Sequences that overlap are written by several blocks, inside the tensors: that much may happen. What is
        # between sequences is not written, and so not read either.
        assert {report.fault for report in reports} <= {"race of blocks"}


def test_200_runs_have_the_same_bits():
    case = Case("again", batch=1, heads=2, kv_heads=1, dtype=torch.float16, causal=True, sinks=True, bias="qk")
    for backend in backends("attention_backward"):
        _, tensors, call = inputs_of(case)
        grads = [torch.ones_like(t) for t in backend.run(call, attention, tensors, return_lse=True)]
        first = backend.run(gradients, call, attention, tensors, grads, return_lse=True)
        for _ in range(200):
            again = backend.run(gradients, call, attention, tensors, grads, return_lse=True)
            assert all(map(torch.equal, first, again))


def test_finite_differences_of_the_emulated_forward():
    """lse is float32 and its inputs are exact: its slope along a line is that of the emulated backward.

    Allowed is what the same difference of the definition in float64 is off, and what rounding makes of either side.
    """
    case = Case("line", batch=1, seq_q=9, seq_k=21, heads=2, kv_heads=1, dtype=torch.float16, causal=True)
    (q, k, v), kwargs = case.inputs()
    places = [
        ((t.double() * 256).round() / 256).clamp(-3, 3) for t in (q, k)
    ]  # what is added to them is exact in float16
    grad = torch.randn(1, 2, 9, generator=torch.Generator().manual_seed(2)).double()
    step = 2.0**-6

    def definition(*args, return_lse, **kwargs):
        return reference.attention(*args, **kwargs)

    def lse_of(function, places, dtype):
        q, k = (t.to(dtype) for t in places)
        return function(q, k, v.to(dtype), return_lse=True, **kwargs)[1].double()

    def slopes(function, dtype):
        leaves = [t.clone().requires_grad_() for t in places]
        return torch.autograd.grad(lse_of(function, leaves, dtype), leaves, grad)

    exact = slopes(definition, torch.float64)
    uphill = [t.sign() for t in exact]

    def difference(function, dtype):
        ends = ([t + sign * step * way for t, way in zip(places, uphill, strict=True)] for sign in (1, -1))
        high, low = ((lse_of(function, end, dtype) * grad).sum() for end in ends)
        return (high - low).item() / (2 * step)

    backend = EMULATED[0]
    found = sum((g * way).sum().item() for g, way in zip(backend.run(slopes, attention, q.dtype), uphill, strict=True))
    slope = sum(g.abs().sum().item() for g in exact)
    of_lse = torch.finfo(torch.float32).eps * 8 * grad.abs().sum().item() / step
    allowed = 2 * abs(difference(definition, torch.float64) - slope) + torch.finfo(q.dtype).eps * slope + of_lse
    assert abs(found - backend.run(difference, attention, q.dtype)) <= allowed
    assert slope > 20 * allowed, "a slope that is lost in what is allowed says nothing"


# ---- every barrier and every wait is needed, and seen to be missing --------------------------------------------------


def run_faulty() -> None:
    """Masked and plain blocks, and values that are not finite: every path of the kernel runs."""
    case = Case("faulty", batch=1, seq_q=160, seq_k=160, heads=1, kv_heads=1, head_dim=64, dtype=torch.bfloat16)
    _, tensors, call = inputs_of(replace(case, causal=True))
    o, lse = EMULATED[0].run(call, attention, tensors, return_lse=True)
    tensors[1][:, 140] = math.inf
    grad_o = torch.ones_like(o)
    grad_o[:, [140, 155]] = math.nan  # in both parts of a block
    EMULATED[0].run(gradients, call, attention, tensors, [grad_o, torch.zeros_like(lse)], return_lse=True)
    of_group = replace(case, heads=2)  # a walk over the blocks of each head
    # The first head sees nothing.
    mask = create_block_mask(lambda b, h, i, j: (h == 1) & (i // 60 % 2 == j // 60 % 2), None, 2, 160, 160, block=64)
    _, tensors, call = inputs_of(replace(of_group, block_mask=mask))
    grads = [torch.ones_like(t) for t in EMULATED[0].run(call, attention, tensors, return_lse=True)]
    EMULATED[0].run(gradients, call, attention, tensors, grads, return_lse=True)
    for seq_q, seq_k in ((200, 10), (10, 200)):  # tiles of queries that see nothing, and of keys that nothing sees
        _, tensors, call = inputs_of(replace(case, seq_q=seq_q, seq_k=seq_k, causal=True, window=(5, 0)))
        grads = [torch.ones_like(t) for t in EMULATED[0].run(call, attention, tensors, return_lse=True)]
        EMULATED[0].run(gradients, call, attention, tensors, grads, return_lse=True)


@pytest.mark.parametrize("which", ["ELNS0_4PassE0E", "ELNS0_4PassE1E"], ids=["queries", "keys"])
def test_every_barrier_and_wait_that_is_taken_out_is_reported(which):
    total, unseen = missing_synchronisations("attention_backward_kernel", "BFloat16ELi64" + which, run_faulty)
    assert total >= 8
    assert unseen == []
