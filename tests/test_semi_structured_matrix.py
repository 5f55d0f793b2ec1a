# SPDX-License-Identifier: Apache-2.0
"""semi_structured_mask and SemiStructured: what is kept, how it is packed, and what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from fmkernels import SemiStructured, reference, semi_structured_mask
from fmkernels._library import ops
from fmkernels.testing import backends

BACKENDS = backends("semi_structured_mask")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
NAN, INF = math.nan, math.inf


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def two_of_four(mask):
    return bool((mask.unflatten(1, (mask.shape[1] // 4, 4)).sum(-1) == 2).all())


# ---- the mask --------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@EVERY_DTYPE
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("shape", [(4, 4), (8, 36), (20, 124), (68, 260)])
def test_mask_is_that_of_the_reference(shape, both, dtype, backend):
    x = normal(*shape, dtype=dtype)
    x[1, 2:4], x[2, 0] = 0.0, -0.0
    x = x.to(backend.device)
    mask = backend.run(semi_structured_mask, x, both_directions=both)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, reference.semi_structured_mask(x, both_directions=both))
    assert two_of_four(mask)
    assert two_of_four(mask.mT) or not both


@EVERY_BACKEND
def test_small_integers_tie_often(backend):
    """Equal sums and equal magnitudes: the lowest is chosen everywhere."""
    x = torch.randint(-2, 3, (64, 64), generator=torch.Generator().manual_seed(0)).float().to(backend.device)
    for both in (False, True):
        mask = backend.run(semi_structured_mask, x, both_directions=both)
        assert torch.equal(mask, reference.semi_structured_mask(x, both_directions=both))


@pytest.mark.parametrize("both", [False, True])
def test_known_answers(both):
    x = torch.zeros(4, 4)
    expected = torch.tensor([[1, 1, 0, 0]] * (2 if both else 4) + [[0, 0, 1, 1]] * (2 if both else 0)).bool()
    assert torch.equal(semi_structured_mask(x, both_directions=both), expected)
    x = torch.tensor([[9.0, 8, 0, 0], [9, 8, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]])
    assert torch.equal(semi_structured_mask(x, both_directions=both), expected)


def test_both_directions_is_the_best_of_all_ways_where_greed_is_not():
    """Taken largest first, 10 and 9 would leave only zeros for what remains."""
    x = normal(64, 64, seed=3)
    mask = semi_structured_mask(x, both_directions=True)
    tiles = x.abs().double().view(16, 4, 16, 4).transpose(1, 2)
    ways = torch.tensor([[[c in pair for c in range(4)] for pair in way] for way in reference_ways()]).double()
    best = torch.einsum("abrc,wrc->abw", tiles, ways).amax(-1)
    kept = (x.abs() * mask).double().view(16, 4, 16, 4).sum((1, 3))
    torch.testing.assert_close(kept, best)


def reference_ways():
    pairs = list(itertools.combinations(range(4), 2))
    ways = [way for way in itertools.product(pairs, repeat=4) if np.bincount(np.ravel(way)).tolist() == [2] * 4]
    assert len(ways) == 90
    return ways


@EVERY_BACKEND
@pytest.mark.parametrize("both", [False, True])
def test_infinity_and_nan_count_as_the_largest_number(both, backend):
    x = normal(32, 32).to(backend.device)
    x[0, 3], x[5, 9], x[12, 12], x[31, 31] = NAN, INF, -INF, NAN
    largest = torch.finfo(torch.float32).max
    mask = backend.run(semi_structured_mask, x, both_directions=both)
    assert mask[~x.isfinite()].all()
    numbers = x.nan_to_num(largest, largest)
    assert torch.equal(mask, backend.run(semi_structured_mask, numbers, both_directions=both))
    assert torch.equal(mask, reference.semi_structured_mask(x, both_directions=both))


@EVERY_BACKEND
@pytest.mark.parametrize("both", [False, True])
def test_strides_change_no_mask(both, backend):
    x = normal(16, 64, dtype=torch.bfloat16).to(backend.device)
    expected = backend.run(semi_structured_mask, x, both_directions=both)
    odd = torch.cat([x.new_zeros(16, 1), x, x.new_full((16, 2), NAN)], 1)[:, 1:65]
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(16, 64)
    for view in (odd, shifted):
        assert torch.equal(backend.run(semi_structured_mask, view, both_directions=both), expected)


def test_masks_without_elements():
    for shape in ((0, 8), (8, 0)):
        assert semi_structured_mask(torch.zeros(shape), both_directions=True).shape == shape


# ---- packing ---------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(16, 16), (32, 80), (48, 192), (112, 144)])
def test_packing_is_undone(shape, dtype, backend):
    w = normal(*shape, dtype=dtype).to(backend.device)
    packed = backend.run(SemiStructured.from_dense, w, both_directions=True)
    dense = w * semi_structured_mask(w, both_directions=True)
    assert packed.shape == shape
    assert packed.dtype == dtype
    assert torch.equal(packed.to_dense(), dense)
    assert torch.equal(packed.t().to_dense(), dense.mT)
    assert torch.equal(packed.t().t().values, packed.values)
    assert torch.equal(backend.run(SemiStructured.from_dense, dense).to_dense(), dense)


@EVERY_BACKEND
def test_strides_change_nothing_packed(backend):
    w = normal(32, 48, dtype=torch.bfloat16).to(backend.device)
    mask = semi_structured_mask(w, both_directions=True)
    expected = backend.run(SemiStructured.from_dense, w, mask, both_directions=True)
    odd = torch.cat([w.new_zeros(32, 1), w, w.new_full((32, 2), NAN)], 1)[:, 1:49]
    odd_mask = torch.cat([mask[:, :1], mask, mask[:, :2]], 1)[:, 1:49]
    actual = backend.run(SemiStructured.from_dense, odd, odd_mask, both_directions=True)
    for one, other in zip((*actual.transposed, actual.values), (*expected.transposed, expected.values), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(actual.metadata, expected.metadata)


def test_metadata_are_what_the_instruction_takes():
    """By the figures of the PTX ISA: 16 bits of row g, then of row g + 8, of 16 columns a word."""
    mask = torch.zeros(16, 128, dtype=torch.bool)
    kept = {}
    for row, group in itertools.product(range(16), range(32)):
        pair = list(itertools.combinations(range(4), 2))[(7 * row + 5 * group + row * group) % 6]
        kept[row, group] = pair
        mask[row, [4 * group + place for place in pair]] = True
    w = torch.arange(1.0, 16 * 128 + 1).view(16, 128)
    packed = SemiStructured.from_dense(w, mask)
    words = packed.metadata.numpy().view(np.uint32)
    assert words.shape == (1, 2, 32)
    for (row, group), (first, second) in kept.items():
        lane = row % 8 * 4 + group % 16 // 4  # selector 0: the block's first 32 columns, lanes 4 g and 4 g + 1
        shift = 16 * (row // 8) + 4 * (group % 4)
        assert words[0, group // 16, lane] >> shift & 15 == first | second << 2
        assert packed.values[row, 2 * group : 2 * group + 2].tolist() == [
            w[row, 4 * group + p] for p in (first, second)
        ]


@EVERY_BACKEND
def test_fewer_than_two_of_four_are_filled_up_with_zeros(backend):
    w = torch.full((16, 16), NAN, device=backend.device)
    mask = torch.zeros(16, 16, dtype=torch.bool, device=backend.device)
    for place in range(4):
        w[1, 4 * place + place], mask[1, 4 * place + place] = place + 1.0, True
    packed = backend.run(SemiStructured.from_dense, w, mask, both_directions=True)
    expected = torch.zeros(16, 16, device=backend.device)
    expected[1, [0, 5, 10, 15]] = torch.arange(1.0, 5.0, device=backend.device)
    assert torch.equal(packed.to_dense(), expected)
    assert torch.equal(packed.t().to_dense(), expected.mT)
    assert packed.columns()[1].tolist() == [0, 1, 4, 5, 8, 10, 12, 15]  # the lowest free place stands in


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(0, 4), st.integers(0, 6)),
    density=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_matrix_of_the_pattern_comes_back(size, density, dtype, seed):
    rows, columns = 16 * size[0], 16 * size[1]
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns // 4, 4, generator=generator)
    mask = (scores.argsort(-1).argsort(-1) < 2).view(rows, columns)
    mask &= torch.rand(rows, columns, generator=generator) < density
    w = torch.randn(rows, columns, generator=generator).to(dtype) * mask
    packed = SemiStructured.from_dense(w, mask)
    assert torch.equal(packed.to_dense(), w)
    assert torch.equal(SemiStructured.from_dense(w).to_dense(), w)
    assert (packed.columns().view(rows, columns // 4, 2).diff(dim=-1) > 0).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "cpu"], ids=str)
def test_a_mask_that_keeps_too_much_has_its_first_two_on_a_device(backend):
    """Which sees it and no host does; places stay valid and nothing is written outside."""
    w = normal(16, 16, dtype=torch.bfloat16).to(backend.device)
    mask = torch.ones(16, 16, dtype=torch.bool, device=backend.device)
    values, metadata = backend.run(lambda: ops.semi_structured_pack(w, mask, False))
    assert (metadata.view(torch.uint8) == 0x44)[..., [0, 1, 2, 3]].all()
    assert torch.equal(values, w.view(16, 4, 4)[..., :2].reshape(16, 8))


# ---- the class -------------------------------------------------------------------------------------------------------


def test_every_pair_of_places_is_told_from_every_other():
    """Of the 16 values of four bits the six that name two places in their order."""
    for bits, group in itertools.product(range(16), range(8)):
        metadata = GOOD.metadata.clone()
        words = metadata.numpy().view(np.uint32)
        words[1, 0, 7] = int(words[1, 0, 7]) & ~(15 << 4 * group) | bits << 4 * group
        if bits & 3 < bits >> 2:
            SemiStructured(GOOD.values, metadata)
        else:
            with pytest.raises(ValueError, match="metadata must name two places"):
                SemiStructured(GOOD.values, metadata)


def test_what_it_says_of_itself():
    packed = SemiStructured.from_dense(normal(32, 64, dtype=torch.float16))
    assert repr(packed) == "SemiStructured(32 x 64, float16, 2304 bytes, cpu)"
    both = SemiStructured.from_dense(normal(32, 64), both_directions=True)
    assert repr(both) == "SemiStructured(32 x 64, float32, both directions, 8960 bytes, cpu)"
    moved = both.to("meta")
    assert moved.device.type == "meta"
    assert moved.t().shape == (64, 32)


W, MASK = normal(32, 48), torch.zeros(32, 48, dtype=torch.bool)
THREE = MASK.clone()
THREE[5, 8:11] = True
COLUMN = MASK.clone()
COLUMN[4:7, 9] = True
ERRORS = {
    "semi_structured_mask": [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType."),
        ({"x": W[0]}, ValueError, "x must be [rows, columns], got 1 dimensions [48]."),
        ({"x": W.double()}, ValueError, "x must be float32 or bfloat16 or float16, got float64."),
        ({"x": W[:, :46]}, ValueError, "x must have a multiple of 4 columns, got 46."),
        ({"x": W[:30], "both_directions": True}, ValueError, "x must have a multiple of 4 rows, got 30."),
        ({"x": W.mT}, ValueError, "x must have a contiguous last dimension, got stride 48."),
        ({"x": W, "both_directions": 1}, TypeError, "both_directions must be True or False, got int."),
    ],
    "SemiStructured.from_dense": [
        ({"w": None}, TypeError, "w must be a tensor, got NoneType."),
        ({"w": W[0]}, ValueError, "w must be [rows, columns], got 1 dimensions [48]."),
        ({"w": W.long()}, ValueError, "w must be float32 or bfloat16 or float16, got int64."),
        ({"w": W[:24]}, ValueError, "w must have a multiple of 16 rows and of 16 columns, got [24, 48]."),
        ({"w": W[:, :40]}, ValueError, "w must have a multiple of 16 rows and of 16 columns, got [32, 40]."),
        ({"w": normal(48, 32).mT}, ValueError, "w must have a contiguous last dimension, got stride 32."),
        ({"mask": 1}, TypeError, "mask must be a tensor, got int."),
        ({"mask": MASK.float()}, ValueError, "mask must be bool, got float32."),
        ({"mask": MASK[:16]}, ValueError, "mask must have the shape of w, [32, 48], got [16, 48]."),
        ({"mask": MASK.to("meta")}, ValueError, "mask must be on the device of w, cpu, got meta."),
        ({"mask": MASK.mT.contiguous().mT}, ValueError, "mask must have a contiguous last dimension, got stride 32."),
        ({"mask": THREE}, ValueError, "mask must keep at most 2 of each 4 along a row, got 3 in row 5 from 8 on."),
        (
            {"mask": COLUMN, "both_directions": True},
            ValueError,
            "mask must keep at most 2 of each 4 along a column, got 3 in column 9 from 4 on.",
        ),
        ({"both_directions": None}, TypeError, "both_directions must be True or False, got NoneType."),
    ],
}
GOOD = SemiStructured.from_dense(W, both_directions=True)
CLASS_ERRORS = [
    ({"values": None}, TypeError, "values must be a tensor, got NoneType."),
    ({"values": GOOD.values[0]}, ValueError, "values must be [rows, columns / 2], got 1 dimensions [24]."),
    ({"values": GOOD.values.int()}, ValueError, "values must be float32 or bfloat16 or float16, got int32."),
    (
        {"values": GOOD.values[:, :20]},
        ValueError,
        "values must be those of a multiple of 16 rows and of 16 columns, got 32 x 40.",
    ),
    ({"values": W[:, :24]}, ValueError, "values must be contiguous, got strides [48, 1]."),
    (
        {"values": GOOD.values.clone().requires_grad_()},
        ValueError,
        "values must not require a gradient, which no op gives.",
    ),
    ({"metadata": GOOD.metadata.long()}, ValueError, "metadata must be int32, got int64."),
    (
        {"metadata": GOOD.metadata[:1]},
        ValueError,
        "metadata must be [2, 1, 32] for a matrix of 32 x 48, got [1, 1, 32].",
    ),
    ({"metadata": GOOD.metadata.to("meta")}, ValueError, "metadata must be on the device of values, cpu, got meta."),
    (
        {"metadata": torch.zeros_like(GOOD.metadata)},
        ValueError,
        "metadata must name two places of each four, the smaller one first, got others.",
    ),
    ({"transposed": 1}, TypeError, "transposed must be None or (values, metadata), got 1."),
    (
        {"transposed": (GOOD.values, GOOD.metadata)},
        ValueError,
        "the values of transposed must be [48, 16] for a matrix of 32 x 48, got [32, 24].",
    ),
    (
        {"transposed": (GOOD.transposed[0].half(), GOOD.transposed[1])},
        ValueError,
        "the values of transposed must have the dtype of values, float32, got float16.",
    ),
]


@pytest.mark.parametrize(("op", "arguments", "error", "sentence"), [(op, *e) for op, es in ERRORS.items() for e in es])
def test_wrong_arguments_are_told_in_one_sentence(op, arguments, error, sentence):
    function = semi_structured_mask if op == "semi_structured_mask" else SemiStructured.from_dense
    with pytest.raises(error) as caught:
        function(**({"w": W} if function == SemiStructured.from_dense else {}) | arguments)
    assert str(caught.value) == f"{op}: {sentence}"


@pytest.mark.parametrize(("fields", "error", "sentence"), CLASS_ERRORS)
def test_wrong_fields_are_told_in_one_sentence(fields, error, sentence):
    good = {"values": GOOD.values, "metadata": GOOD.metadata, "transposed": GOOD.transposed}
    with pytest.raises(error) as caught:
        SemiStructured(**good | fields)
    assert str(caught.value) == f"SemiStructured: {sentence}"


def test_a_transpose_that_was_not_packed():
    with pytest.raises(ValueError, match=r"^SemiStructured.t: the transpose must have been packed: "):
        SemiStructured.from_dense(W).t()


def test_any_byte_but_zero_of_a_mask_is_true():
    """A view of bytes as bool may hold more than 0 and 1: column 1 was kept for a byte of 2 in column 0."""
    mask = semi_structured_mask(W)
    for byte in (2, 255):
        odd = (mask.byte() * byte).view(torch.bool)
        for backend in BACKENDS:
            pack = getattr(torch.ops, backend.namespace).semi_structured_pack
            for transposed in (False, True):
                both = mask if not transposed else semi_structured_mask(W, both_directions=True)
                given = odd if not transposed else (both.byte() * byte).view(torch.bool)
                dtype = torch.float32 if backend.name == "cpu" else torch.bfloat16
                x = W.to(backend.device, dtype)
                expected = pack(x, both.to(backend.device), transposed)
                assert all(map(torch.equal, pack(x, given.to(backend.device), transposed), expected))


def test_the_ops_refuse_what_memory_safety_needs():
    good_mask = semi_structured_mask(W)
    wrong = [(W.double(), good_mask), (W[:24], good_mask[:24]), (W[:, :40], good_mask[:, :40]), (W, good_mask[:16])]
    wrong += [(W, good_mask.byte()), (W.mT, good_mask.mT), (W[0], good_mask)]
    for namespace in {getattr(torch.ops, backend.namespace) for backend in BACKENDS}:
        for x, mask in wrong:
            with pytest.raises(RuntimeError):
                namespace.semi_structured_pack(x, mask, False)
        for x in (W.double(), W[:, :46], W.mT, W[0]):
            with pytest.raises(RuntimeError):
                namespace.semi_structured_mask(x, False)
    with pytest.raises(RuntimeError, match="mask must keep at most 2 of each 4, got 3 in row 5 from column 8 on"):
        ops.semi_structured_pack(W, THREE, False)
    with pytest.raises(RuntimeError, match="got 3 in row 9 from column 4 on"):
        ops.semi_structured_pack(W, COLUMN, True)


# ---- torch -----------------------------------------------------------------------------------------------------------


@EVERY_DTYPE
def test_opcheck(dtype):
    w = normal(32, 80, dtype=dtype)
    opcheck(torch.ops.fmkernels.semi_structured_mask.default, (w, True))
    mask = semi_structured_mask(w, both_directions=True)
    for transposed in (False, True):
        opcheck(torch.ops.fmkernels.semi_structured_pack.default, (w, mask, transposed))


def test_compile():
    compiled = torch.compile(semi_structured_mask, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(W, both_directions=True), semi_structured_mask(W, both_directions=True))
