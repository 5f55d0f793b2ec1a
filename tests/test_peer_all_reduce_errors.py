# SPDX-License-Identifier: Apache-2.0
"""What PeerWorkspace refuses, and what the others learn when a rank is late, is gone, or means another call."""

import contextlib
import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes, as_threads, raised
from peer_node import FINEST, HEADER_BYTES

from fmkernels import PeerWorkspace, _peer_memory
from fmkernels._library import ops

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def on_ranks(world_size, body, **options):
    """What body(workspace) gives on every rank."""

    def run(rank, group):
        with PeerWorkspace(group, **options) as workspace:
            return body(workspace)

    return as_threads(world_size, run)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused():
    sentence = "device must be one that there is, got cuda where torch has no CUDA device."
    assert raised(PeerWorkspace, device="cuda") == f"ValueError: PeerWorkspace: {sentence}"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "meta"}, "ValueError: PeerWorkspace: device must be on cpu or cuda, got meta."),
        (
            {"max_bytes": 1000},
            "ValueError: PeerWorkspace: max_bytes must be an integer of at least 32768 for 1 ranks and 1 lanes, "
            "got 1000.",
        ),
        ({"lanes": 2}, "ValueError: PeerWorkspace: lanes must be 1 on the CPU, got 2."),
        (
            {"timeout": 0},
            "ValueError: PeerWorkspace: timeout must be a number of seconds from 0.001 to 1000000, got 0.",
        ),
        ({"group": 3}, "TypeError: PeerWorkspace: group must be a process group, got int."),
    ],
)
def test_a_workspace_is_refused(options, sentence):
    def body(rank, group):
        return raised(PeerWorkspace, **({"group": group} | options))

    assert as_threads(1, body) == [sentence]


def test_an_argument_that_one_rank_has_wrong_is_its_sentence_on_every_rank():
    def body(rank, group):
        return raised(PeerWorkspace, group, max_bytes=1000 if rank == 1 else None)

    least = "at least 49152 for 2 ranks and 1 lanes"
    assert as_threads(2, body) == [f"ValueError: PeerWorkspace: max_bytes must be an integer of {least}, got 1000."] * 2


def test_calls_are_refused():
    x, rows, weight = torch.ones(6), torch.ones(2, 96), torch.ones(96)

    def body(workspace):
        calls = [
            lambda: workspace.all_reduce([1.0]),
            lambda: workspace.all_reduce(x.double()),
            lambda: workspace.all_reduce(torch.ones(4, 4).t()),
            lambda: workspace.all_reduce(x, op="max"),
            lambda: workspace.all_reduce(x, bits=1),
            lambda: workspace.all_reduce(x, bits=8.0),
            lambda: workspace.all_reduce(x, bits=8, block=100),
            lambda: workspace.all_reduce(x, algorithm="ring"),
            lambda: workspace.all_reduce(x, out=torch.ones(7)),
            lambda: workspace.all_reduce(x, out=x.half()),
            lambda: workspace.all_reduce(x.clone().requires_grad_()),
            lambda: workspace.all_reduce(torch.ones(3, device="meta")),
            lambda: workspace.all_reduce_rms_norm(rows, torch.ones(3, 96), weight),
            lambda: workspace.all_reduce_rms_norm(rows, rows, torch.ones(95)),
            lambda: workspace.all_reduce_rms_norm(rows, rows, weight.half()),
            lambda: workspace.all_reduce_rms_norm(rows, rows, weight, bits=8, block=64),
            lambda: workspace.all_reduce_rms_norm(rows, rows, weight, eps=-1.0),
            lambda: workspace.all_reduce_rms_norm(rows, rows, weight, eps=1e39),
            lambda: workspace.all_reduce_rms_norm(torch.ones(()), torch.ones(()), weight),
        ]
        sentences = [raised(call) for call in calls]
        assert torch.equal(workspace.all_reduce(x), x)  # none of them has begun
        workspace.close()
        return [*sentences, raised(workspace.all_reduce, x)]

    assert on_ranks(1, body, max_bytes=1 << 16)[0] == [
        "TypeError: all_reduce: x must be a tensor, got list.",
        "ValueError: all_reduce: x must be float32 or bfloat16 or float16, got float64.",
        "ValueError: all_reduce: x must be contiguous, its strides are (1, 4).",
        "ValueError: all_reduce: op must be 'sum' or 'avg', got 'max'.",
        "ValueError: all_reduce: bits must be 8, 6, 4 or None, got 1.",
        "ValueError: all_reduce: bits must be 8, 6, 4 or None, got 8.0.",
        "ValueError: all_reduce: block must be a power of two from 32 to 2048, got 100.",
        "ValueError: all_reduce: algorithm must be 'two_shot' or 'one_shot', got 'ring'.",
        "ValueError: all_reduce: out must have the shape of x, [6], got [7].",
        "ValueError: all_reduce: out must have the dtype of x, float32, got float16.",
        "ValueError: all_reduce: the tensors must not require gradients, which it has none of; call it in no_grad().",
        "ValueError: all_reduce: x must be on the device of the workspace, cpu, got meta.",
        "ValueError: all_reduce_rms_norm: residual must have the shape of x, [2, 96], got [3, 96].",
        "ValueError: all_reduce_rms_norm: weight must have the last dimension of x, 96, got 95.",
        "ValueError: all_reduce_rms_norm: weight must be float32 for this x, got float16.",
        "ValueError: all_reduce_rms_norm: the last dimension of x must be a multiple of block, 64, got 96.",
        "ValueError: all_reduce_rms_norm: eps must not be negative, got -1.0.",
        "ValueError: all_reduce_rms_norm: eps must be finite in float32, got 1e+39.",
        "ValueError: all_reduce_rms_norm: x must have a last dimension of at least 1, got shape [].",
        "RuntimeError: all_reduce: the workspace is closed.",
    ]


