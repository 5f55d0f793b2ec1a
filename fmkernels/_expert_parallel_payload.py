# SPDX-License-Identifier: Apache-2.0
"""Tokens of fewer bytes for the way to their experts: int8 or float8, with a scale for each token."""

from __future__ import annotations

import torch
from torch import Tensor

PAYLOADS: dict[str, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, 127.0),
    "float8_e4m3fn": (torch.float8_e4m3fn, 448.0),
}


def encode(x: Tensor, payload: str | None) -> list[Tensor]:
    """[x], or [values [num_tokens, hidden], scales [num_tokens, 1]] with x = values * scales.

    int8 is off by at most half a scale, that is largest / 254; float8_e4m3fn by at most 1 / 16 of the element, or of
    the smallest normal number, largest / 28672. A token with NaN or infinity has the scale NaN: it is NaN throughout.
    """
    if payload is None:
        return [x]
    dtype, largest = PAYLOADS[payload]
    x = x.float()
    peaks = x.abs().amax(1, keepdim=True) if x.shape[1] > 0 else x.new_zeros(x.shape[0], 1)
    scales = torch.where(peaks.isfinite(), peaks / largest, torch.nan)
    values = (x / scales).nan_to_num(0.0, 0.0, 0.0)  # zeros where the scale is 0 or no number
    if dtype == torch.int8:
        values = values.round()
    return [values.clamp(-largest, largest).to(dtype), scales]


def decode(parts: list[Tensor], dtype: torch.dtype, payload: str | None) -> Tensor:
    if payload is None:
        return parts[0]
    values, scales = parts
    return (values.float() * scales).to(dtype)
