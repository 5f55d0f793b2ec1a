# SPDX-License-Identifier: Apache-2.0
"""attention and attention_varlen: every wrong argument has its sentence, and the ops themselves guard memory."""

import contextlib
import gc
import math
import weakref

import pytest
import torch

from fmkernels import attention, attention_varlen
from fmkernels._library import ops

Q, K = torch.zeros(2, 3, 4, 16), torch.zeros(2, 5, 2, 16)
V = torch.zeros(2, 5, 2, 8)
META = {"device": "meta"}
QKV_ERRORS = [
    ("q", [1.0], TypeError, "q must be a tensor, got list."),
    ("q", Q.to_sparse(), ValueError, "q must be a strided tensor, got layout torch.sparse_coo."),
    ("q", Q[0], ValueError, "q must be [batch, seq_q, heads, head_dim], got 3 dimensions [3, 4, 16]."),
    ("q", torch.zeros(()), ValueError, "q must be [batch, seq_q, heads, head_dim], got 0 dimensions []."),
    ("q", Q.double(), ValueError, "q must be float32 or bfloat16 or float16, got float64."),
    (
        "q",
        Q.transpose(1, 3).contiguous().transpose(1, 3),
        ValueError,
        "q must have a contiguous last dimension, got stride 12.",
    ),
    ("q", Q[..., :12], ValueError, "head_dim of q must be a multiple of 8 from 8 to 256, got 12."),
    ("q", torch.zeros(2, 3, 4, 264), ValueError, "head_dim of q must be a multiple of 8 from 8 to 256, got 264."),
    ("q", torch.zeros(2, 3, 4, 0), ValueError, "head_dim of q must be a multiple of 8 from 8 to 256, got 0."),
    ("q", torch.zeros(2, 3, 3, 16), ValueError, "k has 2 kv_heads, which must divide the 3 heads of q."),
    ("k", None, TypeError, "k must be a tensor, got NoneType."),
    ("k", K[0], ValueError, "k must be [batch, seq_k, kv_heads, head_dim], got 3 dimensions [5, 2, 16]."),
    ("k", K.half(), ValueError, "k must have the dtype of q, float32, got float16."),
    ("k", torch.zeros(2, 5, 2, 16, **META), ValueError, "k must be on the device of q, cpu, got meta."),
    ("k", torch.zeros(2, 5, 2, 32)[..., ::2], ValueError, "k must have a contiguous last dimension, got stride 2."),
    ("k", torch.zeros(2, 5, 2, 24), ValueError, "k must have the head_dim of q, 16, got 24."),
    ("k", torch.zeros(3, 5, 2, 16), ValueError, "k must have batch 2, got 3."),
    ("k", torch.zeros(2, 5, 0, 16), ValueError, "k has 0 kv_heads, which must divide the 4 heads of q."),
    ("v", 3, TypeError, "v must be a tensor, got int."),
    ("v", V[0], ValueError, "v must be [batch, seq_k, kv_heads, v_head_dim], got 3 dimensions [5, 2, 8]."),
    ("v", V.bfloat16(), ValueError, "v must have the dtype of q, float32, got bfloat16."),
    ("v", V.to("meta"), ValueError, "v must be on the device of q, cpu, got meta."),
    ("v", torch.zeros(2, 5, 2, 16)[..., ::2], ValueError, "v must have a contiguous last dimension, got stride 2."),
    ("v", V[..., :4], ValueError, "v_head_dim of v must be a multiple of 8 from 8 to 256, got 4."),
    ("v", V[:1], ValueError, "v must have batch 2, got 1."),
    ("v", V[:, :4], ValueError, "v must have the seq_k of k, 5, got 4."),
    ("v", V[:, :, :1], ValueError, "v must have the kv_heads of k, 2, got 1."),
]
MODIFIER_ERRORS = [
    ("causal", 1, TypeError, "causal must be True or False, got int."),
    ("return_lse", None, TypeError, "return_lse must be True or False, got NoneType."),
    ("window", 5, TypeError, "window must be a pair (left, right), got 5."),
    ("window", (1, 2, 3), TypeError, "window must be a pair (left, right), got (1, 2, 3)."),
    ("window", (1.0, 2), TypeError, "window[0] must be an integer, got float."),
    ("window", (1, True), TypeError, "window[1] must be an integer, got bool."),
    ("window", (-2, 0), ValueError, "window[0] must be at least -1, got -2."),
    ("window", (0, -5), ValueError, "window[1] must be at least -1, got -5."),
    ("softmax_scale", "1", TypeError, "softmax_scale must be a number, got str."),
    ("softmax_scale", math.nan, ValueError, "softmax_scale must be finite in float32, got nan."),
    ("softmax_scale", -math.inf, ValueError, "softmax_scale must be finite in float32, got -inf."),
    ("softmax_scale", -3e38, ValueError, "softmax_scale must be at most 2**127 in magnitude, got -3e+38."),
    ("softcap", None, TypeError, "softcap must be a number, got NoneType."),
    ("softcap", -1.0, ValueError, "softcap must not be negative, got -1.0."),
    ("softcap", math.inf, ValueError, "softcap must be finite in float32, got inf."),
    (
        "softcap",
        1e-40,
        ValueError,
        "softcap must be 0 or leave softmax_scale / softcap finite in float32, got 1e-40.",
    ),
    ("softcap", 1e39, ValueError, "softcap must be finite in float32, got 1e+39."),
    ("softmax_scale", -(10**39), ValueError, f"softmax_scale must be finite in float32, got -1{'0' * 39}."),
    ("window", (2**63, 0), ValueError, f"window[0] must be below 2**63, got {2**63}."),
    ("alibi_slopes", 0.5, TypeError, "alibi_slopes must be a tensor, got float."),
    (
        "alibi_slopes",
        torch.zeros(2, 2, 4),
        ValueError,
        "alibi_slopes must be [heads] or [batch, heads], got 3 dimensions [2, 2, 4].",
    ),
    ("alibi_slopes", torch.zeros(4).half(), ValueError, "alibi_slopes must be float32, got float16."),
    ("alibi_slopes", torch.zeros(5), ValueError, "alibi_slopes must have heads 4, got 5."),
    ("alibi_slopes", torch.zeros(3, 4), ValueError, "alibi_slopes must have batch 2, got 3."),
    ("alibi_slopes", torch.zeros(4, **META), ValueError, "alibi_slopes must be on the device of q, cpu, got meta."),
    (
        "alibi_slopes",
        torch.zeros(8)[::2],
        ValueError,
        "alibi_slopes must have a contiguous last dimension, got stride 2.",
    ),
    (
        "alibi_slopes",
        torch.zeros(4, requires_grad=True),
        ValueError,
        "alibi_slopes must not require a gradient: none is computed for it.",
    ),
    ("sinks", [0.0] * 4, TypeError, "sinks must be a tensor, got list."),
    ("sinks", torch.zeros(1, 4), ValueError, "sinks must be [heads], got 2 dimensions [1, 4]."),
    ("sinks", torch.zeros(4).bfloat16(), ValueError, "sinks must be float32, got bfloat16."),
    ("sinks", torch.zeros(2), ValueError, "sinks must have heads 4, got 2."),
    ("sinks", torch.zeros(4, **META), ValueError, "sinks must be on the device of q, cpu, got meta."),
    ("sinks", torch.zeros(8)[::2], ValueError, "sinks must have a contiguous last dimension, got stride 2."),
]
BIAS_ERRORS = [
    ("bias", True, TypeError, "bias must be a tensor, got bool."),
    (
        "bias",
        torch.zeros(3, 5),
        ValueError,
        "bias must be [1 or batch, 1 or heads, 1 or seq_q, 1 or seq_k], got 2 dimensions [3, 5].",
    ),
    ("bias", torch.zeros(1, 1, 3, 5).bool(), ValueError, "bias must be float32, got bool."),
    ("bias", torch.zeros(1, 1, 3, 5).half(), ValueError, "bias must be float32, got float16."),
    ("bias", torch.zeros(1, 1, 3, 5, **META), ValueError, "bias must be on the device of q, cpu, got meta."),
    ("bias", torch.zeros(3, 1, 3, 5), ValueError, "bias must have batch 1 or 2, got 3."),
    ("bias", torch.zeros(1, 2, 3, 5), ValueError, "bias must have heads 1 or 4, got 2."),
    ("bias", torch.zeros(1, 1, 2, 5), ValueError, "bias must have seq_q 1 or 3, got 2."),
    ("bias", torch.zeros(1, 1, 3, 0), ValueError, "bias must have seq_k 1 or 5, got 0."),
]


