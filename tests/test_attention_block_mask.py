# SPDX-License-Identifier: Apache-2.0
"""attention with a block mask: values, gradients, bits, and wrong masks.

What is visited and what may reach a row stands in test_attention_block_mask_isolation.py.
"""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from test_attention_backward import check, gradients, inputs_of, on
from test_block_mask import MASKS, arguments
from torch.library import opcheck

from fmkernels import BlockMask, _library, attention, create_block_mask, reference
from fmkernels.testing import Case, assert_attention, backends

BACKENDS = backends("attention_backward")
CPU = BACKENDS[0]


def case_of(mask, block=64, **fields):
    """A case with the mask of that name, or with a function for one."""
    case = Case(
        f"{mask}, block {block}, {fields or 'plain'}",
        **{"seq_q": 130, "seq_k": 140, "heads": 2, "kv_heads": 1, "head_dim": 8} | fields,
    )
    sizes = (case.seq_q, case.seq_k)
    args = arguments(mask, *sizes, case.batch, case.heads) if isinstance(mask, str) else (mask, None, None, *sizes)
    return dataclasses.replace(case, block_mask=create_block_mask(*args, block=block))


# Where few rows see anything, there must be more of them to measure the error of torch on.
LARGER = {"rows that see nothing": {"heads": 6, "kv_heads": 3}}
CASES = [case_of(name, block, **LARGER.get(name, {})) for name in MASKS for block in (64, 128)]
CASES += [
    case_of("documents", **fields)
    for fields in (
        {"causal": True, "seq_q": 140},
        {"window": (60, 20)},
        {"window": (30, -1), "causal": True, "seq_q": 180},
        {"softcap": 1.5},
        {"alibi": "batch"},
        {"sinks": True},
        {"bias": "bhqk"},
        {"bias": "hqk", "bias_hides": True},
        {"bias": "q", "softcap": 2.0},
        {"heads": 6, "kv_heads": 1},
        {"transposed": True, "kv_heads": 2},
        {"head_dim": 24, "v_head_dim": 72, "batch": 1},
        {"head_dim": 136, "batch": 1},
        {"seq_q": 1},
        {"seq_k": 1},
        {"seq_q": 7, "seq_k": 40},
    )
]
EVERYTHING = {
    "sinks": True,
    "softcap": 2.0,
    "bias": "bhqk",
    "causal": True,
    "window": (90, -1),
    "seq_q": 100,
    "batch": 1,
}
CASES += [
    case_of(name, block, **EVERYTHING, heads=6, kv_heads=kv_heads)
    for name, block, kv_heads in (("dilated", 64, 2), ("dilated", 128, 6), ("stripes", 64, 1), ("stripes", 128, 3))
]


def check_forward(backend, case):
    args, kwargs = case.inputs(backend.device)
    actual = backend.run(attention, *args, return_lse=True, **kwargs)
    assert_attention(backend, actual, reference.attention, *args, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_matches_reference(case, backend):
    check_forward(backend, on(backend, case))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_match_those_of_the_definition(case, backend):
    check(backend, on(backend, case))


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.has_tensor_cores], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[-1], *(c for c in CASES if "short row" in c.name)], ids=str)
def test_float32_on_tensor_cores(case, backend):
    check_forward(backend, case)
    check(backend, case)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[-4:], ids=str)
def test_half_inputs(case, dtype, backend):
    check_forward(backend, dataclasses.replace(case, dtype=dtype))
    check(backend, dataclasses.replace(case, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128, 192, 256])
def test_every_tile_of_the_kernels(dim, backend):
    for block in (64, 128):
        case = on(backend, case_of("stripes", block, seq_q=200, seq_k=270, batch=1, heads=1, kv_heads=1, head_dim=dim))
        check_forward(backend, case)
        check(backend, case)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_few_queries_of_many_keys(kv_heads, backend):
    """On CUDA their keys are split into chunks, which begin within blocks of the mask."""
    for name, block in (("stripes", 64), ("dilated", 128)):
        case = case_of(name, block, seq_q=9, seq_k=1300, kv_heads=kv_heads, dropout_p=0.2)
        check_forward(backend, on(backend, case))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("seq", [63, 64, 65, 95, 96, 97, 127, 128, 129, 192, 385])
