# SPDX-License-Identifier: Apache-2.0
"""Products by groups of rows in each instruction set of the CPU: the kernels differ, and so do their edges.

Sums are exact here, so every one must have the very bits. The set is chosen when the library is loaded, hence a process
for each."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from instruction_sets import BELOW, IN_USE

from fmkernels import moe, reference
from fmkernels.testing import assert_as_good_as_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (0, 1, 2, 4, 5, 6, 7, 9, 13, 25, 130)  # rows of the experts
INNER_AND_COLUMNS = [(1, 1), (31, 2), (32, 7), (33, 8), (65, 9), (256, 33), (257, 128), (2049, 130), (4130, 6)]
INNER_ROWS = (0, 1, 2, 3, 48, 255, 256, 257, 513)
LEFT_AND_RIGHT = [(1, 1), (2, 33), (12, 32), (13, 31), (119, 16), (121, 130), (250, 17)]


def whole(*shape, dtype, seed=0):
    """Numbers that every dtype holds, and float32 every sum of their products."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends(counts):
    return torch.tensor(counts).cumsum(0).int()


def check_grouped_mm(dtype):
    for (inner, columns), has_bias in itertools.product(INNER_AND_COLUMNS, (False, True)):
        a, b = whole(sum(COUNTS) + 3, inner, dtype=dtype), whole(len(COUNTS), inner, columns, dtype=dtype, seed=1)
        bias = whole(len(COUNTS), columns, dtype=torch.float32, seed=2) if has_bias else None
        options = {} if bias is None else {"bias": bias.double()}
        expected = reference.moe.grouped_mm(a.double(), b.double(), ends(COUNTS), **options).to(dtype)
        for by_columns in (False, True):
            matrix = b.transpose(1, 2).contiguous().transpose(1, 2) if by_columns else b
            actual = moe.grouped_mm(a, matrix, ends(COUNTS), bias=bias)
            assert torch.equal(actual, expected), (inner, columns, has_bias, by_columns)


def check_inner(dtype):
    for left, right in LEFT_AND_RIGHT:
        a, b = whole(sum(INNER_ROWS), left, dtype=dtype), whole(sum(INNER_ROWS), right, dtype=dtype, seed=1)
        expected = reference.moe.grouped_mm(a.double().t(), b.double(), ends(INNER_ROWS)).to(dtype)
        assert torch.equal(moe.grouped_mm(a.t(), b, ends(INNER_ROWS)), expected), (left, right)


def check_gated(dtype):
    counts = (1, 5, 13, 0, 40)
    for (inner, width), interleaved in itertools.product([(33, 1), (65, 9), (300, 26), (2049, 66)], (False, True)):
        a = whole(sum(counts), inner, dtype=dtype) / 4
        b = whole(len(counts), inner, 2 * width, dtype=dtype, seed=1) / 4
        both = reference.moe.grouped_mm(a.double(), b.double(), ends(counts)).float()  # exact
        gate, up = (both[:, 0::2], both[:, 1::2]) if interleaved else both.chunk(2, -1)
        unit = lambda g, u: (torch.nn.functional.silu(g) * u).to(torch.promote_types(g.dtype, dtype))  # noqa: E731
        for by_columns in (False, True):
            matrix = b.transpose(1, 2).contiguous().transpose(1, 2) if by_columns else b
            actual = moe.grouped_mm_gated(a, matrix, ends(counts), interleaved=interleaved)
            assert actual.dtype == dtype
            assert_as_good_as_torch(actual, unit, gate, up)


def check_mlp(dtype):
    """The bits of its parts, for weights that lie either way; what a NaN and an infinite weight reach."""
    num_experts, hidden, width = 5, 70, 33
    x = whole(61, hidden, dtype=dtype) / 4
    w_gate_up, w_down = (
        whole(num_experts, *shape, dtype=dtype, seed=s) / 8
        for s, shape in ((1, (2 * width, hidden)), (2, (hidden, width)))
    )
    idx = torch.randint(-1, num_experts - 1, (61, 2), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    idx[:3, 0], idx[:, 1] = num_experts - 1, torch.where(idx[:, 1] == 1, -1, idx[:, 1])  # one expert with three rows
    weights = torch.rand(61, 2, generator=torch.Generator().manual_seed(4))
    x[0, 3], w_gate_up[num_experts - 1, 5, 7] = math.nan, math.inf
    mapping = moe.build_mapping(idx, num_experts, alignment=4)
    inner = moe.grouped_mm_gated(x, w_gate_up, mapping, trans_b=True)
    assert not inner[mapping.pos_to_token < 0].any()
    out = moe.combine(moe.grouped_mm(inner, w_down, mapping.expert_offsets[0], trans_b=True), mapping, weights)
    assert out[0].isnan().all()
    assert out[3:].isfinite().all()
    for by_rows in (False, True):
        given = [w.transpose(1, 2).contiguous().transpose(1, 2) if by_rows else w for w in (w_gate_up, w_down)]
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(moe.moe_mlp(x, *given, weights, idx)[3:], out[3:])
            kept = moe.moe_mlp(x.clone().requires_grad_(), *given, weights, idx)
            assert torch.equal(kept.detach()[3:], out[3:])


CHECKS = {"grouped_mm": check_grouped_mm, "inner": check_inner, "gated": check_gated, "mlp": check_mlp}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("check", CHECKS)
def test_the_set_in_use(check, dtype):
    CHECKS[check](dtype)


@pytest.mark.parametrize("isa", BELOW)
def test_the_sets_below_it(isa):
    run = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"FMKERNELS_CPU_ISA": isa}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout == f"{isa}: {len(CHECKS) * len(DTYPES)} checks\n"


if __name__ == "__main__":
    for check, dtype in itertools.product(CHECKS.values(), DTYPES):
        check(dtype)
    print(f"{IN_USE}: {len(CHECKS) * len(DTYPES)} checks")
