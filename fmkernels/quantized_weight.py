# SPDX-License-Identifier: Apache-2.0
"""`QuantizedWeight`, a matrix of 8 or 4 bits as `quantized_linear` reads it, and `quantize_weight`, which makes one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check as check

GROUP_SIZES = (32, 64, 128)
_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_INTEGER_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, *_WIDE_UNSIGNED)
PANEL, _CHUNK = 32, 32  # rows and columns that the tensors are padded to
_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each nibble of a word is, from the lowest


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight:
    """A matrix [out_features, in_features] of small integers, a scale for each group of columns of a row.

        w[n, k] = scale[n, k // group_size] * (q[n, k] - zero[n, k // group_size])

    Made by `quantize_weight`, or by `QuantizedWeight.from_integers` of what another library has quantised. The tensors
    are drawn in docs/layouts.md; rows are padded to panels of 32 and columns to 32.

    Args:
        values: [panels, words, 32] int32, contiguous: four columns of q a word, or eight.
        scales: [panels, groups, 32] float32, contiguous.
        zeros: [panels, groups, 32] uint8, contiguous, of which the lower 4 bits count; None: 0 with bits=8, 8 with
            bits=4.
        bits: 8, q from -128 to 127, or 4, q from 0 to 15.
        group_size: columns that share a scale, 32, 64 or 128; None: all of a row.
        out_features, in_features: the size of the matrix.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int | None
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        op = "QuantizedWeight"
        _check_format(op, self.bits, self.group_size)
        for name in ("out_features", "in_features"):
            check.integer(op, name, getattr(self, name), 1)
            if getattr(self, name) >= 2**31:
                raise ValueError(f"{op}: {name} must be below 2**31, got {getattr(self, name)}.")
        if self.zeros is not None and self.bits != 4:
            raise ValueError(f"{op}: zeros must be None with bits={self.bits}, got a tensor.")
        panels = -(-self.out_features // PANEL)
        words = -(-self.in_features // _CHUNK) * _CHUNK * self.bits // 32
        groups = num_groups(self.in_features, self.group_size)
        for name, rows, dtype in (
            ("values", words, torch.int32),
            ("scales", groups, torch.float32),
            ("zeros", groups, torch.uint8),
        ):
            t = getattr(self, name)
            if name == "zeros" and t is None:
                continue
            check.is_tensor(op, name, t)
            check.dtype(op, name, t, (dtype,))
            check.same_device(op, name, t, "values", self.values)
            if list(t.shape) != [panels, rows, PANEL]:
                raise ValueError(
                    f"{op}: {name} must be [{panels}, {rows}, {PANEL}] for a matrix of {self.out_features} rows and "
                    f"{self.in_features} columns, got {list(t.shape)}."
                )
            if not t.is_contiguous():
                raise ValueError(f"{op}: {name} must be contiguous, got strides {list(t.stride())}.")
        if self.scales.requires_grad:
            raise ValueError(f"{op}: scales must not require a gradient, which no op gives.")

    @classmethod
    def from_integers(
        cls, q: Tensor, scales: Tensor, zeros: Tensor | None = None, *, bits: int = 8, group_size: int | None = None
    ) -> QuantizedWeight:
        """Packs integers, such as those of a GPTQ or AWQ checkpoint once its own packing is undone.

        Args:
            q: [out_features, in_features], any dtype of integers; from -128 to 127 with bits=8, 0 to 15 with bits=4.
            scales: [out_features, groups] float32, bfloat16 or float16; groups = ceil(in_features / group_size), or 1.
            zeros: [out_features, groups], integers from 0 to 15, with bits=4; None: 8.
            bits: 8 or 4.
            group_size: 32, 64 or 128; None: one scale a row.

        Raises:
            ValueError, TypeError: one sentence with the argument, its rule and what came.
        """
        op = "QuantizedWeight.from_integers"
        _check_format(op, bits, group_size)
        check.is_tensor(op, "q", q)
        check.rank(op, "q", q, 2, "[out_features, in_features]")
        _check_integers(op, "q", q, *((-128, 127) if bits == 8 else (0, 15)))
        rows, columns = q.shape
        if q.numel() == 0:
            raise ValueError(f"{op}: q must have a row and a column, got {list(q.shape)}.")
        groups = num_groups(columns, group_size)
        for name, t in (("scales", scales), ("zeros", zeros)):
            if name == "zeros" and zeros is None:
                continue
            check.is_tensor(op, name, t)
            check.same_device(op, name, t, "q", q)
            if list(t.shape) != [rows, groups]:
                raise ValueError(f"{op}: {name} must be [{rows}, {groups}] for this q, got {list(t.shape)}.")
        check.dtype(op, "scales", scales, check.FLOAT_DTYPES)
        if zeros is not None:
            _check_integers(op, "zeros", zeros, 0, 15)
        values = _panels(_pack(F.pad(q.to(torch.uint8), (0, -columns % _CHUNK)), bits))
        scales = _panels(scales.detach().float())
        return cls(
            values,
            scales,
            None if zeros is None else _panels(zeros.to(torch.uint8)),
            bits,
            group_size,
            rows,
            columns,
        )

    def integers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(q, scales, zeros) as `from_integers` takes them: int8 or uint8, float32, uint8 or None."""
        scales, zeros = (None if t is None else _rows(t)[: self.out_features] for t in (self.scales, self.zeros))
        q = _unpack(_rows(self.values), self.bits)[: self.out_features, : self.in_features]
        return q.view(torch.int8) if self.bits == 8 else q, scales, None if zeros is None else zeros & 15

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.out_features, self.in_features

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(t.nbytes for t in (self.values, self.scales, self.zeros) if t is not None)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on a device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        tensors = (self.values.to(device), self.scales.to(device), zeros)
        return QuantizedWeight(*tensors, self.bits, self.group_size, *self.shape)

    def __repr__(self) -> str:
        symmetric = "" if self.zeros is None else ", with zeros"
        return (
            f"QuantizedWeight({self.out_features} x {self.in_features}, bits={self.bits}, group_size={self.group_size}"
            f"{symmetric}, {self.nbytes} bytes, {self.device})"
        )


def quantize_weight(
    weight: Tensor, *, bits: int = 8, group_size: int | None = None, symmetric: bool = True
) -> QuantizedWeight:
    """Rounds a weight to integers of 8 or 4 bits, each group of columns of a row with its own scale.

        bits=8               scale = max|w| / 127,          q = round(w / scale)
        bits=4, symmetric    scale = max|w| / 7.5,          q = min(round(w / scale), 7) + 8
        bits=4, otherwise    scale = (max w - min w) / 15,  q = round(w / scale) + zero,  zero = round(-min w / scale)

    Rounding is to nearest even; min w and max w include 0. No weight moves by more than half a scale.

    Args:
        weight: [out_features, in_features], float32, bfloat16 or float16, finite, any strides.
        bits: 8 or 4.
        group_size: columns that share a scale, 32, 64 or 128, the last group may be shorter; None: all of a row, for
            bits=8 alone, since 4 bits do not span a row.
        symmetric: False, with bits=4: a zero point for each group, for weights whose ranges are not centred.

    Returns:
        The weight, on the device of `weight`. It is a constant: no gradient flows into it.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "quantize_weight"
    _check_format(op, bits, group_size)
    if bits == 4 and group_size is None:
        raise ValueError(f"{op}: group_size must be 32, 64 or 128 with bits=4, got None.")
    check.flag(op, "symmetric", symmetric)
    if bits == 8 and not symmetric:
        raise ValueError(f"{op}: symmetric must be True with bits=8, got False.")
    check.is_tensor(op, "weight", weight)
    check.rank(op, "weight", weight, 2, "[out_features, in_features]")
    check.dtype(op, "weight", weight, check.FLOAT_DTYPES)
    if weight.numel() == 0:
        raise ValueError(f"{op}: weight must have a row and a column, got {list(weight.shape)}.")
    if not weight.is_meta and not weight.isfinite().all():
        raise ValueError(f"{op}: weight must be finite, got infinity or NaN.")
    rows, columns = weight.shape
    width = columns if group_size is None else group_size
    w = F.pad(weight.detach().float(), (0, -columns % width)).view(rows, -1, width)
    zeros = None
    if bits == 8:
        scales = w.abs().amax(-1) / 127
    elif symmetric:
        scales = w.abs().amax(-1) / 7.5
    else:
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        scales = high / 15 - low / 15  # high - low may be beyond float32
        zeros = (-low / scales).nan_to_num_(0.0).round_().clamp_(0, 15)
    q = (w / scales.unsqueeze(-1)).nan_to_num_(0.0, 0.0, 0.0).round_()  # a group of zeros, or too small for a scale
    if bits == 4:
        q = (q + (8 if zeros is None else zeros.unsqueeze(-1))).clamp_(0, 15)
    q = q.to(torch.int8).view(rows, -1)[:, :columns]
    return QuantizedWeight.from_integers(
        q, scales, None if zeros is None else zeros.to(torch.uint8), bits=bits, group_size=group_size
    )


def num_groups(in_features: int, group_size: int | None) -> int:
    """Scales of a row."""
    return 1 if group_size is None else -(-in_features // group_size)


def _check_format(op: str, bits: int, group_size: int | None) -> None:
    check.integer(op, "bits", bits, 0)
    if bits not in (4, 8):
        raise ValueError(f"{op}: bits must be 8 or 4, got {bits}.")
    if group_size is None:
        return
    check.integer(op, "group_size", group_size, 0)
    if group_size not in GROUP_SIZES:
        raise ValueError(f"{op}: group_size must be 32, 64, 128 or None, got {group_size}.")


def _check_integers(op: str, name: str, t: Tensor, low: int, high: int) -> None:
    if t.dtype not in _INTEGER_DTYPES:
        raise ValueError(f"{op}: {name} must be integers, got {check.dtype_names((t.dtype,))}.")
    if t.is_meta or t.numel() == 0:
        return
    if t.dtype in _WIDE_UNSIGNED:  # torch takes no minimum of them, and uint64 beyond int64 becomes negative
        t, low = t.long(), 0
    smallest, largest = (int(x) for x in t.aminmax())  # compared as Python's: -128 is 128 in uint8
    if smallest < low or largest > high:
        raise ValueError(f"{op}: {name} must lie from {low} to {high}, got {smallest} to {largest}.")


def _pack(q: Tensor, bits: int) -> Tensor:
    """Words [rows, columns of a whole chunk * bits / 32] of uint8 [rows, columns]."""
    if bits == 4:
        q = q.unflatten(1, (-1, 8))[..., _NIBBLES]
        q = (q[..., 0::2] | q[..., 1::2] << 4).flatten(1)
    return q.contiguous().view(torch.int32)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`."""
    q = words.contiguous().view(torch.uint8)
    if bits == 4:
        q = torch.stack([q & 15, q >> 4], -1).unflatten(1, (-1, 4)).flatten(-2)
        q = q[..., sorted(range(8), key=_NIBBLES.__getitem__)].flatten(1)
    return q


def _panels(t: Tensor) -> Tensor:
    """[panels, columns, 32] of [rows, columns], zeros below the last row."""
    return F.pad(t, (0, 0, 0, -len(t) % PANEL)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def _rows(t: Tensor) -> Tensor:
    """The inverse of `_panels`, padding included."""
    return t.transpose(1, 2).flatten(0, 1)