@pytest.mark.parametrize(("name", "value", "error", "sentence"), QKV_ERRORS + MODIFIER_ERRORS + BIAS_ERRORS)
def test_wrong_arguments(name, value, error, sentence):
    arguments = {"q": Q, "k": K, "v": V, name: value}
    with pytest.raises(error) as raised:
        attention(**arguments)
    assert str(raised.value) == f"attention: {sentence}"


@pytest.mark.parametrize("argument", ["v", "q"])
def test_a_caught_failure_keeps_no_tensor_alive(argument, monkeypatch):
    """On a GPU that ran out of memory the inputs of the failed call must be gone when the next one is tried."""
    tensors = {"q": Q.clone(), "k": K.clone(), "v": V.clone()}
    if argument == "v":
        tensors["v"] = V[:, :4].clone()  # refused with a sentence; q: the op fails although all arguments are right
    else:
        monkeypatch.setattr(ops, "attention_forward", lambda *args: torch.empty(-1))
    left = weakref.ref(tensors["q"])
    gc.disable()
    try:
        with contextlib.suppress(ValueError, RuntimeError):
            attention(**tensors)
        tensors.clear()
        assert left() is None
    finally:
        gc.enable()


# ---- packed sequences ------------------------------------------------------------------------------------------------

TOTAL_Q, TOTAL_K = torch.zeros(8, 4, 16), torch.zeros(9, 2, 16)


