# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts of integrations.vllm, and torch's grouped_mm: known answers, loops, and float64."""

import enum
import functools
import re

import pytest
import torch

from fmkernels import moe, reference
from fmkernels.integrations import vllm
from fmkernels.integrations.grouped_mm import grouped_mm
from fmkernels.testing import FLOAT_DTYPES, assert_as_good_as_torch, backends

BACKENDS = [b for b in backends("moe_grouped_mm") if b in backends("moe_build_mapping") and b in backends("moe_route")]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


# ---- moe_align_block_size --------------------------------------------------------------------------------------------


def test_a_known_alignment():
    """Three tokens with two of four experts each: expert 2 has nobody, 1 has two blocks of 2."""
    ids = int32([[1, 3], [0, 1], [3, 1]])
    sorted_ids, expert_ids, total = vllm.moe_align_block_size(ids, 2, 4)
    assert sorted_ids.tolist() == [2, 6, 0, 3, 5, 6, 1, 4, 6, 6]
    assert expert_ids.tolist() == [0, 1, 1, 3, 0]
    assert total.tolist() == [8]
    assert {t.dtype for t in (sorted_ids, expert_ids, total)} == {torch.int32}
    here = int32([-1, 0, -1, 1])
    sorted_ids, expert_ids, total = vllm.moe_align_block_size(ids, 2, 4, here)
    assert sorted_ids.tolist() == [2, 6, 0, 3, 5, 6, 1, 4, 6, 6]
    assert expert_ids.tolist() == [-1, 0, 0, 1, -1]
    sorted_ids, expert_ids, total = vllm.moe_align_block_size(ids, 2, 4, here, ignore_invalid_experts=True)
    assert sorted_ids.tolist() == [0, 3, 5, 6, 1, 4, 6, 6, 6, 6]
    assert expert_ids.tolist() == [0, 0, 1, 0, 0]
    assert total.tolist() == [6]
    scatter_idx = vllm.moe_align_block_size(ids, 2, 4, here, False, True, True)[3]
    assert scatter_idx.dtype == torch.int32
    assert scatter_idx.tolist() == [[0], [1], [-1], [3], [4], [5]]


