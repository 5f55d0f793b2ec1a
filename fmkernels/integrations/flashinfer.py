# SPDX-License-Identifier: Apache-2.0
"""The attention, page, cascade and norm functions of FlashInfer, by their names, on the kernels of fmkernels.

    from fmkernels.integrations.flashinfer import BatchPrefillWithPagedKVCacheWrapper, append_paged_kv_cache

lse is [tokens, heads] and to base 2, as there: the natural logarithm [heads, tokens] of fmkernels times log2(e). A
query that sees no key has lse = -inf and o = 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _check as check
from .. import _library
from ..attention import attention
from ..merge_attention import merge_attention
from ..norm import rms_norm
from ..paged_kv import append
from ._flashinfer_wrappers import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    check_layout,
    refuse,
    to_base_2,
    unpack_cache,
)

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "append_paged_kv_cache",
    "fused_add_rmsnorm",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "rmsnorm",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
]

LN_2 = math.log(2.0)


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """[batch], the tokens of each request: all pages but its last one are full."""
    return (kv_indptr.diff() - 1).clamp(min=0) * page_size + kv_last_page_len


def get_batch_indices_positions(append_indptr: Tensor, seq_lens: Tensor, nnz: int) -> tuple[Tensor, Tensor]:
    """The request of each new token and its position in it: the new tokens of a request are its last ones.

    Args:
        append_indptr: [batch + 1], int32, prefix sums of the new tokens.
        seq_lens: [batch], int32, all tokens of each request, the new ones included.
        nnz: the number of new tokens.

    Returns:
        (batch_indices, positions), [nnz] each, int32.
    """
    tokens = torch.arange(nnz, dtype=torch.int32, device=append_indptr.device)
    batch_indices = torch.bucketize(tokens, append_indptr[1:], right=True, out_int32=True)
    ends = (seq_lens.to(append_indptr.device) - append_indptr[1:]).int()
    return batch_indices, tokens + ends[batch_indices.long()]


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: Tensor | tuple[Tensor, Tensor],
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """`fmkernels.paged_kv.append` under the name and with the arguments of FlashInfer.

    Args:
        append_key, append_value: [nnz, kv_heads, head_dim].
        batch_indices, positions: [nnz], of `get_batch_indices_positions`. On the CPU one without a page is an error; on
            CUDA, outside of FMKERNELS_CHECK=1, it is skipped.
        paged_kv_cache: (k_cache, v_cache), each [num_pages, page_size, kv_heads, head_dim], or both in one tensor
            [num_pages, 2, page_size, kv_heads, head_dim]; with kv_layout "HND" the heads stand before page_size.
        kv_indices: the pages of all requests; kv_indptr: [batch + 1], where those of each begin and end.
        kv_last_page_len: not needed.
        kv_layout: "NHD" or "HND".

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "append_paged_kv_cache"
    k_cache, v_cache = unpack_cache(op, paged_kv_cache, kv_layout)
    page_size = k_cache.shape[1]
    request = batch_indices.long().clamp(0, max(0, kv_indptr.shape[0] - 2))
    place = kv_indptr.long()[request] + positions // page_size
    has_page = (batch_indices == request) & (positions >= 0) & (place < kv_indptr[request + 1])
    has_page &= (place >= 0) & (place < kv_indices.shape[0])  # kv_indptr may name more than there is
    if (k_cache.device.type == "cpu" or _library.check_values) and not has_page.all():
        wrong = int((~has_page).nonzero()[0, 0])
        raise ValueError(
            f"{op}: positions must lie in the pages of their requests, got position {int(positions[wrong])} of "
            f"request {int(batch_indices[wrong])}."
        )
    if kv_indices.shape[0] == 0:
        return
    page = kv_indices.long()[place.clamp(0, kv_indices.shape[0] - 1)]
    slots = torch.where(has_page, page * page_size + positions % page_size, -1)
    append(append_key, append_value, k_cache, v_cache, slots)