def prefix(*values, dtype=torch.int32, device="cpu"):
    return torch.tensor(values, dtype=dtype, device=device)


PACKED = {
    "q": TOTAL_Q, "k": TOTAL_K, "v": TOTAL_K[..., :8], "cu_seqlens_q": prefix(0, 3, 8), "cu_seqlens_k": prefix(0, 4, 9),
    "max_seqlen_q": 5, "max_seqlen_k": 5,
}  # fmt: skip
PACKED_ERRORS = [
    ("q", Q, ValueError, "q must be [total_q, heads, head_dim], got 4 dimensions [2, 3, 4, 16]."),
    ("q", TOTAL_Q.int(), ValueError, "q must be float32 or bfloat16 or float16, got int32."),
    ("q", TOTAL_Q[:7], ValueError, "cu_seqlens_q must end with total_q, 7, got 8."),
    ("q", TOTAL_Q[:, :3], ValueError, "k has 2 kv_heads, which must divide the 3 heads of q."),
    ("k", K, ValueError, "k must be [total_k, kv_heads, head_dim], got 4 dimensions [2, 5, 2, 16]."),
    ("k", TOTAL_K[:8], ValueError, "v must have the total_k of k, 8, got 9."),
    ("v", V, ValueError, "v must be [total_k, kv_heads, v_head_dim], got 4 dimensions [2, 5, 2, 8]."),
    ("v", TOTAL_K[:, :1], ValueError, "v must have the kv_heads of k, 2, got 1."),
    ("cu_seqlens_q", [0, 3, 8], TypeError, "cu_seqlens_q must be a tensor, got list."),
    ("cu_seqlens_q", prefix(0, 3, 8)[None], ValueError, "cu_seqlens_q must be [batch + 1], got 2 dimensions [1, 3]."),
    ("cu_seqlens_q", prefix(0, 3, 8, dtype=torch.int64), ValueError, "cu_seqlens_q must be int32, got int64."),
    ("cu_seqlens_q", prefix(0, 3, 8, **META), ValueError, "cu_seqlens_q must be on the device of q, cpu, got meta."),
    (
        "cu_seqlens_q",
        prefix(0, 0, 3, 0, 8, 0)[::2],
        ValueError,
        "cu_seqlens_q must have a contiguous last dimension, got stride 2.",
    ),
    ("cu_seqlens_q", prefix(), ValueError, "cu_seqlens_q must have batch + 1 elements, got none."),
    ("cu_seqlens_q", prefix(1, 3, 8), ValueError, "cu_seqlens_q must begin with 0, got 1."),
    ("cu_seqlens_q", prefix(-1, 3, 8), ValueError, "cu_seqlens_q must begin with 0, got -1."),
    ("cu_seqlens_q", prefix(0, 5, 4), ValueError, "cu_seqlens_q must not decrease, got 5 before 4."),
    ("cu_seqlens_q", prefix(0, -3, 2), ValueError, "cu_seqlens_q must not decrease, got 0 before -3."),
    ("cu_seqlens_q", prefix(0, 3, 7), ValueError, "cu_seqlens_q must end with total_q, 8, got 7."),
    ("cu_seqlens_q", prefix(0, 4, 9), ValueError, "cu_seqlens_q must end with total_q, 8, got 9."),
    ("cu_seqlens_k", prefix(0, 9), ValueError, "cu_seqlens_k must have as many elements as cu_seqlens_q, 3, got 2."),
    ("cu_seqlens_k", prefix(0, 4, 8), ValueError, "cu_seqlens_k must end with total_k, 9, got 8."),
    ("cu_seqlens_k", prefix(0, 4, 9).float(), ValueError, "cu_seqlens_k must be int32, got float32."),
    ("cu_seqlens_k", prefix(2, 4, 9), ValueError, "cu_seqlens_k must begin with 0, got 2."),
    ("cu_seqlens_k", prefix(0, 4, 3), ValueError, "cu_seqlens_k must not decrease, got 4 before 3."),
    ("max_seqlen_q", 4, ValueError, "max_seqlen_q must be at least the longest sequence, 5, got 4."),
    ("max_seqlen_q", -1, ValueError, "max_seqlen_q must be at least 0, got -1."),
    ("max_seqlen_q", 5.0, TypeError, "max_seqlen_q must be an integer, got float."),
    ("max_seqlen_q", torch.tensor(5), TypeError, "max_seqlen_q must be an integer, got Tensor."),
    ("max_seqlen_k", 0, ValueError, "max_seqlen_k must be at least the longest sequence, 4, got 0."),
    ("max_seqlen_k", None, TypeError, "max_seqlen_k must be an integer, got NoneType."),
]