def test_every_tail(seq, backend):
    """Blocks of the mask and blocks of the kernels end at different places."""
    for block in (64, 128):
        sizes = {"seq_q": seq + 7, "seq_k": seq, "batch": 1, "heads": 1, "kv_heads": 1}
        case = on(backend, case_of("sliding and global", block, **sizes))
        check_forward(backend, case)
        check(backend, case)


def results(case, tensors=None, grad_o=None, backend=CPU):
    """o, lse and the gradients through o, with other tensors than those of the case where they are given."""
    _, own, call = inputs_of(case)
    tensors = own if tensors is None else tensors
    o, lse = backend.run(call, attention, tensors, return_lse=True)
    grad_o = torch.ones_like(o) if grad_o is None else grad_o
    return o, lse, *backend.run(gradients, call, attention, tensors, [grad_o, None], return_lse=True)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_a_mask_that_another_argument_could_give_has_its_bits(name, backend):
    masked = on(backend, case_of(name, 128, seq_q=140))
    plain = dataclasses.replace(masked, block_mask=None, causal=name == "causal")
    tensors = inputs_of(masked)[1]
    pairs = zip(results(masked, tensors, None, backend), results(plain, tensors, None, backend), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_rows_that_see_nothing(kv_heads, backend):
    for name in ("rows that see nothing", "nothing"):
        case = on(backend, case_of(name, kv_heads=kv_heads))
        blind = ~case.block_mask.to_dense()[0, 0].any(-1)
        assert blind.sum() >= 60
        o, lse, grad_q, grad_k, grad_v = results(case, backend=backend)
        assert (o[:, blind] == 0).all()
        assert (lse[:, :, blind] == -math.inf).all()
        assert (grad_q[:, blind] == 0).all()
        assert lse[:, :, ~blind].isfinite().all()
        if name == "nothing":
            assert not any(t.any() for t in (grad_q, grad_k, grad_v))


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_bits_do_not_depend_on_neighbours_threads_or_the_run(kv_heads, backend):
    case = on(backend, case_of("stripes", kv_heads=kv_heads, sinks=True, bias="hqk"))
    first = results(case, backend=backend)
    threads = torch.get_num_threads()
    for count in (1, 2, 3, threads):
        torch.set_num_threads(count)
        assert all(map(torch.equal, first, results(case, backend=backend)))
    stripes, of_heads = MASKS["stripes"][0], (None, case.heads, case.seq_q, case.seq_k)
    mask = create_block_mask(lambda b, h, i, j: stripes(b + 1, h, i, j), *of_heads, block=64)
    alone = dataclasses.replace(case, block_mask=mask)
    _, tensors, _ = inputs_of(case)
    last = results(alone, [t[1:] for t in tensors[:3]] + tensors[3:], backend=backend)
    for one, both in zip(last[:5], first[:5], strict=True):
        assert torch.equal(one[0], both[1])


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dilated", "stripes", "nothing"])
def test_opcheck(name):
    case = case_of(name, seq_q=70, seq_k=90)
    (q, k, v), kwargs = case.inputs()
    tail, mask = (True, -1, -1, 0.25, 0.0, 0.0, None), kwargs["block_mask"].tensors
    given = (q, k, v, None, None, None, *tail, mask)
    opcheck(torch.ops.fmkernels.attention_forward.default, given)
    o, lse = torch.ops.fmkernels.attention_forward(*given)
    given = (torch.ones_like(o), None, q, k, v, o, lse, None, None, None, *tail, False, mask)
    opcheck(torch.ops.fmkernels.attention_backward.default, given)


def test_compiled_gradients_have_the_same_bits():
    """The mask is an argument, or belongs to the function."""
    case = case_of("stripes")
    _, tensors, _ = inputs_of(case)

    def loss(q, k, v, mask=case.block_mask):
        return attention(q, k, v, block_mask=mask, causal=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    grads = []
    for function, args in ((loss, ()), (compiled, (case.block_mask,)), (compiled, ())):
        leaves = [t.clone().requires_grad_() for t in tensors]
        function(*leaves, *args).backward()
        grads.append([t.grad for t in leaves])
    for eager, compiled in itertools.product(grads[:1], grads[1:]):
        assert all(map(torch.equal, eager, compiled))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"seq_q": 131}, "block_mask must be made for the seq_q of q, 131, got one for 130."),
        ({"seq_k": 160}, "block_mask must be made for the seq_k of k, 160, got one for 140."),
        ({"batch": 3}, "block_mask must have batch 1 or 3, got 2."),
        ({"heads": 4}, "block_mask must have heads 1 or 4, got 2."),
    ],
)
def test_masks_for_other_tensors_are_refused(fields, sentence):
    case = case_of("stripes")
    args, _ = dataclasses.replace(case, **fields).inputs()
    with pytest.raises(ValueError, match=f"^attention: {re.escape(sentence)}$"):
        attention(*args, block_mask=case.block_mask)
    with pytest.raises(
        TypeError, match=r"^attention: block_mask must be a fmkernels.BlockMask, got torch.Tensor; Block"
    ):
        attention(*args, block_mask=case.block_mask.to_dense())


