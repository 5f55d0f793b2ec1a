# SPDX-License-Identifier: Apache-2.0
"""fmkernels.quantized_collectives: bad arguments, ranks that disagree, are late or gone, and calls not waited for."""

import datetime
import gc
import threading
import time

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_threads, raised

from fmkernels import quantized_collectives as collectives
from fmkernels.reference import quantized_collectives as reference

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

# ---- arguments -------------------------------------------------------------------------------------------------------

BAD = {
    "ValueError: all_reduce: op must be one of sum, avg, got max.": {"op": "max"},
    "ValueError: all_reduce: bits must be one of 8, 6, 4, 1, float8_e4m3fn, got 5.": {"bits": 5},
    "ValueError: all_reduce: bits must be one of 8, 6, 4, 1, float8_e4m3fn, got True.": {"bits": True},
    "ValueError: all_reduce: inter_bits must be one of 8, 6, 4, 1, float8_e4m3fn, got 0.": {"inter_bits": 0},
    "ValueError: all_reduce: block must be a power of two from 32 to 2048, got 100.": {"block": 100},
    "ValueError: all_reduce: algorithm must be one of two_shot, one_shot, hierarchical, got ring.": {
        "algorithm": "ring"
    },
    "ValueError: all_reduce: chunk_numel must be at least 1, got 0.": {"chunk_numel": 0},
    "ValueError: all_reduce: bits must be one of 8, 6, 4, 1, float8_e4m3fn, got 8.0.": {"bits": 8.0},
    "ValueError: all_reduce: chunk_numel must be below 2**63, got 9223372036854775808.": {"chunk_numel": 2**63},
    "TypeError: all_reduce: chunk_numel must be an integer, got bool.": {"chunk_numel": True},
    "TypeError: all_reduce: block must be an integer, got str.": {"block": "128"},
    "TypeError: all_reduce: hadamard must be True or False, got str.": {"hadamard": "yes"},
    "TypeError: all_reduce: hadamard must be True or False, got int.": {"hadamard": 2},
    "TypeError: all_reduce: async_op must be True or False, got int.": {"async_op": 1},
    "TypeError: all_reduce: node_size must be an integer, got str.": {"algorithm": "hierarchical", "node_size": "1"},
    "TypeError: all_reduce: node_size must be an integer, got bool.": {"algorithm": "hierarchical", "node_size": True},
    "ValueError: all_reduce: node_size must be at least 1, got 0.": {"algorithm": "hierarchical", "node_size": 0},
    "ValueError: all_reduce: rounding must be one of nearest, stochastic, got up.": {"rounding": "up"},
    "ValueError: all_reduce: rounding must be one of nearest, stochastic, got None.": {"rounding": None},
    "ValueError: all_reduce: seed must be given where rounding is 'stochastic', got None.": {"rounding": "stochastic"},
    "TypeError: all_reduce: seed must be an integer, got float.": {"rounding": "stochastic", "seed": 1.0},
    "ValueError: all_reduce: seed must be at least 0, got -1.": {"seed": -1},
    "ValueError: all_reduce: step must be below 2**40, got 1099511627776.": {"step": 2**40},
    "ValueError: all_reduce: offset must be at most 2**62, got 4611686018427387968.": {"offset": 2**62 + 64},
    "ValueError: all_reduce: offset must be a multiple of 64 for this block, got 32.": {
        "rounding": "stochastic",
        "seed": 0,
        "block": 32,
        "offset": 32,
    },
    "ValueError: all_reduce: rounding must be 'nearest' for 1 bit and for 'float8_e4m3fn', got 'stochastic'.": {
        "rounding": "stochastic",
        "seed": 0,
        "algorithm": "hierarchical",
        "node_size": 1,
        "inter_bits": 1,
    },
    "ValueError: all_reduce: node_size must be given for the hierarchical algorithm and for no other, got None for "
    "hierarchical.": {"algorithm": "hierarchical"},
    "ValueError: all_reduce: node_size must be given for the hierarchical algorithm and for no other, got 2 for "
    "two_shot.": {"node_size": 2},
    "ValueError: all_reduce: node_size must divide the 1 ranks of the group, got 2.": {
        "algorithm": "hierarchical",
        "node_size": 2,
    },
    "TypeError: all_reduce: tensor must be a tensor, got list.": {"tensor": [1.0]},
    "ValueError: all_reduce: tensor must be float32, bfloat16 or float16, it is torch.float64.": {
        "tensor": torch.zeros(4, dtype=torch.float64)
    },
    "ValueError: all_reduce: tensor must be contiguous, its strides are (1, 2).": {"tensor": torch.zeros(3, 2).t()},
    "ValueError: all_reduce: tensor must be on cpu or cuda, it is on meta.": {"tensor": torch.zeros(4, device="meta")},
    "ValueError: all_reduce: error_feedback must be float32 with the 4 elements of tensor on cpu, it is torch.float32 "
    "with 5 on cpu.": {"error_feedback": torch.zeros(5)},
    "TypeError: all_reduce: group must be a process group, got str.": {"group": "world"},
}