@pytest.mark.parametrize(("name", "value", "error", "sentence"), PACKED_ERRORS + MODIFIER_ERRORS)
def test_wrong_packed_arguments(name, value, error, sentence):
    with pytest.raises(error) as raised:
        attention_varlen(**{**PACKED, name: value})
    assert str(raised.value) == f"attention_varlen: {sentence}"


def test_a_softcap_that_is_zero_in_float32_is_refused_whatever_the_scale():
    sentence = "^attention: softcap must be 0 or leave softmax_scale / softcap finite in float32, got 1e-46.$"
    for softmax_scale in (0.0, 1e-20, 1.0, None):
        with pytest.raises(ValueError, match=sentence):
            attention(Q, K, V, softmax_scale=softmax_scale, softcap=1e-46)


def test_packed_sequences_have_no_bias():
    with pytest.raises(TypeError, match="bias"):
        attention_varlen(**PACKED, bias=torch.zeros(1, 1, 5, 5))


# ---- the ops themselves, without the public functions before them ----------------------------------------------------

MODIFIERS = {"window_left": -1, "window_right": -1, "softmax_scale": 0.25, "softcap": 0.0}
MODIFIERS |= {"dropout_p": 0.0, "dropout_rng": None}
DIRECT = {"q": Q, "k": K, "v": V, "bias": None, "alibi_slopes": None, "sinks": None, "causal": False, **MODIFIERS}
DIRECT_PACKED = {**PACKED, "alibi_slopes": None, "sinks": None, "causal": False, **MODIFIERS}
EMPTY = torch.zeros(())
HOSTILE_MODIFIERS = [
    {"window_left": -2}, {"window_right": -(2**63)}, {"window_left": 2**70}, {"alibi_slopes": EMPTY},
    {"alibi_slopes": torch.zeros(1, 1, 4)}, {"alibi_slopes": torch.zeros(3)}, {"alibi_slopes": torch.zeros(7, 4)},
    {"alibi_slopes": torch.zeros(4).double()}, {"alibi_slopes": torch.zeros(8)[::2]}, {"sinks": EMPTY},
    {"sinks": torch.zeros(2)}, {"sinks": torch.zeros(4).half()}, {"sinks": torch.zeros(8)[::2]},
]  # fmt: skip
HOSTILE = [
    {"q": EMPTY}, {"q": Q[0]}, {"q": Q.double()}, {"q": Q.to_sparse()}, {"q": Q[..., ::2]}, {"q": Q[..., :4]},
    {"q": torch.zeros(2, 3, 4, 0)}, {"q": torch.zeros(2, 3, 3, 16)}, {"q": torch.zeros(1, 3, 4, 16)}, {"q": None},
    {"k": EMPTY}, {"k": K[0]}, {"k": K.half()}, {"k": torch.zeros(2, 5, 0, 16)}, {"k": K[:1]}, {"k": K[:, :4]},
    {"k": torch.zeros(2, 5, 2, 264)}, {"k": torch.zeros(2, 5, 2, 32)[..., ::2]}, {"k": torch.zeros(2, 5, 2, 8)},
    {"v": EMPTY}, {"v": V[0]}, {"v": V.half()}, {"v": V[:1]}, {"v": V[:, :4]}, {"v": V[:, :, :1]}, {"v": V[..., :0]},
    {"v": torch.zeros(2, 5, 2, 16)[..., ::2]}, {"v": torch.zeros(2, 5, 2, 512)},
    {"bias": EMPTY}, {"bias": torch.zeros(3, 5)}, {"bias": torch.zeros(1, 1, 3, 6)}, {"bias": torch.zeros(1, 1, 2, 5)},
    {"bias": torch.zeros(3, 1, 3, 5)}, {"bias": torch.zeros(1, 3, 3, 5)}, {"bias": torch.zeros(1, 1, 3, 5).int()},
    {"bias": torch.zeros(1, 1, 3, 0)}, *HOSTILE_MODIFIERS,
]  # fmt: skip
HOSTILE_PACKED = [
    {"q": EMPTY}, {"q": Q}, {"q": TOTAL_Q[:7]}, {"q": TOTAL_Q[:0]}, {"q": torch.zeros(8, 3, 16)}, {"k": K},
    {"k": TOTAL_K[:8]}, {"k": TOTAL_K[:, :0]}, {"v": V}, {"v": TOTAL_K[:8]}, {"v": TOTAL_K.half()},
    {"cu_seqlens_q": EMPTY.int()}, {"cu_seqlens_q": prefix()}, {"cu_seqlens_q": prefix(0, 3, 8)[None]},
    {"cu_seqlens_q": prefix(0, 3, 8, dtype=torch.int64)}, {"cu_seqlens_q": prefix(0, 3, 8).float()},
    {"cu_seqlens_q": prefix(0, 0, 3, 0, 8, 0)[::2]}, {"cu_seqlens_q": prefix(0, 3, 2**31 - 1)},
    {"cu_seqlens_q": prefix(-(2**31), 3, 8)}, {"cu_seqlens_q": prefix(0, -(2**31), 8)},
    {"cu_seqlens_q": prefix(0, 9, 8)},
    {"cu_seqlens_q": prefix(0, 3)}, {"cu_seqlens_q": prefix(0, 3, 8, 8)}, {"cu_seqlens_q": prefix(0)},
    {"cu_seqlens_k": prefix()}, {"cu_seqlens_k": prefix(0, 9)}, {"cu_seqlens_k": prefix(0, 4, 9, 9)},
    {"cu_seqlens_k": prefix(0, 4, 10)}, {"cu_seqlens_k": prefix(2**31 - 1, -(2**31), 9)}, {"max_seqlen_q": -(2**63)},
    {"max_seqlen_q": 4}, {"max_seqlen_k": 0}, {"max_seqlen_k": 2**64}, *HOSTILE_MODIFIERS,
]  # fmt: skip


