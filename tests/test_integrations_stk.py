# SPDX-License-Identifier: Apache-2.0
"""integrations.stk against masked dense matrices: products, gradients, forms, and the sentences of its errors."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F

from fmkernels import BlockSparse, _library, topology_moe
from fmkernels.integrations import stk
from fmkernels.testing import assert_as_good_as_torch

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
    return BlockSparse.of(torch.ones_like(x.data), x.topology).to_dense() != 0


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
    mask, grad = stored(stk.Matrix._of(topo.size(), torch.empty(topo.data.shape), topo.topology)), torch.randn(96, 40)

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
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves), out)


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
    assert torch.equal(stk.ops.to_dense(x.grad).t(), stk.ops.to_dense(moved._with_data(weight)))


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
    import sys

    for name in ("", ".ops", ".random", ".matrix"):
        monkeypatch.setitem(sys.modules, f"stk{name}", sys.modules[f"fmkernels.integrations.stk{name}"])
    import stk as theirs
    import stk.ops
    from stk.matrix import Matrix

    assert theirs.ops.dsd is stk.ops.dsd
    assert Matrix is theirs.Matrix


# ---- errors ----------------------------------------------------------------------------------------------------------

#   . 0 1
#   . . .
#   2 . 3
OFFSETS, COLUMNS, ROWS = (torch.tensor(t, dtype=torch.int32) for t in ([0, 2, 2, 4], [1, 2, 0, 2], [0, 0, 2, 2]))
COLUMNS_T, OFFSETS_T, BLOCKS_T = (
    torch.tensor(t, dtype=torch.int32) for t in ([2, 0, 0, 2], [0, 1, 2, 4], [2, 0, 1, 3])
)
DATA = torch.zeros(4, 16, 16)
GIVEN = {
    "size": (48, 48),
    "data": DATA,
    "row_indices": ROWS,
    "column_indices": COLUMNS,
    "offsets": OFFSETS,
    "column_indices_t": COLUMNS_T,
    "offsets_t": OFFSETS_T,
    "block_offsets_t": BLOCKS_T,
}
X = stk.Matrix(**GIVEN)

ERRORS_OF_A_MATRIX = [
    ("size", (48,), "size must be at least 2 numbers, none negative, got (48,)."),
    ("size", (50, 48), "rows and columns must be multiples of the blocking, 16, got (50, 48)."),
    ("size", (64, 48), "offsets must have one for each row of blocks and one more, 5, got 4."),
    (
        "data",
        torch.zeros(4, 8, 8),
        "data must be [num_blocks, blocking, blocking] with a blocking of 16, 32, 64 or 128, got [4, 8, 8].",
    ),
    (
        "data",
        torch.zeros(4, 16, 32),
        "data must be [num_blocks, blocking, blocking] with a blocking of 16, 32, 64 or 128, got [4, 16, 32].",
    ),
    ("data", torch.zeros(3, 16, 16), "column_indices must have one for each block, 3, got 4."),
    ("row_indices", ROWS[1:], "row_indices must have one for each block, 4, got 3."),
    ("row_indices", ROWS + 1, "row_indices must be the rows that offsets give, got 1 for block 0 of row 0."),
    ("column_indices", COLUMNS.long(), "column_indices must be int32 or int16, got int64."),
    ("column_indices", COLUMNS.to("meta"), "column_indices must be on the device of offsets, cpu, got meta."),
    ("offsets", OFFSETS[None], "offsets must be a vector, got 2 dimensions [1, 4]."),
    ("offsets", OFFSETS + 1, "offsets must begin with 0, got 1."),
    ("offsets", torch.tensor([0, 3, 2, 4]).int(), "offsets must not decrease, got 3 before 2."),
    ("offsets", torch.tensor([0, 2, 2, 3]).int(), "offsets must end with the number of blocks, 4, got 3."),
    ("column_indices_t", COLUMNS_T + 1, "column_indices_t must be the rows of the blocks that block_offsets_t names."),
    ("offsets_t", OFFSETS_T.long(), "offsets_t must be int32 or int16, got int64."),
    ("offsets_t", torch.tensor([0, 1, 2, 5]).int(), "offsets_t must end with the number of blocks, 4, got 5."),
    ("block_offsets_t", BLOCKS_T + 1, "block_offsets_t must be from 0 to 3."),
]
ERRORS_OF_A_MATRIX += [
    (
        name,
        torch.tensor(wrong).int(),
        "block_offsets_t must name each block once, column by column as offsets_t counts them, from the first row to "
        "the last.",
    )
    for name, wrong in (
        ("block_offsets_t", [2, 0, 3, 1]),
        ("block_offsets_t", [2, 0, 0, 3]),
        ("block_offsets_t", [0, 2, 1, 3]),
        ("offsets_t", [0, 2, 2, 4]),
    )
]


@pytest.mark.parametrize(("name", "value", "sentence"), ERRORS_OF_A_MATRIX)
def test_indices_that_make_no_matrix(name, value, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(f'stk.Matrix: {sentence}')}$"):
        stk.Matrix(**(GIVEN | {name: value}))


def test_wrong_columns_are_named_by_the_topology():
    for wrong, sentence in (
        ([1, 3, 0, 2], "column_indices must be from 0 to 2, got 3."),
        ([2, 1, 0, 2], "column_indices must ascend within a row of blocks, got column 1 of row 0 not in order."),
    ):
        with pytest.raises(ValueError, match=f"^BlockTopology: {re.escape(sentence)}$"):
            stk.Matrix((48, 48), DATA, ROWS, torch.tensor(wrong).int(), OFFSETS)


def test_indices_are_not_looked_at_on_a_device(monkeypatch):
    """On CUDA, for which meta stands here, they are trusted, unless FMKERNELS_CHECK=1."""
    monkeypatch.setattr(_library, "check_values", False)
    given = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in GIVEN.items()}
    assert stk.Matrix(**given).block_offsets_t.shape == (4,)


OF_HALVES = stk.random.mask(48, 48, 0.5, 16)
B = torch.ones(48, 8)
ERRORS = [
    (lambda: stk.ops.dsd(DATA, B), TypeError, "stk.ops.dsd: a must be a stk.Matrix, got Tensor."),
    (lambda: stk.ops.dsd(X, B[1:]), ValueError, "dsd: b must have for this s, of shape (48, 48), size 48, got 47."),
    (lambda: stk.ops.dsd(OF_HALVES, B), ValueError, "dsd: b must have the dtype of s, float16, got float32."),
    (lambda: stk.ops.dds(B, B), TypeError, "stk.ops.dds: b must be a stk.Matrix, got Tensor."),
    (lambda: stk.ops.dds(X, X), TypeError, "dds: a must be a tensor, got Matrix."),
    (
        lambda: stk.ops.dsd(X.view(3, 16, 48), B),
        ValueError,
        "stk.Matrix: a matrix that is multiplied must have 2 dimensions, got (3, 16, 48).",
    ),
    (
        lambda: stk.ops.dsd(experts_topology(), torch.ones(144, 8)),
        ValueError,
        "BlockSparse: values must be on the device of the topology, cpu, got meta.",
    ),
    (lambda: stk.ops.sdd(B, B.t(), DATA), TypeError, "stk.ops.sdd: topo must be a stk.Matrix, got Tensor."),
    (
        lambda: stk.ops.sdd(B, B.t(), X.t()),
        ValueError,
        "stk.ops.sdd: topo must not be transposed; topo.contiguous() is not.",
    ),
    (
        lambda: stk.ops.sdd(B, B.t(), X.view(3, 16, 48)),
        ValueError,
        "stk.ops.sdd: topo must have 2 dimensions, got (3, 16, 48).",
    ),
    (lambda: stk.ops.to_sparse(B), ValueError, "stk.ops.to_sparse: blocking must be 16, 32, 64 or 128, got 1."),
    (
        lambda: stk.ops.to_sparse(B, 16),
        ValueError,
        "stk.ops.to_sparse: x must have multiples of 16 rows and columns, got [48, 8].",
    ),
    (
        lambda: stk.ops.mul(X, stk.random.mask(48, 64, 0.5, 16)),
        ValueError,
        "stk.ops.mul: b must have the size of a, (48, 48), got (48, 64).",
    ),
    (
        lambda: stk.ops.mul(X, X.t()),
        ValueError,
        "stk.ops.mul: a and b must both be transposed, or neither of them.",
    ),
    (
        lambda: stk.ops.mul(X, stk.ops.to_sparse(torch.ones(48, 48), 16)),
        ValueError,
        "stk.ops.mul: the data of b must have the shape of that of a, [4, 16, 16], got [9, 16, 16].",
    ),
    (
        lambda: stk.ops.mul(X, X.t().contiguous()),
        ValueError,
        "stk.ops.mul: a and b must store the same blocks.",
    ),
    (
        lambda: X.view(48, 48).view(2, 24, 48).t(),
        ValueError,
        "stk.Matrix.t: the matrix must have 2 dimensions, got (2, 24, 48).",
    ),
    (lambda: X.t().view(48, 48), ValueError, "stk.Matrix.view: the matrix must not be transposed."),
    (
        lambda: X.view(3, 48),
        ValueError,
        "stk.Matrix.view: shape must have the 48 columns and 48 rows of the matrix, got (3, 48).",
    ),
    (
        lambda: stk.random.dense_mask(48, 50, 0.5, 16),
        ValueError,
        "stk.random.dense_mask: cols must be a multiple of the blocking, 16, got 50.",
    ),
    (
        lambda: stk.random.dense_mask(48, 48, 1.5, 16),
        ValueError,
        "stk.random.dense_mask: sparsity must be from 0 to 1, got 1.5.",
    ),
    (lambda: stk.random.mask(48, 48, 0.5), ValueError, "stk.random.mask: blocking must be 16, 32, 64 or 128, got 1."),
    (lambda: stk.random.randn(48, 0.5, 16), ValueError, "stk.random.randn: shape must be at least 2 numbers, got 48."),
]


@pytest.mark.parametrize(("run", "kind", "sentence"), ERRORS, ids=[sentence for *_, sentence in ERRORS])
def test_errors(run, kind, sentence):
    with pytest.raises(kind) as raised:
        run()
    assert str(raised.value) == sentence
