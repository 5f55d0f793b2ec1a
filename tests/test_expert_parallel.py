# SPDX-License-Identifier: Apache-2.0
"""fmkernels.expert_parallel over 1 to 4 ranks: the bits of one process, forward and backward."""

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes
from expert_parallel_ranks import Layer, same
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from fmkernels import _expert_parallel_exchange, expert_parallel, moe, reference
from fmkernels._expert_parallel_payload import decode, encode
from fmkernels.testing import assert_as_good_as_torch

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

ENDS = {1: (41,), 2: (17, 41), 3: (17, 17, 41), 4: (17, 17, 30, 41)}  # of 3 and 4 ranks one has no tokens


def all_to_the_last_rank(layer):
    layer.topk_idx = layer.topk_idx % 3 + 9


def no_experts(layer):
    layer.topk_idx.fill_(-1)


def nan_in_a_token(layer):
    layer.x[20] = torch.nan
    layer.topk_idx[20] = 0


def experts_in_order(layer):
    layer.topk_idx = torch.arange(12, dtype=torch.int64).expand(41, 12).contiguous()


CASES = {
    "three choices": {},
    "one choice": {"num_topk": 1},
    "all tokens to one rank": {"change": all_to_the_last_rank},
    "no token has an expert": {"change": no_experts},
    "every token has every expert": {"num_topk": 12, "change": experts_in_order},
    "nan": {"change": nan_in_a_token},
    "odd sizes": {"hidden": 13, "width": 5, "num_topk": 5},
}


def check_bits(rank, n, mesh):
    """In a group of n ranks."""
    group = dist.new_group(list(range(n)))  # a collective of all ranks
    if rank >= n:
        return
    for dtype in (torch.float32, torch.bfloat16):
        for name, case in CASES.items() if n % 2 == 0 or dtype == torch.float32 else ():
            layer = Layer(ENDS[n], dtype=dtype, **case)
            wanted = layer.parts(layer.alone(), rank)
            variants = [{}, {"max_tokens": 41}] + ([{"group": mesh}, {"group": mesh, "max_tokens": 41}] if mesh else [])
            for options in variants:
                actual = layer.together(rank, expert_parallel.moe_mlp, **{"group": group, **options})
                assert all(same(actual, wanted)), (n, dtype, name, options, same(actual, wanted))
        nothing = Layer((0,) * n, dtype=dtype)
        assert all(
            same(nothing.together(rank, expert_parallel.moe_mlp, group=group), nothing.parts(nothing.alone(), rank))
        )


def check_chunks(rank, mesh):
    """Outputs and gradients of tokens have the bits of one chunk; those of experts are the sums of the chunks'."""
    layer = Layer(ENDS[4])
    wanted = layer.parts(layer.alone(), rank)
    halves = [layer.topk_idx.clone(), layer.topk_idx.clone()]
    for begin, end in zip(layer.ends, layer.ends[1:], strict=False):
        middle = begin + (end - begin + 1) // 2
        halves[0][middle:end] = -1
        halves[1][begin:middle] = -1
    sums = [sum(pair) for pair in zip(*(layer.alone(topk_idx=half)[2:4] for half in halves), strict=True)]
    sums = [layer.part("w_down", t, rank) for t in sums]
    for options in ({}, {"group": mesh}):
        actual = layer.together(rank, expert_parallel.moe_mlp, num_chunks=2, **options)
        assert all(same(actual, [*wanted[:2], *sums, wanted[4]])), same(actual, wanted)
    for num_chunks, options in ((3, {}), (16, {}), (3, {"max_tokens": 17})):
        actual = layer.together(rank, expert_parallel.moe_mlp, num_chunks=num_chunks, **options)
        assert [same(actual, wanted)[i] for i in (0, 1, 4)] == [True] * 3


def in_pieces(x, w_gate_up, w_down, topk_weights, topk_idx, *, async_op=False, **options):
    """The layer of dispatch and combine, as users write it."""
    result = expert_parallel.dispatch(x, topk_idx, 12, async_op=async_op, **options)
    recv_x, recv_topk_idx, handle = result.wait() if async_op else result
    assert recv_topk_idx.shape == (len(recv_x), topk_idx.shape[1])
    assert (recv_topk_idx >= 0).sum() == handle.mapping.expert_offsets[1, -1]
    offsets = handle.mapping.expert_offsets[0]
    rows = moe.grouped_mm(moe.permute(recv_x, handle.mapping), w_gate_up, offsets, trans_b=True)
    gate, up = rows.chunk(2, -1)
    y = moe.grouped_mm(torch.nn.functional.silu(gate) * up, w_down, offsets, trans_b=True)
    out = expert_parallel.combine(y, handle, topk_weights, async_op=async_op)
    return out.wait() if async_op else out