@pytest.mark.parametrize("wrong", HOSTILE, ids=lambda wrong: next(iter(wrong)))
def test_the_op_itself_refuses(wrong):
    with pytest.raises(RuntimeError):
        torch.ops.fmkernels.attention_forward(**{**DIRECT, **wrong})


@pytest.mark.parametrize("wrong", HOSTILE_PACKED, ids=lambda wrong: next(iter(wrong)))
def test_the_packed_op_itself_refuses(wrong):
    with pytest.raises(RuntimeError):
        torch.ops.fmkernels.attention_varlen_forward(**{**DIRECT_PACKED, **wrong})


@pytest.mark.parametrize("op", ["attention_forward", "attention_varlen_forward"])
def test_the_ops_refuse_a_tensor_whose_storage_was_shrunk(op):
    right = DIRECT if op == "attention_forward" else DIRECT_PACKED
    right = {**right, "alibi_slopes": torch.zeros(4), "sinks": torch.zeros(4)}
    if op == "attention_forward":
        right["bias"] = torch.zeros(2, 1, 3, 5)
    for name in [name for name, value in right.items() if isinstance(value, torch.Tensor)]:
        shrunk = right[name].clone()
        shrunk.untyped_storage().resize_(shrunk.nbytes - 1)
        with pytest.raises(RuntimeError, match=r"storage of \d+ bytes, which does not hold its elements"):
            getattr(torch.ops.fmkernels, op)(**{**right, name: shrunk})


