# SPDX-License-Identifier: Apache-2.0
"""The angles of the rotary embedding, made once on the host: plain, or stretched to longer contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _check as check

_OP = "rope_cache"
# The parameters of each kind of scaling and what they are when left out; ... : they may not be.
_PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": ...},
    "ntk": {"factor": ...},
    "dynamic": {"factor": ..., "original_max_position_embeddings": ...},
    "llama3": {
        "factor": ...,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ...,
    },
    "yarn": {
        "factor": ...,
        "original_max_position_embeddings": ...,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": None,
        "mscale": None,
        "mscale_all_dim": None,
        "truncate": True,
    },
}


def rope_cache(
    rotary_dim: int,
    num_positions: int,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """cos and sin of position * frequency[i], frequency[i] = base ** (-2 i / rotary_dim), as `rope` reads them.

    Args:
        rotary_dim: columns of a head that are rotated; even, at least 2.
        num_positions: rows; a token may stand at 0 to num_positions - 1.
        base: of the frequencies (`rope_theta`), above 1.
        scaling: None, or a mapping as `rope_scaling` and `rope_parameters` of a model's config.json. `rope_type` (or
            `type`) names the kind, other keys its parameters; `rope_theta` there overrides base.
            "linear" divides frequencies by `factor`. "ntk" takes base * factor ** (d / (d - 2)). "dynamic" does so with
            the factor that num_positions needs beyond `original_max_position_embeddings`. "llama3" divides those that
            turn less than `low_freq_factor` times in the original context, with a ramp up to `high_freq_factor`.
            "yarn" does so between `beta_slow` and `beta_fast` turns, and multiplies cos and sin with `attention_factor`
            (default 0.1 ln(factor) + 1, or of `mscale` and `mscale_all_dim`).
        dtype: float32, bfloat16 or float16.
        device: of the result.

    Returns:
        [num_positions, rotary_dim]: cos of all frequencies, then sin. Angles are computed in float64 and rounded once.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    After Su et al. 2021; Chen et al. 2023 (linear); Peng et al. 2023 (NTK, YaRN); the Llama 3 report.
    """
    check.integer(_OP, "rotary_dim", rotary_dim, 2)
    if rotary_dim % 2 != 0:
        raise ValueError(f"{_OP}: rotary_dim must be even, got {rotary_dim}.")
    check.integer(_OP, "num_positions", num_positions, 0)
    if dtype not in check.FLOAT_DTYPES:
        raise ValueError(f"{_OP}: dtype must be {check.dtype_names(check.FLOAT_DTYPES)}, got {dtype}.")
    kind, parameters = _read(scaling)
    base = parameters.pop("rope_theta", base)
    check.number(_OP, "base", base)
    if base <= 1:
        raise ValueError(f"{_OP}: base must be above 1, got {base}.")
    frequencies, magnitude = _frequencies(kind, parameters, rotary_dim, num_positions, float(base))
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    return (torch.cat([angles.cos(), angles.sin()], -1) * magnitude).to(device, dtype)


def _read(scaling: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """The kind of scaling and its parameters, defaults filled in."""
    if scaling is None:
        return "default", {}
    if not isinstance(scaling, Mapping):
        raise TypeError(f"{_OP}: scaling must be a mapping or None, got {type(scaling).__name__}.")
    given = dict(scaling)
    types = [given.pop(key) for key in ("rope_type", "type") if key in given]
    kind = types[0] if types else "default"
    if kind not in _PARAMETERS:
        raise ValueError(f"{_OP}: scaling must have a rope_type of {', '.join(_PARAMETERS)}, got {kind!r}.")
    result: dict[str, Any] = {"rope_theta": given.pop("rope_theta")} if "rope_theta" in given else {}
    for name, default in _PARAMETERS[kind].items():
        value = given.pop(name, default)
        if value is ...:
            raise ValueError(f"{_OP}: scaling of type {kind} must have a {name}, got {sorted(scaling)}.")
        if name == "truncate":
            check.flag(_OP, name, value)
        elif value is not None or default is not None:
            check.number(_OP, name, value)
            if value <= 0:
                raise ValueError(f"{_OP}: {name} must be above 0, got {value}.")
        result[name] = value
    if given:
        raise ValueError(
            f"{_OP}: scaling of type {kind} must have no {sorted(given)[0]}, got {given[sorted(given)[0]]!r}."
        )
    return kind, result


def _frequencies(
    kind: str, parameters: dict[str, Any], dim: int, num_positions: int, base: float
) -> tuple[Tensor, float]:
    """(frequencies [dim / 2], what cos and sin are multiplied with)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    factor = parameters.get("factor", 1.0)
    original = parameters.get("original_max_position_embeddings")
    if kind in ("ntk", "dynamic"):
        if dim == 2:
            raise ValueError(f"{_OP}: scaling of type {kind} must have a rotary_dim above 2, got 2.")
        stretch = factor if kind == "ntk" else factor * max(num_positions, original) / original - (factor - 1)
        base *= stretch ** (dim / (dim - 2))
    plain = base**-exponents
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "llama3":
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        if high <= low:
            raise ValueError(f"{_OP}: high_freq_factor must be above low_freq_factor, {low}, got {high}.")
        turns = original * plain / (2 * math.pi)  # within the context of pretraining
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * keep + plain / factor * (1 - keep), 1.0
    if kind == "yarn":
        keep = 1 - _yarn_ramp(parameters, dim, base)
        return plain * keep + plain / factor * (1 - keep), _yarn_magnitude(parameters)
    return plain, 1.0


def _yarn_ramp(parameters: dict[str, Any], dim: int, base: float) -> Tensor:
    """0 for the frequencies that turn beta_fast times in the context of pretraining, 1 for beta_slow."""

    def index_of(turns: float) -> float:
        original = parameters["original_max_position_embeddings"]
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = index_of(parameters["beta_fast"]), index_of(parameters["beta_slow"])
    if parameters["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    return ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)


def _yarn_magnitude(parameters: dict[str, Any]) -> float:
    factor, given = parameters["factor"], parameters["attention_factor"]

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if given is not None:
        return given
    if parameters["mscale"] and parameters["mscale_all_dim"]:
        return magnitude(parameters["mscale"]) / magnitude(parameters["mscale_all_dim"])
    return magnitude(1.0)
