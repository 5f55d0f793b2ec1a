# SPDX-License-Identifier: Apache-2.0
"""Puts fmkernels in the place of `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import _check as check
from .._attention_checks import MAX_HEAD_DIM
from .._library import cuda_ops
from ..attention import attention

_logger = logging.getLogger("fmkernels")
_torch_sdpa = F.scaled_dot_product_attention
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def enable() -> None:
    """`torch.nn.functional.scaled_dot_product_attention` is fmkernels from here on, until `disable`.

    Code that took the function out of torch.nn.functional before (`from ... import`) keeps torch's.
    """
    F.scaled_dot_product_attention = scaled_dot_product_attention


def disable() -> None:
    """Puts torch's own function back."""
    F.scaled_dot_product_attention = _torch_sdpa


@contextmanager
def override() -> Iterator[None]:
    """`enable` for the length of a `with` block, then whatever was there before."""
    before = F.scaled_dot_product_attention
    enable()
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with its arguments and meaning, on the kernels of fmkernels.

    Args:
        query: [batch, heads, seq_q, head_dim] or [batch, seq_q, head_dim], any strides, last dimension contiguous.
        key: [batch, kv_heads, seq_k, head_dim] or [batch, seq_k, head_dim].
        value: [batch, kv_heads, seq_k, v_head_dim] or [batch, seq_k, v_head_dim].
        attn_mask: boolean (True: visible) or added to the scores; broadcasts to [batch, heads, seq_q, seq_k].
        dropout_p: probability of dropout; a seed drops other weights than in torch.
        is_causal: query i sees the keys j <= i: aligned at the first key, unlike `fmkernels.attention`.
        scale: factor of the products; head_dim ** -0.5 when None.
        enable_gqa: whether heads may be a multiple of kv_heads.

    Returns:
        [batch, heads, seq_q, v_head_dim], a transposed view; a query that sees no key gives zeros.

    Differentiable once, in the mask too. Calls that the kernels do not serve (float64, head sizes off the multiples of
    8, other ranks, a scale that is not finite, functional differentiation, ...) go to torch, and the logger "fmkernels"
    says so once for each reason.
    """
    reason = _unsupported(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        if not torch.compiler.is_compiling():
            _log(reason)
        return _torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    has_heads = query.dim() == 4
    q, k, v = (t.transpose(1, 2) if has_heads else t.unsqueeze(2) for t in (query, key, value))
    seq_q, seq_k = q.shape[1], k.shape[1]
    window = (-1, -1)
    if is_causal:
        # The kernel aligns the last query with the last key. Keys after the last query are seen by none, and more
        # queries than keys shift the diagonal: j <= i = (i + seq_k - seq_q) + (seq_q - seq_k).
        k, v = k[:, :seq_q], v[:, :seq_q]
        window = (-1, max(seq_q - seq_k, 0))
    bias = None if attn_mask is None else _bias(attn_mask, has_heads, query.dtype)
    o = attention(q, k, v, window=window, softmax_scale=scale, bias=bias, dropout_p=dropout_p)
    return o.transpose(1, 2) if has_heads else o.squeeze(2)


def _bias(mask: Tensor, has_heads: bool, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        # An expanded mask is converted once, not for every head or query that shares it.
        mask = mask[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride())]
        mask = torch.zeros((), dtype=dtype, device=mask.device).where(mask, -math.inf)
    if mask.dim() == 3 and not has_heads:
        return mask.unsqueeze(1)
    return mask.reshape((1,) * (4 - mask.dim()) + mask.shape)


def _unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Why torch has to serve this call, or None. Wrong arguments go there too: its error is the one to see."""
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if not all(isinstance(t, Tensor) for t in tensors) or not isinstance(is_causal, bool):
        return "an argument of the wrong type"
    if scale is not None and not (isinstance(scale, _NUMBERS) and abs(scale) <= check.FLOAT32_MAX):
        return "a scale that is not a finite number"
    if any(t.is_nested or t.layout != torch.strided for t in tensors):
        return "a nested or sparse tensor"
    if not torch.compiler.is_compiling() and any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return "a tensor subclass"
    if any(t.device != query.device for t in tensors):
        return "tensors on several devices"
    if query.device.type != "cpu" and not (query.device.type == "cuda" and "attention_forward" in cuda_ops):
        return f"a device without a kernel, {query.device.type}"
    if isinstance(dropout_p, bool) or not (isinstance(dropout_p, _NUMBERS) and 0 <= dropout_p < 1):
        return "a dropout_p that is no number of [0, 1)"
    if not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return "forward-mode or functional differentiation"
    if query.dtype not in check.FLOAT_DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}"
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (3, 4):
        return f"ranks {query.dim()}, {key.dim()}, {value.dim()}"
    if any(d % 8 != 0 or not 8 <= d <= MAX_HEAD_DIM for d in (query.shape[-1], value.shape[-1])):
        return f"head_dim {query.shape[-1]}, v_head_dim {value.shape[-1]}"
    if any(t.stride(-1) != 1 for t in (query, key, value)):
        return "a last dimension that is not contiguous"
    if (
        query.shape[0] != key.shape[0]
        or query.shape[-1] != key.shape[-1]
        or key.shape[:-1] != value.shape[:-1]
        or (query.dim() == 4 and not _heads_fit(query.shape[1], key.shape[1], enable_gqa))
    ):
        return "shapes that do not match"
    if mask is None:
        return None
    if is_causal:
        return "attn_mask together with is_causal"
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask of {mask.dtype} for a query of {query.dtype}"
    scores = (*query.shape[:-1], key.shape[-2])
    if not 2 <= mask.dim() <= len(scores) or any(
        size not in (1, full) for size, full in zip(mask.shape[::-1], scores[::-1], strict=False)
    ):
        return "shapes that do not match"
    return None


def _heads_fit(heads: int, kv_heads: int, enable_gqa: bool) -> bool:
    return heads == kv_heads or (enable_gqa and kv_heads > 0 and heads % kv_heads == 0)


@functools.cache
def _log(reason: str) -> None:
    _logger.warning("scaled_dot_product_attention: torch's own function serves calls with %s.", reason)
