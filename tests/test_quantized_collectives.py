# SPDX-License-Identifier: Apache-2.0
"""fmkernels.quantized_collectives over 1 to 8 ranks: the bits of the definition, on every rank, however it is cut."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from collective_ranks import as_threads

from fmkernels import block_codec
from fmkernels import quantized_collectives as collectives
from fmkernels._collectives_call import shard_bounds
from fmkernels._collectives_header import header_bytes
from fmkernels.reference import quantized_collectives as reference

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

WORLD_SIZES = range(1, 9)
LENGTHS = (0, 1, 127, 128, 129, 4097)
OPTIONS = (
    {"op": "avg"},
    {"bits": 6, "block": 32},
    {"bits": 4, "dtype": torch.bfloat16},
    {"bits": 1, "block": 256},
    {"block": 2048, "dtype": torch.float16, "op": "avg"},
    {"hadamard": True, "bits": 4},
    {"algorithm": "one_shot", "op": "avg"},
    {"bits": "float8_e4m3fn", "op": "avg"},
    {"rounding": "stochastic", "seed": 5, "step": 3, "op": "avg"},
    {
        "rounding": "stochastic",
        "seed": 2**63 - 1,
        "step": 2**40 - 1,
        "offset": 2**62,
        "bits": 4,
        "algorithm": "one_shot",
    },
)
DRAWN = {"rounding": "stochastic", "seed": 5, "step": 3}


def inputs(world_size, numel, dtype=torch.float32, seed=0):
    """Of every rank; heavier tails than normal, so that blocks have scales of their own."""
    generator = torch.Generator().manual_seed(1000 * world_size + numel + seed)
    return [torch.randn(numel, generator=generator).pow(3).to(dtype) for _ in range(world_size)]


def node_sizes(world_size):
    return [n for n in range(1, world_size + 1) if world_size % n == 0]


def assert_same_bits(actual, expected, at):
    assert actual.dtype == expected.dtype, at
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8)), at


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_reduce_is_its_definition_on_every_rank(world_size):
    cases = [(numel, {}) for numel in LENGTHS] + [(1000, options) for options in OPTIONS]
    for node_size in node_sizes(world_size):
        nodes = {"algorithm": "hierarchical", "node_size": node_size}
        cases += [(1000, nodes | {"inter_bits": 6, "op": "avg"}), (1000, nodes | {"inter_bits": "float8_e4m3fn"})]
        cases.append((1000, nodes | DRAWN | {"hadamard": True}))

    def body(rank, group):
        results = []
        for numel, options in cases:
            options = dict(options)
            x = inputs(world_size, numel, options.pop("dtype", torch.float32))[rank]
            assert collectives.all_reduce(x, group=group, **options) is None
            results.append(x)
        return results

    results = as_threads(world_size, body)
    for i, (numel, options) in enumerate(cases):
        options = dict(options)
        expected = reference.all_reduce(inputs(world_size, numel, options.pop("dtype", torch.float32)), **options)
        for rank in range(world_size):
            assert_same_bits(results[rank][i], expected, (numel, options, rank))


def uneven(world_size, numel):
    """Lengths that differ and are no multiples of a block; rank 1 has none."""
    weights = [0 if rank == 1 else rank + 2 for rank in range(world_size)]
    splits = [numel * weight // sum(weights) for weight in weights]
    splits[0] += numel - sum(splits)
    return splits


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_other_collectives_are_their_definitions(world_size):
    numel = 840 * world_size
    splits = uneven(world_size, numel)
    matrix = [[(7 * i + 5 * j) % 4 * 111 for j in range(world_size)] for i in range(world_size)]
    hierarchical = [{"algorithm": "hierarchical", "node_size": n, "op": "avg"} for n in node_sizes(world_size)]
    others = (
        {"hadamard": True},
        {"chunk_numel": 1},
        {"bits": "float8_e4m3fn"},
        DRAWN | {"block": 32, "chunk_numel": 1},
    )
    hierarchical += [options | DRAWN for options in hierarchical]
    scatters = ({}, {"bits": 4, "op": "avg"}, *others, *hierarchical)
    simple = ({}, {"bits": 6, "block": 64}, *others)
    parts = [x.split(splits)[rank] for rank, x in enumerate(inputs(world_size, numel))]
    sent = [x[: sum(counts)] for x, counts in zip(inputs(world_size, 333 * world_size), matrix, strict=True)]

    def body(rank, group):
        x = inputs(world_size, numel)[rank]
        results = []
        for options in scatters:
            even, output = torch.empty(840), torch.empty(splits[rank])
            collectives.reduce_scatter(even, x, group=group, **options)
            collectives.reduce_scatter(output, x, group=group, input_splits=splits, **options)
            results += [even, output]
        for options in simple:
            even, output = torch.empty(numel), torch.empty(numel)
            collectives.all_gather(even, x[:840], group=group, **options)
            collectives.all_gather(output, parts[rank], group=group, output_splits=splits, **options)
            received = torch.empty(sum(row[rank] for row in matrix))
            collectives.all_to_all(
                received,
                sent[rank],
                group=group,
                input_splits=matrix[rank],
                output_splits=[row[rank] for row in matrix],
                **options,
            )
            results += [even, output, received]
        return results

    actual = as_threads(world_size, body)
    whole = inputs(world_size, numel)
    expected = []  # of each call, of each rank
    for options in scatters:
        options = {key: value for key, value in options.items() if key != "chunk_numel"}
        expected += [reference.reduce_scatter(whole, lengths, **options) for lengths in ([840] * world_size, splits)]
    for options in simple:
        options = {key: value for key, value in options.items() if key != "chunk_numel"}
        for gathered in ([x[:840] for x in whole], parts):
            expected.append([reference.all_gather(gathered, **options)] * world_size)
        expected.append(reference.all_to_all(sent, matrix, **options))
    for rank in range(world_size):
        for i, (result, wanted) in enumerate(zip(actual[rank], expected, strict=True)):
            assert_same_bits(result, wanted[rank], (rank, i))


def rounding_bound(x, bits, block):
    """What rounding may change: half a step, and more on the side where the codes end a step before the extreme."""
    levels = 2 ** (bits - 1)
    padded = torch.nn.functional.pad(x, (0, -x.numel() % block)).view(-1, block)
    extreme = padded.gather(1, padded.abs().argmax(1, keepdim=True))
    step = -extreme / levels
    beyond = torch.where(step == 0, 0.0, padded / step) - (levels - 1)
    return (step.abs() * beyond.clamp(min=0.5)).view(-1)[: x.numel()]


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_the_error_is_at_most_the_sum_of_half_steps(world_size, bits):
    numel, block = 4097, 128

    def body(rank, group):
        x = inputs(world_size, numel)[rank]
        collectives.all_reduce(x, group=group, bits=bits, block=block)
        return x

    result = as_threads(world_size, body)[0].double()
    terms = [x.double() for x in inputs(world_size, numel)]
    decoded = [reference.all_gather([x], bits=bits, block=block).double() for x in inputs(world_size, numel)]
    bound = sum(rounding_bound(x, bits, block) for x in terms) + rounding_bound(sum(decoded), bits, block)
    # float32 rounds each product, each sum and the scale.
    bound += (2 * world_size + 4) * torch.finfo(torch.float32).eps * sum(x.abs() + bound for x in terms)
    assert ((result - sum(terms)).abs() <= bound).all()


# ---- what the bits do not depend on ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"algorithm": "one_shot"},
        {"algorithm": "hierarchical", "node_size": 2},
        DRAWN,
        DRAWN | {"block": 32, "algorithm": "hierarchical", "node_size": 2},
    ],
    ids=str,
)
def test_bits_do_not_depend_on_chunks_nor_on_what_else_is_sent(options):
    world_size, numel, cut = 4, 5000, 17 * 128

    def body(rank, group):
        def reduced(x, place=256, **more):
            x = x.clone()
            collectives.all_reduce(
                x, group=group, **options, **({"offset": place} if options.get("seed") else {}), **more
            )
            return x

        x = inputs(world_size, numel)[rank]
        whole = reduced(x)
        for chunk_numel in (1, 1000, 10**9):
            assert_same_bits(reduced(x, chunk_numel=chunk_numel), whole, chunk_numel)
        assert_same_bits(torch.cat([reduced(x[:cut]), reduced(x[cut:], 256 + cut)]), whole, "two messages")
        assert_same_bits(reduced(torch.cat([x[:256], x]), 0)[256:], whole, "behind others")
        assert_same_bits(reduced(x.view(50, 100)).view(-1), whole, "shape")

    as_threads(world_size, body)


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_the_mean_over_what_is_drawn_is_the_sum(algorithm):
    """Within the standard error of the mean. Ranks that have the same numbers must not round them alike.

    At most one test of 10^4 has an element beyond so many standard errors, by Bernstein's inequality, whose second term
    is for the rare steps of what is nearly a whole code.
    """
    world_size, numel, num_seeds, copies, bits, block = 3, 2048, 8, 40, 4, 128
    x = inputs(1, numel)[0]

    def body(rank, group):
        results = torch.empty(num_seeds, copies, numel)  # each copy has draws of its own, by its place
        options = {"bits": bits, "block": block, "algorithm": algorithm, "rounding": "stochastic"}
        for seed, result in enumerate(results):
            collectives.all_reduce(result.copy_(x), seed=seed, group=group, **options)
        return results.view(-1, numel)

    results, count = as_threads(world_size, body)[0], num_seeds * copies
    largest = results.abs().view(count, -1, block).amax((0, 2))
    mean = results.double().mean(0)
    variance = (results.double() - world_size * x.double()).square().mean(0)
    levels = 2 ** (bits - 1) - 1
    step = (x.view(-1, block).abs().amax(1, keepdim=True) / levels).double()
    part = (x.double().view(-1, block) / step) % 1
    expected = (world_size * step**2 * part * (1 - part)).flatten()  # of the ranks' own roundings, if independent
    errors = 6.0
    slack = (2**-16 * world_size + errors**2 / 3 / count) * step.expand(-1, block).flatten()
    if algorithm == "two_shot":  # the sum is rounded too, by at most a quarter of its step squared
        last = (largest.double() / levels)[:, None].expand(-1, block).flatten()
        expected, slack = expected + last**2 / 4, slack + (2**-16 + errors**2 / 3 / count) * last
    deviation = (mean - world_size * x.double()).abs()
    assert (deviation <= errors * (expected / count).sqrt() + slack).all()
    drawn = expected > 1e-3 * step.expand(-1, block).flatten() ** 2
    ratio = (variance / expected)[drawn].mean()
    noise = 6 * (2 / (count * drawn.sum())).sqrt()
    if algorithm == "one_shot":
        assert abs(ratio - 1) <= 3 * noise, ratio  # 3 if ranks drew alike
    else:
        assert ratio <= 1 + 3 * noise, ratio


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_reaches_its_block_and_no_other(value):
    def body(rank, group):
        x = inputs(3, 1000)[rank]
        if rank == 1:
            x[300] = value
        collectives.all_reduce(x, group=group)
        return x

    for result in as_threads(3, body):
        assert result[256:384].isnan().all()
        assert torch.equal(result.isnan().nonzero().view(-1), torch.arange(256, 384))


# ---- error feedback --------------------------------------------------------------------------------------------------

FEEDBACK = (
    {"bits": 4},
    {"bits": 4, "op": "avg"},
    {"bits": 1, "op": "avg"},
    {"algorithm": "one_shot", "bits": 4},
    {"algorithm": "hierarchical", "node_size": 2},
    {"algorithm": "hierarchical", "node_size": 2, "op": "avg", "hadamard": True},
    {"algorithm": "hierarchical", "node_size": 2, "op": "avg", "rounding": "stochastic", "seed": 1},
    {"bits": "float8_e4m3fn", "op": "avg"},
)


@pytest.mark.parametrize("options", FEEDBACK, ids=str)
def test_what_is_lost_is_in_the_residuals(options):
    """sum of the gradients = sum of the results + sum of the residuals: nothing is lost for good."""
    world_size, numel, num_steps = 4, 1000, 10
    eps = torch.finfo(torch.float32).eps

    def gradient(rank, step):
        return inputs(world_size, numel, seed=31 * step)[rank]

    def run(rank, group, chunk_numel):
        residual, total, largest = torch.zeros(numel), torch.zeros(numel, dtype=torch.float64), 0.0
        for step in range(num_steps):
            x = gradient(rank, step)
            collectives.all_reduce(x, group=group, error_feedback=residual, chunk_numel=chunk_numel, **options)
            total += x.double()
            largest = max(largest, x.abs().max().item(), residual.abs().max().item())
        return total, residual, largest

    results = as_threads(world_size, lambda rank, group: run(rank, group, 10**6))
    count = world_size if options.get("op") == "avg" else 1
    given = sum(gradient(rank, step).double() for rank in range(world_size) for step in range(num_steps))
    kept = results[0][0] * count + sum(residual.double() for _, residual, _ in results)
    # Each step rounds h, what it lacks, the sum over ranks and what that lacks, all no larger than this.
    largest = max(result[2] for result in results) * count + max(
        gradient(rank, step).abs().max().item() for rank in range(world_size) for step in range(num_steps)
    )
    rounded = 32 if options.get("hadamard") else 1  # sums of so many elements
    assert (given - kept).abs().max() <= num_steps * (3 * world_size + 4) * rounded * eps * largest
    lost = (given - results[0][0] * count).abs().max()
    assert lost > 100 * (given - kept).abs().max(), "the residuals hold what the results lack"
    for rank, cut in enumerate(as_threads(world_size, lambda rank, group: run(rank, group, 1))):
        assert torch.equal(cut[0], results[rank][0]), "chunks change no bit"
        assert torch.equal(cut[1], results[rank][1])


@pytest.mark.parametrize(
    "options", [{}, {"op": "avg"}, {"op": "avg", "algorithm": "hierarchical", "node_size": 3}], ids=str
)
@pytest.mark.parametrize("bad", range(6))
def test_a_block_that_is_not_finite_keeps_its_residual(bad, options):
    """On the rank that sums it as on that which has it, to the bit: there and back by 1 / 3 and 3 is not."""
    world_size, numel = 6, 6 * 128
    block = slice(bad * 128, bad * 128 + 128)

    def body(rank, group):
        residual = torch.zeros(numel)
        x = inputs(world_size, numel)[rank]
        collectives.all_reduce(x, group=group, bits=4, error_feedback=residual, **options)
        before = residual.clone()
        x = inputs(world_size, numel)[rank]
        x[block] = torch.inf
        collectives.all_reduce(x, group=group, bits=4, error_feedback=residual, **options)
        assert residual.isfinite().all()
        return before, residual

    for before, after in as_threads(world_size, body):
        assert before[block].any()
        assert torch.equal(before[block], after[block])
        assert not torch.equal(before, after)


# ---- bytes -----------------------------------------------------------------------------------------------------------


class Counting:
    """A group that counts what it sends."""

    def __init__(self, group):
        self._group, self.num_bytes = group, 0
        self.rank, self.size, self.name, self.recv = group.rank, group.size, group.name, group.recv

    def send(self, tensors, peer, tag):
        self.num_bytes += sum(tensor.nbytes for tensor in tensors)
        return self._group.send(tensors, peer, tag)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bytes_sent_are_those_of_the_formula(bits):
    world_size, numel, block = 3, 100_000, 128
    bounds = shard_bounds(numel, world_size, block)
    wires = [block_codec.wire_bytes(b - a, bits=bits, block=block) for a, b in pairwise(bounds)]
    whole = block_codec.wire_bytes(numel, bits=bits, block=block)
    headers = (world_size - 1) * header_bytes(world_size)

    def body(rank, group):
        counted = [Counting(group) for _ in range(3)]
        collectives.all_reduce(torch.zeros(numel), group=counted[0], bits=bits)
        collectives.all_reduce(torch.zeros(numel), group=counted[1], bits=bits, algorithm="one_shot")
        out, sizes = torch.zeros(bounds[rank + 1] - bounds[rank]), [b - a for a, b in pairwise(bounds)]
        collectives.reduce_scatter(out, torch.zeros(numel), group=counted[2], bits=bits, input_splits=sizes)
        return [group.num_bytes for group in counted]

    for rank, sent in enumerate(as_threads(world_size, body)):
        others = sum(wires) - wires[rank]
        assert sent == [
            headers + others + (world_size - 1) * wires[rank],
            headers + (world_size - 1) * whole,
            headers + others,
        ]