@pytest.mark.parametrize("sentence", BAD)
def test_a_bad_argument_is_one_sentence(sentence):
    def body(rank, group):
        arguments = {"tensor": torch.zeros(4), "group": group} | BAD[sentence]
        return raised(collectives.all_reduce, arguments.pop("tensor"), **arguments)

    assert as_threads(1, body) == [sentence]


def test_bad_shapes_of_the_others_are_one_sentence():
    def body(rank, group):
        x = torch.zeros(5)
        y = torch.zeros(6)
        return [
            raised(collectives.reduce_scatter, torch.zeros(2), x, group=group),
            raised(collectives.reduce_scatter, torch.zeros(2), y, group=group),
            raised(collectives.reduce_scatter, torch.zeros(2), y, group=group, input_splits=[2, 5]),
            raised(collectives.reduce_scatter, torch.zeros(3).half(), y, group=group),
            raised(collectives.all_gather, y, torch.zeros(2), group=group),
            raised(collectives.all_to_all, y, y, group=group, input_splits=[6]),
            raised(collectives.all_to_all, y, y.clone(), group=group, output_splits=3),
            raised(collectives.all_to_all, y, y.clone(), group=group, output_splits=[True, 5]),
            raised(collectives.all_to_all, y, y.clone(), group=group, async_op=None),
            raised(collectives.all_gather, y, y[1:4], group=group, async_op="no"),
            raised(collectives.reduce_scatter, y[:3], y, group=group, async_op=0),
            raised(collectives.all_reduce, x, algorithm="direct", group=group),
            raised(collectives.all_reduce, x, error_feedback=x, group=group),
            raised(collectives.all_to_all, y, y, group=group),
            raised(collectives.all_gather, y, y[1:4], group=group),
            raised(collectives.reduce_scatter, y[1:4], y, group=group),
        ]

    texts = as_threads(2, body)[0]
    assert texts == [
        "ValueError: reduce_scatter: the elements of input must be a multiple of the 2 ranks where input_splits is not "
        "given, there are 5.",
        "ValueError: reduce_scatter: output must have this rank's 3 elements, it has 2.",
        "ValueError: reduce_scatter: input_splits must be 2 counts, one for each rank, with the sum of 6, the elements "
        "of input, got [2, 5].",
        "ValueError: reduce_scatter: output must have the dtype and device of input, torch.float32 on cpu, it is "
        "torch.float16 on cpu.",
        "ValueError: all_gather: input must have this rank's 3 elements, it has 2.",
        "ValueError: all_to_all: input_splits must be 2 counts, one for each rank, with the sum of 6, the elements of "
        "input, got [6].",
        "TypeError: all_to_all: output_splits must be a list of counts, got int.",
        "ValueError: all_to_all: output_splits must be 2 counts, one for each rank, with the sum of 6, the elements of "
        "output, got [True, 5].",
        "TypeError: all_to_all: async_op must be True or False, got NoneType.",
        "TypeError: all_gather: async_op must be True or False, got str.",
        "TypeError: reduce_scatter: async_op must be True or False, got int.",
        "ValueError: all_reduce: algorithm must be one of two_shot, one_shot, hierarchical, got direct.",
        "ValueError: all_reduce: error_feedback must share no memory with tensor.",
        "ValueError: all_to_all: output must share no memory with input.",
        "ValueError: all_gather: input must be this rank's part of output or share no memory with output.",
        "ValueError: reduce_scatter: output must be this rank's part of input or share no memory with input.",
    ]


