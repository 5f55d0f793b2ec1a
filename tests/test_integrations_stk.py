# SPDX-License-Identifier: Apache-2.0
"""integrations.stk against masked dense matrices: products, gradients, forms. Errors stand in
test_integrations_stk_errors.py."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F

from fmkernels import BlockSparse, topology_moe
from fmkernels.integrations import stk
from fmkernels.testing import assert_as_good_as_torch, backends

BLOCKINGS = [16, 32, 64, 128]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_TRANSPOSE = pytest.mark.parametrize(
    "transposed", list(itertools.product([False, True], repeat=2)), ids=lambda pair: "".join("nt"[t] for t in pair)
)


def transposed_if(is_transposed, x):
    return x.t() if is_transposed else x


def pair(rows, cols, sparsity, blocking, dtype=torch.float32):
    """(dense, sparse) of the same numbers, zeros in the blocks that are not stored."""
    dense = (torch.randn(rows, cols) * stk.random.dense_mask(rows, cols, sparsity, blocking)).to(dtype)
    return dense, stk.ops.to_sparse(dense, blocking)


def stored(x):
    """[rows, cols] bool of the matrix as it is stored."""
    return BlockSparse.of(torch.ones(x.data.shape), x.topology).to_dense() != 0


def gradients(function, grad, *inputs):
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(leaves[0]))


def check_gradients(found, function, grad, *inputs, dtype):
    """Each of them against the same one of the dense function; a gradient passes through results of the dtype."""
    for place, one in enumerate(found):
        expected = lambda *args, place=place: gradients(function, grad, *args)[place]  # noqa: E731
        assert_as_good_as_torch(one, expected, *inputs, computed_in=None if dtype == torch.float32 else dtype)


def on_blocks(x, function):
    """The dense function of two operands that sees only what the blocks of x hold: its gradient has zeros elsewhere."""
    mask = stored(x)
    return lambda sparse, dense: function(torch.where(mask, sparse, 0), dense)


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_TRANSPOSE
@pytest.mark.parametrize("blocking", BLOCKINGS)
@pytest.mark.parametrize("product", ["dsd", "dds"])
def test_products_and_gradients_of_a_sparse_operand(product, blocking, transposed, dtype):
    rows, inner, columns = 2 * blocking, 3 * blocking, 40
    sparse_first = product == "dsd"
    outer = rows if sparse_first else columns
    of_sparse, of_dense = transposed if sparse_first else transposed[::-1]
    size = (rows, inner) if sparse_first else (inner, rows)
    whole, x = pair(*(size[::-1] if of_sparse else size), 0.5, blocking, dtype)
    size = (inner, columns) if sparse_first else (columns, inner)
    dense = torch.randn(size[::-1] if of_dense else size).to(dtype).requires_grad_()
    x.requires_grad_(True)
    grad = torch.randn(outer, columns if sparse_first else rows).to(dtype)

    def run(sparse, dense, multiply):
        sparse, dense = transposed_if(of_sparse, sparse), transposed_if(of_dense, dense)
        return multiply(sparse, dense) if sparse_first else multiply(dense, sparse)

    def expected(sparse, dense):
        return run(sparse, dense, torch.matmul)

    out = run(x, dense, getattr(stk.ops, product))
    assert_as_good_as_torch(out, expected, whole, dense)
    out.backward(grad)
    assert x.grad.data is x.data.grad
    assert x.grad.size() == x.size()
    found = (stk.ops.to_dense(x.grad), dense.grad)
    check_gradients(found, on_blocks(x, expected), grad, whole, dense, dtype=dtype)
    of_transpose = stk.ops.to_dense(x.t().grad)
    assert torch.equal(of_transpose, stk.ops.to_dense(x.grad).t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY_TRANSPOSE
@pytest.mark.parametrize("blocking", BLOCKINGS)
def test_sdd_and_its_gradients(blocking, transposed, dtype):
    rows, columns, inner = 2 * blocking, 3 * blocking, 40
    topo = stk.random.mask(rows, columns, 0.5, blocking)
    sizes = (rows, inner), (inner, columns)
    a, b = (
        torch.randn(size[::-1] if is_transposed else size).to(dtype).requires_grad_()
        for size, is_transposed in zip(sizes, transposed, strict=True)
    )
    grad = torch.randn(rows, columns).to(dtype)
    mask = stored(topo)

    def operands(a, b):
        return transposed_if(transposed[0], a), transposed_if(transposed[1], b)

    def expected(a, b):
        a, b = operands(a, b)
        return torch.where(mask, a @ b, 0)

    out = stk.ops.sdd(*operands(a, b), topo)
    assert out.dtype == dtype
    assert out.topology is topo.topology, "the lists are made once"
    assert_as_good_as_torch(stk.ops.to_dense(out), expected, a, b)
    out.data.backward(BlockSparse.from_dense(grad, mask=topo.topology).values)
    check_gradients((a.grad, b.grad), expected, grad, a, b, dtype=dtype)


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
def test_from_every_block_to_none(sparsity):
    whole, x = pair(64, 96, sparsity, 16)
    b = torch.randn(96, 20)
    assert_as_good_as_torch(stk.ops.dsd(x, b), torch.matmul, whole, b)
    assert_as_good_as_torch(stk.ops.dds(b.t(), x.t()), torch.matmul, b.t(), whole.t())
    assert torch.equal(stk.ops.to_dense(stk.ops.sdd(torch.ones(64, 8), torch.ones(8, 96), x)) != 0, stored(x))


@pytest.mark.parametrize("backend", backends("block_sparse_dsd"), ids=str)
def test_every_backend(backend):
    whole, x = pair(128, 192, 0.5, 64, torch.bfloat16)
    b = torch.randn(192, 40).bfloat16().to(backend.device)
    x, whole = x.to(backend.device), whole.to(backend.device)
    out = backend.run(stk.ops.dsd, x, b)
    assert_as_good_as_torch(out, torch.matmul, whole, b)
    assert_as_good_as_torch(backend.run(stk.ops.dds, b.t(), x.t()), torch.matmul, b.t(), whole.t())
    mask = stored(x.clone().to("cpu")).to(backend.device)
    blocks = backend.run(stk.ops.sdd, out, b.t(), x)
    expected = lambda a, b: torch.where(mask, a @ b, 0)  # noqa: E731
    assert_as_good_as_torch(stk.ops.to_dense(blocks), expected, out, b.t())


def experts_topology(dtype=torch.float32):
    """As a dropless mixture of experts makes it: int16 indices, offsets by arithmetic, data that is not there."""
    of = topology_moe(torch.tensor([32, 32, 96]), 96, 48, 16)
    data = torch.empty(of.num_blocks, 16, 16, dtype=dtype, device="meta")
    rows = stk.ops.row_indices((96, 144), data, of.row_offsets, of.column_indices.short())
    columns = (t.short() for t in (of.lists(True)[1], of.lists(True)[0][0], of.lists(True)[2]))
    return stk.Matrix((96, 144), data, rows, of.column_indices.short(), of.row_offsets, *columns)


def test_a_layer_of_experts_trains():
    topo = experts_topology()
    assert topo.device.type == "meta"
    x, w_gate, w_up, w_down = (
        t.requires_grad_() for t in (torch.randn(96, 40), *(torch.randn(144, 40) for _ in range(3)))
    )
    mask, grad = stored(topo), torch.randn(96, 40)

    def activated(m):
        columns = m.column_indices_t, m.offsets_t, m.block_offsets_t
        return stk.Matrix(m.size(), F.silu(m.data), m.row_indices, m.column_indices, m.offsets, *columns)

    def layer(x, w_gate, w_up, w_down):
        gate, up = stk.ops.sdd(x, w_gate.t(), topo), stk.ops.sdd(x, w_up.t(), topo)
        return stk.ops.dsd(stk.ops.mul(activated(gate), up), w_down)

    def expected(x, w_gate, w_up, w_down):
        return torch.where(mask, F.silu(x @ w_gate.t()) * (x @ w_up.t()), 0) @ w_down

    leaves = (x, w_gate, w_up, w_down)
    out = layer(*leaves)
    assert_as_good_as_torch(out, expected, *leaves)
    out.backward(grad)
    check_gradients([t.grad for t in leaves], expected, grad, *leaves, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(compiled, out)
    found = torch.autograd.grad(compiled, leaves, grad)
    assert all(map(torch.equal, found, [t.grad for t in leaves]))


# ---- the rest of stk.ops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_transposed", [False, True])
def test_mul_sum_and_ones_like(is_transposed):
    whole, x = pair(64, 96, 0.5, 32)
    other = x.clone().to(torch.float64).to(torch.float32).requires_grad_(True)
    x.requires_grad_(True)
    out = stk.ops.mul(transposed_if(is_transposed, x), transposed_if(is_transposed, other))
    assert out.size() == ((96, 64) if is_transposed else (64, 96))
    assert torch.equal(stk.ops.to_dense(out), transposed_if(is_transposed, whole * whole))
    total = stk.ops.sum(out)
    assert_as_good_as_torch(total, lambda x: x.square().sum(), whole)
    total.backward()
    assert torch.equal(stk.ops.to_dense(x.grad), whole)
    assert torch.equal(other.data.grad, x.data)
    ones = stk.ops.ones_like(transposed_if(is_transposed, x))
    assert torch.equal(stk.ops.to_dense(ones), transposed_if(is_transposed, stored(x)).float())
    assert not ones.requires_grad
    assert not stk.ops.to_dense(x).requires_grad, "as in stk"


def test_row_indices():
    _, x = pair(96, 64, 0.4, 16)
    rows = stk.ops.row_indices((2, 48, 64), x.data, x.offsets, x.column_indices.short())
    assert rows.dtype == torch.int32
    assert torch.equal(rows, torch.repeat_interleave(x.offsets.diff()).int())


@pytest.mark.parametrize("blocking", [1, 5, 16])
def test_dense_mask_has_whole_blocks_and_the_share_that_was_asked_for(blocking):
    mask = stk.random.dense_mask(8 * blocking, 5 * blocking, 0.35, blocking)
    assert mask.dtype == torch.float32
    blocks = mask.view(8, blocking, 5, blocking).transpose(1, 2).flatten(2)
    assert torch.equal(blocks.amin(-1), blocks.amax(-1))
    assert blocks[..., 0].sum() == 26
    torch.manual_seed(5)
    again = [stk.random.dense_mask(64, 64, 0.5, 16) for _ in range(2)]
    torch.manual_seed(5)
    assert torch.equal(stk.random.dense_mask(64, 64, 0.5, 16), again[0])
    assert not torch.equal(*again)


def test_random_matrices():
    x = stk.random.mask(64, 96, 0.5, 16)
    assert (x.dtype, x.nnz, x.size()) == (torch.float16, 12 * 256, (64, 96))
    assert torch.equal(stk.ops.to_dense(x).float(), stored(x).float())
    x = stk.random.randn((3, 128, 64), 0.5, 32)
    assert x.size() == (3, 128, 64)
    assert x.dtype == torch.float16
    assert 0.9 < x.data.float().std() < 1.1
    assert stk.ops.to_dense(x).shape == (3, 128, 64)


# ---- forms -----------------------------------------------------------------------------------------------------------


def test_what_a_matrix_says_of_itself():
    _, x = pair(64, 96, 0.5, 32, torch.bfloat16)
    assert (x.dim(), x.size(), x.shape, x.blocking, x.nnz) == (2, (64, 96), (64, 96), 32, 3 * 1024)
    assert (x.dtype, x.device, x.is_cuda, x.requires_grad) == (torch.bfloat16, torch.device("cpu"), False, False)
    assert isinstance(x.size(), torch.Size)
    assert x.grad is None
    assert x.requires_grad_(True) is x
    assert x.requires_grad
    assert repr(x.t()) == "stk.Matrix(size=(96, 64), blocking=32, num_blocks=3, dtype=torch.bfloat16, device=cpu, " \
        "transposed)"  # fmt: skip


def test_indices_are_those_of_the_transpose_too():
    _, x = pair(96, 160, 0.6, 16)
    t = stk.ops.to_sparse(stk.ops.to_dense(x.t()), 16)
    assert torch.equal(x.column_indices_t, t.column_indices)
    assert torch.equal(x.offsets_t, t.offsets)
    assert torch.equal(x.data[x.block_offsets_t].mT, t.data)
    assert torch.equal(x.t().offsets, x.offsets), "a flag is turned, no index"
    again = stk.Matrix(x.size(), x.data, x.row_indices, x.column_indices, x.offsets)
    assert torch.equal(again.block_offsets_t, x.block_offsets_t)
    partly = stk.Matrix(x.size(), x.data, x.row_indices, x.column_indices, x.offsets, offsets_t=x.offsets_t)
    assert torch.equal(partly.block_offsets_t, x.block_offsets_t)


def test_there_and_back():
    whole, x = pair(96, 160, 0.6, 32)
    assert torch.equal(stk.ops.to_dense(x), whole)
    assert torch.equal(stk.ops.to_dense(x.t()), whole.t())
    assert torch.equal(stk.ops.to_dense(x.t().t()), whole)
    assert x.t().data is x.data
    s = x.t().block_sparse()
    assert torch.equal(s.to_dense(), whole.t())
    of = s.topology
    back = stk.Matrix(of.shape, s.values, of.row_indices, of.column_indices, of.row_offsets)
    assert torch.equal(stk.ops.to_dense(back), whole)


def test_contiguous_moves_the_blocks_of_a_transpose():
    whole, x = pair(96, 160, 0.6, 32)
    x.requires_grad_(True)
    assert x.is_contiguous()
    assert x.contiguous() is x
    t = x.t()
    assert not t.is_contiguous()
    moved = t.contiguous()
    assert moved.is_contiguous()
    assert moved.size() == (160, 96)
    assert torch.equal(stk.ops.to_dense(moved), whole.t())
    weight = torch.randn_like(moved.data)
    (moved.data * weight).sum().backward()
    assert torch.equal(stk.ops.to_dense(x.grad).t(), BlockSparse.of(weight, moved.topology).to_dense())


def test_views_clones_and_moves():
    whole, x = pair(96, 64, 0.5, 16)
    view = x.view(2, 48, 64)
    assert view.data is x.data
    assert torch.equal(stk.ops.to_dense(view), whole.view(2, 48, 64))
    assert torch.equal(stk.ops.to_dense(view.view(96, 64)), whole)
    clone = x.t().clone()
    clone.data.zero_()
    assert torch.equal(stk.ops.to_dense(x), whole)
    assert clone.size() == (64, 96)
    assert not clone.is_contiguous()
    assert x.to(torch.bfloat16) is x
    assert x.dtype == torch.bfloat16
    assert torch.equal(stk.ops.to_dense(x), whole.bfloat16())
    assert x.to("meta").column_indices.device.type == "meta"


def test_other_libraries_find_it_under_the_name_of_stk(monkeypatch):
    for name in ("", ".ops", ".random", ".matrix"):
        monkeypatch.setitem(sys.modules, f"stk{name}", sys.modules[f"fmkernels.integrations.stk{name}"])
    import stk as theirs
    import stk.ops
    from stk.matrix import Matrix

    assert theirs.ops.dsd is stk.ops.dsd
    assert Matrix is theirs.Matrix