def composed(x, w_gate_up, w_down, topk_weights, topk_idx):
    """The same in one process."""
    mapping = moe.build_mapping(topk_idx, 12)
    rows = moe.grouped_mm(moe.permute(x, mapping), w_gate_up, mapping.expert_offsets[0], trans_b=True)
    gate, up = rows.chunk(2, -1)
    y = moe.grouped_mm(torch.nn.functional.silu(gate) * up, w_down, mapping.expert_offsets[0], trans_b=True)
    return moe.combine(y, mapping, topk_weights)


def check_pieces(rank, mesh):
    for num_topk in (2, 5):
        layer = Layer(ENDS[4], num_topk=num_topk)
        wanted = layer.parts(layer.alone(composed), rank)
        for options in ({}, {"async_op": True}, {"max_tokens": 30}, {"group": mesh}, {"group": mesh, "async_op": True}):
            actual = layer.together(rank, in_pieces, **options)
            # The rows of a token's gradient are summed at the rank of the experts first.
            assert [same(actual, wanted)[i] for i in (0, 2, 3, 4)] == [True] * 4, options
            if num_topk <= 2 and layer.ends[rank] < layer.ends[rank + 1]:
                assert same(actual, wanted)[1], options

            def gradient(*leaves, layer=layer):
                leaves = [t.detach().requires_grad_() for t in leaves]
                out = reference.moe.moe_mlp(*leaves, layer.topk_idx)
                grad = torch.autograd.grad(out, leaves[0], layer.grad.to(out.dtype))[0]
                return layer.part("x", grad, rank)

            assert_as_good_as_torch(actual[1], gradient, *layer.leaves())


def check_payload(rank, mesh):
    """A payload is as good as the tokens that it stands for; gradients pass."""
    for payload in ("int8", "float8_e4m3fn"):
        for dtype in (torch.float32, torch.bfloat16):
            layer = Layer(ENDS[4], dtype=dtype)
            layer.x[3] = 0
            layer.x = decode(encode(layer.x, payload), dtype, payload)
            wanted = layer.parts(layer.alone(), rank)
            layer = Layer(ENDS[4], dtype=dtype)
            layer.x[3] = 0
            for options in ({}, {"max_tokens": 17}, {"group": mesh}):
                actual = layer.together(rank, expert_parallel.moe_mlp, payload=payload, **options)
                assert all(same(actual, wanted)), (payload, options)


class Recorded(torch.autograd.Function):
    """The identity, which says when it is computed, forward and backward."""

    @staticmethod
    def forward(ctx, x, order, name):
        ctx.order, ctx.name = order, name
        order.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.order.append(ctx.name)
        return grad, None, None


def check_run(rank):
    """Any experts, beside a shared one; what travels has left before there is something to compute meanwhile."""
    layer, order = Layer(ENDS[4]), []
    weight = torch.nn.Parameter(layer.part("w_down", layer.w_down, rank).clone())

    def experts(rows, offsets):
        return moe.grouped_mm(Recorded.apply(rows, order, "experts")[:, :24], weight, offsets, trans_b=True)

    def shared(x):
        return Recorded.apply(x, order, "shared").tanh()

    def exchange(rows, splits, group):
        order.append("leaves")
        return InFlight(begin(rows, splits, group))

    class InFlight:
        def __init__(self, flight):
            self.flight = flight

        def wait(self):
            order.append("arrives")
            return self.flight.wait()

    x, _, _, topk_weights = layer.leaves(rank)
    args = (x, topk_weights.detach(), layer.part("topk_idx", layer.topk_idx, rank), 12)
    begin = _expert_parallel_exchange.exchange
    _expert_parallel_exchange.exchange = exchange
    try:
        out = expert_parallel.run(experts, *args, num_chunks=2, shared=shared, requires_grad=True)
        part = ["arrives", "experts", "leaves"]
        assert order == ["leaves", "shared", "leaves", *part, *part, "arrives", "arrives"], order
        order.clear()
        out.sum().backward()
        assert order == ["leaves", "leaves", *part, *part, "arrives", "shared", "arrives"], order
    finally:
        _expert_parallel_exchange.exchange = begin
    mapping = moe.build_mapping(layer.topk_idx, 12)
    rows = moe.permute(layer.x, mapping)[:, :24]
    y = moe.grouped_mm(rows, layer.w_down, mapping.expert_offsets[0], trans_b=True)
    alone = moe.combine(y, mapping, layer.topk_weights)
    assert torch.equal(out, layer.part("out", alone + layer.x.tanh(), rank))
    assert weight.grad is not None


