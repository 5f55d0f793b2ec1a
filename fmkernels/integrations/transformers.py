# SPDX-License-Identifier: Apache-2.0
"""`attn_implementation="fmkernels"` and `experts_implementation="fmkernels"` for the models of transformers."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import attention
from ..moe import moe_mlp

NAME = "fmkernels"


def register() -> None:
    """Makes the name "fmkernels" known to transformers, for models made or switched after this call.

        fmkernels.integrations.transformers.register()
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fmkernels")
        model.set_experts_implementation("fmkernels")  # of a mixture of experts

    Honoured: causal and bidirectional attention, padding, sliding windows, custom 4-D masks (boolean or additive),
    grouped heads, softcap, attention sinks, position bias, dropout on the CPU, dynamic and static caches. Queries, keys
    and values are read where they lie; no key head is repeated. Where the mask follows from causality and the sliding
    window alone, none is built. Experts are those of `experts_forward`, where transformers lets them be chosen.

    Raises:
        ImportError: transformers is not installed, or older than 5.0.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) < 5:
        raise ImportError(
            f"fmkernels.integrations.transformers needs transformers 5.0 or newer, found {version}; "
            "run: pip install 'transformers>=5.0'"
        )
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # of a version that has no choice
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a layer as `fmkernels.moe.moe_mlp`: gated by SiLU, gate then up, without biases.

    Args:
        module: has gate_up_proj [num_experts, 2 * width, hidden] and down_proj [num_experts, hidden, width].
        hidden_states: [num_tokens, hidden].
        top_k_index, top_k_weights: [num_tokens, num_topk]. Ids from num_experts on, of other ranks, are left out.
    """
    check_experts(f"experts_implementation='{NAME}'", module)
    idx = torch.where(top_k_index < module.gate_up_proj.shape[0], top_k_index, -1)
    return moe_mlp(hidden_states, module.gate_up_proj, module.down_proj, top_k_weights.float(), idx)


def check_experts(op: str, module: nn.Module) -> None:
    """Of a module of transformers: what `moe_mlp` computes."""
    from transformers.activations import SiLUActivation
    from transformers.integrations import moe

    wanted = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    for name, value in wanted.items():
        if getattr(module, name, value) != value:
            raise ValueError(f"{op}: {name} must be {value}, got {not value}.")
    if not isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        raise ValueError(f"{op}: the activation must be SiLU, got {type(module.act_fn).__name__}.")
    if type(module)._apply_gate is not moe._default_apply_gate:
        raise ValueError(f"{op}: {type(module).__name__} must have no gate of its own.")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; query, key and value are [batch, heads, seq, head_dim].

    Without a mask it is causal, last query against last key, where the module is; a mask stands for everything.
    """
    if kwargs.get("output_attentions", False):
        raise ValueError(f"attn_implementation='{NAME}': output_attentions must be False: no weights are kept.")
    bias, causal, window = None, False, (-1, -1)
    if attention_mask is not None:
        bias = _additive(attention_mask, query.dtype)
    else:
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        sliding_window = _sliding_window(module, kwargs)
        if causal and sliding_window:
            window = (sliding_window - 1, 0)
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    if bias is not None and bias.dtype not in (torch.float32, query.dtype):
        bias = bias.to(query.dtype)
    o = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=causal,
        window=window,
        softmax_scale=scaling,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
        bias=bias,
        dropout_p=dropout,
    )
    return o, None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that transformers calls: an additive mask [batch, 1, q_length, kv_length], or None.

    None stands for what `attention_forward` does without a mask. The mask is additive and not boolean because it is
    made once a step, and would be converted in every layer.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    # Chunked attention has a local_size too, and is no window: it is causal only within the first chunk.
    is_window = local_size == getattr(config, "sliding_window", None) and local_size != getattr(
        config, "attention_chunk_size", None
    )
    is_expressible = local_size is None or is_window or kv_offset + kv_length <= local_size
    if (
        allow_is_causal_skip
        and is_expressible
        and _is_aligned(q_length, kv_length, q_offset, kv_offset)
        and _is_unpadded(attention_mask, kv_length, kv_offset)
    ):
        return None
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function or causal_mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,  # it has cases that mean a causal mask aligned at the first key
        **kwargs,
    )
    return None if mask is None else _additive(mask, dtype)


def _is_aligned(q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> bool:
    """Whether the last query stands at the last key. A static cache ends in keys that are not written yet."""
    if isinstance(q_offset, Tensor):
        if torch.compiler.is_compiling():
            return False  # its value is not known while tracing
        q_offset = int(q_offset)
    return q_offset + q_length == kv_offset + kv_length


def _is_unpadded(padding: Tensor | None, kv_length: int, kv_offset: int) -> bool:
    """Whether the 2-D mask of the tokenizer hides no key."""
    if padding is None:
        return True
    if torch.compiler.is_compiling() or padding.shape[-1] < kv_offset + kv_length:
        return False
    return bool(padding[:, kv_offset : kv_offset + kv_length].all())


def _sliding_window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """How many keys a query of this module sees, or None. Most models say it in the call, some only in their config."""
    if "sliding_window" in kwargs:
        return kwargs["sliding_window"]
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[module.layer_idx] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a boolean mask is True and -inf where it is False; an additive mask as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, -math.inf)