HOSTILE = [
    (name, place, value)
    for name in ("row_offsets", "column_offsets")
    for place in (0, 1, 3, 4, -1)  # 3 ends the first head, 4 begins the second
    for value in (-1, 2**31 - 1, -(2**31))
]
HOSTILE += [(name, -1, None) for name in ("row_offsets", "column_offsets")]  # None: one less, a block left over
HOSTILE += [(name, place, value) for name in ("column_indices", "row_indices") for place in (0, 5, -1)
            for value in (-1, 3, 2**31 - 1, -(2**31))]  # fmt: skip
HOSTILE += [(name, place, value) for name in ("tile_idx", "transposed_tile_idx") for place in (0, -1)
            for value in (-2, 10**6, 2**31 - 1, -(2**31))]  # fmt: skip


@pytest.mark.parametrize(("name", "place", "value"), HOSTILE)
def test_values_outside_the_mask_are_refused(name, place, value):
    case = case_of("stripes", batch=2, heads=4)
    mask = case.block_mask
    values = getattr(mask, name).clone()
    value = values.view(-1)[place] - 1 if value is None else value
    assert values.view(-1)[place] != value
    values.view(-1)[place] = value
    mask = dataclasses.replace(mask, **{name: values})
    (q, k, v), _ = case.inputs()
    with pytest.raises(ValueError, match=r"^BlockMask: \w+ must "):
        attention(q, k, v, block_mask=mask)
    o, lse = torch.zeros_like(q), torch.zeros(2, 4, 130)
    tail = (None, None, None, False, -1, -1, 0.25, 0.0, 0.0, None)
    with pytest.raises(RuntimeError, match="block_mask: "):
        torch.ops.fmkernels.attention_forward(q, k, v, *tail, mask.tensors)
    with pytest.raises(RuntimeError, match="block_mask: "):
        torch.ops.fmkernels.attention_backward(o, None, q, k, v, o, lse, *tail, False, mask.tensors)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.has_tensor_cores], ids=str)
def test_values_outside_the_mask_are_refused_on_a_device_where_that_is_asked_for(backend, monkeypatch):
    """FMKERNELS_CHECK=1 once looked at the lists of packed sequences alone."""
    case = on(backend, case_of("stripes"))
    tensors, mask = inputs_of(case)[1], case.block_mask
    wrong = dataclasses.replace(mask, column_indices=mask.column_indices + 99)
    monkeypatch.setattr(_library, "check_values", True)
    with pytest.raises(ValueError, match=r"^BlockMask: column_indices must "):
        results(dataclasses.replace(case, block_mask=wrong), tensors, backend=backend)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.has_tensor_cores], ids=str)
@pytest.mark.parametrize("value", [3, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(BlockMask)[2:-1]])
def test_values_outside_the_mask_reach_nothing_on_a_device(name, value, backend, monkeypatch):
    """Nobody has checked them there: the emulator sees every address that follows from them."""
    case = on(backend, case_of("stripes", heads=4, bias="h"))
    tensors, mask = inputs_of(case)[1], case.block_mask
    monkeypatch.setattr(BlockMask, "check_values", lambda mask: None)
    values = getattr(mask, name).clone()
    for place in (1, values.numel() // 2):
        values.view(-1)[place] = value
        wrong = dataclasses.replace(mask, **{name: values})
        results(dataclasses.replace(case, block_mask=wrong), tensors, backend=backend)