def check_experts_without_rows(rank):
    """A loop over the experts that have rows: on a rank of none its result depends on nothing. All walk back."""
    layer = Layer(ENDS[4], change=all_to_the_last_rank)

    def loop(weights):
        def experts(rows, offsets):
            begins = [0, *offsets.tolist()]
            parts = [(weights[i], rows[begin:end]) for i, (begin, end) in enumerate(itertools.pairwise(begins))]
            ys = [part[:, :24] @ weight.t() for weight, part in parts if len(part) > 0]
            return torch.cat(ys) if ys else rows.new_zeros(0, 40)

        return experts

    def alone(x, weights, topk_weights):
        mapping = moe.build_mapping(layer.topk_idx, 12)
        y = loop(weights)(moe.permute(x, mapping), mapping.expert_offsets[0])
        return moe.combine(y, mapping, topk_weights)

    names = ("x", "w_down", "topk_weights")
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        leaves, mine = [], []
        for t, name, need in zip((layer.x, layer.w_down, layer.topk_weights), names, needs, strict=True):
            leaves.append(t.clone().requires_grad_(need))
            mine.append(layer.part(name, t, rank).clone().requires_grad_(need))
        wanted = alone(*leaves)
        wanted.backward(layer.grad)
        idx, experts = layer.part("topk_idx", layer.topk_idx, rank), loop(mine[1])
        out = expert_parallel.run(experts, mine[0], mine[2], idx, 12, requires_grad=needs[1])
        assert torch.equal(out, layer.part("out", wanted, rank))
        out.backward(layer.part("grad", layer.grad, rank))
        for name, t, leaf in zip(names, mine, leaves, strict=True):
            if name != "w_down" or rank == 3:
                assert t.grad is leaf.grad is None or torch.equal(t.grad, layer.part(name, leaf.grad, rank)), name


