# SPDX-License-Identifier: Apache-2.0
"""dsd, dds, sdd: values, gradients, edges, errors, and what torch asks of an op. The matrices are in
test_block_topology.py, lists that lie in test_block_sparse_emulated.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from fmkernels import BlockSparse, BlockTopology, dds, dsd, reference, sdd
from fmkernels.testing import assert_as_good_as_torch, backends

BACKENDS = backends("block_sparse_dsd")
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS, ids=str)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BLOCKS = [16, 32, 64, 128, (16, 64), (128, 32)]
EVERY_BLOCK = pytest.mark.parametrize("block", BLOCKS, ids=str)
EVERY_DENSITY = pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sizes_of(block):
    """(rows, inner, columns): ragged, of several blocks each."""
    rows, columns = (block, block) if isinstance(block, int) else block
    return 2 * rows + 5, 3 * columns - 7, 70


def topology(shape, block, density=0.5, seed=1):
    rows, columns = (block, block) if isinstance(block, int) else block
    grid = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < density
    return BlockTopology.from_mask(mask, block, shape)


def matrix(shape, block, density=0.5, dtype=torch.float32, seed=1, pad=math.nan):
    """Of random values; what its blocks hold past the edge of the matrix is `pad`."""
    of = topology(shape, block, density, seed)
    dense = normal(*shape, dtype=dtype, seed=seed + 1)
    values = BlockSparse.from_dense(dense, mask=of).values
    inside = BlockSparse.from_dense(torch.ones_like(dense), mask=of).values != 0
    return BlockSparse.of(torch.where(inside, values, pad), of)


def skip_without_kernel(backend, dtype):
    if dtype == torch.float32 and backend.name != "cpu":
        pytest.skip("float32 has a kernel on the CPU alone")


def by_columns(t):
    return t.mT.contiguous().mT


# ---- values ----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@EVERY_DTYPE
@EVERY_DENSITY
@EVERY_BLOCK
def test_dsd_matches_masked_dense(block, density, dtype, backend):
    skip_without_kernel(backend, dtype)
    rows, inner, columns = sizes_of(block)
    s = matrix((rows, inner), block, density, dtype).to(backend.device)
    for matrix_, length in ((s, inner), (s.t(), rows)):
        b = normal(length, columns, dtype=dtype, seed=3).to(backend.device)
        for dense in (b, by_columns(b)):
            out = backend.run(dsd, matrix_, dense)
            assert out.dtype == dtype
            assert_as_good_as_torch(out, reference.dsd, matrix_.to_dense(), dense)


@EVERY_BACKEND
@EVERY_DTYPE
@EVERY_DENSITY
@EVERY_BLOCK
def test_dds_matches_masked_dense(block, density, dtype, backend):
    skip_without_kernel(backend, dtype)
    rows, inner, count = sizes_of(block)
    s = matrix((rows, inner), block, density, dtype).to(backend.device)
    for matrix_, length in ((s, rows), (s.t(), inner)):
        a = normal(count, length, dtype=dtype, seed=3).to(backend.device)
        for dense in (a, by_columns(a)):
            out = backend.run(dds, dense, matrix_)
            assert out.is_contiguous()
            assert_as_good_as_torch(out, reference.dds, dense, matrix_.to_dense())


@EVERY_BACKEND
@EVERY_DTYPE
@EVERY_DENSITY
@EVERY_BLOCK
def test_sdd_matches_masked_dense(block, density, dtype, backend):
    skip_without_kernel(backend, dtype)
    rows, columns, inner = sizes_of(block)
    of = topology((rows, columns), block, density).to(backend.device)
    a = normal(rows, inner, dtype=dtype, seed=3).to(backend.device)
    b = normal(inner, columns, dtype=dtype, seed=4).to(backend.device)
    for left, right in ((a, b), (by_columns(a), b), (a, by_columns(b)), (by_columns(a), by_columns(b))):
        out = backend.run(sdd, left, right, of)
        assert_as_good_as_torch(out.to_dense(), reference.sdd, left, right, of)
        inside = BlockSparse.from_dense(torch.ones(rows, columns, device=backend.device), mask=of).values != 0
        assert (out.values[~inside] == 0).all()


@EVERY_BACKEND
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_epilogues(activation, backend):
    dtype = torch.float32 if backend.name == "cpu" else torch.bfloat16
    shape = (50, 40)
    s = matrix(shape, 16, dtype=dtype).to(backend.device)
    scale, bias = (normal(size, seed=seed).to(backend.device) for size, seed in ((50, 5), (50, 6)))
    b, a = (normal(*size, dtype=dtype, seed=7).to(backend.device) for size in ((40, 30), (30, 40)))
    options = {"scale": scale, "bias": bias, "activation": activation}
    assert_as_good_as_torch(backend.run(dsd, s, b, **options), reference.dsd, s.to_dense(), b, **options)
    assert_as_good_as_torch(backend.run(dds, a, s.t(), **options), reference.dds, a, s.t().to_dense(), **options)
    of = s.topology
    left, right = (normal(*size, dtype=dtype, seed=8).to(backend.device) for size in ((50, 33), (33, 40)))
    options = {"scale": scale[:40], "bias": bias[:40], "activation": activation}
    out = backend.run(sdd, left, right, of, **options).to_dense()
    assert_as_good_as_torch(out, lambda *x, **o: reference.sdd(*x, of, **o), left, right, **options)


@EVERY_BACKEND
@pytest.mark.parametrize("lists", ["one for all", "each its own"])
def test_batches(lists, backend):
    dtype = torch.float32 if backend.name == "cpu" else torch.float16
    shape = (50, 40) if lists == "one for all" else (3, 50, 40)
    s = matrix(shape, 16, 0.4, dtype).to(backend.device)
    b = normal(3, 40, 20, dtype=dtype).to(backend.device)
    assert_as_good_as_torch(backend.run(dsd, s, b), reference_batched, s.to_dense(), b)
    bt = normal(3, 50, 20, dtype=dtype).to(backend.device)
    assert_as_good_as_torch(backend.run(dsd, s.t(), bt), reference_batched, s.t().to_dense(), bt)
    a = normal(3, 20, 50, dtype=dtype).to(backend.device)
    assert_as_good_as_torch(backend.run(dds, a, s), reference_batched, a, s.to_dense())
    if len(shape) == 3:
        left = normal(3, 50, 33, dtype=dtype).to(backend.device)
        right = normal(3, 33, 40, dtype=dtype).to(backend.device)
        of = s.topology
        out = backend.run(sdd, left, right, of).to_dense()
        assert_as_good_as_torch(out, lambda *x: reference.sdd(*x, of), left, right)


def reference_batched(a, b):
    return a @ b


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_topologies(data):
    block = tuple(data.draw(st.sampled_from([16, 32, 64])) for _ in range(2))
    shape = tuple(data.draw(st.integers(0, 3 * size)) for size in block)
    s = matrix(shape, block, data.draw(st.sampled_from([0.1, 0.5, 0.9])), seed=data.draw(st.integers(0, 99)))
    s = s.t() if data.draw(st.booleans()) else s
    b = normal(s.shape[1], data.draw(st.integers(0, 40)))
    assert_as_good_as_torch(dsd(s, b), reference.dsd, s.to_dense(), b)
    assert_as_good_as_torch(dds(b.mT, s.t()), reference.dds, b.mT, s.t().to_dense())


@pytest.mark.parametrize("inner", [60, 1500])  # 1500: sums of more columns than are multiplied at a time
def test_a_column_has_the_same_bits_beside_others(inner):
    s, b = matrix((70, inner), 16), normal(inner, 200)
    whole = dsd(s, b)
    for columns in (slice(0, 1), slice(7, 30), slice(100, 197)):
        assert torch.equal(dsd(s, b[:, columns]), whole[:, columns])


def test_threads_change_no_bits():
    s, b, a = matrix((300, 280), 32), normal(280, 150), normal(150, 300)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((dsd(s, b), dds(a, s), sdd(by_columns(b.mT), b, topology((150, 150), 32)).values))
    torch.set_num_threads(1)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


# ---- gradients -------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("product", ["dsd", "dds"])
def test_gradients_of_values_dense_and_bias(product, transposed, activation, backend):
    dtype = torch.float32 if backend.name == "cpu" else torch.bfloat16
    s = matrix((50, 40), 16, 0.5, dtype, pad=0.0).to(backend.device)
    values = s.values.clone().requires_grad_()
    s = s.with_values(values)
    s = s.t() if transposed else s
    rows, columns = s.shape
    dense = (
        normal(*((columns, 30) if product == "dsd" else (30, rows)), dtype=dtype).to(backend.device).requires_grad_()
    )
    length = rows if product == "dsd" else columns
    scale, bias = normal(length, seed=5).to(backend.device), normal(length, seed=6).to(backend.device).requires_grad_()
    options = {"scale": scale, "activation": activation}

    def run():
        out = dsd(s, dense, bias=bias, **options) if product == "dsd" else dds(dense, s, bias=bias, **options)
        grad = normal(*out.shape, dtype=dtype, seed=9).to(backend.device)
        return torch.autograd.grad(out, (values, dense, bias), grad)

    def truth(values_, dense_, bias_, scale_):
        with torch.enable_grad():
            args = [t.detach().requires_grad_() for t in (values_, dense_, bias_)]
            whole = dense_of(args[0], s)
            pair = (whole, args[1]) if product == "dsd" else (args[1], whole)
            out = getattr(reference, product)(*pair, scale=scale_, bias=args[2], activation=activation)
            grad = normal(*out.shape, dtype=dtype, seed=9).to(out)
            return torch.autograd.grad(out, args, grad)

    inside = BlockSparse.from_dense(torch.ones(50, 40, device=backend.device), mask=s.topology).values != 0
    found = list(backend.run(run))
    assert (found[0][~inside] == 0).all()
    computed_in = None if dtype == torch.float32 else dtype  # gradients pass through half results
    for place in range(3):
        one = lambda *x, place=place: truth(*x)[place]  # noqa: E731
        assert_as_good_as_torch(found[place], one, values, dense, bias, scale, computed_in=computed_in)


def dense_of(values, s):
    """`to_dense` in the dtype of the values, which may be float64."""
    of, (rows, columns) = s.topology, s.topology.block
    whole = values.new_zeros(of.num_block_rows, of.num_block_columns, rows, columns)
    whole = whole.index_put((of.row_indices.long(), of.column_indices.long()), values)
    whole = whole.transpose(1, 2).reshape(of.num_block_rows * rows, -1)[: of.shape[0], : of.shape[1]]
    return whole.mT if s.is_transposed else whole


@pytest.mark.parametrize("epilogue", [False, True])
def test_gradients_of_sdd(epilogue):
    of = topology((50, 40), (16, 32))
    a, b = normal(50, 33).requires_grad_(), normal(33, 40, seed=2).requires_grad_()
    bias = normal(40, seed=3).requires_grad_()
    options = {"scale": normal(40, seed=4), "activation": "gelu"} if epilogue else {}
    grad = normal(50, 40, seed=5)

    def run(function, *args):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in args[:3]]
            named = {name: t.to(leaves[0]) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
            out = function(leaves[0], leaves[1], bias=leaves[2], **named)
            return torch.autograd.grad(out, leaves, grad.to(out))

    found = run(lambda x, y, **o: sdd(x, y, of, **o).to_dense(), a, b, bias)
    for place in range(3):
        one = lambda *x, place=place: run(lambda x, y, **o: reference.sdd(x, y, of, **o), *x)[place]  # noqa: E731
        assert_as_good_as_torch(found[place], one, a, b, bias)


def test_the_gradient_of_shared_values_sums_over_the_batch():
    s = matrix((50, 40), 16, pad=0.0)
    values, b = s.values.requires_grad_(), normal(3, 40, 20)
    grad = normal(3, 50, 20, seed=9)
    (whole,) = torch.autograd.grad(dsd(s.with_values(values), b), values, grad)
    parts = [torch.autograd.grad(dsd(s.with_values(values), b[i]), values, grad[i])[0] for i in range(3)]
    torch.testing.assert_close(whole, sum(parts))


# ---- edges -----------------------------------------------------------------------------------------------------------


@EVERY_BACKEND
def test_empty_rows_give_the_activation_of_the_bias(backend):
    mask = torch.tensor([[True, False], [False, False], [False, True]])
    of = BlockTopology.from_mask(mask, 16).to(backend.device)
    values = normal(2, 16, 16, dtype=torch.bfloat16).to(backend.device)
    b, bias = normal(32, 24, dtype=torch.bfloat16).to(backend.device), normal(48).to(backend.device)
    out = backend.run(dsd, BlockSparse.of(values, of), b, bias=bias, activation="relu")
    assert torch.equal(out[16:32], bias[16:32, None].relu().bfloat16().expand(16, 24))


@EVERY_BACKEND
def test_what_is_not_finite_reaches_what_depends_on_it_alone(backend):
    dtype = torch.float32 if backend.name == "cpu" else torch.bfloat16
    s = matrix((64, 64), 16, 0.5, dtype).to(backend.device)
    b = normal(64, 40, dtype=dtype).to(backend.device)
    clean = backend.run(dsd, s, b)
    b[20, 3] = math.nan
    s.values[0, 2, 1] = math.inf
    out = backend.run(dsd, s, b)
    touched = torch.zeros(64, 40, dtype=torch.bool, device=backend.device)
    touched[2 + 16 * int(s.topology.row_indices[0])] = True
    touched[:, 3] |= (s.to_dense()[:, 16:32] != 0).any(1)
    assert torch.equal(out[~touched], clean[~touched])
    assert not out[touched].isfinite().any()


@EVERY_BACKEND
@EVERY_DTYPE
def test_any_place_of_dense_rows_gives_the_same_result(dtype, backend):
    skip_without_kernel(backend, dtype)
    s = matrix((50, 40), 16, 0.5, dtype).to(backend.device)
    whole = normal(43, 41, dtype=dtype).to(backend.device)
    for dense in (whole[1:41, 1:24], whole[3:, 5:6], whole[2:42, :40].mT, whole[:1, :24].expand(40, 24)):
        assert_as_good_as_torch(backend.run(dsd, s, dense), reference.dsd, s.to_dense(), dense)


@pytest.mark.parametrize(("rows", "inner", "columns"), [(0, 32, 8), (32, 0, 8), (32, 32, 0), (0, 0, 0)])
def test_nothing_to_do(rows, inner, columns):
    s = matrix((rows, inner), 16)
    assert torch.equal(dsd(s, torch.ones(inner, columns)), s.to_dense() @ torch.ones(inner, columns))
    assert dds(torch.ones(columns, rows), s).shape == (columns, inner)
    blocks = sdd(torch.ones(rows, columns), torch.ones(columns, inner), s.topology)
    assert torch.equal(
        blocks.to_dense(), reference.sdd(torch.ones(rows, columns), torch.ones(columns, inner), s.topology)
    )


@EVERY_BACKEND
def test_blocks_that_no_row_lists_are_zeros(backend):
    of = BlockTopology(
        torch.tensor([0, 1, 1], dtype=torch.int32), torch.zeros(3, dtype=torch.int32), (32, 16), (16, 16)
    )
    of = of.to(backend.device)
    a, b = (normal(*shape, dtype=torch.bfloat16).to(backend.device) for shape in ((32, 8), (8, 16)))
    blocks = backend.run(sdd, a, b, of)
    assert (blocks.values[1:] == 0).all()
    nan = BlockSparse.of(torch.cat([blocks.values[:1], torch.full_like(blocks.values[1:], math.nan)]), of)
    assert torch.equal(backend.run(dsd, nan, b.mT), backend.run(dsd, blocks, b.mT))


# ---- errors ----------------------------------------------------------------------------------------------------------

S, B = matrix((32, 48), 16), normal(48, 8)
ERRORS = [
    (lambda: dsd(B, B), TypeError, "dsd: s must be a BlockSparse, got Tensor."),
    (lambda: dsd(S, None), TypeError, "dsd: b must be a tensor, got NoneType."),
    (lambda: dsd(S, B.half()), ValueError, "dsd: b must have the dtype of s, float32, got float16."),
    (lambda: dsd(S, B[0]), ValueError, "dsd: b must be [rows, columns] or [batch, rows, columns] for this s, got [8]."),
    (lambda: dsd(S, B[1:]), ValueError, "dsd: b must have for this s, of shape (32, 48), size 48, got 47."),
    (lambda: dsd(S, B.to("meta")), ValueError, "dsd: b must be on the device of s, cpu, got meta."),
    (
        lambda: dsd(S, normal(96, 16)[::2, ::2]),
        ValueError,
        "dsd: b must be contiguous in its rows or in its columns, got strides [32, 2].",
    ),
    (lambda: dsd(S, B, bias=B[:, 0]), ValueError, "dsd: bias must have size 32, got 48."),
    (lambda: dsd(S, B, scale=torch.ones(32).half()), ValueError, "dsd: scale must be float32, got float16."),
    (
        lambda: dsd(S, B, scale=torch.ones(32, requires_grad=True)),
        ValueError,
        "dsd: scale must not require a gradient: it is a constant.",
    ),
    (
        lambda: dsd(S, B, activation="tanh"),
        ValueError,
        "dsd: activation must be one of None, 'relu', 'gelu', 'silu', got 'tanh'.",
    ),
    (lambda: dds(B, S), ValueError, "dds: a must have for this s, of shape (32, 48), size 32, got 8."),
    (lambda: sdd(B.mT, B, S), TypeError, "sdd: topology must be a BlockTopology, got BlockSparse."),
    (
        lambda: sdd(B.mT, B, S.topology),
        ValueError,
        "sdd: a must have for this topology, of shape (32, 48), size 32, got 8.",
    ),
    (
        lambda: sdd(normal(32, 8), B.mT.half(), S.topology),
        ValueError,
        "sdd: b must have the dtype of a, float32, got float16.",
    ),
    (
        lambda: sdd(normal(32, 9), B.mT, S.topology),
        ValueError,
        "sdd: b must have as many rows as a has columns, 9, got 8.",
    ),
]


@pytest.mark.parametrize(("run", "kind", "sentence"), ERRORS, ids=[sentence for *_, sentence in ERRORS])
def test_errors(run, kind, sentence):
    with pytest.raises(kind) as raised:
        run()
    assert str(raised.value) == sentence


def test_the_op_refuses_lists_out_of_range():
    op = torch.ops.fmkernels.block_sparse_dsd.default
    offsets, indices, _, order = S.topology.lists(False)
    args = (None, None, 32, False, False, 0)
    for lists, what in (
        ((offsets, indices + 3, None, order), "indices must be from 0 to 2"),
        ((offsets.flip(1).contiguous(), indices, None, order), "offsets must not decrease"),
        ((offsets, indices, indices - 2, order), "positions must be from 0"),
        ((offsets, indices, None, order + 2), "order must be from 0 to 1"),
    ):
        with pytest.raises(RuntimeError, match=what):
            op(S.values, B[None], *lists, *args)


# ---- what torch asks -------------------------------------------------------------------------------------------------


@EVERY_DTYPE
def test_opcheck(dtype):
    s, b = matrix((32, 48), 16, dtype=dtype, pad=0.0), normal(1, 48, 8, dtype=dtype)
    for transposed_out in (False, True):
        args = (s.values, b, *s.topology.lists(False), None, torch.ones(32), 32, False, transposed_out, 1)
        opcheck(torch.ops.fmkernels.block_sparse_dsd.default, args)
    rows = (s.topology.row_indices, s.topology.column_indices)
    args = (normal(1, 32, 8, dtype=dtype), b.mT, *rows, None, None, 16, 16, 0)
    opcheck(torch.ops.fmkernels.block_sparse_sdd.default, args)


def test_compiled_to_one_graph():
    s, a, b = matrix((32, 48), 16), normal(8, 32), normal(48, 8)
    of = s.topology
    of.lists(True)
    assert torch.equal(torch.compile(dsd, fullgraph=True, backend="aot_eager")(s, b), dsd(s, b))
    assert torch.equal(torch.compile(dds, fullgraph=True, backend="aot_eager")(a, s), dds(a, s))
    blocks = torch.compile(sdd, fullgraph=True, backend="aot_eager")(a.mT, b.mT, of)
    assert torch.equal(blocks.values, sdd(a.mT, b.mT, of).values)


def test_autocast_and_flops():
    s, b = matrix((32, 48), 16, pad=0.0), normal(48, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dsd(s, b), dsd(s.to(torch.bfloat16), b.bfloat16()))
        assert torch.equal(dds(b.mT, s.t()), dds(b.bfloat16().mT, s.to(torch.bfloat16).t()))
        assert sdd(b.mT, b, topology((8, 8), 16)).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        dsd(s, b)
    assert counter.get_total_flops() == 2 * s.num_blocks * 256 * 8
    with FlopCounterMode(display=False) as counter:
        sdd(b.mT, b, topology((8, 8), 16, 1.0))
    assert counter.get_total_flops() == 2 * 256 * 48
