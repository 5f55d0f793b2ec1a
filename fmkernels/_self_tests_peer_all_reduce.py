# SPDX-License-Identifier: Apache-2.0
"""Self-tests of the all-reduce over peer memory, for `doctor`: two ranks in one call, so that one device is enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _peer_all_reduce_checks as checks
from . import reference
from ._library import ops
from .testing import Backend, assert_as_good_as_torch

_EPS = 1e-6
_LANES, _TIMEOUT_MS = 1, 10000


def _random(backend: Backend, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(backend.device) for shape in shapes]


def _workspaces(backend: Backend) -> list[Tensor]:
    num_bytes = checks.least_bytes(2 * checks.GRANULE * 4, _LANES)
    return [torch.zeros(num_bytes, dtype=torch.uint8, device=backend.device) for _ in range(2)]


def _test_all_reduce(backend: Backend) -> None:
    xs = _random(backend, (3000,), (3000,))
    outs = [torch.zeros_like(x) for x in xs]
    ops.peer_all_reduce(xs, _workspaces(backend), outs, 0, False, 0, 128, True, _LANES, _TIMEOUT_MS)
    for out in outs:
        assert_as_good_as_torch(out, lambda *xs: reference.peer_all_reduce.all_reduce(xs, op="avg"), *xs)


def _test_all_reduce_rms_norm(backend: Backend) -> None:
    *xs, residual, weight = _random(backend, *[(5, 70)] * 3, (70,))
    outs, residual_outs = ([torch.zeros_like(x) for x in xs] for _ in range(2))
    lists = (xs, [residual] * 2, weight, _workspaces(backend), outs, residual_outs)
    ops.peer_all_reduce_rms_norm(*lists, 0, True, 0, 128, _LANES, _EPS, _TIMEOUT_MS)

    def expected(a: Tensor, b: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return reference.peer_all_reduce.all_reduce_rms_norm([a, b], residual, weight, eps=_EPS, algorithm="one_shot")

    for results in zip(outs, residual_outs, strict=True):
        assert_as_good_as_torch(results, expected, *xs, residual, weight)


SELF_TESTS: dict[str, Callable[[Backend], None]] = {
    "peer_all_reduce": _test_all_reduce,
    "peer_all_reduce_rms_norm": _test_all_reduce_rms_norm,
}
