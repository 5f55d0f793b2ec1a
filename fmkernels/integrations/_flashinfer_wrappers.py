# SPDX-License-Identifier: Apache-2.0
"""The two wrappers of FlashInfer around attention over pages: `plan` makes a block table, `run` calls `attend`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _check as check
from ..paged_kv import attend, page_table_from_csr

LOG2_E = math.log2(math.e)
LAYOUTS = ("NHD", "HND")


def check_layout(op: str, kv_layout: Any) -> None:
    if kv_layout not in LAYOUTS:
        raise ValueError(f"{op}: kv_layout must be NHD or HND, got {kv_layout!r}.")


def refuse(op: str, pos_encoding_mode: Any, **unsupported: Any) -> None:
    """Raises where rotation inside attention, or one of the arguments, is asked for."""
    if pos_encoding_mode != "NONE":
        raise ValueError(f"{op}: pos_encoding_mode must be NONE: rotate q and k before, got {pos_encoding_mode!r}.")
    check.unsupported(op, **unsupported)


def unpack_cache(op: str, cache: Any, kv_layout: Any) -> tuple[Tensor, Tensor]:
    """(k_cache, v_cache), [num_pages, page_size, kv_heads, head_dim] each."""
    check_layout(op, kv_layout)
    if isinstance(cache, Tensor):
        check.rank(op, "paged_kv_cache", cache, 5, "[num_pages, 2, page_size, kv_heads, head_dim] or a pair")
        check.size(op, "paged_kv_cache", cache, 1, "keys and values in dimension 1,", 2)
        pair = cache.unbind(1)
    else:
        if not isinstance(cache, tuple | list) or len(cache) != 2:
            raise TypeError(f"{op}: paged_kv_cache must be a tensor or a pair of them, got {type(cache).__name__}.")
        pair = tuple(cache)
    for t in pair:
        check.is_tensor(op, "paged_kv_cache", t)
        check.rank(op, "paged_kv_cache", t, 4, "a pair of [num_pages, page_size, kv_heads, head_dim]")
    return pair if kv_layout == "NHD" else tuple(t.transpose(1, 2) for t in pair)


def to_base_2(lse: Tensor) -> Tensor:
    """[tokens, heads] to base 2 of [heads, tokens], natural."""
    return (lse.t() * LOG2_E).contiguous()


class _PagedWrapper:
    """What the wrappers share. The workspace is not needed, and the buffers for CUDA graphs are not kept."""

    def __init__(
        self, float_workspace_buffer: Tensor | None = None, kv_layout: str = "NHD", use_cuda_graph: bool = False
    ) -> None:
        self._op = type(self).__name__
        check_layout(self._op, kv_layout)
        if use_cuda_graph:
            raise ValueError(f"{self._op}: use_cuda_graph must be False: capture paged_kv.attend itself, got True.")
        self._kv_layout = kv_layout
        self._options: dict[str, Any] | None = None

    def _plan(
        self,
        qo_indptr: Tensor | None,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool,
        sm_scale: float | None,
        window_left: int,
        logits_soft_cap: float | None,
    ) -> None:
        for name, t in (("indptr", indptr), ("indices", indices), ("last_page_len", last_page_len)):
            check.is_tensor(self._op, name, t)
        check.integer(self._op, "page_size", page_size, 1)
        device = indices.device
        indptr, last_page_len = (t.to(device, torch.int32) for t in (indptr, last_page_len))
        num_pages = indptr.diff()
        # waits for the device, as the plan of FlashInfer does
        max_pages = int(num_pages.max()) if len(num_pages) else 0
        heads = {"num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        heads["page_size"] = page_size
        table = page_table_from_csr(indptr, indices.int(), max_pages=max_pages)
        # a request without pages has no tokens, whatever its last_page_len says
        seqlens = torch.where(num_pages > 0, (num_pages - 1) * page_size + last_page_len, 0).int()
        qo_indptr = None if qo_indptr is None else qo_indptr.to(device, torch.int32)
        options = {"causal": causal, "window": (window_left, -1), "softcap": logits_soft_cap or 0.0}
        options["softmax_scale"] = head_dim**-0.5 if sm_scale is None else sm_scale
        # together, when nothing can fail any more: a plan that fails leaves the one before
        self._heads, self._table, self._seqlens, self._qo_indptr = heads, table, seqlens, qo_indptr
        self._options = options

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Tensor | tuple[Tensor, Tensor],
        *,
        q_scale: float | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """o [tokens, heads, head_dim] of q of that shape; with return_lse (o, lse [tokens, heads], base 2).

        A request that decodes has one token. Scales that are numbers multiply scores and result; tensors are those of
        `attend`. out and lse are tensors like the results, which are then copied to them. enable_pdl changes nothing.
        """
        if self._options is None:
            raise ValueError(f"{self._op}: plan must come before run.")
        check.is_tensor(self._op, "q", q)
        check.rank(self._op, "q", q, 3, "[tokens, heads, head_dim]")
        k_cache, v_cache = unpack_cache(self._op, paged_kv_cache, self._kv_layout)
        came = (q.shape[1], k_cache.shape[2], q.shape[2], k_cache.shape[1])
        for (name, planned), size in zip(self._heads.items(), came, strict=True):
            if planned != size:
                raise ValueError(f"{self._op}: {name} must be that of plan, {planned}, got {size}.")
        options = {**self._options, "sinks": sinks}
        if window_left is not None:
            options["window"] = (window_left, -1)
        if q_scale is not None:
            check.number(self._op, "q_scale", q_scale)
            options["softmax_scale"] *= q_scale
        if isinstance(k_scale, Tensor):
            options["k_scale"] = k_scale
        elif k_scale is not None:
            check.number(self._op, "k_scale", k_scale)
            options["softmax_scale"] *= k_scale
        if isinstance(v_scale, Tensor):
            options["v_scale"] = v_scale
        elif v_scale is not None:
            check.number(self._op, "v_scale", v_scale)
        o, natural = attend(
            q, k_cache, v_cache, self._table, self._seqlens, cu_seqlens_q=self._qo_indptr, return_lse=True, **options
        )
        if v_scale is not None and not isinstance(v_scale, Tensor):
            o *= v_scale
        base_2 = to_base_2(natural) if return_lse else None
        if base_2 is not None and lse is not None:
            base_2 = check.copied(self._op, "lse", lse, base_2)
        o = o if out is None else check.copied(self._op, "out", out, o)
        return o if base_2 is None else (o, base_2)


class BatchDecodeWithPagedKVCacheWrapper(_PagedWrapper):
    """One query of each request over its pages: `fmkernels.paged_kv.attend`. The arguments are those of FlashInfer."""

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = None,
        kv_data_type: Any = None,
        o_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Which pages the requests have; waits for the device.

        indptr, indices and last_page_len say it, int32; block_tables and seq_lens, which would say it again, are not
        read. The data types are those of the tensors of `run`. How keys are split changes no bits, so fixed_split_size
        and disable_split_kv change nothing. pos_encoding_mode must be "NONE", rope_scale and rope_theta None.
        """
        refuse(self._op, pos_encoding_mode, rope_scale=rope_scale, rope_theta=rope_theta)
        pages = (indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size)
        self._plan(None, *pages, True, sm_scale, window_left, logits_soft_cap)


class BatchPrefillWithPagedKVCacheWrapper(_PagedWrapper):
    """Queries of each request over its pages: `fmkernels.paged_kv.attend`. The arguments are those of FlashInfer."""

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = None,
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Which queries and pages the requests have; waits for the device. As `plan` of the decode wrapper.

        custom_mask and packed_custom_mask must be None: `attend` has tree_mask. use_fp16_qk_reduction changes nothing.
        """
        masks = {"custom_mask": custom_mask, "packed_custom_mask": packed_custom_mask}
        refuse(self._op, pos_encoding_mode, rope_scale=rope_scale, rope_theta=rope_theta, **masks)
        check.is_tensor(self._op, "qo_indptr", qo_indptr)
        check.flag(self._op, "causal", causal)
        pages = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk)
        self._plan(qo_indptr, *pages, page_size, causal, sm_scale, window_left, logits_soft_cap)
