# SPDX-License-Identifier: Apache-2.0
"""attention: values, edges, and what torch asks of an op. Beside it: test_attention_isolation.py (what may reach a row,
and that its bits depend on nothing else), test_attention_errors.py, and test_attention_varlen.py."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fmkernels import attention, reference
from fmkernels.testing import Case, assert_as_good_as_torch, assert_attention, backends

BACKENDS = backends("attention_forward")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RUNS = [
    pytest.param(backend, dtype, id=f"{backend}-{dtype}") for backend in BACKENDS for dtype in backend.attention_dtypes
]
# One dtype of each kind: on a GPU float32 has products and tiles of its own.
KINDS = [run for run in RUNS if run.values[1] in (run.values[0].attention_dtypes[0], torch.float32)]
EVERYTHING = {
    "causal": True,
    "window": (40, 3),
    "softmax_scale": 0.3,
    "softcap": 2.0,
    "alibi": "batch",
    "sinks": True,
    "bias": "bhqk",
    "bias_hides": True,
}


def named(label, values, **fields):
    """One case for each value of a field, or of two fields."""
    names = label.split(",")
    pairs = [value if len(names) > 1 else (value,) for value in values]
    return [Case(f"{label}={pair}", **fields, **dict(zip(names, pair, strict=True))) for pair in pairs]


CASES = [
    Case("plain"),
    Case("one query, one key", seq_q=1, seq_k=1),
    Case("causal", causal=True, seq_q=65),
    Case("causal, more queries than keys", causal=True, seq_q=70, seq_k=30),
    Case("no visible key", causal=True, seq_q=40, seq_k=1),
    Case("no key", seq_k=0),
    Case("no key, sinks", seq_k=0, sinks=True),
    Case("window of one key", window=(0, 0)),
    Case("window to the left", window=(5, 0)),
    Case("window, asymmetric", window=(3, 17), seq_q=140, seq_k=130),
    Case("window wider than the sequence", window=(1000, 1000)),
    Case("window, left only", window=(7, -1)),
    Case("window beyond the keys", window=(2, 0), seq_q=80, seq_k=20),
    Case("window and causal", window=(9, 9), causal=True, seq_q=140, seq_k=140),
    Case("softcap", softcap=1.5),
    Case("softmax_scale 0", softmax_scale=0.0),
    Case("softmax_scale negative", softmax_scale=-0.7),
    Case("alibi per head", alibi="heads"),
    Case("alibi per batch", alibi="batch", causal=True, seq_q=60, seq_k=150),
    Case("sinks", sinks=True),
    *named("bias", ["", "b", "h", "q", "k", "bh", "qk", "bqk", "hqk", "bhqk"]),
    Case("bias hides", bias="hqk", bias_hides=True),
    Case("bias hides rows", bias="q", bias_hides=True),
    Case("bias hides, decode", bias="bk", bias_hides=True, seq_q=1, seq_k=700),
    Case("everything", **EVERYTHING),
    Case("everything, tiled", **EVERYTHING, seq_q=110, seq_k=140),
    Case("everything, decode", **{**EVERYTHING, "window": (600, 3)}, seq_q=2, seq_k=1100),
    Case("multi-query", heads=6, kv_heads=1),
    Case("three heads a group", heads=9, kv_heads=3, causal=True, seq_q=65),
    Case("transposed strides", transposed=True, causal=True),
    Case("wide values", head_dim=24, v_head_dim=128),
    Case("narrow values", head_dim=192, v_head_dim=128, causal=True),
    Case("head dim", head_dim=200, v_head_dim=64, seq_q=50, seq_k=140, causal=True),  # one long sum rounded too much
    *named("head_dim", [8, 40, 64, 96, 256], seq_q=40),
    *named("v_head_dim", [8, 72, 256], seq_q=7, kv_heads=4),
    *named("seq_q", range(1, 10), seq_k=70, kv_heads=4, causal=True),  # rows around the switch of the two paths
    *named("seq_q", [1, 2, 3], seq_k=70, causal=True),
    *named("seq_k", [63, 64, 65, 511, 512, 513, 1025], seq_q=3, causal=True, window=(800, -1)),  # chunks of decode
    *named("seq_k", [127, 128, 129, 257], seq_q=50, causal=True),  # blocks of the tiled path
    *named("seq_q", [23, 24, 25, 95, 96, 97, 191, 192, 193], seq_k=150, batch=1, kv_heads=4, window=(90, 20)),
]


# Of float32 on a GPU, whose products take an emulator several times as long; the others are slow tests.
FEW = {
    "no visible key", "no key, sinks", "window, asymmetric", "softcap", "alibi per batch", "sinks", "bias=('hqk',)",
    "bias hides", "everything", "three heads a group", "transposed strides", "mixed lengths, causal", "wide values",
    "head_dim=(256,)", "seq_k=(513,)",
}  # fmt: skip


def runs_of(cases, few=FEW):
    """(case, backend, dtype)"""
    return [
        pytest.param(case, *run.values, id=f"{case}-{run.id}", marks=[pytest.mark.slow] if is_rare else [])
        for case in cases
        for run in RUNS
        for is_rare in [run.values[0].has_tensor_cores and run.values[1] == torch.float32 and case.name not in few]
    ]


@pytest.mark.parametrize(("case", "backend", "dtype"), runs_of(CASES))
def test_forward_matches_reference(case, dtype, backend):
    check(replace(case, dtype=dtype), backend)


def check(case, backend):
    args, kwargs = case.inputs(backend.device)
    actual = backend.run(attention, *args, return_lse=True, **kwargs)
    assert actual[0].dtype == case.dtype
    assert actual[1].dtype == torch.float32
    assert_attention(backend, actual, reference.attention, *args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
@pytest.mark.parametrize("seq_q", [1, 5, 50])
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(head_dim, seq_q, dtype, backend):
    case = Case("head dim", head_dim=head_dim, seq_q=seq_q, seq_k=140, dtype=dtype, causal=True)
    check(case, backend)
    check(replace(case, v_head_dim=264 - head_dim), backend)


@st.composite
def attention_cases(draw):
    kv_heads = draw(st.integers(1, 3))
    window = st.tuples(st.integers(-1, 80), st.integers(-1, 80))
    return Case(
        "drawn",
        batch=draw(st.integers(1, 3)),
        seq_q=draw(st.integers(8, 80) | st.integers(1, 8)),
        seq_k=draw(st.integers(16, 200)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=8 * draw(st.integers(1, 12)),
        v_head_dim=8 * draw(st.integers(1, 12)),
        dtype=draw(st.sampled_from(DTYPES)),
        causal=draw(st.booleans()),
        window=draw(st.just((-1, -1)) | window),
        softcap=draw(st.sampled_from([0.0, 0.5, 30.0])),
        alibi=draw(st.sampled_from(["", "heads", "batch"])),
        sinks=draw(st.booleans()),
        bias=draw(st.none() | st.sets(st.sampled_from("bhqk")).map(lambda dims: "".join(sorted(dims)))),
        bias_dtype=draw(st.sampled_from([None, torch.float32])),
        bias_hides=draw(st.booleans()),
        transposed=draw(st.booleans()),
    )


@settings(max_examples=30)
@given(case=attention_cases())
def test_any_combination(case):
    for backend in BACKENDS:
        check(case if case.dtype in backend.attention_dtypes else replace(case, dtype=torch.bfloat16), backend)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_q", [1, 50])
@pytest.mark.parametrize("level", [-3e4, -200.0, -88.8, 88.8, 200.0, 3e4])
def test_lse_beyond_the_range_of_exp(level, seq_q):
    """Scores far from zero, where exp(score) alone or exp(0 - lse) overflows or vanishes."""
    args, _ = Case("level", seq_q=seq_q).inputs()
    bias = torch.full((1, 1, 1, 1), level)
    o, lse = attention(*args, bias=bias, return_lse=True)
    assert_as_good_as_torch((o, lse), reference.attention, *args, bias=bias)
    assert o.isfinite().all()


@pytest.mark.parametrize("seq_q", [1, 50])
def test_products_beyond_the_range_of_half(seq_q):
    (q, k, v), _ = Case("large", seq_q=seq_q, dtype=torch.float16, head_dim=64).inputs()
    q, k = q * 200, k * 200  # products of 1e5 and more, where float16 ends at 65504
    actual = attention(q, k, v, return_lse=True)
    assert actual[1].abs().max() > 65504
    assert_as_good_as_torch(actual, reference.attention, q, k, v)


@pytest.mark.parametrize("sink", [-math.inf, -1e30, 80.0, 1e30])
@pytest.mark.parametrize("seq_q", [2, 50])
def test_extreme_sinks(sink, seq_q):
    args, _ = Case("sink", seq_q=seq_q, seq_k=20, causal=True).inputs()  # some of 50 queries see no key
    sinks = torch.tensor([sink, 0.5, sink, -2.0])
    actual = attention(*args, causal=True, sinks=sinks, return_lse=True)
    assert_as_good_as_torch(actual, reference.attention, *args, causal=True, sinks=sinks)


def test_a_sink_of_minus_infinity_is_no_sink():
    args, _ = Case("sink", seq_q=50, seq_k=20, causal=True).inputs()
    without = attention(*args, causal=True, return_lse=True)
    with_sink = attention(*args, causal=True, sinks=torch.full((4,), -math.inf), return_lse=True)
    assert all(map(torch.equal, without, with_sink))


@pytest.mark.parametrize("seq_q", [1, 50])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_lowest_finite_bias_is_a_number(bias_dtype, seq_q):
    """Many masks are made of it. A row that has nothing else averages its values; in units of log2 it became -inf."""
    (q, k, v), _ = Case("lowest", seq_q=seq_q, dtype=bias_dtype).inputs()
    bias = torch.full((1, 1, 1, 65), torch.finfo(bias_dtype).min, dtype=bias_dtype)
    assert_as_good_as_torch(
        attention(q, k, v, bias=bias), lambda *a, **b: reference.attention(*a, **b)[0], q, k, v, bias=bias
    )
    bias[..., 7] = -bias[..., 7]
    assert torch.equal(attention(q, k, v, bias=bias), v[:, 7:8].repeat_interleave(2, 2).expand(-1, seq_q, -1, -1))


@pytest.mark.parametrize("seq_q", [1, 50])
def test_the_largest_finite_sink_and_slope_are_numbers(seq_q):
    args, _ = Case("largest", seq_q=seq_q).inputs()
    largest = torch.full((4,), torch.finfo(torch.float32).max)
    o, lse = attention(*args, sinks=largest, return_lse=True)
    assert (o == 0).all()
    assert (lse.isfinite() & (lse > 1e38)).all()
    o = attention(*args, alibi_slopes=largest)  # the key at distance 0 alone counts
    assert torch.equal(o, args[2][:, 65 - seq_q :].repeat_interleave(2, 2))


def test_a_window_costs_what_it_shows():
    """The keys outside it take no memory, however many they are."""
    q, k, v = (torch.randn(1, seq, 1, 8) for seq in (2, 1, 1))
    many = [t.expand(-1, 2**40, -1, -1) for t in (k, v)]
    assert torch.equal(attention(q, *many, window=(3, 0)), v.expand(-1, 2, -1, -1))


@pytest.mark.parametrize(("seq_q", "seq_k"), [(8, 3), (100, 40), (3, 0), (30, 0)])
def test_rows_without_a_key_are_zero_and_minus_infinity(seq_q, seq_k):
    """Never a large finite lse, and never the NaN of 0 / 0."""
    args, _ = Case("no key", seq_q=seq_q, seq_k=seq_k).inputs()
    o, lse = attention(*args, causal=True, return_lse=True)
    blind = seq_q - seq_k
    assert (o[:, :blind] == 0).all()
    assert (lse[:, :, :blind] == -math.inf).all()
    assert lse[:, :, blind:].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (0, 0, 0), (2, 0, 0)])
def test_empty_inputs_give_empty_outputs(shape):
    batch, seq_q, seq_k = shape
    args, _ = Case("empty", batch=batch, seq_q=seq_q, seq_k=seq_k).inputs()
    o, lse = attention(*args, return_lse=True)
    assert o.shape == (batch, seq_q, 4, 16)
    assert lse.shape == (batch, 4, seq_q)


def test_no_heads():
    q, k = torch.empty(2, 3, 0, 8), torch.empty(2, 5, 1, 8)
    assert attention(q, k, k).shape == (2, 3, 0, 8)


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_q", [2, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layout", ["transposed", "padded rows", "offset by one element", "expanded batch", "expanded heads"]
)
def test_strides_change_no_bits(layout, dtype, seq_q):
    def laid_out(t):
        if layout == "transposed":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "padded rows":
            return torch.nn.functional.pad(t, (0, 3, 0, 1, 0, 2), value=math.nan)[:, : t.shape[1], : t.shape[2], :-3]
        if layout == "offset by one element":  # not aligned to a vector
            return torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view_as(t)
        if layout == "expanded batch":
            return t[:1].expand_as(t)
        return t[:, :, :1].expand_as(t)

    args, kwargs = Case("layout", seq_q=seq_q, dtype=dtype, bias="bhqk", sinks=True, alibi="batch").inputs()
    views = [laid_out(t) for t in args]
    assert layout == "offset by one element" or not any(t.is_contiguous() for t in views)
    actual = attention(*views, **kwargs, return_lse=True)
    expected = attention(*(t.contiguous() for t in views), **kwargs, return_lse=True)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("seq_q", [2, 50])
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides_of_bias(bias_dtype, seq_q):
    args, _ = Case("bias", seq_q=seq_q, dtype=torch.float16).inputs()
    dense = Case("bias", seq_q=seq_q, dtype=torch.float16, bias="bhqk", bias_dtype=bias_dtype).inputs()[1]["bias"]
    key_major = dense.transpose(2, 3).contiguous().transpose(2, 3)
    every_other = torch.stack([dense, dense.new_full(dense.shape, math.nan)], dim=-1)[..., 0]
    expected = attention(*args, bias=dense)
    assert torch.equal(attention(*args, bias=key_major), expected)
    assert torch.equal(attention(*args, bias=every_other), expected)
    narrow = dense[:1, :, :1]
    expanded = narrow.expand_as(dense)
    assert torch.equal(attention(*args, bias=expanded), attention(*args, bias=expanded.contiguous()))
    assert torch.equal(attention(*args, bias=narrow), attention(*args, bias=expanded))


def test_strided_sinks_and_slopes_of_a_parameter_table():
    args, kwargs = Case("rows", alibi="batch").inputs()
    table = torch.stack([kwargs["alibi_slopes"], torch.full((2, 4), math.nan)], dim=1)
    assert torch.equal(attention(*args, alibi_slopes=table[:, 0]), attention(*args, **kwargs))


@pytest.mark.parametrize("window", [(-1, 2**63 - 1), (2**63 - 1, -1), (2**62, 2**62)])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(40, 5), (2, 70)])
def test_a_window_wider_than_any_sequence_hides_nothing(seq_q, seq_k, window):
    args, _ = Case("absurd", seq_q=seq_q, seq_k=seq_k).inputs()
    assert torch.equal(attention(*args, window=window), attention(*args))


# ---- gradients: test_attention_backward.py ---------------------------------------------------------------------------


def test_forward_mode_is_refused_and_not_zero():
    (q, k, v), _ = Case("tangent").inputs()
    tangent = torch.ones_like(q)
    with pytest.raises(RuntimeError, match="jvp"), forward_ad.dual_level():
        attention(forward_ad.make_dual(q, tangent), k, v)
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.jvp(lambda q: attention(q, k, v), (q,), (tangent,))


# ---- torch -----------------------------------------------------------------------------------------------------------

TORCH_CASES = [
    Case("plain"),
    Case("bfloat16", dtype=torch.bfloat16, causal=True),
    Case("everything", **EVERYTHING),
    Case("no key", seq_k=0),
    Case("strided", transposed=True, v_head_dim=24),
]


def op_arguments(case, device="cpu"):
    (q, k, v), options = case.inputs(device)
    modifiers = [options.get(name) for name in ("bias", "alibi_slopes", "sinks")]
    return (q, k, v, *modifiers, case.causal, *case.window, case.softmax_scale or 0.25, case.softcap, 0.0, None)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_opcheck(case, backend):
    opcheck(torch.ops.fmkernels.attention_forward.default, op_arguments(case, backend.device))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", TORCH_CASES, ids=str)
def test_compile_is_one_graph(case, dynamic):
    torch._dynamo.reset()
    args, kwargs = case.inputs()
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = attention(*args, return_lse=True, **kwargs)
    assert all(map(torch.equal, compiled(*args, return_lse=True, **kwargs), expected))
    longer, longer_kwargs = replace(case, seq_q=case.seq_q + 5).inputs()
    expected = attention(*longer, return_lse=True, **longer_kwargs)
    assert all(map(torch.equal, compiled(*longer, return_lse=True, **longer_kwargs), expected))


def test_compile_with_inductor():
    torch._dynamo.reset()
    (q, k, v), _ = Case("inductor").inputs()
    compiled = torch.compile(lambda q, k, v: attention(q * 2, k, v, causal=True) + 1, fullgraph=True)
    assert torch.equal(compiled(q, k, v), attention(q * 2, k, v, causal=True) + 1)


class Module(torch.nn.Module):
    def forward(self, q, k, v):
        return attention(q, k, v, causal=True, window=(5, 0), return_lse=True)


def test_export():
    args, _ = Case("export").inputs()
    program = torch.export.export(Module(), args, strict=True)
    assert all(map(torch.equal, program.module()(*args), Module()(*args)))
    assert "fmkernels.attention_forward" in str(program.graph)


def test_flop_formula():
    args, _ = Case("flops", batch=3, seq_q=7, seq_k=11, heads=6, kv_heads=2, head_dim=16, v_head_dim=40).inputs()
    with FlopCounterMode(display=False) as counter:
        attention(*args)
    assert counter.get_total_flops() == 2 * 3 * 6 * 7 * 11 * (16 + 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_its_dtype(dtype):
    (q, k, v), kwargs = Case("autocast", sinks=True, bias="hqk").inputs()
    with torch.autocast("cpu", dtype=dtype):
        actual = attention(q, k.to(dtype), v, **kwargs)
    assert actual.dtype == dtype
    assert torch.equal(actual, attention(q.to(dtype), k.to(dtype), v.to(dtype), **kwargs))


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_autocast_takes_a_bias_of_any_dtype_compiled_or_not(bias_dtype):
    torch._dynamo.reset()
    args, kwargs = Case("autocast", bias="hqk", bias_dtype=bias_dtype).inputs()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.float16):
        expected = attention(*args, **kwargs)
        assert torch.equal(compiled(*args, **kwargs), expected)
    bias = kwargs["bias"].to(torch.float16 if bias_dtype == torch.bfloat16 else bias_dtype)
    assert torch.equal(expected, attention(*(t.half() for t in args), bias=bias))


def test_autocast_does_not_narrow_float64():
    args = [t.double() for t in Case("autocast").inputs()[0]]
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="got float64"):
        attention(*args)


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    args, kwargs = Case("meta", dtype=torch.float16, v_head_dim=24, sinks=True).inputs("meta")
    for t, real in zip(attention(*args, **kwargs, return_lse=True), (torch.float16, torch.float32), strict=True):
        assert (t.device.type, t.dtype) == ("meta", real)
    assert t.shape == (2, 4, 33)
