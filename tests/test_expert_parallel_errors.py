# SPDX-License-Identifier: Apache-2.0
"""fmkernels.expert_parallel: one sentence for wrong arguments, on every rank; and a rank that dies."""

import datetime
import itertools
import os
import time

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes, raised
from expert_parallel_ranks import Layer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from fmkernels import expert_parallel, moe
from fmkernels.nn import Experts, WeightGradStore

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

SAME = "must be the same on every rank of the group, got"


def check_agreement(rank):
    """What one rank does otherwise, all say; and the group is in order afterwards."""
    layer = Layer((5, 10, 15, 20))
    mesh = init_device_mesh("cpu", (2, 2))
    x, gate_up, down, weights = layer.leaves(rank)
    idx = layer.part("topk_idx", layer.topk_idx, rank)

    def call(change=None, **options):
        args = {"x": x, "w_gate_up": gate_up, "w_down": down, "topk_weights": weights, "topk_idx": idx, **options}
        return raised(expert_parallel.moe_mlp, **(args | (change if change is not None and rank == 2 else {})))

    tensors = dict(zip(layer.NAMES, (x, gate_up, down, weights), strict=True))
    more_experts = {name: torch.cat((tensors[name], tensors[name][:1])) for name in ("w_gate_up", "w_down")}
    half = {name: tensors[name].bfloat16() for name in ("x", "w_gate_up", "w_down")}
    changes = (
        ({"topk_idx": idx[:, :2], "topk_weights": weights[:, :2]}, "num_topk", 2, 3),
        (more_experts, "num_experts", 16, 12),
        ({"payload": "int8"}, "payload", "int8", None),
        ({"max_tokens": 8}, "max_tokens", 8, None),
        ({"num_chunks": 2}, "num_chunks", 2, 1),
        ({"x": x.detach()}, "requires_grad", "topk_weights and the experts", "x and topk_weights and the experts"),
        (
            {name: t.detach() for name, t in tensors.items()},
            "requires_grad",
            "nothing",
            "x and topk_weights and the experts",
        ),
        (half, "dtype", "bfloat16", "float32"),
    )
    for group, (change, name, odd, usual) in itertools.product((None, mesh), changes):
        text = call(change, group=group)
        mine, other = (odd, usual) if rank == 2 else (usual, odd)
        if group is None or rank in (2, 3):  # with a mesh those of a node compare, and others hear of it
            wanted = f"ValueError: expert_parallel.moe_mlp: {name} {SAME} {mine} here and {other} on rank "
            assert text.startswith(wanted), text
        else:
            assert "every rank of the group must give valid arguments, rank 1 refused its own." in text, text
    refused = (
        ({"topk_idx": idx + 20}, "ValueError: expert_parallel.moe_mlp: topk_idx must be from -1 to 11, got"),
        ({"w_gate_up": gate_up[0]}, "ValueError: expert_parallel.moe_mlp: w_gate_up must be [local experts, 2 * width"),
        ({"w_gate_up": None}, "TypeError: expert_parallel.moe_mlp: w_gate_up must be a tensor, got NoneType."),
        ({"payload": ["int8"]}, "ValueError: expert_parallel.moe_mlp: payload must be None or int8 or"),
        ({"max_tokens": 2**50}, "RuntimeError: "),  # there is no memory for so many
    )
    for group, (change, wanted) in itertools.product((None, mesh), refused):
        text = call(change, group=group)
        others = "ValueError: expert_parallel.moe_mlp: every rank of the group must give valid arguments, rank "
        assert text.startswith(wanted if rank == 2 else others), text
        assert call(group=group) == "nothing"


def test_what_differs_between_ranks_is_said_on_each(tmp_path):
    as_processes(4, check_agreement, tmp_path)


SECONDS = 4