def aligned(topk_ids, block, num_experts, expert_map, pad, ignore):
    """By its definition: a list an expert."""
    slots = topk_ids.flatten().tolist()
    if ignore and expert_map is not None:
        slots = [int(expert_map[e]) if 0 <= e < num_experts else -1 for e in slots]
    rows, experts = [], []
    for expert in range(num_experts):
        own = [slot for slot, e in enumerate(slots) if e == expert]
        own += [len(slots)] * (-len(own) % block)
        rows += own
        experts += [expert] * (len(own) // block)
    length = len(slots) + num_experts * (block - 1)
    length += -length % block if pad else 0
    if len(slots) < num_experts:
        length = min(length, len(slots) * block)
    total = len(rows)
    rows += [len(slots)] * (length - len(rows))
    experts += [0] * (-(-length // block) - len(experts))
    if expert_map is not None and not ignore:
        experts = [int(expert_map[e]) for e in experts]
    return rows, experts, [total]


@pytest.mark.parametrize(("num_tokens", "num_topk"), [(0, 2), (1, 1), (3, 2), (40, 3)])
@pytest.mark.parametrize("block", [1, 4, 16])
@EVERY_BACKEND
def test_alignments_by_their_definition(num_tokens, num_topk, block, backend):
    """Ids that are no expert are left out, as in vLLM."""
    num_experts = 7
    ids = torch.randint(-2, num_experts + 2, (num_tokens, num_topk)).to(backend.device)
    here = int32([-1, 0, 1, -1, 2, 3, -1]).to(backend.device)
    for options in ((None, False, False), (None, True, False), (here, False, False), (here, True, True)):
        found = backend.run(vllm.moe_align_block_size, ids, block, num_experts, *options)
        assert [t.tolist() for t in found] == list(aligned(ids, block, num_experts, *options)), options


# ---- the routers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("renormalize", [False, True])
@EVERY_BACKEND
def test_topk_softmax_writes_weights_ids_and_places(renormalize, dtype, backend):
    logits = torch.randn(9, 12).to(dtype).to(backend.device)
    weights = torch.empty(9, 3, device=backend.device)
    ids, places = (torch.empty(9, 3, dtype=kind, device=backend.device) for kind in (torch.int64, torch.int32))
    assert backend.run(vllm.topk_softmax, weights, ids, places, logits, renormalize) is None
    assert torch.equal(ids, logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :3])
    assert places.tolist() == [[k * 9 + t for k in range(3)] for t in range(9)]

    def wanted(x):
        top = torch.softmax(x, -1).topk(3).values
        return top / top.sum(-1, keepdim=True) if renormalize else top

    assert_as_good_as_torch(weights, wanted, logits)


def test_topk_sigmoid_and_the_bias():
    logits, bias = torch.randn(9, 12), torch.rand(12)
    weights, ids, places = torch.empty(9, 3), torch.empty(9, 3, dtype=torch.int32), torch.empty(9, 3, dtype=torch.int32)
    vllm.topk_sigmoid(weights, ids, places, logits, True, bias, 2.5)
    chosen = (logits.sigmoid() + bias).topk(3).indices
    assert torch.equal(ids, chosen.int())
    scores = lambda x: torch.sigmoid(x).gather(1, chosen)  # noqa: E731
    assert_as_good_as_torch(weights, lambda x: scores(x) / scores(x).sum(-1, keepdim=True) * 2.5, logits)
    vllm.topk_softmax(weights, ids, places, logits, e_score_correction_bias=bias)
    chosen = (logits.softmax(-1) + bias).topk(3).indices
    assert torch.equal(ids, chosen.int())
    assert_as_good_as_torch(weights, lambda x: torch.softmax(x, -1).gather(1, chosen), logits)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_fused_topk_is_route(scoring):
    x, logits = torch.randn(9, 4), torch.randn(9, 12)
    weights, ids, places = vllm.fused_topk(x, logits, 3, False, scoring_func=scoring)
    expected = moe.route(logits, 3, scoring=scoring, renormalize=False)
    assert torch.equal(weights, expected[0])
    assert torch.equal(ids, expected[1])
    assert places[:, 0].tolist() == list(range(9))
    assert vllm.fused_topk(x, logits, 3, True, torch.int64)[1].dtype == torch.int64


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_grouped_topk_by_its_definition(scoring, with_bias):
    """Of 4 groups of 3 experts two, by the largest score, or by the two largest where there is a bias."""
    x, logits = torch.randn(20, 4), torch.randn(20, 12)
    bias = torch.rand(12) if with_bias else None
    weights, ids = vllm.grouped_topk(x, logits, 3, True, 4, 2, scoring, 1.5, bias)
    scores = torch.softmax(logits, -1) if scoring == "softmax" else logits.sigmoid()
    compared = (scores + bias if with_bias else scores).view(20, 4, 3)
    worth = compared.topk(2 if with_bias else 1).values.sum(-1)
    kept = torch.zeros(20, 4, dtype=torch.bool).scatter(1, worth.topk(2).indices, True)
    chosen = compared.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(1).topk(3).indices
    assert torch.equal(ids, chosen.int())

    def wanted(x):
        top = (torch.softmax(x, -1) if scoring == "softmax" else x.sigmoid()).gather(1, chosen)
        return top / top.sum(-1, keepdim=True) * 1.5

    assert_as_good_as_torch(weights, wanted, logits)


def test_a_token_with_nan_has_no_expert():
    logits = torch.randn(3, 6)
    logits[1, 2] = torch.nan
    weights, ids, _ = vllm.fused_topk(torch.randn(3, 4), logits, 2, True)
    assert ids[1].tolist() == [-1, -1]
    assert weights[1].tolist() == [0, 0]
    assert (ids[[0, 2]] >= 0).all()


# ---- fused_experts ---------------------------------------------------------------------------------------------------


def layer(num_tokens=9, num_topk=2, num_experts=6, hidden=16, width=8, dtype=torch.float32, device="cpu"):
    x, w1, w2 = (
        torch.randn(shape).mul(shape[-1] ** -0.5).to(dtype).to(device)
        for shape in ((num_tokens, hidden), (num_experts, 2 * width, hidden), (num_experts, hidden, width))
    )
    ids = torch.stack([torch.randperm(num_experts)[:num_topk] for _ in range(num_tokens)]).int().to(device)
    return x, w1, w2, torch.rand(num_tokens, num_topk).to(device), ids


@EVERY_BACKEND
def test_fused_experts_against_the_definition(backend):
    dtype = torch.bfloat16 if backend.has_tensor_cores else torch.float32
    args = layer(dtype=dtype, device=backend.device)
    args[4][2, 1], args[4][3, 0] = -1, 6  # no experts: left out, as in vLLM
    out = backend.run(vllm.fused_experts, *args)
    assert_as_good_as_torch(out, lambda *t: reference.moe.moe_mlp(*t[:4], no_others(t[4])), *args, computed_in=dtype)
    x = args[0].clone()
    assert backend.run(vllm.fused_experts, x, *args[1:], inplace=True) is x
    assert torch.equal(x, out)


def no_others(ids, num_experts=6):
    return torch.where(ids < num_experts, ids, -1)


def test_experts_of_two_ranks():
    """Each has those in its map; slots of others are left out, and the sum is all of the layer."""
    x, w1, w2, weights, ids = layer()
    total = 0
    for here in ([0, 3, 4], [5, 2, 1]):
        expert_map = torch.full((6,), -1, dtype=torch.int32)
        expert_map[here] = int32([0, 1, 2])
        args = x, w1[here], w2[here], weights, ids
        out = vllm.fused_experts(*args, global_num_experts=6, expert_map=expert_map)
        local = torch.where(ids >= 0, expert_map[ids.long()], -1)
        assert_as_good_as_torch(out, reference.moe.moe_mlp, *args[:4], local)
        total = total + out.double()
    assert_as_good_as_torch(total.float(), reference.moe.moe_mlp, x, w1, w2, weights, ids)


def test_weights_on_the_input():
    x, w1, w2, weights, ids = layer(num_topk=1)
    activation = enum.Enum("Activation", {"SILU": "silu"}).SILU
    out = vllm.fused_experts(x, w1, w2, weights, ids, apply_router_weight_on_input=True, activation=activation)
    ones = torch.ones_like(weights)
    wanted = lambda x, w1, w2, weights, ids: reference.moe.moe_mlp(x * weights, w1, w2, ones.to(x.dtype), ids)  # noqa: E731
    assert_as_good_as_torch(out, wanted, x, w1, w2, weights, ids)


# ---- torch's grouped_mm ----------------------------------------------------------------------------------------------

ENDS = [3, 3, 8, 11]  # of 12, the second group empty
FORMS = {
    "rows of a": ((12, 16), (4, 16, 24)),
    "columns of b": ((4, 24, 16), (16, 12)),
    "inner": ((24, 12), (12, 16)),
    "batch": ((4, 12, 16), (4, 16, 24)),
}


def by_groups(a, b, offs=None):
    """Torch's definition in the dtype of a, halves in float32; zeros behind the last group."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    left, right = a.to(dtype), b.to(dtype)
    if offs is None:
        return torch.bmm(left, right).to(a.dtype)
    ends = offs.tolist()
    groups = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    if b.dim() == 3:
        out = left.new_zeros(a.shape[0], b.shape[2])
        for g, rows in enumerate(groups):
            out[rows] = left[rows] @ right[g]
    elif a.dim() == 3:
        out = left.new_zeros(a.shape[1], b.shape[1])
        for g, columns in enumerate(groups):
            out[:, columns] = left[g] @ right[:, columns]
    else:
        out = torch.stack([left[:, inner] @ right[inner] for inner in groups])
    return out.to(a.dtype)


@pytest.mark.parametrize("by_columns", [False, True], ids=["by rows", "by columns"])
@pytest.mark.parametrize("form", FORMS)
@EVERY_BACKEND
def test_every_form_of_grouped_mm(form, by_columns, backend):
    dtype = torch.bfloat16 if backend.has_tensor_cores else torch.float32
    a, b = (torch.randn(shape).to(dtype).to(backend.device) for shape in FORMS[form])
    b = b.mT.contiguous().mT if by_columns else b
    offs = () if form == "batch" else (int32(ENDS).to(backend.device),)
    out = backend.run(grouped_mm, a, b, **({"offs": offs[0]} if offs else {}))
    assert out.is_contiguous()
    assert_as_good_as_torch(out, by_groups, a, b, *offs)
    if backend.name == "cpu" and (form != "inner" or not by_columns):  # torch's own, which leaves the tail unwritten
        theirs = torch.nn.functional.grouped_mm(a, b, **({"offs": offs[0]} if offs else {}))
        assert theirs.shape == out.shape
        tail = {"rows of a": (slice(11),), "columns of b": (slice(None), slice(11))}.get(form, ())
        assert_as_good_as_torch(theirs[tail], lambda *t: by_groups(*t)[tail], a, b, *offs)


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3)], ids=["no rows", "no groups"])
def test_an_empty_batch_of_grouped_mm(shape):
    assert grouped_mm(torch.zeros(shape), torch.zeros(shape[0], 3, 5)).shape == (*shape[:2], 5)


def test_the_bias_and_the_gradients_of_grouped_mm():
    a, b, bias = (torch.randn(shape).requires_grad_() for shape in ((12, 16), (4, 16, 24), (4, 24)))
    offs = int32(ENDS)
    out = grouped_mm(a, b, offs=offs, bias=bias, out_dtype=torch.float32)
    grad = torch.randint(-4, 5, out.shape).float()
    actual = torch.autograd.grad(out, (a, b, bias), grad)

    def wanted(index):
        def run(*inputs):
            leaves = [t.detach().requires_grad_() for t in inputs[:3]]
            y = reference.moe.grouped_mm(*leaves[:2], inputs[3], bias=leaves[2])
            return torch.autograd.grad(y, leaves, inputs[4])[index]

        return run

    for index, found in enumerate(actual):
        assert_as_good_as_torch(found, wanted(index), a, b, bias, offs, grad)


@pytest.mark.parametrize("form", ["columns of b", "batch"])
def test_gradients_of_the_other_forms(form):
    operands = [torch.randn(shape).requires_grad_() for shape in FORMS[form]]
    offs = () if form == "batch" else (int32(ENDS),)
    found = torch.autograd.grad(grouped_mm(*operands, **({"offs": offs[0]} if offs else {})).square().sum(), operands)

    def gradient(index, a, b, *offs):
        leaves = [t.detach().requires_grad_() for t in (a, b)]
        return torch.autograd.grad(by_groups(*leaves, *offs).square().sum(), leaves)[index]

    for index in (0, 1):
        assert_as_good_as_torch(found[index], functools.partial(gradient, index), *operands, *offs)


# ---- errors ----------------------------------------------------------------------------------------------------------

X, W1, W2, WEIGHTS, IDS = (
    torch.zeros(3, 8),
    torch.zeros(4, 8, 8),
    torch.zeros(4, 8, 4),
    torch.zeros(3, 2),
    int32([[0, 1]] * 3),
)
LOGITS, A, B, OFFS = torch.zeros(3, 4), torch.zeros(6, 8), torch.zeros(2, 8, 4), int32([2, 6])
REFUSED = [
    (
        lambda: vllm.moe_align_block_size([[1]], 2, 4),
        TypeError,
        "moe_align_block_size: topk_ids must be a tensor, got list.",
    ),
    (
        lambda: vllm.moe_align_block_size(IDS.float(), 2, 4),
        ValueError,
        "moe_align_block_size: topk_ids must be int32 or int64, got float32.",
    ),
    (
        lambda: vllm.moe_align_block_size(IDS, 0, 4),
        ValueError,
        "moe_align_block_size: block_size must be at least 1, got 0.",
    ),
    (
        lambda: vllm.moe_align_block_size(IDS, 2, 4, int32([0])),
        ValueError,
        "moe_align_block_size: expert_map must have as many elements as there are experts, 4, got 1.",
    ),
    (
        lambda: vllm.moe_align_block_size(IDS, 2, 4, int32([0, 1, 2, 3]), return_scatter_idx=True),
        ValueError,
        "moe_align_block_size: ignore_invalid_experts must be True for return_scatter_idx with expert_map, got False.",
    ),
    (
        lambda: vllm.topk_softmax(WEIGHTS, IDS, IDS, LOGITS, is_padding=IDS),
        ValueError,
        "topk_softmax: is_padding must be None: it is not supported, got Tensor.",
    ),
    (
        lambda: vllm.topk_softmax(WEIGHTS[:2], IDS, IDS, LOGITS),
        ValueError,
        "topk_softmax: topk_weights must have the shape of the result, [3, 2], got [2, 2].",
    ),
    (
        lambda: vllm.topk_softmax(WEIGHTS, IDS, IDS.long(), LOGITS),
        ValueError,
        "topk_softmax: token_expert_indices must have the dtype of the result, int32, got int64.",
    ),
    (
        lambda: vllm.fused_topk(X[:2], LOGITS, 2, True),
        ValueError,
        "fused_topk: gating_output must have the tokens of hidden_states, 2, got 3.",
    ),
    (
        lambda: vllm.fused_topk(X, LOGITS, 2, True, scoring_func="tanh"),
        ValueError,
        "fused_topk: scoring_func must be softmax or sigmoid, got 'tanh'.",
    ),
    (
        lambda: vllm.grouped_topk(X, LOGITS, 2, True),
        ValueError,
        "grouped_topk: num_expert_group must be at least 1, got 0.",
    ),
    (
        lambda: vllm.fused_experts(X, W1, W2, WEIGHTS, IDS, activation="gelu"),
        ValueError,
        "fused_experts: activation must be silu: no other is supported, got 'gelu'.",
    ),
    (
        lambda: vllm.fused_experts(X, W1, W2, WEIGHTS, IDS, quant_config="fp8"),
        ValueError,
        "fused_experts: quant_config must be None: it is not supported, got str.",
    ),
    (
        lambda: vllm.fused_experts(X, W1, W2, WEIGHTS, IDS, global_num_experts=8),
        ValueError,
        "fused_experts: global_num_experts must be that of w1, 4, without expert_map, got 8.",
    ),
    (
        lambda: vllm.fused_experts(X, W1, W2, WEIGHTS, IDS, global_num_experts=0, expert_map=OFFS[:0]),
        ValueError,
        "fused_experts: global_num_experts must be at least 1, got 0.",
    ),
    (
        lambda: vllm.fused_experts(X, W1, W2, WEIGHTS, IDS, apply_router_weight_on_input=True),
        ValueError,
        "fused_experts: topk_ids must have one expert a token with apply_router_weight_on_input, got 2.",
    ),
    (lambda: grouped_mm(A, B), ValueError, "grouped_mm: offs must be given, got NoneType."),
    (
        lambda: grouped_mm(B, B.mT, offs=OFFS),
        ValueError,
        "grouped_mm: offs must be None for two operands of three dimensions, got Tensor.",
    ),
    (
        lambda: grouped_mm(B.mT, A.t(), offs=OFFS, bias=X),
        ValueError,
        "grouped_mm: bias must be None but for mat_a [M, K] and mat_b [G, K, N], got Tensor.",
    ),
    (
        lambda: grouped_mm(A, B, offs=OFFS, out_dtype=torch.float16),
        ValueError,
        "grouped_mm: out_dtype must be None or the dtype of mat_a, float32, got float16.",
    ),
    (lambda: grouped_mm(A, B.mT, offs=OFFS), ValueError, "grouped_mm: mat_b must have for this mat_a K = 8, got 4."),
    (
        lambda: grouped_mm(A[0], B, offs=OFFS),
        ValueError,
        "grouped_mm: mat_a must have 2 or 3 dimensions, got 1 dimensions [8].",
    ),
    (lambda: grouped_mm(B, B.mT[:1]), ValueError, "grouped_mm: mat_b must have the groups of mat_a, 2, got 1."),
    (
        lambda: grouped_mm(A, B, offs=int32([4, 9])),
        ValueError,
        "moe.grouped_mm: offsets must not decrease and be at most M, 6, got 9 after 4.",
    ),
]


@pytest.mark.parametrize(("call", "error", "sentence"), REFUSED, ids=[row[2].split(",")[0][:60] for row in REFUSED])
def test_what_is_refused(call, error, sentence):
    with pytest.raises(error, match=rf"^{re.escape(sentence)}$"):
        call()