def op_args(**changes):
    args = {
        "x": [torch.ones(100) for _ in range(2)],
        "workspaces": [torch.zeros(HEADER_BYTES + 4 * FINEST, dtype=torch.uint8) for _ in range(2)],
        "out": [torch.ones(100) for _ in range(2)],
        "rank": 0,
        "one_shot": False,
        "bits": 0,
        "block": 128,
        "average": False,
        "lanes": 1,
        "timeout_ms": 1000,
    }
    return {**args, **changes}.values()


BUFFER = torch.zeros(HEADER_BYTES + 4 * FINEST + 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x": []}, "the number of x must be from 1 to 2, got 0"),
        ({"workspaces": []}, "the number of workspaces must be from 1 to 16, got 0"),
        ({"rank": 1}, "rank must be from 0 to 0, got 1"),
        ({"rank": -1}, "rank must be from 0 to 0, got -1"),
        ({"lanes": 2}, "lanes must be 1 on the CPU, got 2"),
        ({"timeout_ms": 0}, "timeout_ms must be from 1 to 2147483647, got 0"),
        ({"bits": 5}, "bits must be 8, 6, 4 or 0 for the elements as they are, got 5"),
        ({"bits": 8, "block": 48}, "block must be a power of two from 32 to 2048, got 48"),
        ({"out": [torch.ones(100)]}, "out must have as many tensors as x, 2, got 1"),
        ({"out": [torch.ones(100), torch.ones(99)]}, "out must have size 100 in dimension 0, got 99"),
        ({"x": [torch.ones(100), torch.ones(200)[::2]]}, "x must be contiguous"),
        ({"x": [torch.ones(100).int()] * 2}, "x must be float32, float16 or bfloat16"),
        ({"out": [torch.ones(100)] * 2}, "out must be another tensor for every rank"),
        ({"workspaces": [torch.zeros(HEADER_BYTES + 4 * FINEST)] * 2}, "workspaces must be uint8"),
        ({"workspaces": [BUFFER[1:], BUFFER[:-1]]}, "workspaces must begin on boundaries of 64 bytes"),
        ({"workspaces": [BUFFER[:-1]] * 2}, "workspaces must be another tensor for every rank"),
        (
            {"workspaces": [torch.zeros(HEADER_BYTES + 4 * FINEST - 1, dtype=torch.uint8) for _ in range(2)]},
            "workspaces of 49151 bytes have 16128 for a lane at a time, and this call needs 16384",
        ),
        ({"workspaces": [BUFFER[:100], torch.zeros(100, dtype=torch.uint8)]}, "workspaces of 100 bytes have 0"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_the_op_refuses_what_would_leave_memory(changes, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        ops.peer_all_reduce(*op_args(**changes))


# ---- ranks that disagree ---------------------------------------------------------------------------------------------


def test_calls_that_differ_are_one_sentence_on_every_rank():
    x, rows, weight = torch.ones(4096), torch.ones(64, 64), torch.ones(64)

    def body(workspace):
        is_last = workspace.rank == 2
        norm = {"x": rows, "residual": rows, "weight": weight}
        pairs = [
            (lambda: workspace.all_reduce(x), lambda: workspace.all_reduce(x[:-1])),
            (lambda: workspace.all_reduce(x[:0]), lambda: workspace.all_reduce(x)),
            (lambda: workspace.all_reduce(x), lambda: workspace.all_reduce(x.half())),
            (lambda: workspace.all_reduce(x), lambda: workspace.all_reduce(x, bits=8)),
            (lambda: workspace.all_reduce(x, bits=8), lambda: workspace.all_reduce(x, bits=8, block=64)),
            (lambda: workspace.all_reduce(x), lambda: workspace.all_reduce(x, algorithm="one_shot")),
            (lambda: workspace.all_reduce(x), lambda: workspace.all_reduce(x, op="avg")),
            (lambda: workspace.all_reduce(rows), lambda: workspace.all_reduce_rms_norm(**norm)),
            (
                lambda: workspace.all_reduce_rms_norm(**norm),
                lambda: workspace.all_reduce_rms_norm(rows.view(-1, 32), rows.view(-1, 32), weight[:32]),
            ),
            (
                lambda: workspace.all_reduce_rms_norm(**norm),
                lambda: workspace.all_reduce_rms_norm(**norm, eps=1e-5),
            ),
        ]
        sentences = []
        for i, pair in enumerate(pairs):
            sentences.append(raised(pair[is_last]))
            result = workspace.all_reduce(torch.full((300,), float(i + workspace.rank)))  # it is as good as before
            assert torch.equal(result, torch.full((300,), 3.0 * i + 3))
        return sentences

    first, *others = on_ranks(3, body)
    assert others == [first, first]
    same = "must be the same on every rank, rank 0 has"
    assert first == [
        f"ValueError: all_reduce: numel {same} 4096 and rank 2 4095.",
        f"ValueError: all_reduce: numel {same} 0 and rank 2 4096.",
        f"ValueError: all_reduce: dtype {same} float32 and rank 2 float16.",
        f"ValueError: all_reduce: bits {same} None and rank 2 8.",
        f"ValueError: all_reduce: block {same} 128 and rank 2 64.",
        f"ValueError: all_reduce: algorithm {same} two_shot and rank 2 one_shot.",
        f"ValueError: all_reduce: op {same} sum and rank 2 avg.",
        f"ValueError: PeerWorkspace: the operation {same} all_reduce and rank 2 all_reduce_rms_norm.",
        f"ValueError: all_reduce_rms_norm: hidden {same} 64 and rank 2 32.",
        "ValueError: all_reduce_rms_norm: eps or the dtype of weight must be the same on every rank, those of rank 0 "
        "and rank 2 differ.",
    ]


def test_workspaces_that_differ_are_one_sentence_on_every_rank():
    def sizes(rank, group):
        return raised(PeerWorkspace, group, max_bytes=(1 << 20) + rank)

    same = "must be the same on every rank, rank 0 has"
    assert as_threads(2, sizes) == [f"ValueError: PeerWorkspace: max_bytes {same} 1048576 and rank 1 1048577."] * 2

    def timeouts(rank, group):
        return raised(PeerWorkspace, group, timeout=1.0 + rank)

    assert as_threads(2, timeouts) == [f"ValueError: PeerWorkspace: timeout {same} 1.0 and rank 1 2.0."] * 2


def test_ranks_on_several_nodes_are_one_sentence_on_every_rank(monkeypatch):
    nodes = {}
    monkeypatch.setattr(_peer_memory, "host", lambda: f"node{nodes[threading.get_ident()]}")

    def body(rank, group):
        nodes[threading.get_ident()] = rank // 2
        return raised(PeerWorkspace, group)

    sentence = "the ranks of group must be on one node, rank 0 is on node0 and rank 2 on node1."
    assert as_threads(3, body) == [f"ValueError: PeerWorkspace: {sentence}"] * 3


@pytest.mark.parametrize("function", ["ftruncate", "posix_fallocate", "_map"])
def test_memory_that_one_rank_cannot_have_is_one_sentence_on_every_rank(monkeypatch, tmp_path, function):
    failing, text = [], "kein Glück \N{FOUR LEAF CLOVER} " * 100  # of which they tell each other a part

    def fail_on_one(function):
        def wrapped(*args):
            if threading.get_ident() in failing:
                raise OSError(text)
            return function(*args)

        return wrapped

    module = _peer_memory if function == "_map" else os
    monkeypatch.setattr(module, function, fail_on_one(getattr(module, function)))
    if function == "posix_fallocate":  # of files that have a name
        monkeypatch.delattr(os, "memfd_create")
        monkeypatch.setattr(_peer_memory.tempfile, "tempdir", str(tmp_path))

    def body(rank, group):
        if rank == 1:
            failing.append(threading.get_ident())
        return raised(PeerWorkspace, group)

    what = "open the memory of the others: OSError: " if function == "_map" else "make its memory: "
    prefix = f"RuntimeError: PeerWorkspace: rank 1 could not {what}kein Glück"
    first, *others = as_threads(3, body)
    assert others == [first, first]
    assert first.startswith(prefix)
    assert list(tmp_path.iterdir()) == []


def test_files_with_names_are_memory_as_well(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(_peer_memory.tempfile, "tempdir", str(tmp_path))

    def body(workspace):
        return workspace.all_reduce(torch.ones(100))

    for result in on_ranks(2, body):
        assert torch.equal(result, torch.full((100,), 2.0))
    assert list(tmp_path.iterdir()) == []


def test_symmetric_memory_that_one_rank_cannot_have_is_one_sentence_on_every_rank(monkeypatch):
    symmetric = pytest.importorskip("torch.distributed._symmetric_memory")
    failing = []

    def empty(*shape, **options):
        if threading.get_ident() in failing:
            raise torch.OutOfMemoryError("kein Glück")
        return torch.empty(*shape, **options)

    monkeypatch.setattr(symmetric, "empty", empty)
    monkeypatch.setattr(symmetric, "rendezvous", lambda *_: pytest.fail("without the others"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())

    def body(rank, group):
        if rank == 1:
            failing.append(threading.get_ident())
        return raised(_peer_memory._symmetric_memory, group, torch.device("cpu"), 100)

    assert as_threads(3, body) == ["RuntimeError: PeerWorkspace: rank 1 could not make its memory: kein Glück"] * 3


# ---- ranks that are late or gone -------------------------------------------------------------------------------------


def test_a_late_rank_is_waited_for():
    def body(workspace):
        if workspace.rank == 1:
            time.sleep(0.3)
        return workspace.all_reduce(torch.ones(100))

    for result in on_ranks(3, body, timeout=30):
        assert torch.equal(result, torch.full((100,), 3.0))


LATE = (
    "RuntimeError: all_reduce: rank {} is gone or late: rank {} waited for it for {} ms, and the workspace is of no "
    "use any more."
)
AFTER = "RuntimeError: all_reduce: the workspace is of no use any more, rank {} has waited in vain for rank {}."


def test_a_rank_that_is_too_late_makes_the_workspace_useless_on_every_rank():
    done = threading.Event()

    def body(workspace):
        if workspace.rank == 0:  # whom the others wait for first, whoever of them begins
            assert done.wait(60)
            return 0.0, [raised(workspace.all_reduce, torch.ones(100))] * 2
        before = time.monotonic()
        sentences = [raised(workspace.all_reduce, torch.ones(100))]
        took = time.monotonic() - before
        done.set()
        return took, [*sentences, raised(workspace.all_reduce, torch.ones(100))]

    times, (first, second, third) = zip(*on_ranks(3, body, timeout=0.3), strict=True)
    assert 0.25 < max(times) < 20
    assert LATE.format(0, 1, 300) == second[0] or LATE.format(0, 2, 300) == third[0]
    for sentences in (first, second, third):  # who of the two was first makes no difference to those who come after
        assert sentences[1] in (AFTER.format(1, 0), AFTER.format(2, 0))
    assert first[1] == second[1] == third[1]


def test_all_others_together_are_waited_for_no_longer_than_the_timeout():
    begun, done = threading.Event(), threading.Event()

    def body(workspace):
        if workspace.rank == 2:
            assert done.wait(60)
            return ""
        if workspace.rank == 1:
            assert begun.wait(60)
            time.sleep(1.0)
        begun.set()
        sentence = raised(workspace.all_reduce, torch.ones(100))
        done.set()
        return sentence

    first, second, _ = on_ranks(3, body, timeout=2.0)
    late = 2 if "rank 2" in first else 1  # which a busy machine may make of it
    assert first == LATE.format(late, 0, 2000)  # 2 s after it began; the other one began 1 s later
    assert second == AFTER.format(0, late)


def _die(rank):
    workspace = PeerWorkspace(timeout=3.0)
    if rank == 1:
        for _ in range(3):
            workspace.all_reduce(torch.ones(100_000))
        os._exit(0)
    before = time.monotonic()
    for _ in range(3):
        workspace.all_reduce(torch.ones(100_000))
    sentence = raised(workspace.all_reduce, torch.ones(100_000))
    assert "rank 1 is gone or late" in sentence or "in vain for rank 1" in sentence, sentence
    assert time.monotonic() - before < 30
    assert "in vain for rank 1" in raised(workspace.all_reduce_rms_norm, *[torch.ones(4, 64)] * 2, torch.ones(64))
    return False


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_that_dies_is_named_and_nothing_hangs(world_size, tmp_path):
    as_processes(world_size, _die, tmp_path)
