# SPDX-License-Identifier: Apache-2.0
"""The functions of the package flash_attn by their names and signatures (version 2), on the kernels of fmkernels.

    from fmkernels.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func

float32 is allowed too. A query that sees no key has lse = -inf, where flash_attn has +inf.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _check as check
from ..attention import attention, attention_varlen
from ..paged_kv import attend

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`fmkernels.attention` under the name and with the arguments of flash_attn.

    Args:
        q: [batch, seq_q, heads, head_dim]; k, v: [batch, seq_k, kv_heads, head_dim]; any strides with a contiguous last
            dimension, nothing is copied.
        dropout_p, softmax_scale, causal, softcap, alibi_slopes: as in `fmkernels.attention`; window_size is its window.
        deterministic: the kernels always are.
        return_attn_probs: also return lse and, in the place of the probabilities, an empty tensor: flash_attn fills it
            under dropout alone, for its own tests.

    Returns:
        o [batch, seq_q, heads, head_dim]; with return_attn_probs (o, lse [batch, heads, seq_q], empty).

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    _check("flash_attn_func", window_size, deterministic, return_attn_probs)
    result = attention(
        q,
        k,
        v,
        causal=causal,
        window=window_size,
        softmax_scale=softmax_scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_lse=return_attn_probs,
    )
    return _with_probabilities(result)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`fmkernels.attention_varlen` under the name and with the arguments of flash_attn.

    Args:
        q: [total_q, heads, head_dim]; k, v: [total_k, kv_heads, head_dim].
        cu_seqlens_q, cu_seqlens_k: [batch + 1], int32; max_seqlen_q, max_seqlen_k: at least the longest sequence.
        block_table: [batch, max_blocks], int32: k and v are pages [num_blocks, page_size, kv_heads, head_dim] of any
            page_size, `fmkernels.paged_kv.attend` runs, without gradients and dropout, and max_seqlen_* are not read.
        The others as in `flash_attn_func`.

    Returns:
        o [total_q, heads, head_dim]; with return_attn_probs (o, lse [heads, total_q], empty).

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.
    """
    _check("flash_attn_varlen_func", window_size, deterministic, return_attn_probs)
    options = {"causal": causal, "window": window_size, "softmax_scale": softmax_scale, "softcap": softcap}
    options |= {"alibi_slopes": alibi_slopes, "return_lse": return_attn_probs}
    if block_table is None:
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return _with_probabilities(attention_varlen(q, k, v, *lengths, dropout_p=dropout_p, **options))
    if dropout_p != 0:
        raise ValueError(f"flash_attn_varlen_func: dropout_p must be 0 with block_table, got {dropout_p}.")
    check.is_tensor("flash_attn_varlen_func", "cu_seqlens_k", cu_seqlens_k)
    return _with_probabilities(attend(q, k, v, block_table, cu_seqlens_k.diff(), cu_seqlens_q=cu_seqlens_q, **options))


def _check(function: str, window_size: Any, deterministic: Any, return_attn_probs: Any) -> None:
    """What `attention` does not see, or knows under another name."""
    check.window(function, "window_size", window_size)
    check.flag(function, "deterministic", deterministic)
    check.flag(function, "return_attn_probs", return_attn_probs)


def _with_probabilities(result: Tensor | tuple[Tensor, Tensor]) -> Result:
    if isinstance(result, Tensor):
        return result
    o, lse = result
    return o, lse, o.new_empty(0)