def test_there_must_be_a_group():
    assert raised(collectives.all_reduce, torch.zeros(4)) == (
        "ValueError: all_reduce: group is None and there is no default group; call init_process_group first."
    )
    text = raised(collectives.all_reduce, torch.zeros(4), group=dist.GroupMember.NON_GROUP_MEMBER)
    assert text == "ValueError: all_reduce: group must have this process among its ranks, it has not."


# ---- ranks that disagree ---------------------------------------------------------------------------------------------


def test_ranks_that_disagree_all_raise_the_same_sentence_and_go_on():
    def body(rank, group):
        last = rank == 2
        zeros, ones = torch.zeros(600), torch.ones(600)
        texts = [
            raised(collectives.all_reduce, torch.zeros(601 if last else 600), group=group),
            raised(collectives.all_reduce, zeros.half() if last else zeros, group=group),
            raised(collectives.all_reduce, zeros, bits=4 if last else 8, group=group),
            raised(collectives.all_reduce, zeros, op="avg" if last else "sum", group=group),
            raised(collectives.all_reduce, zeros, algorithm="one_shot" if last else "two_shot", group=group),
            raised(collectives.all_reduce, zeros, error_feedback=torch.zeros(600) if last else None, group=group),
            raised(collectives.all_reduce, zeros, bits="float8_e4m3fn" if last else 8, group=group),
            raised(collectives.all_reduce, zeros, rounding="stochastic" if last else "nearest", seed=1, group=group),
            raised(collectives.all_reduce, zeros, rounding="stochastic", seed=2**63 - 1 - last, group=group),
            raised(collectives.all_reduce, zeros, rounding="stochastic", seed=0, step=int(last), group=group),
            raised(collectives.all_reduce, zeros, rounding="stochastic", seed=0, offset=128 * last, group=group),
            raised(collectives.all_reduce, zeros.clone(), seed=rank, group=group),
            raised(collectives.reduce_scatter, torch.zeros(200), zeros, group=group)
            if last
            else raised(collectives.all_gather, zeros, torch.zeros(200), group=group),
            raised(
                collectives.all_to_all,
                torch.zeros(200 * 3 + last),
                zeros,
                output_splits=[200, 200, 200 + last],
                group=group,
            ),
        ]
        residual = torch.full((600,), 3.0)
        raised(collectives.all_reduce, zeros, error_feedback=residual, bits=4 if last else 8, group=group)
        assert (residual == 3).all(), "nothing has happened"
        work = collectives.all_reduce(zeros.clone(), bits=4 if last else 8, group=group, async_op=True)
        texts += [raised(work.wait), raised(work.get_future().wait).split("callback: ")[1].split("\n")[0]]
        assert not work.is_success()
        assert isinstance(work.exception(), ValueError)
        collectives.all_reduce(ones, group=group)
        assert (ones == 3).all()
        return texts

    first, *others = as_threads(3, body)
    same = "must be the same on every rank, rank 0 has"
    assert first == [
        f"ValueError: all_reduce: numel {same} 600 and rank 2 601.",
        f"ValueError: all_reduce: dtype {same} torch.float32 and rank 2 torch.float16.",
        f"ValueError: all_reduce: bits {same} 8 and rank 2 4.",
        f"ValueError: all_reduce: op {same} sum and rank 2 avg.",
        f"ValueError: all_reduce: algorithm {same} two_shot and rank 2 one_shot.",
        f"ValueError: all_reduce: error_feedback {same} False and rank 2 True.",
        f"ValueError: all_reduce: bits {same} 8 and rank 2 float8_e4m3fn.",
        f"ValueError: all_reduce: rounding {same} nearest and rank 2 stochastic.",
        f"ValueError: all_reduce: seed {same} 9223372036854775807 and rank 2 9223372036854775806.",
        f"ValueError: all_reduce: step {same} 0 and rank 2 1.",
        f"ValueError: all_reduce: offset {same} 0 and rank 2 128.",
        "nothing",  # where nothing is drawn seeds do not matter
        f"ValueError: all_gather: function {same} all_gather and rank 2 reduce_scatter.",
        "ValueError: all_to_all: splits must agree between ranks, rank 2 sends 200 elements to rank 2, which expects "
        "201.",
        f"ValueError: all_reduce: bits {same} 8 and rank 2 4.",
        f"ValueError: all_reduce: bits {same} 8 and rank 2 4.",
    ]
    for other in others:
        assert [text.replace("reduce_scatter: f", "all_gather: f") for text in other] == first


