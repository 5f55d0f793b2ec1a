# SPDX-License-Identifier: Apache-2.0
"""Blocks of int8 values with a scale each: what quantize makes, and the products with it."""

import math
from dataclasses import replace

import pytest
import torch
from faults import missing_synchronisations
from torch.library import opcheck

from fmkernels import BlockSparse, BlockTopology, dds, dsd, reference
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("block_sparse_dsd")
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BLOCKS = [16, 32, 64, 128, (16, 64), (128, 32)]
SOME_BLOCKS = [16, (64, 32), *(pytest.param(block, marks=pytest.mark.slow) for block in BLOCKS[1:])]
EVERY_BLOCK = pytest.mark.parametrize("block", BLOCKS, ids=str)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix(shape, block, density=0.5, seed=1):
    """Quantized, of blocks of different magnitudes; before that, NaN stands in what its blocks hold past the edge."""
    rows, columns = (block, block) if isinstance(block, int) else block
    grid = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < density
    of = BlockTopology.from_mask(mask, block, shape)
    values = BlockSparse.from_dense(normal(*shape, seed=seed + 1), mask=of).values
    values = values * torch.linspace(0.1, 3.0, len(values))[:, None, None]
    inside = BlockSparse.from_dense(torch.ones(shape), mask=of).values != 0
    return BlockSparse.of(torch.where(inside, values, math.nan), of).quantize()


def dense_of(s, dtype, backend):
    """The matrix that a product multiplies by: float32 on the CPU, rounded to the dtype of `dense` on CUDA."""
    return s.dequantize(torch.float32 if backend.name == "cpu" else dtype).to_dense().float()


def check_product(backend, product, dense, s, dtype, **options):
    """Against the reference of the dequantized matrix, which has more digits than the dense operand on the CPU."""
    whole = dense_of(s, dtype, backend)
    actual = backend.run(product, *((s, dense) if product is dsd else (dense, s)), **options)
    assert actual.dtype == dtype
    assert actual.is_contiguous()

    def truth(whole, dense, **named):
        return getattr(reference, product.__name__)(*((whole, dense) if product is dsd else (dense, whole)), **named)

    assert_as_good_as_torch(actual, truth, whole, dense.float(), **options)


def skip_without_kernel(backend, dtype):
    if dtype == torch.float32 and backend.name != "cpu":
        pytest.skip("float32 has a kernel on the CPU alone")


# ---- quantize --------------------------------------------------------------------------------------------------------


@EVERY_DTYPE
@EVERY_BLOCK
def test_quantize_matches_its_definition(block, dtype):
    rows, columns = (block, block) if isinstance(block, int) else block
    of = BlockTopology.from_mask(torch.ones(2, 2, dtype=torch.bool), block, (2 * rows - 3, 2 * columns - 5))
    s = BlockSparse.from_dense(normal(*of.shape, dtype=dtype), mask=of)
    q = s.quantize()
    values, scales = reference.block_sparse.quantize(s.values)
    assert q.dtype == torch.int8
    assert torch.equal(q.values, values)
    assert torch.equal(q.block_scales, scales)
    assert torch.equal(q.dequantize(dtype).values, (values.float() * scales[:, None, None]).to(dtype))
    error = (q.dequantize().values - s.values.float()).abs().amax((1, 2))
    assert (error <= scales * 0.5001).all()
    assert torch.equal(q.t().to_dense(), q.to_dense().mT)
    assert (q.topology, q.is_transposed) == (s.topology, False)
    assert s.t().quantize().is_transposed


def test_what_a_block_holds_past_the_edge_does_not_count():
    s = matrix((20, 40), 32, 1.0)
    assert s.block_scales.isfinite().all()
    assert (s.values[:, 20:] == 0).all()
    assert (s.values[1, :, 8:] == 0).all()
    assert (s.values[:, :20].abs().amax((1, 2)) == 127).all()


def test_blocks_of_zeros_of_tiny_and_of_huge_values():
    of = BlockTopology.from_mask(torch.ones(1, 4, dtype=torch.bool), 16)
    largest = torch.tensor([0.0, 1e-45, 1e-38, torch.finfo(torch.float32).max])
    s = BlockSparse.of(largest[:, None, None].expand(4, 16, 16).contiguous(), of).quantize()
    assert s.block_scales[0] == 1
    assert (s.values[0] == 0).all()
    assert s.dequantize().values.isfinite().all()
    torch.testing.assert_close(s.dequantize().values[2:, 0, 0], largest[2:], rtol=0.01, atol=0)


