# SPDX-License-Identifier: Apache-2.0
"""sampling: the tokens of the definition, bit by bit; distributions, ties, errors, and what torch asks of an op."""

import math

import pytest
import torch
from chi_square import FALSE_ALARM, chi_square
from torch.library import opcheck

from fmkernels import _library, reference, sample
from fmkernels._library import ops
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("sampling_tokens")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 1e-3},
    {"temperature": 50.0, "top_p": 0.95},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 12, "min_p": 0.02},
    {"top_k": 12, "min_p": 0.3, "top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.7},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 300, "top_p": 0.99},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
]


def inputs(batch=24, vocab=301, dtype=torch.float32, device="cpu", seed=0):
    """(logits, {seed, offset}); among the rows: many ties, all equal, and infinities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, vocab, generator=generator) * 3
    logits[1], logits[2] = logits[1].round(), 1.0
    logits[3, : vocab // 2], logits[4, 7 % vocab] = -math.inf, math.inf
    randoms = {name: torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator) for name in ("seed", "offset")}
    return logits.to(device, dtype), {name: value.to(device) for name, value in randoms.items()}


def per_row(options, batch, device):
    """The same numbers as tensors."""
    dtypes = {"top_k": torch.int32}
    return {
        name: torch.full((batch,), value, dtype=dtypes.get(name, torch.float32), device=device)
        for name, value in options.items()
    }


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [1, 37, 1000])
def test_tokens_are_those_of_the_definition(vocab, options, backend):
    logits, randoms = inputs(vocab=vocab, device=backend.device)
    tokens = backend.run(sample, logits, **randoms, **options)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, reference.sample(logits, **randoms, **options))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_has_its_own_options(dtype, backend):
    """And what it draws does not depend on the rows beside it, on the threads, or on how its options are given."""
    batch = len(OPTIONS)
    logits, randoms = inputs(batch, 300, dtype, backend.device)
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    rows = [{**defaults, **options} for options in OPTIONS]
    options = {
        name: torch.tensor([row[name] for row in rows], device=backend.device).to(
            torch.int32 if name == "top_k" else torch.float32
        )
        for name in defaults
    }
    together = backend.run(sample, logits, **randoms, **options)
    for i, row in enumerate(OPTIONS):
        alone = {name: value[i : i + 1] for name, value in randoms.items()}
        assert torch.equal(backend.run(sample, logits[i : i + 1], **alone, **row), together[i : i + 1])
    assert torch.equal(together.cpu(), sample(logits.cpu(), **{k: v.cpu() for k, v in (randoms | options).items()}))
    torch.set_num_threads(2)
    assert torch.equal(backend.run(sample, logits, **randoms, **options), together)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_penalties(backend):
    logits, randoms = inputs(12, 60, device=backend.device)
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(-3, 4, (12, 60), generator=generator).clamp(min=0).int().to(backend.device)
    prompt = (torch.rand(12, 60, generator=generator) < 0.2).to(backend.device)
    for penalties in (
        {"repetition_penalty": 1.5, "output_counts": counts, "prompt_mask": prompt},
        {"frequency_penalty": 0.7, "presence_penalty": -0.4, "output_counts": counts},
        {"repetition_penalty": 0.5, "prompt_mask": prompt},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.25, "output_counts": counts}
        | {"prompt_mask": prompt},
    ):
        for others in ({}, {"temperature": 0.0}, {"top_k": 7, "top_p": 0.8, "temperature": 0.6}):
            tokens = backend.run(sample, logits, **randoms, **penalties, **others)
            assert torch.equal(tokens, reference.sample(logits, **randoms, **penalties, **others))
    without = backend.run(sample, logits, **randoms, repetition_penalty=1.5)
    assert torch.equal(without, backend.run(sample, logits, **randoms))  # no token is old


def test_known_answers():
    """Ties go to the lower id: of four equal tokens top_k = 2 keeps the first two, and greedy the first."""
    seed, offset = torch.arange(400), torch.zeros(400, dtype=torch.int64)
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]]).expand(400, -1)
    for options, kept in (
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 3}, {0, 1, 3}),
        ({"temperature": 0.0}, {0}),
        ({"top_p": 0.4}, {0, 1}),
        ({"top_p": 0.457}, {0, 1}),  # two of them are 0.4579 of all
        ({"top_p": 0.459}, {0, 1, 3}),
        ({"top_p": 0.0}, {0}),
        ({"min_p": 0.37}, {0, 1, 3, 4}),  # exp(-1) is 0.368
        ({"min_p": 0.36}, {0, 1, 2, 3, 4}),
        ({"min_p": 0.37, "top_k": 4, "top_p": 0.75}, {0, 1, 3}),
    ):
        tokens = set(sample(logits, seed=seed, offset=offset, **options).tolist())
        assert tokens == kept, options
    zero = torch.tensor([[-0.0, 0.0, -1.0]])
    assert sample(zero, seed=seed[:1], offset=offset[:1], temperature=0.0).item() == 0  # -0 is 0


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 1.5}], ids=str)
@pytest.mark.parametrize("by", ["seed", "offset"])
def test_tokens_have_the_distribution_of_the_definition(by, options):
    """Chi-square over 60,000 draws; a right sampler fails with a probability of FALSE_ALARM."""
    count = 60_000
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0)) * 1.5
    numbers, same = torch.arange(count), torch.full((count,), 7)
    randoms = {"seed": numbers, "offset": same} if by == "seed" else {"seed": same, "offset": numbers}
    tokens = sample(logits.expand(count, -1), **randoms, **options)
    expected = reference.sampling_weights(logits[0], **options).double()
    expected *= count / expected.sum()
    observed = tokens.bincount(minlength=20).double()
    assert chi_square(observed, expected) > FALSE_ALARM


def test_neighbouring_seeds_and_offsets_draw_independently():
    """Chi-square of pairs of tokens: of the next seed, and of the next offset."""
    count, vocab = 100_000, 4
    logits = torch.zeros(1, vocab).expand(count, -1)
    numbers, same = torch.arange(count), torch.full((count,), 7)
    first = sample(logits, seed=numbers, offset=same)
    for second in (sample(logits, seed=numbers + 1, offset=same), sample(logits, seed=numbers, offset=same + 1)):
        pairs = (first * vocab + second).bincount(minlength=vocab**2).double()
        assert chi_square(pairs, torch.full_like(pairs, count / vocab**2)) > FALSE_ALARM


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs_are_those_of_the_logits(dtype, backend):
    logits, randoms = inputs(12, 500, dtype, backend.device)
    logits[4, 7] = 0.0  # nothing is infinite
    tokens, logprobs = backend.run(sample, logits, **randoms, top_k=9, temperature=0.8, return_logprobs=True)
    assert torch.equal(tokens, backend.run(sample, logits, **randoms, top_k=9, temperature=0.8))
    assert_as_good_as_torch(logprobs, lambda x: x.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], logits)


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.5, "top_k": 3}], ids=str)
def test_rows_from_which_nothing_can_be_drawn(options, backend):
    logits, randoms = inputs(8, 90, device=backend.device)
    clean = backend.run(sample, logits, **randoms, **options)
    logits[5, 80], logits[6] = math.nan, -math.inf
    tokens, logprobs = backend.run(sample, logits, **randoms, **options, return_logprobs=True)
    assert tokens[5:7].tolist() == [-1, -1]
    assert logprobs[5:7].isnan().all()
    keep = [0, 1, 2, 3, 4, 7]
    assert torch.equal(tokens[keep], clean[keep])


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_strides_change_no_tokens(backend):
    logits, randoms = inputs(6, 40, device=backend.device)
    wide = torch.cat([logits, torch.full_like(logits, math.nan)], 1)
    assert torch.equal(backend.run(sample, wide[:, :40], **randoms), backend.run(sample, logits, **randoms))
    expanded = backend.run(sample, logits[:1].expand(6, -1), **randoms)
    assert torch.equal(expanded, backend.run(sample, logits[:1].repeat(6, 1), **randoms))


def test_empty_batch():
    logits, nothing = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    tokens, logprobs = sample(logits, seed=nothing, offset=nothing, return_logprobs=True)
    assert (tokens.shape, logprobs.shape) == ((0,), (0,))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "cpu"], ids=str)
def test_a_gpu_clamps_options_out_of_their_range(backend, monkeypatch):
    logits, randoms = inputs(5, 50, device=backend.device)
    for wrong, right in (
        ({"temperature": -1.0}, {"temperature": 0.0}),
        ({"temperature": math.nan}, {}),
        ({"temperature": math.inf}, {"temperature": torch.finfo(torch.float32).max}),
        ({"top_p": 1.5}, {"top_p": 1.0}),
        ({"top_p": math.nan}, {}),
        ({"top_p": -0.5}, {"top_p": 0.0}),
        ({"min_p": 2.0}, {"min_p": 1.0}),
        ({"min_p": -1.0}, {}),
        ({"top_k": -3}, {}),
        ({"top_k": 2**31 - 1}, {}),
        *(({"repetition_penalty": x}, {}) for x in (0.0, -2.0, math.inf, math.nan)),
        *(({name: x}, {}) for name in ("frequency_penalty", "presence_penalty") for x in (-math.inf, math.nan)),
    ):
        old = {"output_counts": torch.ones(5, 50, dtype=torch.int32, device=backend.device)}
        tokens = backend.run(sample, logits, **randoms, **old, **per_row(wrong, 5, backend.device))
        assert torch.equal(tokens, backend.run(sample, logits, **randoms, **old, **right))
    monkeypatch.setattr(_library, "check_values", True)  # as FMKERNELS_CHECK=1
    with pytest.raises(ValueError, match=r"top_p must be from 0 to 1, got 1\.5"):
        backend.run(sample, logits, **randoms, **per_row({"top_p": 1.5}, 5, backend.device))


# ---- errors ----------------------------------------------------------------------------------------------------------

LOGITS, LONGS, FLOATS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
ERRORS = [
    ({"logits": 1}, TypeError, "logits must be a tensor, got int."),
    ({"logits": LOGITS[0]}, ValueError, "logits must be [batch, vocab], got 1 dimensions [5]."),
    ({"logits": LOGITS.double()}, ValueError, "logits must be float32 or bfloat16 or float16, got float64."),
    ({"logits": LOGITS[:, :0]}, ValueError, "logits must have a vocabulary from 1 to 8388608, got 0."),
    ({"logits": torch.zeros(2, 6)[:, ::2]}, ValueError, "logits must have a contiguous last dimension, got stride 2."),
    ({"seed": None}, TypeError, "seed must be a tensor, got NoneType."),
    ({"seed": LONGS.int()}, ValueError, "seed must be int64, got int32."),
    ({"offset": LONGS[:1]}, ValueError, "offset must have as many elements as logits has rows, 2, got 1."),
    ({"offset": LONGS[None]}, ValueError, "offset must be [batch], got 2 dimensions [1, 2]."),
    ({"seed": torch.zeros(4).long()[::2]}, ValueError, "seed must be contiguous, got stride 2."),
    ({"temperature": -0.5}, ValueError, "temperature must be finite and not negative, got -0.5."),
    ({"temperature": FLOATS - 1}, ValueError, "temperature must be finite and not negative, got -1."),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got str."),
    ({"temperature": FLOATS.double()}, ValueError, "temperature must be float32, got float64."),
    ({"temperature": math.inf}, ValueError, "temperature must be finite in float32, got inf."),
    ({"top_k": 1.5}, TypeError, "top_k must be an integer, got float."),
    ({"top_k": -1}, ValueError, "top_k must be at least 0, got -1."),
    ({"top_k": LONGS.int() - 1}, ValueError, "top_k must be not negative, got -1."),
    ({"top_k": LONGS}, ValueError, "top_k must be int32, got int64."),
    ({"top_p": 1.1}, ValueError, "top_p must be from 0 to 1, got 1.1."),
    ({"min_p": FLOATS + math.nan}, ValueError, "min_p must be from 0 to 1, got nan."),
    *(
        ({"repetition_penalty": x}, ValueError, f"repetition_penalty must be finite and positive in float32, got {x}.")
        for x in (0.0, 1e-50)
    ),
    ({"presence_penalty": FLOATS + math.inf}, ValueError, "presence_penalty must be finite, got inf."),
    ({"output_counts": LOGITS}, ValueError, "output_counts must be int32, got float32."),
    ({"prompt_mask": LOGITS.bool()[0]}, ValueError, "prompt_mask must have the shape of logits, [2, 5], got [5]."),
    ({"seed": LONGS.to("meta")}, ValueError, "seed must be on the device of logits, cpu, got meta."),
    ({"return_logprobs": 1}, TypeError, "return_logprobs must be True or False, got int."),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "sentence"), ERRORS)
def test_wrong_arguments(wrong, error, sentence):
    with pytest.raises(error) as raised:
        sample(**{"logits": LOGITS, "seed": LONGS, "offset": LONGS, **wrong})
    assert str(raised.value) == f"sample: {sentence}"


HOSTILE = [
    (0, [torch.zeros(()), LOGITS[0], LOGITS[:1], LOGITS[:, :0], LOGITS.double(), torch.zeros(2, 10)[:, ::2]]),
    (1, [LONGS[:1], LONGS.int(), torch.zeros(4).long()[::2]]),
    (2, [LONGS[:1], LONGS.int()]),
    (3, [FLOATS[:1], FLOATS.double(), FLOATS - 1, FLOATS + math.nan]),
    (4, [LONGS, LONGS.int()[:1], LONGS.int() - 1]),
    (5, [FLOATS + 2, FLOATS[:1]]),
    (7, [FLOATS, FLOATS + math.inf]),
    (10, [LOGITS, LOGITS.int()[:1], torch.zeros(2, 10).int()[:, ::2]]),
    (11, [LOGITS, LOGITS.bool()[:1], torch.zeros(2, 10).bool()[:, ::2]]),
]


@pytest.mark.parametrize(("position", "values"), HOSTILE)
def test_the_op_itself_refuses(position, values):
    right = [LOGITS, LONGS, LONGS, *[None] * 9, False]
    ops.sampling_tokens(*right)
    for value in values:
        with pytest.raises(RuntimeError):
            ops.sampling_tokens(*right[:position], value, *right[position + 1 :])


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.namespace == "fmkernels"], ids=str)
@pytest.mark.parametrize("logprobs", [False, True])
def test_opcheck(logprobs, backend):
    logits, randoms = inputs(5, 33, torch.bfloat16, backend.device)
    options = per_row({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01}, 5, backend.device)
    logits = logits.nan_to_num(posinf=5.0, neginf=-5.0)  # infinities have logprobs of NaN, which opcheck finds unequal
    args = (logits, *randoms.values(), *options.values(), *[None] * 5, logprobs)
    opcheck(torch.ops.fmkernels.sampling_tokens.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(sample, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (5, 9):
        logits, randoms = inputs(batch, 30)
        for options in ({"temperature": 0.7, "top_k": 3}, per_row({"top_p": 0.8}, batch, "cpu")):
            assert torch.equal(compiled(logits, **randoms, **options), sample(logits, **randoms, **options))