def check_death(rank, when):
    """Rank 2 ends, or stops, in the middle of a step; the others raise within the timeout of the group."""
    layer = Layer((5, 10, 15))
    x, gate_up, down, weights = layer.leaves(rank)
    idx = layer.part("topk_idx", layer.topk_idx, rank)
    dist.barrier()
    group = dist.new_group(timeout=datetime.timedelta(seconds=SECONDS))
    dist.barrier()
    begin = time.monotonic()

    def step():
        recv_x, _, handle = expert_parallel.dispatch(x, idx, 12, group=group)
        if rank == 2 and when == "experts":
            os._exit(0)
        if rank == 2 and when == "stops":
            time.sleep(SECONDS + 2)
            os._exit(0)
        rows = moe.grouped_mm(
            moe.permute(recv_x, handle.mapping), gate_up, handle.mapping.expert_offsets[0], trans_b=True
        )
        y = moe.grouped_mm(rows[:, :24], down, handle.mapping.expert_offsets[0], trans_b=True)
        out = expert_parallel.combine(y, handle, weights)
        if rank == 2 and when == "backward":
            os._exit(0)
        out.sum().backward()

    text = raised(step)
    assert text.startswith(("RuntimeError", "DistBackendError")), text
    assert time.monotonic() - begin < SECONDS + 5
    os._exit(0)


@pytest.mark.parametrize("when", ["experts", "backward", "stops"])
def test_a_rank_that_dies_hangs_nobody(when, tmp_path):
    begin = time.monotonic()
    as_processes(3, check_death, tmp_path, when)
    assert time.monotonic() - begin < 60


X, IDX, WEIGHTS = torch.randn(6, 8), torch.zeros(6, 2, dtype=torch.int32), torch.rand(6, 2)


def test_without_a_group():
    assert raised(expert_parallel.dispatch, X, IDX, 4) == (
        "ValueError: expert_parallel.dispatch: group must exist: torch.distributed.init_process_group was not called."
    )


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("one") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


DISPATCH = [
    ({"x": None}, TypeError, "x must be a tensor, got NoneType."),
    ({"x": X[0]}, ValueError, "x must be [num_tokens, hidden], got 1 dimensions [8]."),
    ({"x": X.double()}, ValueError, "x must be float32 or bfloat16 or float16, got float64."),
    ({"x": X.t()}, ValueError, "x must have a contiguous last dimension, got stride 8."),
    ({"x": X[:, :0]}, ValueError, "x must have a column or more, got [6, 0]."),
    ({"topk_idx": IDX.float()}, ValueError, "topk_idx must be int32 or int64, got float32."),
    ({"topk_idx": IDX[:5]}, ValueError, "topk_idx must have the tokens of x, 6, got 5."),
    ({"topk_idx": IDX + 4}, ValueError, "topk_idx must be from -1 to 3, got 4."),
    ({"topk_idx": IDX - 2}, ValueError, "topk_idx must be from -1 to 3, got -2."),
    ({"topk_idx": IDX[:, :0]}, ValueError, "topk_idx must have a column or more, got [6, 0]."),
    ({"topk_idx": IDX[:, :1].repeat(1, 1025)}, ValueError, "topk_idx must have at most 1024 columns, got 1025."),
    ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0."),
    ({"num_experts": 2.0}, TypeError, "num_experts must be an integer, got float."),
    ({"num_experts": 1025}, ValueError, "num_experts must be at most 1024 and a multiple of the 1 ranks, got 1025."),
    ({"group": 3}, TypeError, "group must be a process group, two of them, a DeviceMesh or None, got 3."),
    ({"max_tokens": 5}, ValueError, "x must have at most max_tokens = 5 tokens, got 6."),
    ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0."),
    ({"payload": "int4"}, ValueError, "payload must be None or int8 or float8_e4m3fn, got 'int4'."),
    ({"payload": ["int8"]}, ValueError, "payload must be None or int8 or float8_e4m3fn, got ['int8']."),
    ({"async_op": 1}, TypeError, "async_op must be True or False, got int."),
]


@pytest.mark.parametrize(("changed", "error", "sentence"), DISPATCH)
def test_wrong_arguments_of_dispatch(changed, error, sentence, one_rank):
    with pytest.raises(error) as caught:
        expert_parallel.dispatch(**{"x": X, "topk_idx": IDX, "num_experts": 4, **changed})
    assert str(caught.value) == f"expert_parallel.dispatch: {sentence}"


COMBINE = [
    ({"y": None}, TypeError, "y must be a tensor, got NoneType."),
    ({"y": X[0]}, ValueError, "y must be [rows, hidden], got 1 dimensions [8]."),
    ({"y": X}, ValueError, "y must have the rows of handle.mapping, 12, got 6."),
    ({"handle": 1}, TypeError, "handle must be a Handle of dispatch, got int."),
    ({"topk_weights": WEIGHTS.double()}, ValueError, "topk_weights must be float32, got float64."),
    ({"topk_weights": WEIGHTS.to("meta")}, ValueError, "topk_weights must be on the device of y, cpu, got meta."),
    ({"topk_weights": WEIGHTS[:, :1]}, ValueError, "topk_weights must have the shape of topk_idx, [6, 2], got [6, 1]."),
]


