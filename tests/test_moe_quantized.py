# SPDX-License-Identifier: Apache-2.0
"""moe.quantize_experts, quantized_grouped_mm, quantized_moe_mlp: values, edges, and what torch asks of an op."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fmkernels import QuantizedWeight, moe, quantize_weight, quantized_linear, reference
from fmkernels.testing import FLOAT_DTYPES, assert_as_good_as_torch, backends

BACKENDS = [b for b in backends("moe_quantized_mm") if b in backends("moe_permute") and b in backends("glu_forward")]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
EVERY_DTYPE = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(b, dtype) for b in BACKENDS for dtype in (FLOAT_DTYPES if b.name == "cpu" else FLOAT_DTYPES[1:])],
    ids=lambda value: str(value).split(".")[-1],
)
FORMATS = {
    "int8": {"bits": 8},
    "int8 in groups": {"bits": 8, "group_size": 64},
    "int4": {"bits": 4, "group_size": 128},
    "int4 with zeros": {"bits": 4, "group_size": 32, "symmetric": False},
}
EVERY_FORMAT = pytest.mark.parametrize("form", FORMATS)
INNER, COLUMNS = 200, 64  # a ragged chunk, ragged groups of 64 and 128; two panels an expert


def of(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def normal(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def experts(form, num_experts, columns=COLUMNS, inner=INNER, device="cpu", seed=1):
    return moe.quantize_experts(normal(num_experts, columns, inner, seed=seed), **FORMATS[form]).to(device)


def inputs(ends, num_rows=None, form="int8", inner=INNER, dtype=torch.float32, device="cpu"):
    """(a, weight, offsets, bias)"""
    a = normal(ends[-1] if num_rows is None else num_rows, inner, dtype=dtype, device=device)
    weight = experts(form, len(ends), inner=inner, device=device)
    return a, weight, of(*ends, device=device), normal(len(ends), COLUMNS, device=device, seed=2)


def assert_right(out, a, weight, offsets, bias=None):
    matrices = reference.dequantize_weight(weight, torch.float64).unflatten(0, (len(offsets), -1)).mT

    def expected(a, bias):
        return reference.moe.grouped_mm(a, matrices.to(a.dtype), offsets, bias=bias)

    assert_as_good_as_torch(out, expected, a, bias)
    last = int(offsets[-1])
    assert torch.equal(out[last:], torch.zeros_like(out[last:]))


# ---- values ----------------------------------------------------------------------------------------------------------

# On average 3, 13 and 28 rows an expert, which are the three tiles of CUDA. On the CPU up to 4 or 5 rows are multiplied
# where they are decoded, more by tiles of 4 to 6, 120 at a time.
LOADS = {
    "one to five": [1, 3, 6, 10, 15],
    "empty experts": [0, 8, 8, 21, 60],
    "tiles and parts": [16, 33, 80],
    "more than a block": [130, 137],
    "all to one": [0, 0, 0, 37],
}


@pytest.mark.parametrize("load", LOADS)
@EVERY_FORMAT
@EVERY_DTYPE
def test_matches_the_reference(load, form, dtype, backend):
    if backend.name == "emulated":
        if dtype == torch.float16 and load != "one to five":
            pytest.skip("differs from bfloat16 in two instructions")
        if load == "more than a block" and form != "int4":
            pytest.skip("its tiles are of 32 rows, as those of another load")
    elif dtype == torch.float16 and load in ("empty experts", "all to one"):
        pytest.skip("copied to float32 first, as bfloat16 is")
    ends = LOADS[load]
    a, weight, offsets, bias = inputs(ends, ends[-1] + 2, form, dtype=dtype, device=backend.device)
    given_bias = None if load == "all to one" else bias
    out = backend.run(moe.quantized_grouped_mm, a, weight, offsets, bias=given_bias)
    assert out.dtype == dtype
    assert_right(out, a, weight, offsets, given_bias)


@EVERY_BACKEND
def test_by_hand(backend):
    """Two experts of 32 rows; the integers of expert e are 1 + e in every even row, and -1 in every odd one."""
    q = torch.tensor([[1, -1], [2, -1]], dtype=torch.int8)[:, None, :, None].expand(2, 16, 2, 3).reshape(64, 3)
    weight = QuantizedWeight.from_integers(q, torch.tensor([[0.5]]).expand(64, 1)).to(backend.device)
    a = torch.tensor([[1.0, 2, 3], [4, 5, 6], [1, 1, 1], [9, 9, 9]], dtype=torch.bfloat16, device=backend.device)
    out = backend.run(moe.quantized_grouped_mm, a, weight, of(1, 3, device=backend.device))
    expected = torch.tensor([[3.0, -3], [15, -7.5], [3, -1.5], [0, 0]], dtype=torch.bfloat16, device=backend.device)
    assert torch.equal(out, expected.repeat(1, 16))


@EVERY_DTYPE
@EVERY_FORMAT
def test_more_columns_than_are_under_way_at_a_time(form, dtype, backend):
    """Eight warps, four chunks of 32 columns each; rows that do not begin on 16-byte boundaries."""
    a, weight, offsets, _ = inputs([2, 3], 3, form, 1103, dtype, backend.device)
    assert_right(backend.run(moe.quantized_grouped_mm, a, weight, offsets), a, weight, offsets)


@EVERY_DTYPE
@EVERY_FORMAT
def test_a_row_has_the_same_bits_whatever_the_others_are(form, dtype, backend):
    """Alone, and in every tile: also those of `quantized_linear` with its expert's matrix."""
    a, weight, _, bias = inputs([0, 0, 0], 70, form, dtype=dtype, device=backend.device)
    row = 40
    alone = backend.run(moe.quantized_grouped_mm, a[row : row + 1], weight, of(0, 1, 1, device=a.device), bias=bias)
    for first, last in ((39, 41), (38, 44), (20, 50), (0, 70)):
        ends = of(row - first if first == 0 else 1, last - first, last - first, device=a.device)
        before = int(ends[0])
        out = backend.run(
            moe.quantized_grouped_mm, a[row - before : row - before + last - first], weight, ends, bias=bias
        )
        assert torch.equal(out[before], alone[0])
    panels = slice(COLUMNS // 32, 2 * COLUMNS // 32)
    second = dataclasses.replace(
        weight,
        values=weight.values[panels].clone(),
        scales=weight.scales[panels].clone(),
        zeros=None if weight.zeros is None else weight.zeros[panels].clone(),
        out_features=COLUMNS,
    )
    assert torch.equal(backend.run(quantized_linear, a[row], second, bias[1]), alone[0])


@pytest.mark.parametrize("num_rows", [3, 40])
@EVERY_FORMAT
def test_the_code_for_sm_90(form, num_rows):
    sm_80 = next((backend for backend in BACKENDS if backend.name == "emulated"), None)
    if sm_80 is None:
        pytest.skip("no emulated backend")
    a, weight, offsets, _ = inputs([num_rows // 3, num_rows], None, form, dtype=torch.bfloat16)
    sm_90 = dataclasses.replace(sm_80, architecture=90)
    results = [backend.run(moe.quantized_grouped_mm, a, weight, offsets) for backend in (sm_80, sm_90)]
    assert torch.equal(*results)


@settings(max_examples=8)
@given(
    loads=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    behind=st.integers(0, 3),
    size=st.tuples(st.sampled_from([32, 96]), st.integers(1, 150)),
    form=st.sampled_from(list(FORMATS)),
    dtype=st.sampled_from(FLOAT_DTYPES),
    seed=st.integers(0, 9),
)
def test_any_size(loads, behind, size, form, dtype, seed):
    offsets = of(*loads).cumsum(0).int()
    weight = experts(form, len(loads), *size, seed=seed)
    a = normal(sum(loads) + behind, size[1], dtype=dtype, seed=seed)
    for backend in BACKENDS:
        if backend.name == "cpu" or dtype != torch.float32:
            args = [t.to(backend.device) for t in (a, weight, offsets)]
            assert_right(backend.run(moe.quantized_grouped_mm, *args), *args)


@pytest.mark.slow
@pytest.mark.parametrize("loads", [[240, 1, 0, 500], [24, 25, 30, 31]], ids=str)
@EVERY_FORMAT
def test_large_sizes_on_the_cpu(form, loads):
    """5000 columns: so many that a task has fewer rows than a block."""
    weight, offsets = experts(form, 4, 96, 5000), of(*loads).cumsum(0).int()
    a = normal(sum(loads), 5000)
    assert_right(moe.quantized_grouped_mm(a, weight, offsets), a, weight, offsets)


def test_the_portable_kernels_agree(tmp_path):
    """Another process, whose kernels are those of a processor without AVX2."""
    forms = ("int8", "int4 with zeros")
    cases = [inputs([1, 1, 6, 20], 21, form) for form in forms]
    torch.save([(a, *w.integers(), w.bits, w.group_size, offsets) for a, w, offsets, _ in cases], tmp_path / "in")
    code = (
        "import torch, sys\n"
        "from fmkernels import QuantizedWeight, moe\n"
        "out = []\n"
        "for a, q, scales, zeros, bits, group_size, offsets in torch.load(sys.argv[1] + '/in'):\n"
        "    w = QuantizedWeight.from_integers(q, scales, zeros, bits=bits, group_size=group_size)\n"
        "    out.append(moe.quantized_grouped_mm(a, w, offsets))\n"
        "torch.save(out, sys.argv[1] + '/out')\n"
    )
    environment = {**os.environ, "FMKERNELS_CPU_ISA": "generic"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    for out, (a, weight, offsets, _) in zip(torch.load(tmp_path / "out"), cases, strict=True):
        assert_right(out, a, weight, offsets)


def test_threads_change_no_bits():
    a, weight, offsets, bias = inputs([150, 150, 153, 170], 171, "int4", 600)
    results = []
    for num_threads in (1, 2, 1):
        torch.set_num_threads(num_threads)
        results.append(moe.quantized_grouped_mm(a, weight, offsets, bias=bias))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_quantised_as_a_weight_of_all_rows():
    w = normal(3, 32, 40)
    for form in FORMATS.values():
        stacked, joined = moe.quantize_experts(w.transpose(1, 2).contiguous().transpose(1, 2), **form), w.flatten(0, 1)
        expected = quantize_weight(joined, **form)
        assert stacked.shape == (96, 40)
        for name in ("values", "scales", "zeros"):
            actual, wanted = getattr(stacked, name), getattr(expected, name)
            assert wanted is None if actual is None else torch.equal(actual, wanted)


# ---- the layer -------------------------------------------------------------------------------------------------------


def layer(
    num_tokens=11, num_topk=2, num_experts=4, hidden=64, width=48, form="int8", dtype=torch.float32, device="cpu"
):
    """(x, w_gate_up, w_down, topk_weights, topk_idx), with -1 and an expert twice among the choices."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype).to(device)
    gate_up, down = normal(num_experts, 2 * width, hidden) * hidden**-0.5, normal(num_experts, hidden, width, seed=1)
    packed = (moe.quantize_experts(w, **FORMATS[form]).to(device) for w in (gate_up, down * width**-0.5))
    weights = torch.rand(num_tokens, num_topk, generator=generator).to(device)
    idx = torch.randint(-1, num_experts, (num_tokens, num_topk), generator=generator, dtype=torch.int32).to(device)
    return x, *packed, weights, idx


@pytest.mark.parametrize(
    ("num_tokens", "num_topk", "form"), [(11, 2, "int8"), (1, 1, "int4 with zeros"), (50, 3, "int4 with zeros")]
)
@EVERY_DTYPE
def test_layer_matches_the_reference(num_tokens, num_topk, form, dtype, backend):
    if backend.name == "emulated" and dtype == torch.float16 and num_tokens != 11:
        pytest.skip("differs from bfloat16 in two instructions")
    x, w_gate_up, w_down, weights, idx = layer(num_tokens, num_topk, form=form, dtype=dtype, device=backend.device)
    out = backend.run(moe.quantized_moe_mlp, x, w_gate_up, w_down, weights, idx)

    def expected(x, weights):
        return reference.moe.quantized_moe_mlp(x, w_gate_up, w_down, weights, idx)

    assert_as_good_as_torch(out, expected, x, weights, computed_in=dtype)


@EVERY_BACKEND
def test_no_tokens_no_experts_and_nan_in_the_layer(backend):
    x, w_gate_up, w_down, weights, idx = layer(dtype=torch.bfloat16, device=backend.device)
    run = lambda *args: backend.run(moe.quantized_moe_mlp, *args)  # noqa: E731
    assert run(x[:0], w_gate_up, w_down, weights[:0], idx[:0]).shape == (0, 64)
    assert not run(x, w_gate_up, w_down, weights, torch.full_like(idx, -1)).any()
    clean = run(x, w_gate_up, w_down, weights, idx)
    x[3], idx[3] = torch.nan, 0
    out = run(x, w_gate_up, w_down, weights, idx)
    assert out[3].isnan().all()
    others = [i for i in range(len(x)) if i != 3]
    assert torch.equal(out[others], clean[others])


# ---- edges -----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
def test_no_rows_and_no_rows_of_experts(backend):
    a, weight, offsets, bias = inputs([0, 0, 0], 4, dtype=torch.bfloat16, device=backend.device)
    a[:] = torch.nan  # is not read
    out = backend.run(moe.quantized_grouped_mm, a, weight, offsets, bias=bias)
    assert torch.equal(out, torch.zeros_like(out))
    assert backend.run(moe.quantized_grouped_mm, a[:0], weight, offsets).shape == (0, COLUMNS)


@pytest.mark.parametrize("ends", [(9, 3, 70), (-5, 2, -1), (2**31 - 1, 0, 0), (0, 0, 0)], ids=str)
def test_wrong_offsets_on_the_device_are_clamped(ends):
    """An expert ends at the largest offset up to its own, and at the last row."""
    for backend in BACKENDS:
        if backend.name == "cpu":
            continue
        a, weight, _, bias = inputs([0, 0, 0], 40, dtype=torch.bfloat16, device=backend.device)
        out = backend.run(moe.quantized_grouped_mm, a, weight, of(*ends, device=a.device), bias=bias)
        right = torch.tensor(ends).cummax(0).values.clamp(0, 40).int().to(a.device)
        assert torch.equal(out, backend.run(moe.quantized_grouped_mm, a, weight, right, bias=bias))


@EVERY_BACKEND
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("form", ["int8", "int4 with zeros"])
def test_what_is_not_finite_reaches_its_row_alone(form, value, backend):
    a, weight, offsets, _ = inputs([1, 9, 12], 13, form, dtype=torch.bfloat16, device=backend.device)
    clean = backend.run(moe.quantized_grouped_mm, a, weight, offsets)
    a[[0, 4], 33] = value
    out = backend.run(moe.quantized_grouped_mm, a, weight, offsets)
    others = [i for i in range(13) if i not in (0, 4)]
    assert torch.equal(out[others], clean[others])
    expected = reference.moe.quantized_grouped_mm(a.double(), weight, offsets)[[0, 4]].bfloat16()
    assert torch.equal(out[[0, 4]].isnan(), expected.isnan())
    assert torch.equal(out[[0, 4]].sign() * out[[0, 4]].isinf(), expected.sign() * expected.isinf())


@EVERY_BACKEND
@pytest.mark.parametrize("layout", ["offset by one element", "column slice", "every other row", "expanded"])
def test_strides_change_no_bits(layout, backend):
    a, weight, offsets, _ = inputs([3, 3, 12], 14, dtype=torch.bfloat16, device=backend.device)
    view = {
        "offset by one element": lambda: torch.cat([a.new_full((1,), math.nan), a.flatten()])[1:].view_as(a),
        "column slice": lambda: torch.cat([a, a.new_full((14, 5), math.nan)], -1)[:, :INNER],
        "every other row": lambda: torch.stack([a, torch.full_like(a, math.nan)], 1).flatten(0, 1)[::2],
        "expanded": lambda: a[:1].expand(14, INNER),
    }[layout]()
    out = backend.run(moe.quantized_grouped_mm, view, weight, offsets)
    assert out.is_contiguous()
    assert torch.equal(out, backend.run(moe.quantized_grouped_mm, view.contiguous(), weight, offsets))


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "emulated"], ids=str)
@pytest.mark.parametrize("form", ["int8", "int4 with zeros"])
def test_opcheck(form, backend):
    a, w, offsets, bias = inputs([2, 2, 5], 6, form, 40, torch.bfloat16, backend.device)
    tensors, sizes = (w.values, w.scales, w.zeros), (w.bits, w.group_size or 0, *w.shape)
    given_bias = None if form == "int8" else bias
    opcheck(torch.ops.fmkernels.moe_quantized_mm.default, (a, *tensors, offsets, given_bias, *sizes))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_is_one_graph(dynamic):
    torch._dynamo.reset()
    quantized_grouped_mm = torch.compile(moe.quantized_grouped_mm, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_rows in (6, 11):
        a, weight, offsets, bias = inputs([2, 2, 5], num_rows, "int4 with zeros")
        given_bias = bias if dynamic else None
        expected = moe.quantized_grouped_mm(a, weight, offsets, bias=given_bias)
        assert torch.equal(quantized_grouped_mm(a, weight, offsets, bias=given_bias), expected)


def test_the_layer_compiles_to_one_graph():
    torch._dynamo.reset()
    quantized_moe_mlp = torch.compile(moe.quantized_moe_mlp, fullgraph=True, backend="aot_eager")
    for num_tokens in (11, 17):
        args = layer(num_tokens)
        assert torch.equal(quantized_moe_mlp(*args), moe.quantized_moe_mlp(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    a, weight, offsets, bias = inputs([2, 2, 5], 6)
    args = layer()
    with torch.autocast("cpu", dtype):
        out, of_layer = moe.quantized_grouped_mm(a, weight, offsets, bias=bias), moe.quantized_moe_mlp(*args)
    assert torch.equal(out, moe.quantized_grouped_mm(a.to(dtype), weight, offsets, bias=bias))
    assert torch.equal(of_layer, moe.quantized_moe_mlp(args[0].to(dtype), *args[1:]))


def test_a_half_bias_is_the_same_number():
    a, weight, offsets, bias = inputs([2, 2, 5], 6, dtype=torch.bfloat16)
    bias = bias.bfloat16()
    expected = moe.quantized_grouped_mm(a, weight, offsets, bias=bias.float())
    assert torch.equal(moe.quantized_grouped_mm(a, weight, offsets, bias=bias), expected)


def test_flops_are_counted():
    a, weight, offsets, _ = inputs([2, 2, 5], 6)
    with FlopCounterMode(display=False) as counter:
        moe.quantized_grouped_mm(a, weight, offsets)
    assert counter.get_total_flops() == 2 * 6 * INNER * COLUMNS