def check_again(rank):
    """Backward twice, of some inputs alone, and with the layer computed again in backward."""
    layer = Layer(ENDS[4])
    wanted = layer.parts(layer.alone(), rank)

    def checkpointed(*args):
        return checkpoint(expert_parallel.moe_mlp, *args, use_reentrant=False)

    assert all(same(layer.together(rank, checkpointed), wanted))
    leaves = layer.leaves(rank)
    out = expert_parallel.moe_mlp(*leaves, layer.part("topk_idx", layer.topk_idx, rank))
    for _ in range(2):
        grads = torch.autograd.grad(out, leaves, layer.part("grad", layer.grad, rank), retain_graph=True)
        assert all(same(grads, wanted[1:]))
    for i in range(4):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(layer.leaves(rank))]
        out = expert_parallel.moe_mlp(*leaves, layer.part("topk_idx", layer.topk_idx, rank), num_chunks=1 + i // 3)
        assert all(same(torch.autograd.grad(out, leaves[i], layer.part("grad", layer.grad, rank)), [wanted[1 + i]]))


def check_rows(rank, mesh):
    """A token is one row for each rank that has an expert of it; of two levels, one for each node, then each rank."""
    layer = Layer(ENDS[4], num_topk=5)
    x, idx = (layer.part(name, getattr(layer, name), rank) for name in ("x", "topk_idx"))
    ranks, nodes = ([{e // count for e in row if e >= 0} for row in idx.tolist()] for count in (3, 6))
    splits = expert_parallel.dispatch(x, idx, 12)[2].legs[0].token_splits.send
    assert splits == [sum(r in token for token in ranks) for r in range(4)]
    first, second = expert_parallel.dispatch(x, idx, 12, group=mesh)[2].legs
    assert first.token_splits.send == [sum(n in token for token in nodes) for n in range(2)]
    assert sum(second.token_splits.send) <= 2 * sum(first.token_splits.receive)


def check_all(rank):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "device"))
    for n in ENDS:
        check_bits(rank, n, mesh if n == 4 else None)
    check_chunks(rank, mesh)
    check_pieces(rank, mesh)
    check_payload(rank, mesh)
    check_run(rank)
    check_experts_without_rows(rank)
    check_again(rank)
    check_rows(rank, mesh)


def test_ranks_have_the_bits_of_one_process(tmp_path):
    as_processes(4, check_all, tmp_path)


def check_any_sizes(rank):
    """Sizes, tokens of a rank and variants by chance, the same for all ranks."""
    mesh = init_device_mesh("cpu", (2, 2))
    chance = random.Random(0)
    for _ in range(60):
        ends = tuple(itertools.accumulate(chance.choice((0, 1, 3, 8, 40)) for _ in range(4)))
        num_experts = 4 * chance.randint(1, 8)
        dtype = chance.choice((torch.float32, torch.bfloat16, torch.float16))
        sizes = {"hidden": chance.randint(1, 70), "width": chance.randint(1, 40), "num_topk": chance.randint(1, 9)}
        options = {"group": chance.choice((None, mesh)), "max_tokens": chance.choice((None, 40)), "num_chunks": 1}
        layer = Layer(ends, num_experts=num_experts, dtype=dtype, **sizes)
        wanted = layer.parts(layer.alone(), rank)
        actual = layer.together(rank, expert_parallel.moe_mlp, **options)
        assert all(same(actual, wanted)), (ends, num_experts, dtype, sizes, options, same(actual, wanted))
        options["num_chunks"] = chance.randint(2, 16)
        actual = layer.together(rank, expert_parallel.moe_mlp, **options)
        assert [same(actual, wanted)[i] for i in (0, 1, 4)] == [True] * 3, (ends, num_experts, dtype, sizes, options)


@pytest.mark.slow
def test_any_sizes(tmp_path):
    as_processes(4, check_any_sizes, tmp_path)


@pytest.mark.parametrize("payload", ["int8", "float8_e4m3fn"])
def test_the_error_of_a_payload_is_the_one_that_is_stated(payload):
    x = torch.randn(64, 100) * torch.logspace(-30, 30, 64)[:, None]
    x[0] = 0
    error = (decode(encode(x, payload), torch.float32, payload) - x).abs().double()
    largest = x.abs().amax(1, keepdim=True).double()
    rounding = 1 + 2.0**-20  # of the scale and the product
    if payload == "int8":
        assert (error <= largest / 254 * rounding).all()
    else:
        assert (error <= torch.maximum(x.abs().double() / 16, largest / 458752) * rounding).all()
    for value in (torch.nan, torch.inf):
        x[5, 7] = value
        assert decode(encode(x, payload), torch.float32, payload)[5].isnan().all()
        assert decode(encode(x, payload), torch.float32, payload)[6].isfinite().all()


@pytest.fixture
def four_fake_ranks():
    """A group whose collectives do nothing, for what needs no values."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


def fake_step(**options):
    with FakeTensorMode():
        x, grad = torch.randn(5, 16, requires_grad=True), torch.randn(5, 16)
        gate_up, down = torch.randn(2, 8, 16, requires_grad=True), torch.randn(2, 16, 4, requires_grad=True)
        weights, idx = torch.rand(5, 3, requires_grad=True), torch.zeros(5, 3, dtype=torch.int32)
        out = expert_parallel.moe_mlp(x, gate_up, down, weights, idx, **options)
        return [t.shape for t in (out, *torch.autograd.grad(out, (x, gate_up, down, weights), grad))]


def test_nothing_waits_for_the_device_with_max_tokens(four_fake_ranks):
    """Tensors without values have shapes alone: whatever asked one for a value would raise."""
    shapes = [(5, 16), (5, 16), (2, 8, 16), (2, 16, 4), (5, 3)]
    assert fake_step(max_tokens=8) == shapes
    assert fake_step(max_tokens=8, payload="int8", num_chunks=2) == shapes
    mesh = init_device_mesh("cpu", (2, 2))
    assert fake_step(max_tokens=8, group=mesh) == shapes
    with pytest.raises(ValueError, match="x must have at most max_tokens = 4 tokens, got 5"):
        fake_step(max_tokens=4)  # no rank hears of it, and none is asked
    with pytest.raises(DataDependentOutputException):
        fake_step()
