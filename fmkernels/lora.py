# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters of many requests in one batch, for serving."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check as check
from ._library import autocast, call, needs_grad, ops, register_fake, register_flop_formula

MAX_RANK = 128


def lora(x: Tensor, base: Tensor, a: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None = None) -> Tensor:
    """Adds to the output of a layer what each token's adapter makes of the layer's input.

        y[t] = base[t] + scale[i] b[i] (a[i] x[t]),  i = idx[t];    y[t] = base[t] where i = -1

    Adapters of one layer are stacked: slot i of `a` and `b` is adapter i, and loading another one is a copy into a
    slot. Adapters of a smaller rank are padded with zeros.

    Args:
        x: [tokens, in_features], float32, bfloat16 or float16, contiguous last dimension.
        base: [tokens, out_features], dtype of x, contiguous last dimension: what the layer itself gives.
        a: [adapters, rank, in_features], dtype of x, contiguous last dimension; rank from 1 to 128.
        b: [adapters, out_features, rank], dtype of x, contiguous last dimension.
        idx: [tokens] int32, the adapter of each token; -1: none. Any order: tokens need not be sorted.
        scale: [adapters] float32, contiguous, such as alpha / rank; None: 1.

    Returns:
        [tokens, out_features], dtype of base, contiguous.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came. On CUDA the values of idx are
            checked under FMKERNELS_CHECK=1; otherwise a token whose adapter does not exist has none.

    CPU and CUDA (sm_80 and later). Accumulates in float32, a x too, and rounds once. Deterministic, and a token has the
    same bits whatever the other tokens are. For inference: no gradient. FLOPs are counted; under autocast x, base, a
    and b take the autocast dtype. After Chen et al. 2023, Punica, and Sheng et al. 2023, S-LoRA.
    """
    x, base, a, b = autocast(4, x, base, a, b)
    if isinstance(base, Tensor) and isinstance(x, Tensor):
        check.same_dtype("lora", "base", base, "x", x)
    return lora_expand(lora_shrink(x, a, idx), base, b, idx, scale)


def lora_shrink(x: Tensor, a: Tensor, idx: Tensor) -> Tensor:
    """The first half of `lora`: h[t] = a[idx[t]] x[t], and 0 where idx[t] = -1.

    Args:
        x, a, idx: as of `lora`.

    Returns:
        [tokens, rank], float32, contiguous.

    Raises:
        ValueError, TypeError: as `lora`.
    """
    _refuse_gradients("lora_shrink", x, a)
    x, a = autocast(2, x, a)
    return call(ops.lora_shrink, (x, a, idx), _check_shrink)


def lora_expand(h: Tensor, base: Tensor, b: Tensor, idx: Tensor, scale: Tensor | None = None) -> Tensor:
    """The second half of `lora`: y[t] = base[t] + scale[i] b[i] h[t], i = idx[t], and base[t] where i = -1.

    Args:
        h: [tokens, rank], float32, contiguous last dimension.
        base, b, idx, scale: as of `lora`; the dtype is that of base.

    Returns:
        [tokens, out_features], dtype of base, contiguous.

    Raises:
        ValueError, TypeError: as `lora`.
    """
    _refuse_gradients("lora_expand", h, base, b, scale)
    base, b = autocast(2, base, b)
    return call(ops.lora_expand, (base, b, h, idx, scale), _check_expand)


def _refuse_gradients(op: str, *tensors: Tensor | None) -> None:
    if needs_grad(*tensors):
        raise ValueError(f"{op}: gradients are not computed; call it under torch.no_grad().")


def _check_idx(op: str, idx: Tensor, num_adapters: int) -> None:
    if idx.numel() == 0 or not check.sees_values(idx):
        return
    low, high = (int(t) for t in torch.aminmax(idx))
    if low < -1 or high >= num_adapters:
        wrong = low if low < -1 else high
        raise ValueError(f"{op}: idx must be from -1 to {num_adapters - 1}, got {wrong}.")


def _check_common(
    op: str, name: str, tokens: Tensor, stack_name: str, stack: Tensor, idx: Tensor, rank_dim: int
) -> None:
    """Tokens [tokens, features] and a stack of adapters of their dtype, and the adapters' indices."""
    for other, t, dims, layout in (
        (name, tokens, 2, "[tokens, features]"),
        (stack_name, stack, 3, "[adapters, rank, in_features]" if rank_dim == 1 else "[adapters, out_features, rank]"),
        ("idx", idx, 1, "[tokens]"),
    ):
        check.is_tensor(op, other, t)
        check.rank(op, other, t, dims, layout)
        check.same_device(op, other, t, name, tokens)
    check.dtype(op, name, tokens, check.FLOAT_DTYPES)
    check.same_dtype(op, stack_name, stack, name, tokens)
    check.size(op, stack_name, stack, 3 - rank_dim, "the features of " + name, tokens.shape[1])
    if not 1 <= stack.shape[rank_dim] <= MAX_RANK:
        raise ValueError(f"{op}: {stack_name} must have a rank from 1 to {MAX_RANK}, got {stack.shape[rank_dim]}.")
    check.last_dim_contiguous(op, name, tokens)
    check.last_dim_contiguous(op, stack_name, stack)
    check.dtype(op, "idx", idx, (torch.int32,))
    check.size(op, "idx", idx, 0, "the tokens of " + name, tokens.shape[0])


def _check_shrink(x: Tensor, a: Tensor, idx: Tensor) -> None:
    _check_common("lora_shrink", "x", x, "a", a, idx, 1)
    check.kernel_exists("lora_shrink", "lora_shrink", x)
    _check_idx("lora_shrink", idx, a.shape[0])


def _check_expand(base: Tensor, b: Tensor, h: Tensor, idx: Tensor, scale: Tensor | None) -> None:
    op = "lora_expand"
    _check_common(op, "base", base, "b", b, idx, 2)
    check.is_tensor(op, "h", h)
    check.rank(op, "h", h, 2, "[tokens, rank]")
    check.same_device(op, "h", h, "base", base)
    check.dtype(op, "h", h, (torch.float32,))
    check.size(op, "h", h, 0, "the tokens of base", base.shape[0])
    check.size(op, "h", h, 1, "the rank of b", b.shape[2])
    check.last_dim_contiguous(op, "h", h)
    if scale is not None:
        check.is_tensor(op, "scale", scale)
        check.rank(op, "scale", scale, 1, "[adapters]")
        check.same_device(op, "scale", scale, "base", base)
        check.dtype(op, "scale", scale, (torch.float32,))
        check.size(op, "scale", scale, 0, "the adapters of b", b.shape[0])
        check.last_dim_contiguous(op, "scale", scale)
    check.kernel_exists(op, "lora_expand", base)
    _check_idx(op, idx, b.shape[0])


@register_fake("lora_shrink")
def _(x, a, idx):
    _check_shrink(x, a, idx)
    return x.new_empty((x.shape[0], a.shape[1]), dtype=torch.float32)


@register_fake("lora_expand")
def _(base, b, h, idx, scale):
    _check_expand(base, b, h, idx, scale)
    return base.new_empty(base.shape)


@register_flop_formula("lora_shrink")
def _(x_shape, a_shape, idx_shape, *args, out_shape=None, **kwargs) -> int:
    """Every token counts, whether it has an adapter only the device knows."""
    return 2 * x_shape[0] * a_shape[1] * a_shape[2]


@register_flop_formula("lora_expand")
def _(base_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * base_shape[0] * b_shape[1] * b_shape[2]
