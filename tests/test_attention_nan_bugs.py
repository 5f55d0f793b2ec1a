# SPDX-License-Identifier: Apache-2.0
"""NaN bugs that other attention kernels had, each under the name of its report.

Those of backward passes stand here with what attention has of them so far, its forward, and with the backward of
merge_attention.
"""

import math

import pytest
import torch

from fmkernels import attention, attention_varlen, merge_attention, reference
from fmkernels.testing import Case, assert_attention, backends

pytestmark = pytest.mark.parametrize("backend", backends("attention_forward"), ids=str)
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_flash_attention_334_more_queries_than_keys(dtype, backend):
    """Causal rows before the first key divided 0 by 0."""
    args, _ = Case("334", seq_q=128, seq_k=40, head_dim=64, dtype=dtype).inputs(backend.device)
    o, lse = backend.run(attention, *args, causal=True, return_lse=True)
    assert (o[:, :88] == 0).all()
    assert (lse[..., :88] == -math.inf).all()
    assert_attention(backend, (o, lse), reference.attention, *args, causal=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_flash_attention_443_packed_with_more_queries_than_keys(dtype, backend):
    case = Case("443", seqlens=((70, 3), (1, 0), (129, 128), (5, 64)), head_dim=64, dtype=dtype)
    args, _ = case.inputs(backend.device)
    actual = backend.run(attention_varlen, *args, causal=True, return_lse=True)
    assert not any(t.isnan().any() for t in actual)
    assert_attention(backend, actual, reference.attention_varlen, *args[:5], causal=True)


@pytest.mark.parametrize("seq_k", [513, 1024, 4100])
def test_torchtitan_3235_splits_that_see_no_key(seq_k, backend):
    """Decoding splits the keys; a window leaves some without a visible one, and two such merge to -inf - -inf."""
    args, _ = Case("3235", seq_q=1, seq_k=seq_k, heads=8, head_dim=64, dtype=backend.attention_dtypes[0]).inputs(
        backend.device
    )
    for window in ((10, 0), (0, 0)):
        actual = backend.run(attention, *args, window=window, return_lse=True)
        assert_attention(backend, actual, reference.attention, *args, window=window)
    blind = backend.run(attention, args[0], args[1][:, :0], args[2][:, :0], return_lse=True)
    o, lse = merge_attention(*blind, *blind)
    assert (o == 0).all()
    assert (lse == -math.inf).all()


def test_flash_attention_1052_large_half_inputs(backend):
    """Inputs of three times the usual size gave NaN gradients in float16."""
    (q, k, v), _ = Case("1052", batch=1, seq_q=512, seq_k=512, heads=1, kv_heads=1, head_dim=128).inputs(backend.device)
    args = [(3 * t).half() for t in (q, k, v)]
    actual = backend.run(attention, *args, causal=True, return_lse=True)
    assert_attention(backend, actual, reference.attention, *args, causal=True)


@pytest.mark.parametrize("level", [-88.8, -100.0, -1e4])
@pytest.mark.parametrize("seq_k", [64, 192])
def test_torch_196678_padded_keys_beside_scores_far_below_zero(seq_k, level, backend):
    """A key past the end scored 0, and exp(0 - lse) overflows where lse is below -88.7; half blocks have such keys."""
    args, _ = Case("196678", seq_q=40, seq_k=seq_k, head_dim=64, dtype=torch.bfloat16).inputs(backend.device)
    bias = torch.full((1, 1, 1, 1), level, device=backend.device)
    o, lse = backend.run(attention, *args, bias=bias, return_lse=True)
    assert lse.max() < -80
    assert_attention(backend, (o, lse), reference.attention, *args, bias=bias)
    sides = [t.requires_grad_() for t in (o, lse, o.clone(), lse.clone())]
    merge_attention(*sides)[0].float().sum().backward()
    assert all(t.grad.isfinite().all() for t in sides)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cudnn_frontend_1072_one_query(dtype, backend):
    for seq_k in (1, 7, 128, 1000):
        args, _ = Case("1072", seq_q=1, seq_k=seq_k, head_dim=64, dtype=dtype).inputs(backend.device)
        actual = backend.run(attention, *args, causal=True, return_lse=True)
        assert_attention(backend, actual, reference.attention, *args, causal=True)


@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 0), (40, 0), (40, 7)])
def test_flashinfer_4452_lse_of_an_empty_row_is_minus_infinity(seq_q, seq_k, backend):
    """And not a large finite number, which a merge would weigh."""
    args, _ = Case("4452", seq_q=seq_q, seq_k=seq_k, dtype=backend.attention_dtypes[0]).inputs(backend.device)
    _, lse = backend.run(attention, *args, causal=True, return_lse=True)
    blind = seq_q - seq_k
    assert (lse[..., :blind] == -math.inf).all()
    assert lse[..., blind:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("seq_q", [1, 50])
@pytest.mark.parametrize("garbage", ["NaN", "bytes 0x7F"])  # vLLM's own tests fill unused slots with the latter
def test_flashinfer_945_garbage_in_unused_slots_of_a_cache(garbage, seq_q, dtype, backend):
    """The keys are the beginning of a longer cache; what lies behind them weighs 0, and 0 * NaN is NaN."""
    if dtype not in backend.attention_dtypes:
        pytest.skip(f"attention has no {dtype} on {backend}")
    (q, k, v), _ = Case("945", seq_q=seq_q, seq_k=77, head_dim=64, dtype=dtype).inputs(backend.device)

    def in_a_cache(t):
        cache = t.new_full((t.shape[0], 200, *t.shape[2:]), math.nan)
        if garbage == "bytes 0x7F":
            cache.view(torch.uint8).fill_(0x7F)
        cache[:, : t.shape[1]] = t
        return cache[:, : t.shape[1]]

    expected = backend.run(attention, q, k, v, causal=True, return_lse=True)
    actual = backend.run(attention, q, in_a_cache(k), in_a_cache(v), causal=True, return_lse=True)
    assert all(map(torch.equal, actual, expected))


@pytest.fixture
def _memory_begins_as_nan(monkeypatch):
    """Fresh outputs hold NaN, so that what a kernel leaves unwritten shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_memory_begins_as_nan")
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 0), (1, 600), (33, 0), (33, 65), (130, 20)])
def test_tilelang_2461_every_element_of_the_outputs_is_written(seq_q, seq_k, backend):
    args, _ = Case("2461", seq_q=seq_q, seq_k=seq_k, v_head_dim=24, dtype=backend.attention_dtypes[0]).inputs(
        backend.device
    )
    o, lse = backend.run(attention, *args, causal=True, return_lse=True)
    assert not o.isnan().any()
    assert not lse.isnan().any()
    case = Case(
        "2461", seqlens=((seq_q, seq_k), (0, 3), (9, 4), (2, 0)), v_head_dim=24, dtype=backend.attention_dtypes[0]
    )
    packed, _ = case.inputs(backend.device)
    o, lse = backend.run(attention_varlen, *packed, causal=True, return_lse=True)
    assert not o.isnan().any()
    assert not lse.isnan().any()
