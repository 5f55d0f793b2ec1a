# SPDX-License-Identifier: Apache-2.0
"""The memory of a training step of attention grows with the sequence, not with its square."""

import subprocess
import sys

STEP = """
import sys
import torch
from fmkernels import attention

torch.set_num_threads(1)

def peak():  # in KiB, of this process alone: getrusage begins with the peak of the parent
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def step(seq):
    leaves = [torch.randn(1, seq, 1, 64, requires_grad=True) for _ in range(3)]
    attention(*leaves, causal=True).sum().backward()

step(64)
before = peak()
step(int(sys.argv[1]))
print(peak() - before)
"""


def peak_growth(seq: int) -> int:
    """By how much a step raises the peak of a process of its own."""
    command = [sys.executable, "-c", STEP, str(seq)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_sequence_twice_as_long_takes_twice_the_memory():
    once, twice = peak_growth(4096), peak_growth(8192)
    assert once * 1024 > 4096 * 64 * 4, "less than one tensor of the step: nothing was measured"
    assert twice < 3 * once, "scores of all pairs would take four times as much"
