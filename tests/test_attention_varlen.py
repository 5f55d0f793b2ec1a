# SPDX-License-Identifier: Apache-2.0
"""attention_varlen: values, packing, and what torch asks of an op. Its errors are in test_attention_errors.py."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import BACKENDS, DTYPES, runs_of
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fmkernels import attention, attention_varlen, reference
from fmkernels.testing import Case, assert_attention

MIXED = ((5, 9), (1, 130), (0, 7), (40, 40), (3, 0), (0, 0), (25, 1), (2, 600), (70, 20))
CASES = [
    Case("one sequence", seqlens=((33, 65),)),
    Case("mixed lengths", seqlens=MIXED),
    Case("mixed lengths, causal", seqlens=MIXED, causal=True),
    Case("queries longer than keys, causal", seqlens=((70, 3), (9, 2), (128, 127)), causal=True),
    Case("keys longer than queries, causal", seqlens=((3, 70), (2, 9), (127, 128)), causal=True),
    Case("window", seqlens=MIXED, window=(6, 2)),
    Case("window of one key", seqlens=MIXED, window=(0, 0)),
    Case("softcap and scale", seqlens=MIXED, softcap=3.0, softmax_scale=0.7),
    Case("alibi per head", seqlens=MIXED, alibi="heads"),
    Case("alibi per sequence, sinks, causal", seqlens=MIXED, alibi="batch", sinks=True, causal=True),
    Case("decode", seqlens=((1, 5), (1, 700), (1, 64), (1, 0), (1, 513)), causal=True, heads=8),
    Case("multi-query, wide values", seqlens=MIXED, heads=6, kv_heads=1, v_head_dim=72),
    Case("no keys at all", seqlens=((3, 0), (1, 0)), sinks=True),
    Case("no queries at all", seqlens=((0, 4), (0, 2))),
    Case("no sequences", seqlens=()),
]


def packed(case, device="cpu"):
    """(arguments of attention_varlen, those of its reference, which needs no longest lengths, keyword arguments)"""
    if not case.seqlens:
        tokens = [torch.empty(0, heads, case.head_dim, device=device) for heads in (4, 2, 2)]
        cu_seqlens = torch.zeros(1, dtype=torch.int32, device=device)
        return (*tokens, cu_seqlens, cu_seqlens, 0, 0), (*tokens, cu_seqlens, cu_seqlens), {}
    args, kwargs = case.inputs(device)
    return args, args[:5], kwargs


@pytest.mark.parametrize(("case", "backend", "dtype"), runs_of(CASES))
def test_forward_matches_reference(case, dtype, backend):
    args, reference_args, kwargs = packed(replace(case, dtype=dtype), backend.device)
    actual = backend.run(attention_varlen, *args, return_lse=True, **kwargs)
    assert_attention(backend, actual, reference.attention_varlen, *reference_args, **kwargs)


def alone(args, kwargs, index):
    """`attention` of one of the packed sequences."""
    q, k, v, cu_seqlens_q, cu_seqlens_k = args[:5]
    (q_begin, q_end), (k_begin, k_end) = (cu[index : index + 2].tolist() for cu in (cu_seqlens_q, cu_seqlens_k))
    slopes = kwargs.get("alibi_slopes")
    if slopes is not None and slopes.dim() == 2:
        kwargs = {**kwargs, "alibi_slopes": slopes[index : index + 1]}
    o, lse = attention(
        q[None, q_begin:q_end], k[None, k_begin:k_end], v[None, k_begin:k_end], return_lse=True, **kwargs
    )
    return slice(q_begin, q_end), o[0], lse[0]


lengths = st.tuples(st.integers(0, 8) | st.integers(0, 70), st.integers(0, 150) | st.sampled_from([512, 513]))


@settings(max_examples=50)
@given(
    seqlens=st.lists(lengths, min_size=1, max_size=7).map(tuple),
    causal=st.booleans(),
    window=st.sampled_from([(-1, -1), (30, 0), (4, 9)]),
    alibi=st.sampled_from(["", "batch"]),
    dtype=st.sampled_from(DTYPES),
)
def test_a_sequence_has_the_same_bits_in_every_packing(seqlens, causal, window, alibi, dtype):
    case = Case("packing", seqlens=seqlens, causal=causal, window=window, alibi=alibi, sinks=True, dtype=dtype)
    args, _, kwargs = packed(case)
    o, lse = attention_varlen(*args, return_lse=True, **kwargs)
    for index in range(len(seqlens)):
        rows, o_alone, lse_alone = alone(args, kwargs, index)
        assert torch.equal(o[rows], o_alone)
        assert torch.equal(lse[:, rows], lse_alone)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("index", range(len(MIXED)))
def test_garbage_in_the_other_sequences_changes_no_bits(index, poison):
    args, _, kwargs = packed(Case("garbage", seqlens=MIXED, sinks=True))
    clean = attention_varlen(*args, return_lse=True, **kwargs)
    dirty = []
    for tokens, cu_seqlens in zip(args[:3], (args[3], args[4], args[4]), strict=True):
        begin, end = cu_seqlens[index : index + 2].tolist()
        dirty.append(torch.full_like(tokens, poison))
        dirty[-1][begin:end] = tokens[begin:end]
    o, lse = attention_varlen(*dirty, *args[3:], return_lse=True, **kwargs)
    rows = slice(*args[3][index : index + 2].tolist())
    assert torch.equal(o[rows], clean[0][rows])
    assert torch.equal(lse[:, rows], clean[1][:, rows])


def test_threads_change_no_bits():
    args, _, kwargs = packed(Case("threads", seqlens=MIXED, causal=True))
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results.append(attention_varlen(*args, return_lse=True, **kwargs))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


def test_longer_bounds_change_no_bits():
    args, _, kwargs = packed(Case("bounds", seqlens=MIXED, causal=True))
    expected = attention_varlen(*args, **kwargs)
    for longest in (args[6] + 1, 2**62):
        assert torch.equal(attention_varlen(*args[:5], longest, longest, **kwargs), expected)


def test_strided_tokens_of_one_projection():
    """q, k and v as views of one packed [total, (heads + 2 kv_heads) * head_dim] product."""
    args, _, _ = packed(Case("qkv", seqlens=((5, 5), (30, 30))))
    fused = torch.cat([t.flatten(1) for t in args[:3]], dim=1)
    views = [t.unflatten(1, (-1, 16)) for t in fused.split([64, 32, 32], dim=1)]
    assert torch.equal(attention_varlen(*views, *args[3:]), attention_varlen(*args))


def op_arguments(case, device="cpu"):
    args, _, options = packed(case, device)
    scale, slopes, sinks = case.softmax_scale or 0.25, options.get("alibi_slopes"), options.get("sinks")
    return (*args, slopes, sinks, case.causal, *case.window, scale, case.softcap, 0.0, None)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[9]], ids=str)
def test_opcheck(case, backend):
    opcheck(torch.ops.fmkernels.attention_varlen_forward.default, op_arguments(case, backend.device))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", [CASES[1], CASES[9]], ids=str)
def test_compile_is_one_graph(case, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attention_varlen, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlens in (case.seqlens, (*case.seqlens, (4, 5))):
        args, _, kwargs = packed(replace(case, seqlens=seqlens))
        expected = attention_varlen(*args, return_lse=True, **kwargs)
        assert all(map(torch.equal, compiled(*args, return_lse=True, **kwargs), expected))


def test_compiled_gradients_with_the_same_prefix_sums_for_queries_and_keys():
    """One tensor for both, as packed self-attention has it, and was refused: dynamo wants distinct tensors."""
    torch._dynamo.reset()
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    qkv = [torch.randn(8, 2, 16, requires_grad=True) for _ in range(3)]
    results = []
    for function in (attention_varlen, torch.compile(attention_varlen, fullgraph=True, backend="aot_eager")):
        o = function(*qkv, cu_seqlens, cu_seqlens, 5, 5)
        results.append((o, *torch.autograd.grad(o.square().sum(), qkv)))
    assert all(map(torch.equal, *results))


def test_compiled_code_checks_the_prefix_sums():
    torch._dynamo.reset()
    args, _, _ = packed(CASES[1])
    compiled = torch.compile(attention_varlen, fullgraph=True, backend="aot_eager")
    wrong = args[3].clone()
    wrong[-1] += 1
    with pytest.raises(RuntimeError, match="cu_seqlens_q must end with the"):
        compiled(*args[:3], wrong, args[4], args[5] + 1, args[6])


class Module(torch.nn.Module):
    def forward(self, q, k, v, cu_seqlens_q, cu_seqlens_k):
        return attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, 70, 600, causal=True)


def test_export():
    args, _, _ = packed(CASES[1])
    program = torch.export.export(Module(), args[:5], strict=True)
    assert torch.equal(program.module()(*args[:5]), Module()(*args[:5]))


def test_flop_formula_is_the_bound_of_the_shapes():
    args, _, _ = packed(Case("flops", seqlens=((7, 11), (2, 30)), head_dim=16, v_head_dim=40))
    with FlopCounterMode(display=False) as counter:
        attention_varlen(*args)
    assert counter.get_total_flops() == 2 * 4 * 9 * 30 * (16 + 40)


def test_autocast_takes_its_dtype():
    args, _, kwargs = packed(Case("autocast", seqlens=MIXED, sinks=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = attention_varlen(*args, **kwargs)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, attention_varlen(*(t.bfloat16() for t in args[:3]), *args[3:], **kwargs))
