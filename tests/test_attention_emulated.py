# SPDX-License-Identifier: Apache-2.0
"""attention on emulated GPUs: the tiles of every architecture class, and whether the checks see what holds them up."""

import math
from dataclasses import replace

import pytest
import torch
from faults import missing_synchronisations

from fmkernels import _library, attention, attention_varlen, create_block_mask, reference
from fmkernels.testing import Case, assert_attention, backends

EMULATED = [backend for backend in backends("attention_forward") if backend.name == "emulated"]
pytestmark = pytest.mark.skipif(not EMULATED, reason="the emulated backend is not built")

SMALL_SHARED_MEMORY = 86  # 99 KiB a block, where sm_80 gives 163 and more
AFTER_HOPPER = 120  # 99 KiB too, and compiled from the PTX for sm_90, whose own GPUs have more: its wide tiles trapped


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *((architecture, torch.bfloat16) for architecture in (80, SMALL_SHARED_MEMORY, 90, AFTER_HOPPER)),
        (80, torch.float16),
        (SMALL_SHARED_MEMORY, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128, 192, 256])
def test_every_tile(head_dim, dtype, architecture):
    """Blocks of keys that are plain, cut by the diagonal, by a window and by the end of the sequence."""
    backend = replace(EMULATED[0], architecture=architecture)
    plain = Case(
        "tile", batch=1, seq_q=140, seq_k=210, heads=1, kv_heads=1, head_dim=head_dim, dtype=dtype, causal=True
    )
    for case in (plain, replace(plain, window=(90, 0)), replace(plain, causal=False, v_head_dim=64)):
        args, kwargs = case.inputs()
        actual = backend.run(attention, *args, **kwargs, return_lse=True)
        assert_attention(backend, actual, reference.attention, *args, **kwargs)


# ---- what the host cannot see, and what a GPU does not take ----------------------------------------------------------

HOSTILE = [
    [0, 5, 3, 40],
    [-7, 5, 9, 40],
    [0, 5, 2**31 - 1, 40],
    [0, 39, 40, 41],
    [-(2**31), 2**31 - 1, 0, 3],
    [3, 2, 1, 0],
]


@pytest.mark.parametrize("which", ["queries", "keys", "both"])
@pytest.mark.parametrize("prefix", HOSTILE, ids=str)
def test_prefix_sums_that_lie_reach_nothing_outside_the_tensors(prefix, which, monkeypatch):
    import emulator

    case = Case("hostile", heads=2, kv_heads=1, seqlens=((5, 9), (4, 0), (31, 31)), dtype=torch.float16)
    args, kwargs = case.inputs()
    lie = torch.tensor(prefix, dtype=torch.int32)
    args = list(args)
    args[3] = args[3] if which == "keys" else lie
    args[4] = args[4] if which == "queries" else lie
    reports = ()
    try:
        EMULATED[0].run(attention_varlen, *args, **kwargs)
    except emulator.FaultError as error:
        reports = error.reports
    # Sequences that overlap are written by several blocks, inside the tensors: that much, and nothing else, may happen.
    assert {report.fault for report in reports} <= {"race of blocks"}
    monkeypatch.setattr(_library, "check_values", True)  # as FMKERNELS_CHECK=1
    with pytest.raises(ValueError, match=r"^attention_varlen: (cu_seqlens|max_seqlen)_[qk] must"):
        EMULATED[0].run(attention_varlen, *args, **kwargs)


@pytest.mark.parametrize("seq_k", [31, 1200])
def test_sequences_that_cannot_hold_the_queries_are_a_sentence_and_no_empty_grid(seq_k):
    forward = torch.ops.fmkernels_emulated.attention_varlen_forward.default
    case = Case("empty grid", heads=2, kv_heads=1, seqlens=((5, 9), (4, seq_k)), dtype=torch.float16)
    q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k = case.inputs()[0]
    tail = (longest_k, None, None, False, -1, -1, 0.25, 0.0, 0.0, None)
    for longest in (0, -5):
        with pytest.raises(RuntimeError, match=f"2 sequences of at most {longest} tokens, which are not the 9 tokens"):
            forward(q, k, v, cu_seqlens_q, cu_seqlens_k, longest, *tail)
    none = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="0 sequences of at most 5 tokens, which are not the 9 tokens of q"):
        forward(q, k, v, none, none, longest_q, *tail)


@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_unaligned_rows_are_copied(name, offset):
    (q, k, v), _ = Case("aligned", seq_q=20, head_dim=24, dtype=torch.bfloat16).inputs()
    tensors = {"q": q, "k": k, "v": v}
    expected = EMULATED[0].run(attention, q, k, v)
    rows = tensors[name]
    wide = torch.zeros(*rows.shape[:-1], rows.shape[-1] + 8 + offset, dtype=rows.dtype)
    wide[..., offset : offset + rows.shape[-1]] = rows
    tensors[name] = wide[..., offset : offset + rows.shape[-1]]
    assert torch.equal(EMULATED[0].run(attention, **tensors), expected)


def test_sizes_that_no_grid_holds_are_sentences():
    forward = torch.ops.fmkernels_emulated.attention_forward.default
    tail = (None, None, None, False, -1, -1, 0.25, 0.0, 0.0, None)
    many = torch.zeros(1, 1, 1, 8, dtype=torch.float16).expand(70000, -1, -1, -1)
    with pytest.raises(RuntimeError, match="batch and kv_heads must be at most 65535 on CUDA, got 70000 and 1"):
        forward(many, many, many, *tail)


