# SPDX-License-Identifier: Apache-2.0
"""Products of a block-sparse and a dense matrix: `dsd`, `dds` and `sdd`, named by output, left and right operand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._block_sparse_checks import (
    as_float,
    check_dense,
    check_dsd,
    check_epilogue,
    check_major,
    check_sdd,
    operands,
    with_major,
)
from ._block_sparse_epilogue import ACTIVATIONS, FUNCTIONS, finish_blocks
from ._library import as_rows, autocast, call, needs_grad, no_view, ops, register_fake, register_flop_formula
from .block_sparse_matrix import BlockSparse
from .block_topology import BlockTopology


def dsd(
    s: BlockSparse,
    b: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """A block-sparse matrix times a dense one.

        out[i, n] = activation(scale[i] * sum_k s[i, k] b[k, n] + bias[i])

    Args:
        s: [rows, inner], or [batch, rows, inner]; as it is stored or transposed (`s.t()`).
        b: [inner, columns] or [batch, inner, columns], dtype of s, contiguous in its rows or in its columns. A batch
            with an s of 2 dimensions: each is multiplied by the same s. Of any dtype with an s of int8 values.
        scale: [rows] float32; a constant.
        bias: [rows], float32 or the dtype of b.
        activation: None, "relu", "gelu" (by erf) or "silu".

    Returns:
        [rows, columns] or [batch, rows, columns], dtype of b, contiguous. Rows without a block are activation(bias).

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU: float32, bfloat16, float16; CUDA (sm_80 and later): bfloat16, float16. Accumulates in float32 in the order of
    the blocks. An int8 value is its product with the scale of its block, in float32, on CUDA rounded to the dtype of b.
    Differentiable once in the values of s (if not int8), b and bias. Deterministic; a column has the same bits whatever
    the others are. FLOPs are counted; under autocast values and b take the autocast dtype. After Gale et al. 2022,
    MegaBlocks, and Gray et al. 2017, GPU kernels for block-sparse weights.
    """
    s, b = operands("dsd", s, "b", b)
    check_dense("dsd", "b", b, s, -2)
    return _multiply("dsd", s, b, False, scale, bias, activation)


def dds(
    a: Tensor,
    s: BlockSparse,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """A dense matrix times a block-sparse one; `dds(x, w.t())` is a linear layer with weight w.

        out[m, j] = activation(scale[j] * sum_k a[m, k] s[k, j] + bias[j])

    Args:
        a: [..., inner], dtype of s; with an s of 3 dimensions [batch, rows, inner]. Contiguous in its rows or columns.
            Of any dtype with an s of int8 values.
        s: [inner, columns], or [batch, inner, columns]; as it is stored or transposed (`s.t()`).
        scale: [columns] float32; a constant.
        bias: [columns], float32 or the dtype of a.
        activation: None, "relu", "gelu" (by erf) or "silu".

    Returns:
        [..., columns], dtype of a, contiguous. Columns without a block are activation(bias).

    Raises:
        ValueError, TypeError: as `dsd`.

    As `dsd`, in all else.
    """
    s, a = operands("dds", s, "a", a)
    if len(s.shape) == 3 or a.dim() == 2:
        check_dense("dds", "a", a, s, -1)
        return _multiply("dds", s.t(), a.mT, True, scale, bias, activation)
    if a.dim() == 0:
        raise ValueError("dds: a must be [..., inner], got 0 dimensions [].")
    flat = as_rows(a)
    check_dense("dds", "a", flat, s, -1)
    out = _multiply("dds", s.t(), flat.mT, True, scale, bias, activation)
    return no_view(out, (*a.shape[:-1], s.shape[-1]))


def sdd(
    a: Tensor,
    b: Tensor,
    topology: BlockTopology,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> BlockSparse:
    """The blocks of a product of two dense matrices that a topology names.

        s[i, j] = activation(scale[j] * sum_k a[i, k] b[k, j] + bias[j])

    Args:
        a: [rows, inner] or [batch, rows, inner], contiguous in its rows or in its columns.
        b: [inner, columns] or [batch, inner, columns], dtype of a, likewise.
        topology: of shape (rows, columns) or (batch, rows, columns).
        scale: [columns] float32; a constant.
        bias: [columns], float32 or the dtype of a.
        activation: None, "relu", "gelu" (by erf) or "silu".

    Returns:
        A `BlockSparse` of the topology; zeros in its blocks past the edge of the matrix.

    Raises:
        ValueError, TypeError: as `dsd`.

    As `dsd`, in all else; differentiable once in a, b and bias.
    """
    op = "sdd"
    if not isinstance(topology, BlockTopology):
        raise TypeError(f"{op}: topology must be a BlockTopology, got {type(topology).__name__}.")
    a, b = autocast(2, a, b)
    dims = len(topology.shape)
    for name, t, dim, expected in (("a", a, -2, topology.shape[-2]), ("b", b, -1, topology.shape[-1])):
        check.is_tensor(op, name, t)
        check.rank(op, name, t, dims, "[batch, rows, columns]" if dims == 3 else "[rows, columns]")
        check.size(op, name, t, dim, f"for this topology, of shape {topology.shape}, size", expected)
        if dims == 3:
            check.size(op, name, t, 0, "the batch of the topology,", topology.shape[0])
        check_major(op, name, t)
    check.same_dtype(op, "b", b, "a", a)
    check.size(op, "b", b, -2, "as many rows as a has columns,", a.shape[-1])
    check_epilogue(op, topology.shape[-1], a, scale, bias, activation)
    three = [t if dims == 3 else t[None] for t in (a, b)]
    if not needs_grad(a, b, bias):
        return BlockSparse.of(_run_sdd(*three, topology, scale, bias, ACTIVATIONS[activation]), topology)
    topology.make_lists_to_compile()
    values = _Sdd.apply(*three, topology)
    if scale is None and bias is None and activation is None:
        return BlockSparse.of(values, topology)
    return BlockSparse.of(finish_blocks(values, topology, scale, bias, activation), topology)


# ---- dsd, of which dds is one ---------------------------------------------------------------------------------------


def _multiply(
    op: str,
    s: BlockSparse,
    dense: Tensor,
    transposed_out: bool,
    scale: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    """op(S) dense, or its transpose."""
    rows = s.shape[-2]
    check_epilogue(op, rows, dense, scale, bias, activation)
    three = dense if dense.dim() == 3 else dense[None]
    if needs_grad(s.values, dense, bias):
        s.topology.make_lists_to_compile()
        out = _Dsd.apply(s.values, three, bias, s.block_scales, s.topology, s.is_transposed, transposed_out, scale)
        if activation is not None:
            out = FUNCTIONS[activation](out)
    else:
        matrix = (s.values, s.block_scales, s.topology, s.is_transposed)
        out = _run_dsd(*matrix, three, transposed_out, scale, bias, ACTIVATIONS[activation])
    return out if dense.dim() == 3 else no_view(out, out.shape[1:])


def _run_dsd(
    values: Tensor,
    block_scales: Tensor | None,
    topology: BlockTopology,
    is_transposed: bool,
    dense: Tensor,
    transposed_out: bool,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """Takes no `BlockSparse`: under torch.compile a backward may not look at what its checks look at."""
    rows = topology.shape[-1 if is_transposed else -2]
    epilogue = (scale, as_float(bias), rows, is_transposed, transposed_out, activation, block_scales)
    return call(ops.block_sparse_dsd, (values, dense, *topology.lists(is_transposed), *epilogue), check_dsd)


class _Dsd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        dense: Tensor,
        bias: Tensor | None,
        block_scales: Tensor | None,
        topology: BlockTopology,
        is_transposed: bool,
        transposed_out: bool,
        scale: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(values, dense, scale, block_scales)
        ctx.topology, ctx.is_transposed, ctx.transposed_out = topology, is_transposed, transposed_out
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _run_dsd(values, block_scales, topology, is_transposed, dense, transposed_out, scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        values, dense, scale, block_scales = ctx.saved_tensors
        grad = grad_out.mT if ctx.transposed_out else grad_out  # [batch, rows, columns]
        grad_values = grad_dense = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2), dtype=torch.float32).to(ctx.bias_dtype)
        if scale is not None:
            grad = (grad * scale[:, None]).to(dense.dtype)
        grad = with_major(grad)
        if ctx.needs_input_grad[1]:
            by_columns = dense.stride(-1) != 1 and dense.stride(-2) == 1
            grad_dense = _run_dsd(values, block_scales, ctx.topology, not ctx.is_transposed, grad, by_columns)
            grad_dense = grad_dense.mT if by_columns else grad_dense
        if ctx.needs_input_grad[0]:
            if ctx.topology.num_lists == 1 and len(dense) > 1:  # the sum over the batch is one more inner dimension
                grad, dense = (t.transpose(0, 1).flatten(1)[None] for t in (grad, dense))
            left, right = (dense, grad.mT) if ctx.is_transposed else (grad, dense.mT)
            grad_values = _run_sdd(left, right, ctx.topology)
        return grad_values, grad_dense, grad_bias, None, None, None, None, None


# ---- sdd ------------------------------------------------------------------------------------------------------------


def _run_sdd(a: Tensor, b: Tensor, topology: BlockTopology, scale=None, bias=None, activation: int = 0) -> Tensor:
    indices, epilogue = (topology.row_indices, topology.column_indices), (scale, as_float(bias))
    return call(ops.block_sparse_sdd, (a, b, *indices, *epilogue, *topology.block, activation), check_sdd)


class _Sdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, topology: BlockTopology) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.topology = topology
        return _run_sdd(a, b, topology)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        s = (grad_values.contiguous(), None, ctx.topology)
        grad_a = _run_dsd(*s, False, b.mT, False) if ctx.needs_input_grad[0] else None
        grad_b = _run_dsd(*s, True, a, True) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None


# ---- fake kernels, rules ------------------------------------------------------------------------------------


@register_fake("block_sparse_dsd")
def _(values, dense, offsets, indices, positions, order, scale, bias, rows, transposed, transposed_out, *options):
    batch, _, columns = dense.shape
    return dense.new_empty((batch, columns, rows) if transposed_out else (batch, rows, columns))


@register_fake("block_sparse_sdd")
def _(a, b, row_indices, column_indices, scale, bias, block_rows, block_columns, activation):
    return a.new_empty((row_indices.shape[0], block_rows, block_columns))


@register_flop_formula("block_sparse_dsd")
def _(values_shape, dense_shape, offsets_shape, indices_shape, *args, out_shape=None, **kwargs) -> int:
    """Of all blocks, whether a row lists them only the device knows."""
    times = dense_shape[0] if offsets_shape[0] == 1 else 1
    return 2 * times * indices_shape[0] * values_shape[1] * values_shape[2] * dense_shape[2]


@register_flop_formula("block_sparse_sdd")
def _(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    num_blocks, block_rows, block_columns = out_shape
    return 2 * num_blocks * block_rows * block_columns * a_shape[2]
