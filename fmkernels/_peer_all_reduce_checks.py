# SPDX-License-Identifier: Apache-2.0
"""Argument checks of `fmkernels.peer_all_reduce`, and the least that a workspace must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _check as check
from ._library import needs_grad

MAX_RANKS, MAX_LANES = 16, 64
HEADER_BYTES = 16384  # of a workspace; and elements that a lane of a kernel writes at least at a time:
GRANULE = 2048


def least_bytes(slice_bytes: int, lanes: int) -> int:
    """Of a workspace whose lanes have so much of each half."""
    return HEADER_BYTES + 2 * lanes * (-(-slice_bytes // 256) * 256)


def code_and_block(name: str, bits: Any, block: Any, algorithm: Any) -> tuple[int, int]:
    """What the op calls bits, and block."""
    if isinstance(bits, bool) or not isinstance(bits, int | None) or bits not in (8, 6, 4, None):
        raise ValueError(f"{name}: bits must be 8, 6, 4 or None, got {bits!r}.")
    if isinstance(block, bool) or not isinstance(block, int) or block not in (32, 64, 128, 256, 512, 1024, 2048):
        raise ValueError(f"{name}: block must be a power of two from 32 to 2048, got {block!r}.")
    if algorithm not in ("two_shot", "one_shot"):
        raise ValueError(f"{name}: algorithm must be 'two_shot' or 'one_shot', got {algorithm!r}.")
    return bits or 0, block


def check_plain(name: str, **tensors: Any) -> None:
    for argument, tensor in tensors.items():
        check.is_tensor(name, argument, tensor)
    if needs_grad(*tensors.values()):
        raise ValueError(f"{name}: the tensors must not require gradients, which it has none of; call it in no_grad().")


def _check_list(name: str, argument: str, tensors: Sequence[Tensor], x: Tensor) -> None:
    for tensor in tensors:
        check.is_tensor(name, argument, tensor)
        check.dtype(name, argument, tensor, check.FLOAT_DTYPES)
        check.same_dtype(name, argument, tensor, "x", x)
        check.same_device(name, argument, tensor, "x", x)
        check.shape(name, argument, tensor, "x", x)
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: {argument} must be contiguous, its strides are {tensor.stride()}.")


def check_all_reduce(
    x: Sequence[Tensor],
    workspaces: Sequence[Tensor],
    out: Sequence[Tensor],
    rank: int,
    one_shot: bool,
    bits: int,
    block: int,
    average: bool,
    lanes: int,
    timeout_ms: int,
) -> None:
    del rank, one_shot, bits, block, average, lanes, timeout_ms
    name = "all_reduce"
    _check_list(name, "x", x, x[0])
    _check_list(name, "out", out, x[0])
    check.same_device(name, "x", x[0], "the workspace", workspaces[0])
    check.kernel_exists(name, "peer_all_reduce", x[0])


def check_all_reduce_rms_norm(
    x: Sequence[Tensor],
    residual: Sequence[Tensor],
    weight: Tensor,
    workspaces: Sequence[Tensor],
    out: Sequence[Tensor],
    residual_out: Sequence[Tensor],
    rank: int,
    one_shot: bool,
    bits: int,
    block: int,
    lanes: int,
    eps: float,
    timeout_ms: int,
) -> None:
    del rank, one_shot, lanes, eps, timeout_ms
    name, like = "all_reduce_rms_norm", x[0]
    _check_list(name, "x", x, like)
    if like.dim() < 1 or like.shape[-1] < 1:
        raise ValueError(f"{name}: x must have a last dimension of at least 1, got shape {list(like.shape)}.")
    for argument, tensors in (("residual", residual), ("out", out), ("residual_out", residual_out)):
        _check_list(name, argument, tensors, like)
    hidden = like.shape[-1]
    check.rank(name, "weight", weight, 1, "[hidden]")
    check.size(name, "weight", weight, 0, "the last dimension of x,", hidden)
    check.same_device(name, "weight", weight, "x", like)
    check.dtype(name, "weight", weight, check.FLOAT_DTYPES)
    check.float32_or_dtype_of(name, "weight", weight, "x", like)
    check.last_dim_contiguous(name, "weight", weight)
    if bits and hidden % block:
        raise ValueError(f"{name}: the last dimension of x must be a multiple of block, {block}, got {hidden}.")
    check.same_device(name, "x", like, "the workspace", workspaces[0])
    check.kernel_exists(name, "peer_all_reduce_rms_norm", like)
