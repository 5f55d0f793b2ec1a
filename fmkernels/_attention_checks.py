# SPDX-License-Identifier: Apache-2.0
"""The argument checks of `attention` and `attention_varlen`, in the manner of `_check`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _check as check
from .block_mask import BlockMask

MAX_HEAD_DIM = 256
_LAYOUTS = (
    "[batch, seq_q, heads, head_dim]",
    "[batch, seq_k, kv_heads, head_dim]",
    "[batch, seq_k, kv_heads, v_head_dim]",
)
_PACKED_LAYOUTS = ("[total_q, heads, head_dim]", "[total_k, kv_heads, head_dim]", "[total_k, kv_heads, v_head_dim]")


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, layouts: tuple[str, str, str]) -> None:
    for name, t, layout in zip("qkv", (q, k, v), layouts, strict=True):
        check.is_tensor(op, name, t)
        check.rank(op, name, t, 4 if op == "attention" else 3, layout)
        if t is q:
            check.dtype(op, name, t, check.FLOAT_DTYPES)
        else:
            check.same_dtype(op, name, t, "q", q)
        check.same_device(op, name, t, "q", q)
        check.last_dim_contiguous(op, name, t)
    (heads, head_dim), (kv_heads, k_head_dim) = q.shape[-2:], k.shape[-2:]
    for name, dim in (("head_dim of q", head_dim), ("v_head_dim of v", v.shape[-1])):
        if dim % 8 != 0 or not 8 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"{op}: {name} must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {dim}.")
    if k_head_dim != head_dim:
        raise ValueError(f"{op}: k must have the head_dim of q, {head_dim}, got {k_head_dim}.")
    if kv_heads < 1 or heads % kv_heads != 0:
        raise ValueError(f"{op}: k has {kv_heads} kv_heads, which must divide the {heads} heads of q.")
    check.size(op, "v", v, -2, "the kv_heads of k,", kv_heads)


def check_scalars(
    op: str,
    causal: bool,
    window: tuple[int, int],
    softmax_scale: float | None,
    softcap: float,
    dropout_p: float,
    return_lse: bool,
) -> None:
    check.flag(op, "causal", causal)
    check.flag(op, "return_lse", return_lse)
    check.window(op, "window", window)
    if softmax_scale is not None:
        check.number(op, "softmax_scale", softmax_scale)
        if abs(softmax_scale) > 2.0**127:  # the kernels work in units of log2
            raise ValueError(f"{op}: softmax_scale must be at most 2**127 in magnitude, got {softmax_scale}.")
    check.number(op, "softcap", softcap, non_negative=True)
    largest_scale = 1.0 if softmax_scale is None else abs(softmax_scale)
    if softcap != 0 and (check.vanishes(softcap) or largest_scale > check.FLOAT32_MAX * softcap):
        raise ValueError(f"{op}: softcap must be 0 or leave softmax_scale / softcap finite in float32, got {softcap}.")
    check.number(op, "dropout_p", dropout_p, non_negative=True)
    if dropout_p >= 1:
        raise ValueError(f"{op}: dropout_p must be less than 1, got {dropout_p}.")


def check_modifiers(op: str, q: Tensor, batch: int, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    heads = q.shape[-2]
    if alibi_slopes is not None:
        check.is_tensor(op, "alibi_slopes", alibi_slopes)
        if alibi_slopes.dim() != 2:
            check.rank(op, "alibi_slopes", alibi_slopes, 1, "[heads] or [batch, heads]")
        else:
            check.size(op, "alibi_slopes", alibi_slopes, 0, "batch", batch)
        check.dtype(op, "alibi_slopes", alibi_slopes, (torch.float32,))
        check.same_device(op, "alibi_slopes", alibi_slopes, "q", q)
        check.last_dim_contiguous(op, "alibi_slopes", alibi_slopes)
        check.size(op, "alibi_slopes", alibi_slopes, -1, "heads", heads)
    if sinks is not None:
        check.plain(op, "sinks", sinks, 1, "[heads]", torch.float32, "q", q)
        check.size(op, "sinks", sinks, 0, "heads", heads)


def check_dropout(op: str, q: Tensor, dropout_p: float, dropout_rng: Tensor | None) -> None:
    if dropout_rng is not None:
        check.plain(op, "dropout_rng", dropout_rng, 1, "[2]", torch.int64, "q", q)
        check.size(op, "dropout_rng", dropout_rng, 0, "size", 2)


def default_scale(q: Any) -> float:
    """head_dim ** -0.5, and any number where q is refused later."""
    return q.shape[-1] ** -0.5 if isinstance(q, Tensor) and q.dim() > 0 and q.shape[-1] > 0 else 1.0


def check_mask_fits(op: str, mask: Any, q: Any, k: Any) -> None:
    """What the op, which is given the tensors of the mask, cannot see; the rest of q and k is checked with them."""
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"{op}: block_mask must be a fmkernels.BlockMask, got {type(mask).__module__}.{type(mask).__name__}; "
            "BlockMask.from_flex converts torch's, create_block_mask makes one from a function."
        )
    for what, t, expected in (("seq_q of q", q, mask.seq_q), ("seq_k of k", k, mask.seq_k)):
        if isinstance(t, Tensor) and t.dim() == 4 and t.shape[1] != expected:
            raise ValueError(f"{op}: block_mask must be made for the {what}, {t.shape[1]}, got one for {expected}.")


def check_mask(op: str, tensors: list[Tensor], q: Tensor, k: Tensor) -> None:
    mask = BlockMask(q.shape[1], k.shape[1], *tensors)
    check.same_device(op, "block_mask", mask.tiles, "q", q)
    for what, count, full in (("batch", mask.shape[0], q.shape[0]), ("heads", mask.shape[1], q.shape[2])):
        if count not in (1, full):
            raise ValueError(f"{op}: block_mask must have {what} 1 or {full}, got {count}.")
    if check.sees_values(mask.tiles):
        mask.check_values()


def check_attention(
    q, k, v, bias, alibi_slopes, sinks, causal, left, right, scale, softcap, dropout_p, dropout_rng, mask=None
) -> None:
    op = "attention"
    check_qkv(op, q, k, v, _LAYOUTS)
    for name, t in (("k", k), ("v", v)):
        check.size(op, name, t, 0, "batch", q.shape[0])
    check.size(op, "v", v, 1, "the seq_k of k,", k.shape[1])
    check_modifiers(op, q, q.shape[0], alibi_slopes, sinks)
    if bias is not None:
        check.is_tensor(op, "bias", bias)
        check.rank(op, "bias", bias, 4, "[1 or batch, 1 or heads, 1 or seq_q, 1 or seq_k]")
        check.same_device(op, "bias", bias, "q", q)
        check.dtype(op, "bias", bias, tuple(dict.fromkeys((torch.float32, q.dtype))))
        for dim, (what, full) in enumerate(
            (("batch", q.shape[0]), ("heads", q.shape[2]), ("seq_q", q.shape[1]), ("seq_k", k.shape[1]))
        ):
            if bias.shape[dim] not in (1, full):
                raise ValueError(f"{op}: bias must have {what} 1 or {full}, got {bias.shape[dim]}.")
    check_dropout(op, q, dropout_p, dropout_rng)
    if mask is not None:
        check_mask(op, mask, q, k)
    check.kernel_exists(op, "attention_forward", q)


def check_attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes, sinks, *scalars
) -> None:
    op = "attention_varlen"
    check_qkv(op, q, k, v, _PACKED_LAYOUTS)
    check.size(op, "v", v, 0, "the total_k of k,", k.shape[0])
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check.plain(op, name, t, 1, "[batch + 1]", torch.int32, "q", q)
        if t.shape[0] < 1:
            raise ValueError(f"{op}: {name} must have batch + 1 elements, got none.")
    check.size(op, "cu_seqlens_k", cu_seqlens_k, 0, "as many elements as cu_seqlens_q,", cu_seqlens_q.shape[0])
    check_modifiers(op, q, cu_seqlens_q.shape[0] - 1, alibi_slopes, sinks)
    check_dropout(op, q, *scalars[-2:])  # dropout_p and dropout_rng
    if check.sees_values(cu_seqlens_q):
        check.prefix_sums(op, "cu_seqlens_q", cu_seqlens_q, "total_q", q.shape[0], ("max_seqlen_q", max_seqlen_q))
        check.prefix_sums(op, "cu_seqlens_k", cu_seqlens_k, "total_k", k.shape[0], ("max_seqlen_k", max_seqlen_k))
    check.kernel_exists(op, "attention_varlen_forward", q)
