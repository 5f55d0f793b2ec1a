# SPDX-License-Identifier: Apache-2.0
"""`SemiStructured`, a matrix of which two of each four neighbours in a row are stored, and the mask that makes one."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._library import call, ops, register_fake

ROW_TILE, COLUMN_BLOCK, TILE_WORDS = 16, 64, 32  # of metadata


def semi_structured_mask(x: Tensor, *, both_directions: bool = False) -> Tensor:
    """What to keep of a matrix so that at most two of each four neighbours are not zero (2:4 sparsity).

    Of each four along a row the two largest magnitudes are kept, the lower column where they are equal. With
    `both_directions` each tile of 4 x 4 keeps two in every row and in every column, so that the transpose has the
    pattern too: of all 90 ways to do that the one with the largest sum of magnitudes, the lowest way where sums are
    equal. That is the best there is, where greedy choices are not. Infinity and NaN count as the largest finite
    number, so that they are kept rather than lost.

    Args:
        x: [rows, columns], float32, bfloat16 or float16, a contiguous last dimension; columns a multiple of 4.
        both_directions: True: rows must be a multiple of 4 too.

    Returns:
        [rows, columns] bool, contiguous: what is kept. No gradient flows through it.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later), the same mask on both: sums are of float32, in one order. Deterministic. After
    Mishra et al. 2021, Accelerating sparse deep neural networks, and Hubara et al. 2021, Accelerated sparse neural
    training: a provable and efficient method to find N:M transposable masks.
    """
    check.flag("semi_structured_mask", "both_directions", both_directions)
    x = x.detach() if isinstance(x, Tensor) else x
    return call(ops.semi_structured_mask, (x, both_directions), _check_mask_arguments)


class SemiStructured:
    """A matrix [rows, columns] of which each four neighbours in a row hold at most two elements that are not zero.

    Made by `SemiStructured.from_dense`; a constant, no gradient flows into it. Rows and columns are multiples of 16.
    The tensors are drawn in docs/layouts.md: they are what a tensor core takes.

    Args:
        values: [rows, columns / 2] float32, bfloat16 or float16, contiguous: the two kept of each four, in their order.
        metadata: [rows / 16, ceil(columns / 64), 32] int32, contiguous: where in its four each of them stands.
        transposed: values and metadata of the transpose, or None; it is what gradients need.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """

    def __init__(self, values: Tensor, metadata: Tensor, transposed: tuple[Tensor, Tensor] | None = None) -> None:
        op = "SemiStructured"
        _check_packed(op, ("values", values), ("metadata", metadata))
        if transposed is not None:
            if not isinstance(transposed, tuple) or len(transposed) != 2:
                raise TypeError(f"{op}: transposed must be None or (values, metadata), got {transposed!r}.")
            names = ("the values of transposed", "the metadata of transposed")
            _check_packed(op, *zip(names, transposed, strict=True))
            check.same_dtype(op, names[0], transposed[0], "values", values)
            check.same_device(op, names[0], transposed[0], "values", values)
            rows, columns = values.shape[0], 2 * values.shape[1]
            if list(transposed[0].shape) != [columns, rows // 2]:
                raise ValueError(
                    f"{op}: {names[0]} must be [{columns}, {rows // 2}] for a matrix of {rows} x {columns}, "
                    f"got {list(transposed[0].shape)}."
                )
        self.values, self.metadata, self.transposed = values, metadata, transposed

    @classmethod
    def _of(cls, values: Tensor, metadata: Tensor, transposed: tuple[Tensor, Tensor] | None) -> SemiStructured:
        """Of tensors that are right."""
        matrix = cls.__new__(cls)
        matrix.values, matrix.metadata, matrix.transposed = values, metadata, transposed
        return matrix

    @classmethod
    def from_dense(cls, w: Tensor, mask: Tensor | None = None, *, both_directions: bool = False) -> SemiStructured:
        """Packs what a mask keeps of a matrix.

        Args:
            w: [rows, columns], multiples of 16, float32, bfloat16 or float16, a contiguous last dimension.
            mask: [rows, columns] bool, at most two True of each four along a row and, with both_directions, along a
                column; None: `semi_structured_mask`. What it leaves out counts as zero.
            both_directions: packs the transpose too, for gradients and for `t()`.

        Raises:
            ValueError, TypeError: one sentence with the argument, its rule and what came.
        """
        op = "SemiStructured.from_dense"
        check.flag(op, "both_directions", both_directions)
        check_dense(op, "w", w)
        w = w.detach()
        if mask is None:
            mask = semi_structured_mask(w, both_directions=both_directions)
        else:
            _check_mask(op, mask, w, both_directions)
        packed = ops.semi_structured_pack(w, mask, False)
        return cls._of(*packed, ops.semi_structured_pack(w, mask, True) if both_directions else None)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return self.values.shape[0], 2 * self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(t.nbytes for t in (self.values, self.metadata, *(self.transposed or ())))

    def t(self) -> SemiStructured:
        """The transpose, which was packed beside the matrix."""
        if self.transposed is None:
            raise ValueError(
                "SemiStructured.t: the transpose must have been packed: from_dense(w, both_directions=True)."
            )
        return SemiStructured._of(*self.transposed, (self.values, self.metadata))

    def columns(self) -> Tensor:
        """[rows, columns / 2] int64: the column of each element of values."""
        places = _places(self.metadata)
        word = torch.arange(places.shape[1], device=self.device) // 8 * 16  # 16 columns a word, 4 a group
        group = torch.arange(places.shape[1], device=self.device) // 2 % 4 * 4
        return (places + word + group)[:, : self.values.shape[1]]

    def to_dense(self) -> Tensor:
        """[rows, columns], zeros where nothing is stored."""
        return self.values.new_zeros(self.shape).scatter_(1, self.columns(), self.values)

    def to(self, device: torch.device | str) -> SemiStructured:
        """The same matrix on a device."""
        transposed = None if self.transposed is None else tuple(t.to(device) for t in self.transposed)
        return SemiStructured._of(self.values.to(device), self.metadata.to(device), transposed)

    def __repr__(self) -> str:
        rows, columns = self.shape
        both = "" if self.transposed is None else ", both directions"
        dtype = check.dtype_names((self.dtype,))
        return f"SemiStructured({rows} x {columns}, {dtype}{both}, {self.nbytes} bytes, {self.device})"


def check_dense(op: str, name: str, w: Tensor) -> None:
    """A matrix that can be packed."""
    check.is_tensor(op, name, w)
    check.rank(op, name, w, 2, "[rows, columns]")
    check.dtype(op, name, w, check.FLOAT_DTYPES)
    if w.shape[0] % ROW_TILE or w.shape[1] % ROW_TILE:
        raise ValueError(
            f"{op}: {name} must have a multiple of {ROW_TILE} rows and of {ROW_TILE} columns, got {list(w.shape)}."
        )
    check.last_dim_contiguous(op, name, w)
    check.kernel_exists(op, "semi_structured_pack", w)


def _places(metadata: Tensor) -> Tensor:
    """[rows, columns / 2], whole column blocks: 0 to 3."""
    words = metadata.view(*metadata.shape[:2], 8, 4)  # [row tile, column block, g, word]: rows g and g + 8
    halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF], 1).permute(0, 1, 3, 2, 4)
    shifts = torch.arange(0, 16, 2, device=metadata.device)
    return (halves.flatten(3).flatten(0, 2).unsqueeze(-1) >> shifts & 3).flatten(1)


def _check_packed(op: str, named_values: tuple[str, Tensor], named_metadata: tuple[str, Tensor]) -> None:
    (name, values), (metadata_name, metadata) = named_values, named_metadata
    check.is_tensor(op, name, values)
    check.rank(op, name, values, 2, "[rows, columns / 2]")
    check.dtype(op, name, values, check.FLOAT_DTYPES)
    if values.requires_grad:
        raise ValueError(f"{op}: {name} must not require a gradient, which no op gives.")
    rows, columns = values.shape[0], 2 * values.shape[1]
    if rows % ROW_TILE or columns % ROW_TILE:
        raise ValueError(
            f"{op}: {name} must be those of a multiple of {ROW_TILE} rows and of {ROW_TILE} columns, "
            f"got {rows} x {columns}."
        )
    check.is_tensor(op, metadata_name, metadata)
    check.dtype(op, metadata_name, metadata, (torch.int32,))
    check.same_device(op, metadata_name, metadata, name, values)
    expected = [rows // ROW_TILE, -(-columns // COLUMN_BLOCK), TILE_WORDS]
    if list(metadata.shape) != expected:
        raise ValueError(
            f"{op}: {metadata_name} must be {expected} for a matrix of {rows} x {columns}, got {list(metadata.shape)}."
        )
    for tensor_name, t in (named_values, named_metadata):
        if not t.is_contiguous():
            raise ValueError(f"{op}: {tensor_name} must be contiguous, got strides {list(t.stride())}.")
    if metadata.numel() and check.sees_values(metadata):
        # 4 + second - first of each group, at most 7, in its four bits; above 4 the next sum has the highest one.
        words = metadata.long() & 0xFFFFFFFF
        difference = (words >> 2 & 0x33333333 | 0x44444444) - (words & 0x33333333)
        if (difference + 0x33333333 & 0x88888888 != 0x88888888).any():
            raise ValueError(
                f"{op}: {metadata_name} must name two places of each four, the smaller one first, got others."
            )


def _check_mask_arguments(x: Tensor, both_directions: bool) -> None:
    op = "semi_structured_mask"
    check.is_tensor(op, "x", x)
    check.rank(op, "x", x, 2, "[rows, columns]")
    check.dtype(op, "x", x, check.FLOAT_DTYPES)
    for dim, name in ((1, "columns"), (0, "rows")):
        if x.shape[dim] % 4 and (dim == 1 or both_directions):
            raise ValueError(f"{op}: x must have a multiple of 4 {name}, got {x.shape[dim]}.")
    check.last_dim_contiguous(op, "x", x)
    check.kernel_exists(op, "semi_structured_mask", x)


def _check_mask(op: str, mask: Tensor, w: Tensor, both_directions: bool) -> None:
    check.is_tensor(op, "mask", mask)
    check.dtype(op, "mask", mask, (torch.bool,))
    check.shape(op, "mask", mask, "w", w)
    check.same_device(op, "mask", mask, "w", w)
    check.last_dim_contiguous(op, "mask", mask)
    if not check.sees_values(mask):
        return
    for direction, lines in (("row", mask), ("column", mask.mT))[: 2 if both_directions else 1]:
        kept = lines.unflatten(1, (lines.shape[1] // 4, 4)).sum(-1)
        if (kept > 2).any():
            line, group = (kept > 2).nonzero()[0].tolist()
            raise ValueError(
                f"{op}: mask must keep at most 2 of each 4 along a {direction}, got {int(kept[line, group])} in "
                f"{direction} {line} from {4 * group} on."
            )


@register_fake("semi_structured_mask")
def _(x, both_directions):
    return x.new_empty(x.shape, dtype=torch.bool)


@register_fake("semi_structured_pack")
def _(x, mask, transposed):
    rows, columns = (x.shape[1], x.shape[0]) if transposed else x.shape
    words = (rows // ROW_TILE, (columns + COLUMN_BLOCK - 1) // COLUMN_BLOCK, TILE_WORDS)
    return x.new_empty((rows, columns // 2)), x.new_empty(words, dtype=torch.int32)
