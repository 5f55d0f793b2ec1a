# SPDX-License-Identifier: Apache-2.0
"""Fused attention: `attention` for a rectangular batch, `attention_varlen` for packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _check as check
from ._attention_checks import check_attention, check_attention_varlen, check_mask_fits, check_scalars, default_scale
from ._library import autocast, call, needs_grad, ops, register_fake, register_flop_formula
from .block_mask import BlockMask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    block_mask: BlockMask | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention without materialising the score matrix.

        score(i, j) = softcap_(softmax_scale * <q[b, i, h], k[b, j, g]>) + bias[b, h, i, j]
                      - alibi_slopes[h] * |i + seq_k - seq_q - j|,      g = h // (heads // kv_heads)
        o[b, i, h]  = sum_j softmax_j(score(i, .)) v[b, j, g]      over the visible keys j

    where softcap_(x) is softcap * tanh(x / softcap), or x where softcap is 0.

    Args:
        q: [batch, seq_q, heads, head_dim], float32, bfloat16 or float16; head_dim a multiple of 8, at most 256.
        k: [batch, seq_k, kv_heads, head_dim], dtype and device of q; kv_heads divides heads.
        v: [batch, seq_k, kv_heads, v_head_dim]; v_head_dim a multiple of 8, at most 256.
        causal: query i sees keys j <= i + seq_k - seq_q (bottom-right aligned: the last query sees every key).
        window: (left, right), how many keys before and after the aligned position a query sees; -1: all.
        softmax_scale: factor of the products; head_dim ** -0.5 when None.
        softcap: bound of the scores through tanh, in units of the score; 0: none.
        alibi_slopes: [heads] or [batch, heads], float32; not differentiable.
        sinks: [heads], float32; one more logit per head in the denominator of the softmax.
        bias: added to the scores, float32 or the dtype of q, [1 or batch, 1 or heads, 1 or seq_q, 1 or seq_k]; -inf
            hides a key, whose value must then still be finite (0 * NaN is NaN).
        dropout_p: probability that a weight of the softmax is dropped, of [0, 1); what is kept is scaled by
            1 / (1 - dropout_p). It is rounded to a multiple of 2**-16.
        dropout_rng: [2], int64, on the device of q: a seed and an offset modulo 2**32, from which it follows what is
            dropped; the same pair drops the same weights again. None: drawn from torch's generator of the device.
        block_mask: made by `create_block_mask`; a key must be visible by it and by the others. Only listed blocks are
            visited.
        return_lse: also return the logarithm of the denominator.

    All tensors may have any strides with a contiguous last dimension (bias: any strides). Nothing is copied, except on
    CUDA q, k or v with a row off a 16-byte boundary or 2**23 elements and more from a token to the next.

    Returns:
        o [batch, seq_q, heads, v_head_dim], dtype of q; a query that sees no key gives zeros. With return_lse, (o, lse)
        with lse [batch, heads, seq_q], float32, natural logarithm, -inf where no key is seen and there is no sink.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    Supported on the CPU and on CUDA (sm_80 and later). Differentiable once, in q, k, v, bias and sinks, through o and
    through lse; a bias that requires no gradient costs none.
    Deterministic, gradients too: no atomics. A row's bits depend on its own sequence, and not on the batch or the
    number of threads.
    Algorithm: Dao 2023, FlashAttention-2.
    """
    check_scalars("attention", causal, window, softmax_scale, softcap, dropout_p, return_lse)
    _check_no_grad("attention", alibi_slopes)
    scale = default_scale(q) if softmax_scale is None else softmax_scale
    rng = _draw_rng(q) if dropout_p > 0.0 and dropout_rng is None else dropout_rng
    mask = None
    if block_mask is not None:
        check_mask_fits("attention", block_mask, q, k)
        mask = block_mask.tensors
    args = (q, k, v, bias, alibi_slopes, sinks, causal, *window, scale, softcap, dropout_p, rng, mask)
    o, lse = _call(ops.attention_forward, args, (q, k, v, bias, sinks), check_attention)
    return (o, lse) if return_lse else o


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_rng: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over sequences of different lengths, packed one after another without padding.

    Sequence b has the queries from cu_seqlens_q[b] to cu_seqlens_q[b + 1] and the keys from cu_seqlens_k[b] to
    cu_seqlens_k[b + 1]; either may be empty. Its result has the bits that `attention` gives for it alone; under dropout
    those that it gives for it as the batch b.

    Args:
        q: [total_q, heads, head_dim]; dtypes and head sizes as in `attention`.
        k: [total_k, kv_heads, head_dim].
        v: [total_k, kv_heads, v_head_dim].
        cu_seqlens_q: [batch + 1], int32, prefix sums of the query lengths: from 0 to total_q, never decreasing.
        cu_seqlens_k: [batch + 1], int32, likewise to total_k.
        max_seqlen_q: at least the longest query length.
        max_seqlen_k: at least the longest key length.
        causal, window, softmax_scale, softcap, alibi_slopes, sinks, dropout_p, dropout_rng, return_lse: as in
            `attention`; seq_q and seq_k are those of the sequence. There is no bias: packed sequences have no common
            rectangle for one.

    Returns:
        o [total_q, heads, v_head_dim]; with return_lse, (o, lse) with lse [heads, total_q], float32.

    Raises, support and determinism: as `attention`. Under torch.compile the kernel checks the values of the prefix sums
    and raises RuntimeError.
    """
    check_scalars("attention_varlen", causal, window, softmax_scale, softcap, dropout_p, return_lse)
    _check_no_grad("attention_varlen", alibi_slopes)
    check.integer("attention_varlen", "max_seqlen_q", max_seqlen_q, 0)
    check.integer("attention_varlen", "max_seqlen_k", max_seqlen_k, 0)
    scale = default_scale(q) if softmax_scale is None else softmax_scale
    args = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    rng = _draw_rng(q) if dropout_p > 0.0 and dropout_rng is None else dropout_rng
    args += (alibi_slopes, sinks, causal, *window, scale, softcap, dropout_p, rng)
    o, lse = _call(ops.attention_varlen_forward, args, (q, k, v, sinks), check_attention_varlen)
    return (o, lse) if return_lse else o


def _call(op: Any, args: tuple[Any, ...], differentiable: tuple[Any, ...], check_tensors: Any) -> tuple[Tensor, Tensor]:
    """The op, through autograd where a gradient is wanted."""
    args = autocast(3, *args)
    if needs_grad(*differentiable):
        function = _Attention if op is ops.attention_forward else _AttentionVarlen
        return call(function.apply, args, check_tensors)
    return call(op, args, check_tensors)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, slopes: Any, sinks: Any, *rest: Any) -> Any:
        o, lse = ops.attention_forward(q, k, v, bias, slopes, sinks, *rest)
        *scalars, rng, mask = rest
        ctx.save_for_backward(q, k, v, o, lse, bias, slopes, sinks, rng, *(mask or ()))
        ctx.scalars = scalars
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, o, lse, bias, slopes, sinks, rng, *mask = ctx.saved_tensors
        wants_bias = ctx.needs_input_grad[3]
        grad_o = _readable_grad(grad_o, o)
        *grads, grad_bias, grad_sinks = ops.attention_backward(
            grad_o, grad_lse, q, k, v, o, lse, bias, slopes, sinks, *ctx.scalars, rng, wants_bias, mask or None
        )
        grads += [grad_bias.to(bias.dtype) if wants_bias else None, None, grad_sinks if sinks is not None else None]
        return (*grads, *[None] * (len(ctx.scalars) + 2))


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Any:
        o, lse = ops.attention_varlen_forward(q, k, v, *args)
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, slopes, sinks, *scalars, rng = args
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, slopes, sinks, rng)
        ctx.scalars = (max_seqlen_q, max_seqlen_k), scalars
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, slopes, sinks, rng = ctx.saved_tensors
        lengths, scalars = ctx.scalars
        grad_o = _readable_grad(grad_o, o)
        *grads, grad_sinks = ops.attention_varlen_backward(
            grad_o, grad_lse, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, *lengths, slopes, sinks, *scalars, rng
        )
        return (*grads, *[None] * 5, grad_sinks if sinks is not None else None, *[None] * len(scalars), None)


def _readable_grad(grad_o: Tensor | None, o: Tensor) -> Tensor:
    """The gradient as the kernels read it."""
    if grad_o is None:
        return torch.zeros_like(o)
    return grad_o if grad_o.stride(-1) == 1 else grad_o.contiguous()  # expanded, as sum() gives


def _check_no_grad(op: str, alibi_slopes: Tensor | None) -> None:
    if isinstance(alibi_slopes, Tensor) and alibi_slopes.requires_grad:
        raise ValueError(f"{op}: alibi_slopes must not require a gradient: none is computed for it.")


def _draw_rng(q: Any) -> Tensor | None:
    """A new (seed, offset), and nothing where q is refused later."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=q.device) if isinstance(q, Tensor) else None