@pytest.mark.parametrize(("changed", "error", "sentence"), COMBINE)
def test_wrong_arguments_of_combine(changed, error, sentence, one_rank):
    handle = expert_parallel.dispatch(X, IDX, 4)[2]
    with pytest.raises(error) as caught:
        expert_parallel.combine(**{"y": torch.zeros(12, 8), "handle": handle, "topk_weights": WEIGHTS, **changed})
    assert str(caught.value) == f"expert_parallel.combine: {sentence}"


MLP = [
    (
        {"w_gate_up": torch.zeros(4, 8)},
        "w_gate_up must be [local experts, 2 * width, hidden], got 2 dimensions [4, 8].",
    ),
    ({"w_gate_up": torch.zeros(4, 5, 8)}, "w_gate_up must have an even number of rows an expert, got 5."),
    ({"w_gate_up": torch.zeros(4, 6, 7)}, "w_gate_up must have for this x hidden = 8, got 7."),
    ({"w_gate_up": torch.zeros(4, 6, 8).half()}, "w_gate_up must have the dtype of x, float32, got float16."),
    ({"w_down": torch.zeros(4, 8, 2)}, "w_down must be [4, 8, 3] for this w_gate_up, got [4, 8, 2]."),
    ({"topk_weights": WEIGHTS[:, :1]}, "topk_weights must have the shape of topk_idx, [6, 2], got [6, 1]."),
    ({"topk_weights": WEIGHTS.to("meta")}, "topk_weights must be on the device of x, cpu, got meta."),
    ({"num_chunks": 17}, "num_chunks must be at most 16, got 17."),
]


@pytest.mark.parametrize(("changed", "sentence"), MLP)
def test_wrong_arguments_of_moe_mlp(changed, sentence, one_rank):
    arguments = {"w_gate_up": torch.zeros(4, 6, 8), "w_down": torch.zeros(4, 8, 3)}
    with pytest.raises(ValueError, match="expert_parallel") as caught:
        expert_parallel.moe_mlp(**{"x": X, "topk_weights": WEIGHTS, "topk_idx": IDX, **arguments, **changed})
    assert str(caught.value) == f"expert_parallel.moe_mlp: {sentence}"


def test_experts_that_lose_rows(one_rank):
    text = raised(expert_parallel.run, lambda rows, offsets: rows[1:], X, WEIGHTS, IDX, 4)
    assert text == "ValueError: expert_parallel.run: y must have the rows of handle.mapping, 12, got 11."


def test_a_dispatch_is_waited_for_once(one_rank):
    pending = expert_parallel.dispatch(X, IDX, 4, async_op=True)
    handle = pending.wait()[2]
    assert raised(pending.wait) == "ValueError: expert_parallel: wait must be called once, it was called before."
    pending = expert_parallel.dispatch(X, IDX, 4, async_op=True)
    assert expert_parallel.combine(torch.zeros(12, 8), handle, WEIGHTS, async_op=True).wait().shape == (6, 8)
    pending.wait()


def test_wrong_modules_for_the_style(one_rank):
    mesh = init_device_mesh("cpu", (1,))
    style, op = expert_parallel.ExpertParallel, "ValueError: expert_parallel.ExpertParallel: "
    assert raised(parallelize_module, torch.nn.Linear(2, 2), mesh, style()) == (
        f"{op}module must have the parameters gate_up_proj and down_proj, got ['bias', 'weight']."
    )
    deferred = Experts(4, 8, 8, weight_grad_store=WeightGradStore())
    assert raised(parallelize_module, deferred, mesh, style()) == (
        f"{op}module must have no weight_grad_store: gradients of DTensors cannot wait in it."
    )
    assert raised(style, payload="int2") == f"{op}payload must be None or int8 or float8_e4m3fn, got 'int2'."
    assert raised(style, split_tokens=2) == (
        "TypeError: expert_parallel.ExpertParallel: split_tokens must be a DeviceMesh of one dimension, got 2."
    )
