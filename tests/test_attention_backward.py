# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention: against float64 autograd through the definition, at edges, and what torch asks of an op."""

import dataclasses
import math

import pytest
import torch
from test_attention import KINDS, runs_of
from torch.library import opcheck

from fmkernels import attention, attention_varlen, merge_attention, reference
from fmkernels.testing import Case, as_multiplied, assert_as_good_as_torch, backends, split_tf32

BACKENDS = backends("attention_backward")
DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")


def inputs_of(case):
    """(names, tensors) of what gets a gradient, and a function of them alone for any execution of attention."""
    args, kwargs = case.inputs()
    named = dict(zip("qkv", args[:3], strict=True)) | {n: kwargs[n] for n in ("bias", "sinks") if n in kwargs}

    def call(function, tensors, **more):
        given = dict(zip(named, tensors, strict=True))
        rest = {name: value for name, value in (kwargs | more).items() if name not in named}
        return function(*(given.pop(n) for n in "qkv"), *args[3:], **given, **rest)

    return list(named), list(named.values()), call


def gradients(call, function, tensors, grads, **more):
    """Of (o, lse) with respect to every tensor."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    outputs = call(function, leaves, **more)
    wanted = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    return torch.autograd.grad([o for o, _ in wanted], leaves, [g for _, g in wanted], materialize_grads=True)


def on(backend, case):
    """The case in the first dtype of the backend."""
    return dataclasses.replace(case, dtype=backend.attention_dtypes[0])


def check(backend, case, through=("o", "lse")):
    _, tensors, call = inputs_of(case)
    function = attention_varlen if case.is_packed else attention
    generator = torch.Generator().manual_seed(1)
    outputs = backend.run(call, function, tensors, return_lse=True)
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) if n in through else None
             for n, t in zip(("o", "lse"), outputs, strict=True)]  # fmt: skip
    actual = backend.run(gradients, call, function, tensors, grads, return_lse=True)

    names = inputs_of(case)[0]
    computed_in = case.dtype if backend.has_tensor_cores else None  # weights are rounded to the dtype of the inputs

    def expected(*inputs):
        splits = backend.has_tensor_cores and inputs[0].dtype == torch.float32
        return from_saved(case, names, *inputs, **({"as_factor": split_tf32} if splits else {}))

    expected = as_multiplied(backend, expected)
    assert_as_good_as_torch(actual, expected, *tensors, *grads, computed_in=computed_in)


def from_saved(case, names, *inputs, as_factor=lambda x: x):
    """The gradients from o and lse, which is what a backward is given: exact in float64, and in float32 with the
    rounding of lse, and of o to the dtype of the inputs, that no backward can undo. as_factor: what tensor cores make
    of a factor of a product."""
    *tensors, grad_o, grad_lse = inputs
    _, kwargs = case.inputs()
    kwargs |= {n: v.to(tensors[0].dtype) for n, v in kwargs.items() if torch.is_tensor(v) and v.is_floating_point()}
    given = dict(zip(names, tensors, strict=True))
    if not case.is_packed:
        grads = from_saved_dense(case.dtype, given, kwargs, grad_o, grad_lse, as_factor)
        return [grads[name] for name in names]
    totals = {name: torch.zeros_like(t) for name, t in given.items()}
    starts = [0, 0]
    for b, lengths in enumerate(case.seqlens):
        queries, keys = (slice(start, start + n) for start, n in zip(starts, lengths, strict=True))
        starts = [queries.stop, keys.stop]
        places = {"q": queries, "k": keys, "v": keys}
        part = {name: t[None, places[name]] if name in places else t for name, t in given.items()}
        own = kwargs | {"first_batch": b}
        if case.alibi == "batch":
            own["alibi_slopes"] = kwargs["alibi_slopes"][b : b + 1]
        grad = from_saved_dense(case.dtype, part, own, *(g if g is None else g[None, queries] if i == 0 else
                                g[None, :, queries] for i, g in enumerate((grad_o, grad_lse))), as_factor)  # fmt: skip
        for name, total in totals.items():
            if name in places:
                total[places[name]] = grad[name][0]
            else:
                total += grad[name]
    return [totals[name] for name in names]


def from_saved_dense(dtype, given, kwargs, grad_o, grad_lse, as_factor):
    leaves = {n: t.detach().requires_grad_() for n, t in given.items()}
    q, k, v, sinks = given["q"], given["k"], given["v"], given.get("sinks")
    kwargs = {n: value for n, value in kwargs.items() if n not in given}
    with torch.no_grad():
        o, lse = reference.attention(q, k, v, sinks=sinks, bias=given.get("bias"), **kwargs)
    if q.dtype == torch.float32:
        o = o.to(dtype).float()
    dropout_p, rng, first_batch = (kwargs.pop(name, 0) for name in ("dropout_p", "dropout_rng", "first_batch"))
    scores, _ = reference.attention_scores(leaves["q"], leaves["k"], bias=leaves.get("bias"), **kwargs)
    group = q.shape[2] // k.shape[2]
    grad_o = torch.zeros_like(o) if grad_o is None else grad_o
    delta = (grad_o * o).sum(-1).transpose(1, 2) - (0 if grad_lse is None else grad_lse)
    weights = torch.where(lse[..., None] == -math.inf, 0.0, (scores.detach() - lse[..., None]).exp())
    factors = 1.0
    if dropout_p:
        factors = reference.dropout_factors(dropout_p, rng, *scores.shape, first_batch=first_batch).to(q)
    products = torch.einsum("bihd,bjhd->bhij", as_factor(grad_o), v.repeat_interleave(group, dim=2)) * factors
    slopes = torch.where(weights == 0, 0.0, weights * (products - delta[..., None]))
    q_and_k = [leaves["q"], leaves["k"]]
    grads = dict(zip("qk", torch.autograd.grad(scores, q_and_k, as_factor(slopes), retain_graph=True), strict=True))
    if "bias" in leaves:
        (grads["bias"],) = torch.autograd.grad(scores, leaves["bias"], slopes)
    of_heads = torch.einsum("bhij,bihd->bjhd", as_factor(weights * factors), as_factor(grad_o))
    grads["v"] = of_heads.unflatten(2, (k.shape[2], group)).sum(3)
    if sinks is not None:
        share = torch.where(lse == -math.inf, 0.0, (sinks[:, None] - lse).exp())
        grads["sinks"] = -(share * delta).sum((0, 2))
    return grads


def test_the_gradients_from_saved_results_are_those_of_the_definition():
    check_definition(CASES)


def check_definition(cases):
    for case in cases:
        names, tensors, call = inputs_of(case)
        tensors = [t.double() for t in tensors]
        slopes = case.inputs()[1].get("alibi_slopes")
        more = {} if slopes is None else {"alibi_slopes": slopes.double()}

        def packed(q, k, v, cu_q, cu_k, max_q, max_k, **kwargs):
            return reference.attention_varlen(q, k, v, cu_q, cu_k, **kwargs)

        function = packed if case.is_packed else reference.attention
        grads = [torch.ones_like(t) for t in call(function, tensors, **more)]
        exact = gradients(call, function, tensors, grads, **more)
        for name, a, b in zip(names, exact, from_saved(case, names, *tensors, *grads), strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, at=f"{case} {name}": f"{at}: {text}")


CASES = [
    Case("plain"),
    Case("causal", causal=True, seq_q=130, seq_k=130),
    Case("more_keys", causal=True, seq_q=49, seq_k=200),
    Case("more_queries", causal=True, seq_q=120, seq_k=40),  # the first see nothing
    Case("window", window=(20, 7), seq_q=130, seq_k=130),
    Case("window_left", causal=True, window=(5, -1), seq_q=200, seq_k=150),
    Case("one_query", seq_q=1, seq_k=190),
    Case("one_key", seq_q=70, seq_k=1),
    Case("heads_of_a_group", heads=6, kv_heads=2, seq_q=33, causal=True),
    Case("one_kv_head", heads=5, kv_heads=1),
    Case("other_values", head_dim=24, v_head_dim=40),
    Case("other_keys", head_dim=72, v_head_dim=8, causal=True),
    Case("widest", head_dim=256, v_head_dim=256, batch=1, heads=1, kv_heads=1),
    Case("scale", softmax_scale=0.7),
    Case("negative_scale", softmax_scale=-0.2, causal=True),
    Case("softcap", softcap=1.5, causal=True),
    Case("alibi", alibi="batch", causal=True),
    Case("sinks", sinks=True, causal=True),
    Case("bias", bias="bhqk", bias_dtype=torch.float32),
    Case("bias_of_all", bias="qk", causal=True),
    Case("bias_of_keys", bias="bk", softcap=2.0),
    Case("bias_of_rows", bias="hq"),
    Case("bias_that_hides", bias="hqk", bias_hides=True),
    Case("bias_number", bias=""),
    Case("transposed", transposed=True, causal=True),
    Case(
        "everything",
        heads=6,
        kv_heads=3,
        head_dim=40,
        v_head_dim=24,
        causal=True,
        window=(30, -1),
        softcap=3.0,
        alibi="heads",
        sinks=True,
        bias="bhqk",
        seq_q=70,
        seq_k=110,
    ),
    Case("packed", seqlens=((33, 33), (0, 5), (1, 70), (100, 97), (4, 0)), causal=True, sinks=True),
    Case("packed_window", seqlens=((60, 100), (7, 7)), window=(9, 3), softcap=2.0, alibi="batch"),
]


# Of float32 on a GPU; the others are slow tests.
FEW = {
    "more_queries",
    "window",
    "heads_of_a_group",
    "other_values",
    "widest",
    "softcap",
    "alibi",
    "sinks",
    "bias",
    "bias_of_keys",
    "packed",
}


@pytest.mark.parametrize(("case", "backend", "dtype"), runs_of(CASES, FEW))
def test_gradients_match_those_of_the_definition(case, backend, dtype):
    check(backend, dataclasses.replace(case, dtype=dtype))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("through", ["o", "lse"])
def test_gradients_through_one_result(through, backend):
    check(backend, on(backend, Case("one_result", causal=True, sinks=True, bias="hqk")), through=(through,))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("seq", range(32, 97))
def test_every_tail(seq, backend):
    """Tiles of rows and blocks of keys end at every place."""
    check(backend, on(backend, Case("tail", seq_q=seq, seq_k=seq + 64, causal=True)))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_rows_of_several_chunks(backend):
    """More rows than are packed at a time: 24 MiB of them at these sizes are about 2300."""
    case = Case("long", batch=1, heads=16, kv_heads=1, seq_q=200, seq_k=60, head_dim=256, causal=True)
    check(backend, on(backend, case))


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_what_sees_nothing_has_no_gradient(backend, dtype):
    """Queries before the first key, and keys that a bias of -inf hides from all, even where they hold NaN."""
    _, tensors, call = inputs_of(Case("blind", causal=True, seq_q=20, seq_k=8, dtype=dtype))
    grads = [torch.ones_like(t) for t in backend.run(call, attention, tensors, return_lse=True)]
    grads[1][:] = 0.0  # -inf has no slope
    grad_q, grad_k, grad_v = backend.run(gradients, call, attention, tensors, grads, return_lse=True)
    assert (grad_q[:, :12] == 0).all()
    assert all(t.isfinite().all() for t in (grad_q, grad_k, grad_v))


POISON = Case("poison", batch=1, heads=2, kv_heads=2, seq_q=100, seq_k=100, causal=True)


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
@pytest.mark.parametrize("where", ["grad_o", "q", "k", "v"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_poison_of_one_head_stays_there(poison, where, backend, dtype):
    """A NaN reaches what sees it or is seen by it, and nothing else: hidden pairs are no products with zero."""
    _, tensors, call = inputs_of(dataclasses.replace(POISON, dtype=dtype))
    o, lse = backend.run(call, attention, tensors, return_lse=True)
    grads = [torch.ones_like(o), torch.zeros_like(lse)]
    place = 60
    poisoned = dict(zip("qkv", tensors, strict=True)) | {"grad_o": grads[0]}
    poisoned[where][0, place, 0, 3] = poison
    actual = backend.run(gradients, call, attention, tensors, grads, return_lse=True)
    assert all(t[:, :, 1].isfinite().all() for t in actual), "the other head"
    grad_q, grad_k, grad_v = (t[0, :, 0] for t in actual)
    if where in ("grad_o", "q"):  # of one query: its own gradient, and those of the keys that it sees
        assert grad_q[:place].isfinite().all()
        assert grad_q[place + 1 :].isfinite().all()
        assert grad_k[place + 1 :].isfinite().all()
        assert grad_v[place + 1 :].isfinite().all()
        assert math.isinf(poison) or grad_q[place].isnan().any()
    else:  # of one key: the queries from it on, and all keys that these see
        assert grad_q[:place].isfinite().all()
        assert math.isinf(poison) or grad_q[place:].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_scores_beyond_the_range_of_half(backend):
    (q, k, v), _ = Case("large", dtype=torch.float16, causal=True).inputs()
    leaves = [t.requires_grad_() for t in (q * 300, k * 300, v)]
    backend.run(attention, *leaves, causal=True).sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves[2:])


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("sizes", [{"batch": 0}, {"seq_q": 0}, {"seq_k": 0}], ids=str)
def test_nothing_to_do(sizes, backend):
    _, tensors, call = inputs_of(on(backend, dataclasses.replace(Case("empty", bias="hqk", sinks=True), **sizes)))
    grads = [torch.ones_like(t) for t in backend.run(call, attention, tensors, return_lse=True)]
    if sizes == {"seq_k": 0}:
        grads[1] = None
    for t, grad in zip(tensors, backend.run(gradients, call, attention, tensors, grads, return_lse=True), strict=True):
        assert grad.shape == t.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_merged_attention_trains(backend):
    """Two halves of the keys, merged through their lse, have the gradients of the whole."""
    case = on(backend, Case("merged"))
    inputs, _ = case.inputs()

    def halves(attention, merge, *inputs):
        q, k, v = leaves = [t.detach().requires_grad_() for t in inputs]
        first = attention(q, k[:, :30], v[:, :30], return_lse=True)
        o, _ = merge(*first, *attention(q, k[:, 30:], v[:, 30:], return_lse=True))
        return torch.autograd.grad(o.square().sum(), leaves)

    def definition(q, k, v, return_lse):
        return reference.attention(q, k, v)

    actual = backend.run(halves, attention, merge_attention, *inputs)
    expected = lambda *inputs: halves(definition, reference.merge_attention, *inputs)  # noqa: E731
    assert_as_good_as_torch(actual, expected, *inputs, computed_in=case.dtype)


# ---- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
def test_bits_do_not_depend_on_neighbours_threads_or_the_run(backend, dtype):
    case = Case("packed", seqlens=((70, 70), (1, 33), (130, 111)), causal=True, sinks=True, dtype=dtype)
    _, tensors, call = inputs_of(case)
    grads = [torch.ones_like(t) for t in backend.run(call, attention_varlen, tensors, return_lse=True)]
    first = backend.run(gradients, call, attention_varlen, tensors, grads, return_lse=True)
    threads = torch.get_num_threads()
    for count in (1, 2, 3, threads):
        torch.set_num_threads(count)
        again = backend.run(gradients, call, attention_varlen, tensors, grads, return_lse=True)
        assert all(map(torch.equal, first, again))
    q, k, v, sinks = tensors
    alone = [t[None, -n:] for t, n in ((q, 130), (k, 111), (v, 111))]
    call = lambda function, tensors, **more: function(*tensors, causal=True, sinks=sinks, **more)  # noqa: E731
    o, lse = backend.run(call, attention, alone, return_lse=True)
    own = backend.run(gradients, call, attention, alone, [torch.ones_like(o), torch.ones_like(lse)], return_lse=True)
    for t, packed in zip(own, first[:3], strict=True):
        assert torch.equal(t[0], packed[-t.shape[1] :])


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_only_what_is_wanted_gets_a_gradient(wanted):
    names, tensors, call = inputs_of(Case("some", bias="hqk", sinks=True))
    leaves = [t.clone().requires_grad_(name == wanted) for name, t in zip(names, tensors, strict=True)]
    call(attention, leaves).sum().backward()
    assert [name for name, t in zip(names, leaves, strict=True) if t.grad is not None] == [wanted]


def test_a_second_derivative_is_an_error():
    (q, k, v), _ = Case("second").inputs()
    q.requires_grad_()
    (grad,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_opcheck():
    args, kwargs = Case("op", bias="hqk", sinks=True).inputs()
    rest = (kwargs["bias"], None, kwargs["sinks"], False, -1, -1, 0.25, 0.0, 0.0, None)
    o, lse = torch.ops.fmkernels.attention_forward(*args, *rest)
    opcheck(torch.ops.fmkernels.attention_backward.default, (torch.ones_like(o), None, *args, o, lse, *rest, True))


def test_opcheck_packed():
    (*qkv, cu_q, cu_k, longest_q, longest_k), _ = Case("op", seqlens=((5, 9), (3, 3))).inputs()
    rest = (cu_q, cu_k, longest_q, longest_k, None, None, False, -1, -1, 0.25, 0.0, 0.0, None)
    o, lse = torch.ops.fmkernels.attention_varlen_forward(*qkv, *rest)
    given = (torch.ones_like(o), torch.ones_like(lse), *qkv, o, lse, *rest)
    opcheck(torch.ops.fmkernels.attention_varlen_backward.default, given)


@pytest.mark.parametrize("name", ["grad_o", "o", "lse", "grad_lse"])
def test_the_op_refuses_what_does_not_fit(name):
    q = torch.zeros(1, 5, 2, 8)
    lse = torch.zeros(1, 2, 5)
    given = {
        "grad_o": q,
        "grad_lse": lse,
        "q": q,
        "k": q,
        "v": q,
        "o": q,
        "lse": lse,
        "bias": None,
        "alibi_slopes": None,
        "sinks": None,
        "causal": False,
        "window_left": -1,
        "window_right": -1,
        "softmax_scale": 1.0,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "dropout_rng": None,
        "bias_grad": False,
    }
    torch.ops.fmkernels.attention_backward(**given)
    for wrong in (given[name][..., :-1], given[name].double(), given[name][0]):
        with pytest.raises(RuntimeError, match=name):
            torch.ops.fmkernels.attention_backward(**{**given, name: wrong})


def test_compiled_gradients_have_the_same_bits():
    names, tensors, call = inputs_of(Case("compiled", causal=True, bias="hqk", sinks=True))

    def loss(*leaves):
        return call(attention, leaves).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        function(*leaves).backward()
        results.append([t.grad for t in leaves])
    for name, eager, compiled in zip(names, *results, strict=True):
        assert torch.equal(eager, compiled), name


def test_a_loss_under_autocast_may_go_backward_after_it():
    """Which is how torch says to do it; q was kept as float32 beside an o in half, and the backward refused the two."""
    names, tensors, call = inputs_of(Case("autocast", bias="hqk", sinks=True))
    halves = [t.bfloat16() if name in "qkv" else t for name, t in zip(names, tensors, strict=True)]
    leaves, expected = ([t.clone().requires_grad_() for t in given] for given in (tensors, halves))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = call(attention, leaves).sum()
    loss.backward()
    call(attention, expected).sum().backward()
    for name, leaf, half in zip(names, leaves, expected, strict=True):
        assert torch.equal(leaf.grad, half.grad.float()), name