@register_fake("attention_forward")
def _(*args):
    check_attention(*args)
    q, _k, v, *_ = args
    batch, seq_q, heads, _ = q.shape
    return q.new_empty(batch, seq_q, heads, v.shape[-1]), q.new_empty(batch, heads, seq_q, dtype=torch.float32)


@register_fake("attention_varlen_forward")
def _(*args):
    check_attention_varlen(*args)
    q, _k, v, *_ = args
    total_q, heads, _ = q.shape
    return q.new_empty(total_q, heads, v.shape[-1]), q.new_empty(heads, total_q, dtype=torch.float32)


@register_fake("attention_backward")
def _(
    grad_o,
    grad_lse,
    q,
    k,
    v,
    o,
    lse,
    bias,
    slopes,
    sinks,
    causal,
    left,
    right,
    scale,
    softcap,
    dropout_p,
    rng,
    bias_grad,
    mask=None,
):
    bias_shape = bias.shape if bias is not None and bias_grad else (0,)
    sinks_shape = (q.shape[-2] if sinks is not None else 0,)
    small = [q.new_empty(shape, dtype=torch.float32) for shape in (bias_shape, sinks_shape)]
    return (*[t.new_empty(t.shape) for t in (q, k, v)], *small)


@register_fake("attention_varlen_backward")
def _(grad_o, grad_lse, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, slopes, sinks, *scalars):
    sinks_shape = (q.shape[-2] if sinks is not None else 0,)
    return (*[t.new_empty(t.shape) for t in (q, k, v)], q.new_empty(sinks_shape, dtype=torch.float32))


@register_flop_formula("attention_forward")
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Both products over the whole rectangle, as torch counts its own attention: masks are not subtracted."""
    batch, seq_q, heads, head_dim = q_shape
    return 2 * batch * heads * seq_q * k_shape[1] * (head_dim + v_shape[-1])


@register_flop_formula("attention_varlen_forward")
def _(q_shape, k_shape, v_shape, cu_q_shape, cu_k_shape, max_seqlen_q, max_seqlen_k, *args, out_shape=None, **kwargs):
    """The bound that shapes give: every query against the longest key sequence."""
    total_q, heads, head_dim = q_shape
    return 2 * heads * total_q * max_seqlen_k * (head_dim + v_shape[-1])
