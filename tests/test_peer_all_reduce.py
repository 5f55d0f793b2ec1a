# SPDX-License-Identifier: Apache-2.0
"""All-reduce through shared memory on the CPU: ranks that are threads of one call, or processes of a PeerWorkspace."""

import gc
import math
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_processes, as_threads
from peer_node import FINEST, HEADER_BYTES, Node
from torch.library import opcheck

from fmkernels import PeerWorkspace, quantized_collectives, reference, rms_norm
from fmkernels.testing import assert_as_good_as_torch, backends

CPU = next(backend for backend in backends("peer_all_reduce") if backend.name == "cpu")
EACH_ALGORITHM = pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
NEEDS_GLOO = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = [None, 8, 6, 4]
SIZES = (0, 1, 127, 128, 129, 4097)


def node(world_size, **options):
    return Node(CPU, world_size, lanes=1, **options)


def inputs(world_size, *shape, dtype=torch.float32, seed=0):
    """Of every rank; heavier tails than normal, so that blocks have scales of their own."""
    generator = torch.Generator().manual_seed(1000 * world_size + math.prod(shape) + seed)
    return [torch.randn(shape, generator=generator).pow(3).to(dtype) for _ in range(world_size)]


def assert_same_bits(actual, expected, at=None):
    assert actual.dtype == expected.dtype, at
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)), at


def check(ranks, xs, **options):
    """All ranks have the bits of the definition."""
    expected = reference.peer_all_reduce.all_reduce(xs, **options)
    for rank, out in enumerate(ranks.all_reduce(xs, **options)):
        assert_same_bits(out, expected, (rank, ranks.world_size, options))


# ---- values ----------------------------------------------------------------------------------------------------------