def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One query over contiguous keys: `fmkernels.attention`.

    Args:
        q: [heads, head_dim].
        k, v: [kv_len, kv_heads, head_dim], with kv_layout "HND" [kv_heads, kv_len, head_dim].
        kv_layout: "NHD" or "HND".
        q_scale, k_scale: numbers that scores are multiplied by; v_scale: one that the result is.
        window_left: keys before the query that are seen, -1 for all.
        logits_soft_cap: the softcap; sm_scale: default head_dim ** -0.5.
        use_tensor_cores: changes nothing.
        pos_encoding_mode, rope_scale, rope_theta: must be "NONE", None and None: rotate before.
        return_lse: also return lse [heads].

    Returns:
        o [heads, head_dim]; with return_lse (o, lse).
    """
    check.is_tensor("single_decode_with_kv_cache", "q", q)
    result = single_prefill_with_kv_cache(
        q[None],
        k,
        v,
        q_scale,
        k_scale,
        v_scale,
        kv_layout=kv_layout,
        pos_encoding_mode=pos_encoding_mode,
        sm_scale=sm_scale,
        window_left=window_left,
        logits_soft_cap=logits_soft_cap,
        rope_scale=rope_scale,
        rope_theta=rope_theta,
        return_lse=return_lse,
    )
    return (result[0][0], result[1][0]) if return_lse else result[0]


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: float | None = None,
    scale_k: float | None = None,
    scale_v: float | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: Tensor | None = None,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The queries of one request over contiguous keys: `fmkernels.attention`.

    Args:
        q: [qo_len, heads, head_dim]; k, v: as in `single_decode_with_kv_cache`.
        scale_q, scale_k, scale_v: numbers, as q_scale, k_scale and v_scale there.
        o_dtype: the result is converted to it; default that of q.
        custom_mask: [qo_len, kv_len], bool, True where a key is seen; causal is then not read.
        packed_custom_mask: must be None.
        causal: bottom-right aligned.
        use_fp16_qk_reduction, backend: change nothing.
        The others as in `single_decode_with_kv_cache`.

    Returns:
        o [qo_len, heads, head_dim]; with return_lse (o, lse [qo_len, heads]).
    """
    op = "single_prefill_with_kv_cache"
    check_layout(op, kv_layout)
    refuse(op, pos_encoding_mode, rope_scale=rope_scale, rope_theta=rope_theta, packed_custom_mask=packed_custom_mask)
    check.flag(op, "return_lse", return_lse)
    for name, t in (("q", q), ("k", k), ("v", v)):
        check.is_tensor(op, name, t)
        check.rank(op, name, t, 3, "[tokens, heads, head_dim], or the heads first")
    if kv_layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    bias = None
    if custom_mask is not None:
        check.is_tensor(op, "custom_mask", custom_mask)
        check.dtype(op, "custom_mask", custom_mask, (torch.bool,))
        bias = torch.zeros_like(custom_mask, dtype=q.dtype).masked_fill_(~custom_mask, -torch.inf)[None, None]
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    for name, factor in (("scale_q", scale_q), ("scale_k", scale_k)):
        if factor is not None:
            check.number(op, name, factor)
            scale *= factor
    if scale_v is not None:
        check.number(op, "scale_v", scale_v)
    o, lse = attention(
        q[None],
        k[None],
        v[None],
        causal=causal and custom_mask is None,
        window=(window_left, -1),
        softmax_scale=scale,
        softcap=logits_soft_cap or 0.0,
        bias=bias,
        return_lse=True,
    )
    o = o[0] if scale_v is None else o[0] * scale_v
    o = o if o_dtype is None else o.to(o_dtype)
    return (o, to_base_2(lse[0])) if return_lse else o


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """`fmkernels.merge_attention` of v [tokens, heads, head_dim] and s [tokens, heads], the logarithm to base 2."""
    for name, s in (("s_a", s_a), ("s_b", s_b)):
        check.is_tensor("merge_state", name, s)
        check.rank("merge_state", name, s, 2, "[tokens, heads]")
    o, lse = merge_attention(v_a, s_a.float().t() * LN_2, v_b, s_b.float().t() * LN_2)
    return o, to_base_2(lse)


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """`merge_state`, written to v and s; where mask [tokens] is False, they stay as they are."""
    merged, s_merged = merge_state(v, s, v_other, s_other)
    for name, t in (("v", v), ("s", s)):
        check.written("merge_state_in_place", name, t)
    if mask is not None:
        merged = torch.where(mask[:, None, None], merged, v)
        s_merged = torch.where(mask[:, None], s_merged, s)
    v.copy_(merged)
    s.copy_(s_merged)


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_state` of v [tokens, num_states, heads, head_dim] and s [tokens, num_states, heads], state after state."""
    check.is_tensor("merge_states", "v", v)
    check.rank("merge_states", "v", v, 4, "[tokens, num_states, heads, head_dim]")
    if v.shape[1] < 1:
        raise ValueError("merge_states: v must have at least 1 state, got 0.")
    merged = v[:, 0], s[:, 0].float()
    for index in range(1, v.shape[1]):
        merged = merge_state(*merged, v[:, index], s[:, index])
    return merged


def rmsnorm(
    input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None, enable_pdl: bool | None = None
) -> Any:
    """`fmkernels.rms_norm`, written to out where it is given. enable_pdl changes nothing."""
    return rms_norm(input, weight, eps, out=out)


def fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """residual becomes input + residual, and input its `fmkernels.rms_norm`. enable_pdl changes nothing."""
    rms_norm(input, weight, eps, residual, out=input, residual_out=residual)