# ---- ranks that are late or gone -------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_op", [False, True])
def test_a_rank_that_is_gone_raises_on_the_others_within_the_timeout(async_op):
    def body(rank, group):
        if rank == 1:
            time.sleep(3)  # and keeps its connections open
            return None
        begin = time.monotonic()
        if async_op:
            work = collectives.all_reduce(torch.zeros(1000), group=group, async_op=True)
            text = raised(work.wait)
        else:
            text = raised(collectives.all_reduce, torch.zeros(1000), group=group)
        return text, time.monotonic() - begin

    results = as_threads(3, body, seconds=1)
    for text, seconds in (results[0], results[2]):
        assert text.startswith("RuntimeError: all_reduce: rank ")
        assert " of the group is gone or late: " in text
        assert seconds < 3
    assert "rank 1 of" in results[0][0] + results[2][0]


def test_a_rank_that_is_late_is_waited_for():
    def body(rank, group):
        x = torch.full((300,), float(rank))
        if rank == 0:
            time.sleep(0.5)
        collectives.all_reduce(x, group=group)
        return x

    for x in as_threads(3, body):
        assert (x == 3).all()


# ---- calls that are not waited for -----------------------------------------------------------------------------------


def test_asynchronous_calls_overlap_and_are_waited_for_in_any_order():
    world_size, numels = 3, (5000, 0, 129, 20000, 1)

    def inputs(rank):
        generator = torch.Generator().manual_seed(rank)
        return [torch.randn(n, generator=generator) for n in numels]

    def body(rank, group):
        tensors = inputs(rank)
        works = [collectives.all_reduce(x, group=group, async_op=True, chunk_numel=1000) for x in tensors]
        gathered = torch.empty(world_size * 10)
        collectives.all_gather(gathered, torch.full((10,), float(rank)), group=group)  # of the same group, meanwhile
        others = torch.full((4,), float(rank))
        group.allreduce([others]).wait()  # torch's own, too
        assert (others == 3).all()
        order = range(len(works)) if rank else reversed(range(len(works)))
        for i in order:
            assert works[i].wait(datetime.timedelta(seconds=20))
            assert works[i].is_completed()
            assert works[i].is_success()
            assert works[i].result()[0] is tensors[i]
            assert works[i].get_future().wait() is tensors[i]
        assert torch.equal(gathered.view(3, 10)[:, 0], torch.arange(3.0))
        return tensors

    results = as_threads(world_size, body)
    for i in range(len(numels)):
        expected = reference.all_reduce([inputs(rank)[i] for rank in range(world_size)])
        for rank in range(world_size):
            assert torch.equal(results[rank][i], expected), (i, rank)


@pytest.mark.parametrize("options", [{}, {"algorithm": "hierarchical", "node_size": 2}], ids=str)
def test_a_rank_may_wait_for_a_call_before_it_begins_the_next(options):
    """The others have begun both by then; what they still have to send for the first must not wait for the second."""

    def body(rank, group):
        def begin(x):
            return collectives.all_reduce(x, group=group, async_op=True, **options)

        x, y = torch.full((300,), float(rank)), torch.full((5,), 1.0)
        if rank == 0:
            time.sleep(0.2)
            begin(x).wait()
            begin(y).wait()
        else:
            for work in [begin(x), begin(y)]:
                work.wait()
        return x, y

    for x, y in as_threads(4, body, seconds=5):
        assert (x == 6).all()
        assert (y == 4).all()


def test_the_thread_of_a_group_ends_with_it():
    def body(rank, group):
        x = torch.ones(10)
        collectives.all_reduce(x, group=group, async_op=True).wait()
        return x

    def finishers():
        gc.collect()
        return [thread for thread in threading.enumerate() if thread.name == "fmkernels collectives"]

    as_threads(2, body)
    end = time.monotonic() + 20
    while finishers() and time.monotonic() < end:
        time.sleep(0.01)
    assert finishers() == []


def test_a_wait_ends_at_its_own_timeout():
    def body(rank, group):
        if rank == 1:
            time.sleep(0.5)
        x = torch.ones(10)
        work = collectives.all_reduce(x, group=group, async_op=True)
        text = raised(work.wait, datetime.timedelta(milliseconds=50)) if rank == 0 else None
        work.wait()
        assert (x == 2).all()
        return text

    text = as_threads(2, body)[0]
    assert text == "RuntimeError: wait: the call must be done within 0:00:00.050000, it is not."