@pytest.mark.parametrize("name", ["softmax_scale", "softcap"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_the_ops_refuse_factors_that_are_not_finite(name, value):
    for op, arguments in (("attention_forward", DIRECT), ("attention_varlen_forward", DIRECT_PACKED)):
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            getattr(torch.ops.fmkernels, op)(**{**arguments, name: value})


@pytest.mark.parametrize("seq_q", [1, 30])  # the direct path, the tiled one
def test_the_largest_softcap_bounds_nothing(seq_q):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, seq, 2, 16, generator=generator) for seq in (seq_q, 40, 40))
    capped = attention(q, k, v, softcap=torch.finfo(torch.float32).max, return_lse=True)
    torch.testing.assert_close(capped, attention(q, k, v, return_lse=True))


def test_a_huge_max_seqlen_is_only_a_bound():
    huge = {**DIRECT_PACKED, "max_seqlen_q": 2**62, "max_seqlen_k": 2**62}
    expected = torch.ops.fmkernels.attention_varlen_forward(**DIRECT_PACKED)
    assert all(map(torch.equal, torch.ops.fmkernels.attention_varlen_forward(**huge), expected))


def test_the_unchanged_arguments_are_right():
    """Else the tests above would pass on a library that refuses everything."""
    torch.ops.fmkernels.attention_forward(**DIRECT)
    torch.ops.fmkernels.attention_varlen_forward(**DIRECT_PACKED)