@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
@EVERY_BACKEND
def test_what_is_not_finite_stays_in_its_block(what, backend):
    dtype = torch.float32 if backend.name == "cpu" else torch.bfloat16
    mask = torch.tensor([[True, True, False], [True, False, True]])
    s = BlockSparse.from_dense(normal(32, 40), 16, BlockTopology.from_mask(mask, 16, (32, 40)))
    clean = s.quantize()
    s.values[1, 3, 4] = what  # of block (0, 1)
    q = s.quantize()
    assert q.block_scales.isnan().tolist() == [False, True, False, False]
    for count in (3, 40):
        b = normal(40, count, dtype=dtype)
        out, expected = (backend.run(dsd, x.to(backend.device), b.to(backend.device)) for x in (q, clean))
        assert out[:16].isnan().all()
        assert torch.equal(out[16:], expected[16:])
        b = normal(32, count, dtype=dtype)
        out, expected = (backend.run(dsd, x.t().to(backend.device), b.to(backend.device)) for x in (q, clean))
        assert out[16:32].isnan().all()
        assert torch.equal(out[:16], expected[:16])
        assert torch.equal(out[32:], expected[32:])


# ---- values ----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@EVERY_DTYPE
@pytest.mark.parametrize("block", SOME_BLOCKS, ids=str)
@pytest.mark.parametrize("product", [dsd, dds])
def test_products_match_the_dequantized_matrix(product, block, dtype, backend):
    skip_without_kernel(backend, dtype)
    rows, columns = (block, block) if isinstance(block, int) else block
    s = matrix((2 * rows + 5, 3 * columns - 7), block).to(backend.device)
    for matrix_ in (s, s.t()):
        length = matrix_.shape[1 if product is dsd else 0]
        dense = normal(length, 70, dtype=dtype, seed=3).to(backend.device)
        dense = dense if product is dsd else dense.mT.contiguous()
        for x in (dense, dense.mT.contiguous().mT):
            check_product(backend, product, x, matrix_, dtype)


@EVERY_BACKEND
@pytest.mark.parametrize("block", [16, 64, (128, 16)], ids=str)
def test_whole_chunks_batches_and_epilogues(block, backend):
    """Sizes of whole 16-byte chunks: the fast copies on CUDA."""
    dtype = torch.float32 if backend.name == "cpu" else torch.float16
    s = matrix((256, 384), block, 0.4).to(backend.device)
    options = {"scale": normal(256).to(backend.device), "bias": normal(256, seed=5).to(backend.device)}
    b = normal(2, 384, 72, dtype=dtype, seed=6).to(backend.device)
    out = backend.run(dsd, s, b)
    assert out.shape == (2, 256, 72)
    for i in range(2):
        assert torch.equal(out[i], backend.run(dsd, s, b[i]))
    check_product(backend, dsd, b[0], s, dtype)
    check_product(backend, dsd, normal(256, 72, dtype=dtype, seed=7).to(backend.device), s.t(), dtype)
    check_product(backend, dds, normal(24, 384, dtype=dtype, seed=8).to(backend.device), s.t(), dtype, **options)


@pytest.mark.parametrize("density", [0.0, 1.0])
@EVERY_BACKEND
def test_empty_and_full(density, backend):
    dtype = torch.float32 if backend.name == "cpu" else torch.bfloat16
    s = matrix((50, 40), 16, density).to(backend.device)
    check_product(backend, dsd, normal(40, 5, dtype=dtype).to(backend.device), s, dtype)
    each = matrix((2, 50, 40), 16, density).to(backend.device)  # lists of its own for each of a batch
    b = normal(2, 40, 24, dtype=dtype).to(backend.device)
    check_product(backend, dsd, b, each, dtype)


def test_nothing_to_do():
    s = matrix((0, 32), 16)
    assert dsd(s, torch.ones(32, 3)).shape == (0, 3)
    assert torch.equal(dsd(s.t(), torch.ones(0, 3)), torch.zeros(32, 3))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("product", [dsd, dds])
