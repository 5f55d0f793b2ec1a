# SPDX-License-Identifier: Apache-2.0
"""integrations.stk: indices that make no matrix, and the sentences of all other errors."""

import re

import pytest
import torch

from fmkernels import _library
from fmkernels.integrations import stk

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
        lambda: stk.ops.dsd(stk.Matrix(**(GIVEN | {"data": DATA.to("meta")})), B),
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
        lambda: X.view(-3, -16, 48),
        ValueError,
        "stk.Matrix.view: shape must have the 48 columns and 48 rows of the matrix, got (-3, -16, 48).",
    ),
    (
        lambda: X.view(3.0, 16, 48),
        ValueError,
        "stk.Matrix.view: shape must have the 48 columns and 48 rows of the matrix, got (3.0, 16, 48).",
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
