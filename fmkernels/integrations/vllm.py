# SPDX-License-Identifier: Apache-2.0
"""Custom ops of vLLM and its flash_attn_varlen_func, by their names and argument orders, on the kernels of fmkernels.

    from fmkernels.integrations.vllm import flash_attn_varlen_func, fused_add_rms_norm, reshape_and_cache_flash

As there, outputs are arguments that are written to. Only inference. lse is the natural logarithm on both sides; a query
that sees no key has lse = -inf.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check as check
from ..attention import attention_varlen
from ..glu import geglu, swiglu
from ..merge_attention import merge_attention
from ..norm import rms_norm as _rms_norm
from ..paged_kv import append, attend
from ..rope import rope
from ._vllm_moe import fused_experts as fused_experts
from ._vllm_moe import moe_align_block_size as moe_align_block_size
from ._vllm_route import fused_topk as fused_topk
from ._vllm_route import grouped_topk as grouped_topk
from ._vllm_route import topk_sigmoid as topk_sigmoid
from ._vllm_route import topk_softmax as topk_softmax

_FLOAT8 = (torch.float8_e4m3fn, torch.uint8)  # vLLM keeps fp8 caches as bytes
_CACHE_DTYPES = {"auto": (), "fp8": _FLOAT8, "fp8_e4m3": _FLOAT8, "int8": (torch.int8,)}
_QUANTIZED = (*_FLOAT8, torch.int8)


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """`fmkernels.paged_kv.append` under the name and with the arguments of vLLM.

    Args:
        key, value: [num_tokens or more, kv_heads, head_dim]; what follows the slots is padding.
        key_cache, value_cache: [num_blocks, block_size, kv_heads, head_dim], any strides with a contiguous last
            dimension: both orders of heads and tokens. An fp8 cache may be uint8.
        slot_mapping: [num_tokens], int64; negative slots are skipped.
        kv_cache_dtype: "auto", for a cache in the dtype of key; "fp8" and "fp8_e4m3"; "int8". The caches must hold it.
        k_scale, v_scale: float32, one number or [kv_heads]; not read for "auto".

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "reshape_and_cache_flash"
    if kv_cache_dtype not in tuple(_CACHE_DTYPES):
        raise ValueError(f"{op}: kv_cache_dtype must be one of {', '.join(_CACHE_DTYPES)}, got {kv_cache_dtype!r}.")
    for name, t in (("key", key), ("value", value), ("slot_mapping", slot_mapping)):
        check.is_tensor(op, name, t)
    for name, t in (("key_cache", key_cache), ("value_cache", value_cache)):
        check.is_tensor(op, name, t)
        allowed = _CACHE_DTYPES[kv_cache_dtype] or (key.dtype,)
        if t.dtype not in allowed:
            raise ValueError(
                f"{op}: {name} must be {check.dtype_names(allowed)} for this key and kv_cache_dtype {kv_cache_dtype}, "
                f"got {check.dtype_names((t.dtype,))}."
            )
    num_tokens = slot_mapping.shape[0]
    scales = {} if kv_cache_dtype == "auto" else {"k_scale": k_scale, "v_scale": v_scale}
    caches = _as_float8(key_cache), _as_float8(value_cache)
    append(key[:num_tokens], value[:num_tokens], *caches, slot_mapping, **scales)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    q_v: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: list[int] | tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int = 0,
    fa_version: int = 2,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fmkernels.paged_kv.attend` where there is a block_table, else `fmkernels.attention_varlen`.

    Args:
        q: [total_q, heads, head_dim].
        k, v: with block_table [num_blocks, block_size, kv_heads, head_dim], any block_size, also float8_e4m3fn (or its
            bytes) and int8; else [total_k, kv_heads, head_dim].
        max_seqlen_q, max_seqlen_k: at least the longest; read without block_table alone.
        cu_seqlens_q: [batch + 1], int32.
        cu_seqlens_k: [batch + 1], int32, without block_table.
        seqused_k: [batch], int32, the tokens of each request, with block_table.
        softmax_scale, causal, softcap, alibi_slopes: as in `attend`; window_size is its window, s_aux its sinks.
        block_table: [batch, max_blocks], int32.
        out: a tensor like the result, which is then copied to it.
        k_descale, v_descale: float32, [batch, kv_heads], the same for all requests (expanded), or as in `attend`. Read
            where the cache is quantised: vLLM always gives them.
        deterministic, return_attn_probs, scheduler_metadata, num_splits, fa_version: change nothing: the kernels always
            are deterministic, and how they split the keys changes no bits.
        q_descale: not read, since it belongs to queries in fp8, which are not supported.
        q_v, cp_tot_seqused_k: must be None; dropout_p 0, cp_world_size 1, cp_rank 0.

    Returns:
        o [total_q, heads, head_dim]; with return_softmax_lse (o, lse [heads, total_q]).

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "flash_attn_varlen_func"
    check.unsupported(op, q_v=q_v, cp_tot_seqused_k=cp_tot_seqused_k)
    for name, t in (("q", q), ("k", k)):
        check.is_tensor(op, name, t)
    check.dtype(op, "q", q, check.FLOAT_DTYPES)
    if k.dtype not in _QUANTIZED:
        k_descale = v_descale = None
    for name, value, only in (
        ("dropout_p", dropout_p, 0),
        ("cp_world_size", cp_world_size, 1),
        ("cp_rank", cp_rank, 0),
    ):
        if value != only:
            raise ValueError(f"{op}: {name} must be {only}: nothing else is supported, got {value}.")
    check.flag(op, "return_softmax_lse", return_softmax_lse)
    window = (-1, -1) if window_size is None else window_size
    check.window(op, "window_size", window)
    options = {"causal": causal, "window": tuple(window), "softmax_scale": softmax_scale, "softcap": softcap}
    options |= {"alibi_slopes": alibi_slopes, "sinks": s_aux, "return_lse": True}
    if block_table is None:
        for name, value in (("seqused_k", seqused_k), ("k_descale", k_descale), ("v_descale", v_descale)):
            if value is not None:
                raise ValueError(f"{op}: {name} must be None without block_table, got {type(value).__name__}.")
        if cu_seqlens_k is None:
            raise ValueError(f"{op}: cu_seqlens_k must be given without block_table, got None.")
        o, lse = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    else:
        if seqused_k is None or cu_seqlens_k is not None:
            raise ValueError(f"{op}: seqused_k must be given with block_table, and cu_seqlens_k must not.")
        scales = {"k_scale": _of_all_requests(op, "k_descale", k_descale)}
        scales |= {"v_scale": _of_all_requests(op, "v_descale", v_descale)}
        caches = _as_float8(k), _as_float8(v)
        o, lse = attend(q, *caches, block_table, seqused_k, cu_seqlens_q=cu_seqlens_q, **scales, **options)
    o = o if out is None else check.copied(op, "out", out, o)
    return (o, lse) if return_softmax_lse else o


def merge_attn_states(
    output: Tensor,
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    output_lse: Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: Tensor | None = None,
) -> None:
    """`fmkernels.merge_attention` under the name and with the arguments of vLLM.

    Args:
        output: [num_tokens, heads, head_dim], written.
        prefix_output, suffix_output: shape and dtype of output.
        prefix_lse, suffix_lse: [heads, num_tokens], float32; -inf, and +inf too: no key was seen.
        output_lse: [heads, num_tokens], written; None: not wanted.
        prefill_tokens_with_context: tokens from here on have no prefix; None: all have one.
        output_scale: must be None.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "merge_attn_states"
    check.unsupported(op, output_scale=output_scale)
    for name, t in (("prefix_lse", prefix_lse), ("suffix_lse", suffix_lse)):
        check.is_tensor(op, name, t)
    prefix_lse, suffix_lse = (lse.masked_fill(lse == torch.inf, -torch.inf) for lse in (prefix_lse, suffix_lse))
    if prefill_tokens_with_context is not None:
        check.integer(op, "prefill_tokens_with_context", prefill_tokens_with_context, 0)
        prefix_lse[:, prefill_tokens_with_context:] = -torch.inf
    o, lse = merge_attention(prefix_output, prefix_lse, suffix_output, suffix_lse)
    check.copied(op, "output", output, o)
    if output_lse is not None:
        check.copied(op, "output_lse", output_lse, lse)


def rms_norm(out: Tensor, input: Tensor, weight: Tensor | None, epsilon: float) -> None:
    """`fmkernels.rms_norm` of input, written to out, under the name and with the arguments of vLLM."""
    _rms_norm(input, weight, epsilon, out=out)


def fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> None:
    """residual becomes input + residual, and input its RMSNorm, as in vLLM; one pass of `fmkernels.rms_norm`."""
    _rms_norm(input, weight, epsilon, residual, out=input, residual_out=residual)


def silu_and_mul(out: Tensor, input: Tensor) -> None:
    """`fmkernels.swiglu` of input [..., 2 * width], gate then up, written to out [..., width], as in vLLM."""
    swiglu(input, out=out)


def gelu_and_mul(out: Tensor, input: Tensor) -> None:
    """`fmkernels.geglu` of input [..., 2 * width], gate then up, written to out [..., width], as in vLLM."""
    geglu(input, out=out)


def gelu_tanh_and_mul(out: Tensor, input: Tensor) -> None:
    """`gelu_and_mul` with the approximation by tanh."""
    geglu(input, approximate="tanh", out=out)


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    rope_dim_offset: int = 0,
    inverse: bool = False,
) -> None:
    """`fmkernels.rope` in place, under the name and with the arguments of vLLM.

    Args:
        positions: [num_tokens] or [batch, seq], int64 or int32.
        query: [..., heads * head_size] or [..., heads, head_size], the leading dimensions those of positions. Written.
        key: the same with heads of its own, or None. Written.
        head_size: columns of a head.
        cos_sin_cache: [max_position, rotary_dim], cosines and then sines, float32 or the dtype of query.
        is_neox: pairs are columns (c, c + rotary_dim / 2), else (2 c, 2 c + 1).
        rope_dim_offset: the first column of a head that is rotated.
        inverse: rotates back.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    op = "rotary_embedding"
    check.integer(op, "head_size", head_size, 1)
    check.integer(op, "rope_dim_offset", rope_dim_offset, 0)
    check.flag(op, "is_neox", is_neox)
    check.is_tensor(op, "positions", positions)
    heads = [None, None]
    for index, (name, t) in enumerate((("query", query), ("key", key))):
        if t is None and name == "key":
            continue
        check.is_tensor(op, name, t)
        leading = list(positions.shape)
        columns = t.shape[len(leading) :].numel()
        if list(t.shape[: len(leading)]) != leading or t.dim() == len(leading) or columns % head_size != 0:
            raise ValueError(
                f"{op}: {name} must be [..., heads * head_size] for positions {leading} and head_size {head_size}, "
                f"got {list(t.shape)}."
            )
        heads[index] = t.view(*leading, columns // head_size, head_size)[..., rope_dim_offset:]
    rope(*heads, positions, cos_sin_cache, interleaved=not is_neox, inverse=inverse, out=tuple(heads))


def _as_float8(cache: Any) -> Any:
    return cache.view(torch.float8_e4m3fn) if isinstance(cache, Tensor) and cache.dtype == torch.uint8 else cache


def _of_all_requests(op: str, name: str, descale: Any) -> Any:
    """[kv_heads] of an expanded [batch, kv_heads]."""
    if not isinstance(descale, Tensor) or descale.dim() != 2:
        return descale
    if descale.shape[0] == 0 or (descale.shape[0] > 1 and descale.stride(0) != 0):
        raise ValueError(
            f"{op}: {name} must be one row expanded to all requests, got strides {list(descale.stride())}."
        )
    return descale[0].contiguous()