@pytest.mark.parametrize("quantized", [False, True])
@EVERY_DTYPE
def test_a_column_has_the_same_bits_beside_any_number_of_others(dtype, quantized, product, transposed):
    """Whichever path their number takes: straight from the values, by panels of them, or of the dense operand."""
    s = matrix((70, 1500) if not transposed else (1500, 70), 16)
    s = s if quantized else s.dequantize(dtype)
    s = s.t() if transposed else s
    dense = normal(1500, 120, dtype=dtype, seed=3)

    def run(columns):
        return dsd(s, columns) if product is dsd else dds(columns.mT, s.t()).mT

    whole = run(dense)
    for count in (*range(1, 18), 48, 49, 96, 97):  # of 10, 13 and 14 too much was written
        assert torch.equal(run(dense[:, 7 : 7 + count].contiguous()), whole[:, 7 : 7 + count])
        assert torch.equal(run(dense[:, 7 : 7 + count]), whole[:, 7 : 7 + count])


# ---- gradients -------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("product", [dsd, dds])
def test_gradients_of_dense_and_bias(product, backend):
    dtype = torch.float32 if backend.name == "cpu" else torch.bfloat16
    s = matrix((50, 40), 16).to(backend.device)
    s = s if product is dsd else s.t()
    dense = normal(*((40, 30) if product is dsd else (30, 40)), dtype=dtype).to(backend.device).requires_grad_()
    bias = normal(50).to(backend.device).requires_grad_()
    scale = normal(50, seed=2).to(backend.device)

    def run():
        args = (s, dense) if product is dsd else (dense, s)
        out = product(*args, scale=scale, bias=bias, activation="relu")
        return torch.autograd.grad(out, (dense, bias), normal(*out.shape, dtype=dtype, seed=9).to(backend.device))

    def truth(dense_, bias_, whole, scale_):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (dense_, bias_)]
            args = (whole, leaves[0]) if product is dsd else (leaves[0], whole)
            out = getattr(reference, product.__name__)(*args, scale=scale_, bias=leaves[1], activation="relu")
            return torch.autograd.grad(out, leaves, normal(*out.shape, dtype=dtype, seed=9).to(out))

    found = backend.run(run)
    whole = dense_of(s, dtype, backend).to(dtype)
    for place in range(2):
        one = lambda *x, place=place: truth(*x)[place]  # noqa: E731
        computed_in = None if dtype == torch.float32 else dtype
        assert_as_good_as_torch(found[place], one, dense, bias, whole, scale, computed_in=computed_in)


def test_quantized_values_are_constants():
    values = normal(1, 16, 16).requires_grad_()
    of = BlockTopology.from_mask(torch.ones(1, 1, dtype=torch.bool), 16)
    q = BlockSparse.of(values, of).quantize()
    assert not q.values.requires_grad
    assert not dsd(q, torch.ones(16, 2)).requires_grad


# ---- errors ----------------------------------------------------------------------------------------------------------

S = matrix((32, 48), 16, 1.0)
ERRORS = [
    (lambda: S.with_values(None), TypeError, "BlockSparse: values must be a tensor, got NoneType."),
    (
        lambda: BlockSparse.of(S.values, S.topology),
        ValueError,
        "BlockSparse: values must be float32 or bfloat16 or float16, got int8.",
    ),
    (
        lambda: BlockSparse.of(S.values.float(), S.topology, block_scales=S.block_scales),
        ValueError,
        "BlockSparse: values must be int8, got float32.",
    ),
    (
        lambda: BlockSparse.of(S.values, S.topology, block_scales=S.block_scales[1:]),
        ValueError,
        "BlockSparse: block_scales must have one element for each block, 6, got 5.",
    ),
    (
        lambda: BlockSparse.of(S.values, S.topology, block_scales=S.block_scales.double()),
        ValueError,
        "BlockSparse: block_scales must be float32, got float64.",
    ),
    (
        lambda: BlockSparse.of(S.values, S.topology, block_scales=S.block_scales.clone().requires_grad_()),
        ValueError,
        "BlockSparse: block_scales must not require a gradient: they are constants.",
    ),
    (lambda: BlockSparse.of(S.values, S.topology, block_scales=1.0), TypeError, "must be a tensor, got float."),
    (S.quantize, ValueError, "BlockSparse.quantize: values must be float32 or bfloat16 or float16, got int8."),
    (
        lambda: S.dequantize().dequantize(),
        ValueError,
        "BlockSparse.dequantize: values must be int8, got float32.",
    ),
    (
        lambda: S.dequantize(torch.int8),
        ValueError,
        "BlockSparse.dequantize: dtype must be float32 or bfloat16 or float16, got torch.int8.",
    ),
    (
        lambda: S.to(torch.bfloat16),
        ValueError,
        "BlockSparse.to: int8 values must be dequantized to be bfloat16.",
    ),
    (S.to_bsr, ValueError, "BlockSparse.to_bsr: int8 values must be dequantized: torch.sparse_bsr has no scales."),
    (
        lambda: dsd(S, torch.ones(48, 2, dtype=torch.int8)),
        ValueError,
        "dsd: b must be float32 or bfloat16 or float16, got int8.",
    ),
    (
        lambda: dsd(S, torch.ones(48, 2).bfloat16(), bias=torch.ones(32).half()),
        ValueError,
        "dsd: bias must be float32 or bfloat16 for this matrix, got float16.",
    ),
]


