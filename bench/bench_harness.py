# SPDX-License-Identifier: Apache-2.0
"""The harness itself: its noise is a row of the table, and what disagrees or is not faster is not reported so."""

from __future__ import annotations

import measure
import pytest
import torch
from measure import Contender


@pytest.mark.parametrize("size", [512], ids="mm {}".format)
def test_same_against_same(compare, device, size):
    """torch.mm beside itself: the noise of this run; every other row is read against this one."""
    args = tuple(torch.randn(size, size, device=device) for _ in range(2))
    compare(
        "noise",
        f"mm {size}",
        Contender("torch.mm", torch.mm, [args]),
        [Contender("itself", torch.mm, [args])],
        flops=2 * size**3,
    )


def test_twice_the_work_takes_twice_the_time(device):
    """In the same rounds, through the same clock."""
    args = [tuple(torch.randn(512, 512, device=device) for _ in range(2))]

    def twice(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.mm(a, b)
        torch.mm(a, b)

    def ratio() -> float:
        return measure.seconds_of(twice, args * 5, device) / measure.seconds_of(torch.mm, args * 5, device)

    ratios = sorted(ratio() for _ in range(15))
    assert 1.6 < ratios[7] < 2.4


@pytest.mark.parametrize("wrong", ["value", "dtype", "shape"])
def test_disagreement_is_refused(wrong):
    """A contender whose result is another one is not timed."""
    x = torch.randn(64)
    changed = {"value": x + 1e-3, "dtype": x.double(), "shape": x[None]}[wrong]
    ours = Contender("ours", torch.Tensor.clone, [(x,)])
    with pytest.raises(AssertionError, match="ours and peer disagree, so neither is timed"):
        measure.require_agreement(ours, [Contender("peer", torch.Tensor.clone, [(changed,)])])
