# SPDX-License-Identifier: Apache-2.0
"""Self-tests of the codec of blocks, for `doctor`: the bytes of its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import block_codec, reference
from .testing import Backend

_NUMEL = 2500
_FORMAT: dict[str, Any] = {"bits": 6, "block": 64, "hadamard": True}
_DRAWN: dict[str, Any] = {"rounding": "stochastic", "seed": 5, "step": 1}


def _numbers() -> Tensor:
    return torch.randn(_NUMEL, generator=torch.Generator().manual_seed(0))


def _wires(count: int) -> Tensor:
    return torch.stack([reference.block_codec.quantize(_numbers() * (rank + 1), **_FORMAT) for rank in range(count)])


def _assert_same(actual: Tensor, expected: Tensor) -> None:
    wrong = int((actual.cpu().view(torch.uint8) != expected.view(torch.uint8)).sum())
    assert wrong == 0, f"output 0: error in {wrong} bytes of {expected.nbytes}"


def _wire(backend: Backend, bits: int) -> Tensor:
    """To write to: new memory might hold the bytes of the last call."""
    num_bytes = block_codec.wire_bytes(_NUMEL, bits=bits, block=_FORMAT["block"])
    return torch.full((num_bytes,), 255, dtype=torch.uint8, device=backend.device)


def _test_quantize(backend: Backend) -> None:
    x = _numbers()
    out = _wire(backend, _FORMAT["bits"])
    actual = block_codec.quantize(x.to(backend.device), **_FORMAT, **_DRAWN, out=out)
    _assert_same(actual, reference.block_codec.quantize(x, **_FORMAT, **_DRAWN))


def _test_sum(backend: Backend) -> None:
    wires = _wires(2)
    out = torch.full((_NUMEL,), torch.nan, device=backend.device)
    actual = block_codec.sum_wires(wires.to(backend.device), _NUMEL, **_FORMAT, out=out)
    _assert_same(actual, reference.block_codec.sum_wires(wires, _NUMEL, **_FORMAT))


def _test_reduce(backend: Backend) -> None:
    wires = _wires(3)
    options = {**_FORMAT, **_DRAWN, "out_bits": 4, "op": "avg"}
    actual = block_codec.reduce_wires(wires.to(backend.device), _NUMEL, **options, out=_wire(backend, 4))
    _assert_same(actual, reference.block_codec.reduce_wires(wires, _NUMEL, **options))


SELF_TESTS: dict[str, Callable[[Backend], None]] = {
    "block_codec_quantize": _test_quantize,
    "block_codec_sum": _test_sum,
    "block_codec_reduce": _test_reduce,
}