@pytest.mark.parametrize(("run", "kind", "sentence"), ERRORS, ids=[sentence for *_, sentence in ERRORS])
def test_errors(run, kind, sentence):
    with pytest.raises(kind) as raised:
        run()
    assert str(raised.value).endswith(sentence)


def test_the_op_refuses_by_itself():
    op, lists = torch.ops.fmkernels.block_sparse_dsd.default, S.topology.lists(False)
    args, b = (None, None, 32, False, False, 0), torch.ones(1, 48, 2)
    with pytest.raises(RuntimeError, match="values must be int8"):
        op(S.values.float(), b, *lists, *args, S.block_scales)
    with pytest.raises(RuntimeError, match="dtype"):
        op(S.values, b, *lists, *args)
    with pytest.raises(RuntimeError, match="block_scales"):
        op(S.values, b, *lists, *args, S.block_scales[1:])
    offsets, indices, _, order = lists
    with pytest.raises(RuntimeError, match="indices must ascend"):
        op(S.values, b, offsets, indices.flip(0).contiguous(), None, order, *args, S.block_scales)


# ---- what torch asks -------------------------------------------------------------------------------------------------


@EVERY_DTYPE
def test_opcheck(dtype):
    b = normal(1, 48, 8, dtype=dtype)
    for transposed_out in (False, True):
        args = (S.values, b, *S.topology.lists(False), None, torch.ones(32), 32, False, transposed_out, 1)
        opcheck(torch.ops.fmkernels.block_sparse_dsd.default, (*args, S.block_scales))


def test_compiled_to_one_graph_and_autocast():
    a, b = normal(8, 32), normal(48, 8)
    S.topology.lists(True)
    assert torch.equal(torch.compile(dsd, fullgraph=True, backend="aot_eager")(S, b), dsd(S, b))
    assert torch.equal(torch.compile(dds, fullgraph=True, backend="aot_eager")(a, S), dds(a, S))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dsd(S, b), dsd(S, b.bfloat16()))


# ---- the emulator ----------------------------------------------------------------------------------------------------

EMULATED = [backend for backend in BACKENDS if backend.name == "emulated"]


@pytest.mark.skipif(not EMULATED, reason="the emulated backend is not built")
@pytest.mark.parametrize("lie", [-1, -(2**31), 2**31 - 1])
def test_positions_that_lie_read_no_scale_outside(lie):
    op, (offsets, indices, _, order) = torch.ops.fmkernels_emulated.block_sparse_dsd.default, S.topology.lists(False)
    b, position = normal(1, 48, 8, dtype=torch.bfloat16), torch.arange(6, dtype=torch.int32)
    position[1] = lie
    args = (None, None, 32, False, False, 0, S.block_scales)
    out = replace(EMULATED[0], architecture=80).run(lambda: op(S.values, b, offsets, indices, position, order, *args))
    whole = dense_of(S, torch.bfloat16, EMULATED[0])
    whole[:16, 16:32] = 0
    torch.testing.assert_close(out[0].float(), whole @ b[0].float(), rtol=1 / 128, atol=1e-4)


@pytest.mark.skipif(not EMULATED, reason="the emulated backend is not built")
@pytest.mark.parametrize("block", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_every_barrier_and_wait_that_is_taken_out_is_reported(block):
    """Of as many steps that the copies under way behind the last one lie where sums are stored."""
    inner = 6 * 32
    ways = [matrix((32, inner), block, 1.0), matrix((inner, 32), block, 1.0).t()]
    b = normal(inner, 136, dtype=torch.bfloat16)
    backend = replace(EMULATED[0], architecture=80)

    def run():
        for s in ways:
            backend.run(dsd, s, b)
            backend.run(dds, b.mT.contiguous(), s.t())

    instance = f"DsdTraitsINS_8BFloat16ELi{block}EEELb1ELb1E"
    total, unseen = missing_synchronisations("block_sparse_dsd_kernel", instance, run)
    assert total >= 4 * 6
    assert unseen == []