def test_a_position_and_a_window_add_up_within_32_bits():
    """Beside a window of 2**30 keys the position of the last row was negative, and no row saw a key."""
    q, k, v = (torch.randn(1, seq, 1, 8).half() for seq in (40, 1, 1))
    longest = 2**30 - 1024
    many = [t.expand(-1, longest, -1, -1) for t in (k, v)]
    assert torch.equal(EMULATED[0].run(attention, q, *many, window=(3, 2**30)), v.expand(-1, 40, -1, -1))
    with pytest.raises(RuntimeError, match=f"sequences must be at most {longest} rows long on CUDA"):
        EMULATED[0].run(attention, q, *(t.expand(-1, longest + 1, -1, -1) for t in (k, v)), window=(3, 2**30))


def test_no_keys_may_lie_in_any_way():
    """Their last dimension has a stride of 2; there is nothing to align or to copy."""
    q = torch.zeros(2, 3, 2, 16, dtype=torch.float16)
    k = torch.empty(2, 16, 2, 0, dtype=torch.float16).permute(0, 3, 2, 1)
    o, lse = EMULATED[0].run(attention, q, k, k, return_lse=True)
    assert (o == 0).all()
    assert (lse == -math.inf).all()


# ---- split keys ------------------------------------------------------------------------------------------------------


def test_a_poisoned_value_passes_a_chunk_whose_scores_are_all_minus_infinity():
    """Its weight is 0, and 0 * NaN is NaN. The merge left such a chunk out as one without a visible key."""
    q, k, v = (torch.ones(1, seq, 1, 8, dtype=torch.float16) for seq in (1, 1200, 1200))
    k[:, 576:1152] = -math.inf
    v[:, 600, :, 3] = math.nan
    actual = EMULATED[0].run(attention, q, k, v, return_lse=True)
    assert actual[0].isnan().sum() == 1
    assert_attention(EMULATED[0], actual, reference.attention, q, k, v)


def test_the_memory_for_chunks_is_bounded_by_the_keys():
    """It was as large as if every sequence were the longest: gigabytes for a long one among many short."""
    case = Case("one long", seqlens=((1, 6000), *((1, 1),) * 200), dtype=torch.float16)
    args, kwargs = case.inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        actual = EMULATED[0].run(attention_varlen, *args, return_lse=True)
    allocated = [event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0]
    assert allocated
    assert sum(allocated) < args[1].nbytes
    assert_attention(EMULATED[0], actual, reference.attention_varlen, *args[:5], **kwargs)


# ---- every barrier and every wait is needed, and seen to be missing --------------------------------------------------

# Masked and plain blocks, and a value that is not finite: every path of the kernel runs.
CASE = Case(
    "faulty", batch=1, seq_q=300, seq_k=300, heads=1, kv_heads=1, head_dim=64, dtype=torch.bfloat16, causal=True
)


def run_case() -> None:
    (q, k, v), kwargs = CASE.inputs()
    v[:, 290] = float("inf")
    EMULATED[0].run(attention, q, k, v, **kwargs)
    mask = create_block_mask(lambda b, h, i, j: i // 100 == j // 100, None, None, CASE.seq_q, CASE.seq_k, block=64)
    EMULATED[0].run(attention, q, k, v, block_mask=mask, **kwargs)


def test_every_barrier_and_wait_that_is_taken_out_is_reported():
    total, unseen = missing_synchronisations("attention_forward_kernel", "BFloat16ELi64E", run_case)
    assert total >= 12
    assert unseen == []


def test_a_walk_that_does_not_wait_for_its_readers_is_reported():
    """That all lanes see its visits is for the barrier of the block, which the kernel has."""
    total, unseen = missing_synchronisations("BlockWalk", "advance", run_case)
    assert total >= 1
    assert unseen == []


# ---- float32, in split products --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_float32_of_infinities_and_of_the_largest_numbers(head_dim):
    """Two tf32 stand for a number, and an infinity less itself is NaN: such scores are those of plain multiply-adds."""
    largest = torch.finfo(torch.float32).max
    (q, k, v), _ = Case("ends", batch=1, seq_q=70, seq_k=70, heads=1, kv_heads=1, head_dim=head_dim).inputs()
    q, k = q.abs(), k.abs()
    k[:, 3] = -math.inf  # weight 0 in every row
    k[:, 40] = -largest  # products beyond the range are infinities too
    q[:, 50] = math.inf  # one row alone
    v[:, 60, 0, 2] = math.inf
    v[:, 65] = largest  # rounded up it would be an infinity in the rows that do not see it
    actual = EMULATED[0].run(attention, q, k, v, causal=True, return_lse=True)
    expected = reference.attention(*(t.double() for t in (q, k, v)), causal=True)
    o, truth = actual[0][:, :60], expected[0][:, :60]
    assert torch.equal(o.isfinite(), truth.isfinite())
    assert o[:, :50].isfinite().all()
    assert actual[0][:, 60:, 0, 2].isinf().all()
    assert_attention(
        EMULATED[0], (o, actual[1][..., :60]), reference.attention, q[:, :60], k[:, :60], v[:, :60], causal=True
    )