@EACH_ALGORITHM
@pytest.mark.parametrize("world_size", range(1, 9))
def test_every_rank_has_the_bits_of_the_definition(world_size, algorithm):
    ranks = node(world_size)
    for i, numel in enumerate(SIZES):
        for j, bits in enumerate(BITS):
            if (i + j + world_size) % 2:  # the other half with another number of ranks
                continue
            xs = inputs(world_size, numel, dtype=DTYPES[(i + j // 2 + world_size) % 3])
            check(ranks, xs, bits=bits, algorithm=algorithm, op=("sum", "avg")[(i + j) % 2])


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("block", [32, 64, 256, 512, 1024, 2048])
def test_every_block_has_its_scale(block, bits):
    ranks = node(3)
    for algorithm in ("one_shot", "two_shot"):
        check(ranks, inputs(3, 5000, dtype=torch.bfloat16), bits=bits, block=block, algorithm=algorithm)


@EACH_ALGORITHM
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_codes_it_is_as_good_as_torch(dtype, algorithm):
    xs = inputs(5, 3000, dtype=dtype)
    for op in ("sum", "avg"):
        result = node(5).all_reduce(xs, op=op, algorithm=algorithm)[2]
        assert_as_good_as_torch(result, lambda *xs, op=op: reference.peer_all_reduce.all_reduce(xs, op=op), *xs)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_error_is_at_most_the_sum_of_half_steps(bits):
    """Of a code the step is the extreme's magnitude over 2^(bits - 1), and at the end of the other side a whole one."""
    world_size, block = 4, 128
    xs = inputs(world_size, 40 * block)

    def steps(x):
        return (x.view(-1, block).abs().amax(1) / 2 ** (bits - 1)).repeat_interleave(block)

    exact = sum(x.double() for x in xs)
    bound = sum(steps(x.double()) for x in xs) * 1.001
    one_shot = node(world_size).all_reduce(xs, bits=bits, algorithm="one_shot")[0].double()
    assert ((one_shot - exact).abs() <= bound).all()
    two_shot = node(world_size).all_reduce(xs, bits=bits, algorithm="two_shot")[0].double()
    assert ((two_shot - exact).abs() <= bound + steps(exact.abs() + bound) * 1.001).all()
    assert (one_shot - exact).abs().max() > 0


@EACH_ALGORITHM
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_of_the_sum(dtype, algorithm):
    world_size, shape = 3, (7, 5, 192)
    xs, residuals = inputs(world_size, *shape, dtype=dtype), inputs(world_size, *shape, dtype=dtype, seed=1)
    for weight in (torch.randn(192), torch.randn(192).to(dtype)):
        for bits in (None, 8):
            options = {"algorithm": algorithm, "bits": bits, "block": 64}
            outs, sums = node(world_size).all_reduce_rms_norm(xs, residuals, weight, eps=1e-5, **options)
            for out, residual_out, residual in zip(outs, sums, residuals, strict=True):
                _, expected = reference.peer_all_reduce.all_reduce_rms_norm(xs, residual, weight, eps=1e-5, **options)
                assert_same_bits(residual_out, expected, options)
                assert_same_bits(out, rms_norm(residual_out, weight, 1e-5), options)
            assert_as_good_as_torch(out, reference.rms_norm, residual_out, weight, eps=1e-5)


@EACH_ALGORITHM
def test_the_norm_is_the_two_calls_in_float32(algorithm):
    xs, residual, weight = inputs(2, 33, 64), *inputs(1, 33, 64, seed=1), torch.randn(64)
    outs, sums = node(2).all_reduce_rms_norm(xs, [residual] * 2, weight, algorithm=algorithm)
    out, residual_out = rms_norm(node(2).all_reduce(xs)[0], weight, 1e-6, residual)
    assert_same_bits(sums[1], residual_out)
    assert_same_bits(outs[1], out)


def test_rows_of_any_length_and_number():
    for hidden, rows in ((1, 5), (7, 1), (96, 100), (100, 41), (2080, 7), (5000, 3), (64, 0)):
        ranks = node(2, slice_bytes=2 * 4 * 5120)
        for bits in (None, 4) if hidden % 32 == 0 else (None,):
            xs, residuals = inputs(2, rows, hidden), inputs(2, rows, hidden, seed=1)
            weight, options = torch.randn(hidden), {"bits": bits, "block": 32}
            outs, sums = ranks.all_reduce_rms_norm(xs, residuals, weight, **options)
            for out, residual_out, residual in zip(outs, sums, residuals, strict=True):
                _, expected = reference.peer_all_reduce.all_reduce_rms_norm(xs, residual, weight, **options)
                assert_same_bits(residual_out, expected, (hidden, rows))
                assert_same_bits(out, rms_norm(residual_out, weight, 1e-6), (hidden, rows))


@EACH_ALGORITHM
def test_rows_that_are_longer_than_a_slice(algorithm):
    ranks, hidden = node(3, slice_bytes=FINEST * 3), 3 * FINEST + 64  # in float32 four slices and more
    xs, residuals, weight = inputs(3, 2, hidden), inputs(3, 2, hidden, seed=1), torch.randn(hidden)
    for bits in (None, 8):
        options = {"algorithm": algorithm, "bits": bits, "block": 64}
        outs, sums = ranks.all_reduce_rms_norm(xs, residuals, weight, **options)
        for out, residual_out, residual in zip(outs, sums, residuals, strict=True):
            _, expected = reference.peer_all_reduce.all_reduce_rms_norm(xs, residual, weight, **options)
            assert_same_bits(residual_out, expected, options)
            assert_same_bits(out, rms_norm(residual_out, weight, 1e-6), options)


def test_no_ranks_but_one():
    x = inputs(1, 1000)[0]
    assert_same_bits(node(1).all_reduce([x])[0], x)
    check(node(1), [x], bits=8)


# ---- what the bits do not depend on ----------------------------------------------------------------------------------


@EACH_ALGORITHM
@pytest.mark.parametrize("bits", BITS)
def test_a_message_larger_than_the_workspace_goes_in_rounds(bits, algorithm):
    xs = inputs(3, 30001)
    expected = reference.peer_all_reduce.all_reduce(xs, bits=bits, algorithm=algorithm)
    for slice_bytes in (FINEST * 3, FINEST * 3 + 256, 1 << 20):
        for out in node(3, slice_bytes=slice_bytes).all_reduce(xs, bits=bits, algorithm=algorithm):
            assert_same_bits(out, expected, slice_bytes)


def test_a_block_does_not_depend_on_what_is_around_it():
    xs = inputs(3, 9000)
    for bits in BITS:
        whole = node(3).all_reduce(xs, bits=bits)[0]
        part = node(3).all_reduce([x[1280:6000] for x in xs], bits=bits)[1]
        assert_same_bits(part[:4608], whole[1280:5888], bits)


@NEEDS_GLOO
def test_bits_are_those_of_the_quantised_collectives():
    xs = inputs(4, 1000)
    for algorithm in ("one_shot", "two_shot"):

        def body(rank, group, algorithm=algorithm):
            x = xs[rank].clone()
            quantized_collectives.all_reduce(x, group=group, bits=4, algorithm=algorithm)
            return x

        assert_same_bits(node(4).all_reduce(xs, bits=4, algorithm=algorithm)[3], as_threads(4, body)[0])


def test_tensors_that_begin_anywhere_and_results_in_their_place():
    base = [torch.cat([x.new_zeros(1), x]) for x in inputs(2, 4500)]
    for bits in BITS:
        xs = [x.clone()[1:] for x in base]
        expected = reference.peer_all_reduce.all_reduce(xs, bits=bits)
        for out in node(2).all_reduce(xs, bits=bits, outs=xs):
            assert_same_bits(out, expected, bits)
    xs, residuals, weight = inputs(2, 50, 128), inputs(2, 50, 128, seed=1), torch.randn(128)
    expected = node(2).all_reduce_rms_norm(xs, residuals, weight, bits=8)
    actual = node(2).all_reduce_rms_norm(xs, residuals, weight, bits=8, outs=(xs, residuals))
    for a, b in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert_same_bits(a, b)


# ---- one workspace, many calls ---------------------------------------------------------------------------------------


def alternate(ranks, num_calls, seed):
    choose = random.Random(seed)
    for _ in range(num_calls):
        numel = choose.choice((0, 1, 63, 64, 65, 500, 2048, 2049, choose.randrange(20000)))
        xs = inputs(ranks.world_size, numel, dtype=choose.choice(DTYPES), seed=choose.randrange(1000))
        options = {"bits": choose.choice(BITS), "algorithm": choose.choice(("one_shot", "two_shot"))}
        if choose.random() < 0.2 and numel % 64 == 0:
            rows = [x.view(-1, 64) for x in xs]
            outs, sums = ranks.all_reduce_rms_norm(rows, rows, torch.ones(64), block=32, **options)
            for x, out, residual_out in zip(rows, outs, sums, strict=True):
                assert_same_bits(out, rms_norm(residual_out, torch.ones(64), 1e-6), options)
                _, expected = reference.peer_all_reduce.all_reduce_rms_norm(
                    rows, x, torch.ones(64), block=32, **options
                )
                assert_same_bits(residual_out, expected, options)
        else:
            check(ranks, xs, block=choose.choice((32, 128, 2048)), op=choose.choice(("sum", "avg")), **options)


@pytest.mark.parametrize("world_size", [2, 3])
def test_calls_of_any_kind_follow_each_other(world_size):
    alternate(node(world_size), 60, seed=world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_ten_thousand_calls_of_any_kind_follow_each_other(world_size):
    alternate(node(world_size), 10000, seed=world_size)


def test_epochs_go_on_beyond_2_to_32():
    ranks = node(3, epoch=2**32 - 5)
    alternate(ranks, 10, seed=0)
    assert len({tuple(ranks.epochs(rank)) for rank in range(3)}) == 1
    assert 5 < ranks.epochs(0)[0] < 1000


@NEEDS_GLOO
def test_a_rank_never_reads_what_is_written_for_a_later_step():
    """A rank that sleeps between calls finds the bits of its own call, however far the others would like to be."""

    def body(rank, group):
        delay = random.Random(rank)
        with PeerWorkspace(group, max_bytes=1 << 17) as workspace:
            for i in range(60):
                if delay.random() < 0.1:
                    time.sleep(delay.random() * 2e-3)
                x = torch.full((700,), float(i * 4 + rank))
                algorithm = ("one_shot", "two_shot")[i % 2]
                assert torch.equal(workspace.all_reduce(x, algorithm=algorithm), torch.full((700,), i * 12.0 + 3))

    as_threads(3, body)


# ---- what is not finite ----------------------------------------------------------------------------------------------


@EACH_ALGORITHM
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_reaches_its_place_or_its_block(value, algorithm):
    xs = inputs(3, 5000)
    clean = node(3).all_reduce(xs, algorithm=algorithm)[0]
    xs[1][3000] = value
    result = node(3).all_reduce(xs, algorithm=algorithm)[2]
    assert torch.equal(result.isfinite().logical_not().nonzero().view(-1), torch.tensor([3000]))
    assert torch.equal(result[3000], torch.tensor(value)) or (result[3000].isnan() and math.isnan(value))
    assert torch.equal(result[:3000], clean[:3000])
    for bits in (8, 6, 4):
        result = node(3).all_reduce(xs, bits=bits, algorithm=algorithm)[2]
        assert torch.equal(result.isnan().nonzero().view(-1), torch.arange(2944, 3072))


def test_what_is_not_finite_reaches_its_row():
    xs, residuals = inputs(2, 40, 64), inputs(2, 40, 64, seed=1)
    xs[0][7, 3] = torch.nan
    out, residual_out = (list_of[1] for list_of in node(2).all_reduce_rms_norm(xs, residuals, torch.ones(64)))
    assert residual_out.isnan().sum() == 1
    assert torch.equal(out.isnan().any(1).nonzero().view(-1), torch.tensor([7]))


# ---- processes -------------------------------------------------------------------------------------------------------


def _process(rank, seed):
    world_size = dist.get_world_size()
    with PeerWorkspace(max_bytes=1 << 18) as workspace:
        assert workspace.bytes == 1 << 18
        choose = random.Random(seed)
        for i in range(60):
            numel = (*SIZES, 60000)[i % 7]
            xs = inputs(world_size, numel, dtype=choose.choice(DTYPES), seed=i)
            options = {"bits": choose.choice(BITS), "algorithm": choose.choice(("one_shot", "two_shot"))}
            torch.set_num_threads(1 + (i + rank) % 2)  # which need not be the same
            assert_same_bits(
                workspace.all_reduce(xs[rank], **options), reference.peer_all_reduce.all_reduce(xs, **options), options
            )
        x, big = torch.full((64, 96), float(rank)), torch.full((1_200_000,), float(rank + 1))
        out, residual_out = workspace.all_reduce_rms_norm(x, torch.ones(64, 96), torch.ones(96), bits=8, block=32)
        assert torch.allclose(out, torch.ones(64, 96))
        assert residual_out.min() >= 1
        torch.set_num_threads(2)
        assert workspace.all_reduce(big, op="avg", out=big) is big
        assert torch.allclose(big, torch.tensor((world_size + 1) / 2))
    gc.collect()
    assert "memfd:fmkernels" not in Path("/proc/self/maps").read_text()  # nor, as this was the last one, is it anywhere


@NEEDS_GLOO
@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow), 4]
)
def test_ranks_that_are_processes(world_size, tmp_path):
    as_processes(world_size, _process, tmp_path, world_size)


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_opcheck():
    workspaces = [torch.zeros(HEADER_BYTES + 4 * FINEST, dtype=torch.uint8) for _ in range(2)]
    xs, residuals = inputs(2, 4, 64), inputs(2, 4, 64, seed=1)
    outs, sums = ([torch.zeros(4, 64) for _ in range(2)] for _ in range(2))
    opcheck(torch.ops.fmkernels.peer_all_reduce.default, (xs, workspaces, outs, 0, False, 8, 64, True, 1, 30000))
    lists = (xs, residuals, torch.ones(64), workspaces, outs, sums)
    opcheck(torch.ops.fmkernels.peer_all_reduce_rms_norm.default, (*lists, 0, True, 0, 64, 1, 1e-6, 30000))


@NEEDS_GLOO
def test_a_compiled_function_leaves_the_call_to_python():
    def body(rank, group):
        with PeerWorkspace(group) as workspace:
            if rank == 0:
                torch._dynamo.reset()
                compiled = torch.compile(lambda x: workspace.all_reduce(x * 2) + 1, backend="eager")
                return compiled(torch.ones(100))
            return workspace.all_reduce(torch.ones(100))

    assert torch.equal(as_threads(2, body)[0], torch.full((100,), 4.0))
