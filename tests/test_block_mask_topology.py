# SPDX-License-Identifier: Apache-2.0
"""BlockMask.from_topology: attention over the blocks of a topology, against torch's with a dense mask."""

import re

import pytest
import torch
import torch.nn.functional as F
from test_attention_backward import check, on

from fmkernels import BlockMask, BlockTopology, attention, create_block_mask, reference
from fmkernels.testing import Case, assert_as_good_as_torch, assert_attention, backends

BACKENDS = backends("attention_backward")
BLOCKS = [16, 32, 64, 128, (64, 16), (32, 128), (64, 128)]
SEQ_Q, SEQ_K = 130, 330


def topology(block, *batch, seq_q=SEQ_Q, seq_k=SEQ_K, density=0.5):
    """The first row of blocks has none, where there are more."""
    rows, columns = (block, block) if isinstance(block, int) else block
    mask = torch.rand(*batch, -(-seq_q // rows), -(-seq_k // columns)) < density
    mask[..., 0, :] &= mask.shape[-2] == 1
    return BlockTopology.from_mask(mask, block, (*batch, seq_q, seq_k))


def dense(of):
    """[.., seq_q, seq_k] bool, from the lists."""
    rows, columns = of.block
    visible = torch.zeros(of.num_lists, *of.shape[-2:], dtype=torch.bool)
    for row, column in zip(of.row_indices.tolist(), of.column_indices.tolist(), strict=True):
        which, row = divmod(row, of.num_block_rows)
        visible[which, row * rows : (row + 1) * rows, column * columns : (column + 1) * columns] = row >= 0
    return visible.view(of.shape)


# ---- the mask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(("batch", "heads"), [(None, None), (2, None), (None, 3), (2, 3)])
def test_the_mask_is_that_of_the_blocks(batch, heads, block):
    of = topology(block, *([(batch or 1) * (heads or 1)] if batch or heads else []))
    mask = BlockMask.from_topology(of, batch=batch, heads=heads)
    assert mask.shape == (batch or 1, heads or 1, SEQ_Q, SEQ_K)
    visible = dense(of).view(mask.shape)
    assert torch.equal(mask.to_dense(), visible)
    mask.check_values()
    made = create_block_mask(lambda b, h, i, j: visible[b, h, i, j], batch, heads, SEQ_Q, SEQ_K, block=mask.block)
    assert all(map(torch.equal, mask.tensors, made.tensors))


@pytest.mark.parametrize("block", [64, 128])
def test_blocks_of_its_own_size_stay_as_they_are_listed(block, monkeypatch):
    monkeypatch.delattr("fmkernels.block_mask.build")
    of = topology(block)
    mask = BlockMask.from_topology(of)
    assert mask.block == block
    assert torch.equal(mask.column_indices, of.column_indices)
    assert mask.tiles.shape == (0, block, block // 32)


@pytest.mark.parametrize("block", [32, 64])
def test_blocks_that_no_row_lists_are_not_seen(block):
    offsets, indices = torch.tensor([0, 2, 2, 3]), torch.tensor([0, 1, 1, 0, 1])
    of = BlockTopology(offsets.int(), indices.int(), (3 * block, 2 * block), block)
    assert torch.equal(of.to_mask(), torch.tensor([[1, 1], [0, 0], [0, 1]]).bool())
    mask = BlockMask.from_topology(of)
    mask.check_values()
    visible = of.to_mask().repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert torch.equal(mask.to_dense()[0, 0], visible)


@pytest.mark.parametrize("sizes", [(0, 100), (100, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("block", [16, 64])
def test_nothing_to_see_and_one_pair(sizes, block):
    stored = torch.ones([-(-size // block) for size in sizes], dtype=torch.bool)
    of = BlockTopology.from_mask(stored, block, sizes)
    assert torch.equal(of.to_mask(), stored)
    mask = BlockMask.from_topology(of)
    assert mask.to_dense().shape == (1, 1, *sizes)
    assert mask.to_dense().all()


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_attention_is_that_of_torch_with_the_dense_mask(block, causal):
    of = topology(block, 6)
    mask = BlockMask.from_topology(of, batch=2, heads=3)
    q, k, v = (torch.randn(2, seq, 3, 16) for seq in (SEQ_Q, SEQ_K, SEQ_K))
    visible, grad = dense(of).view(2, 3, SEQ_Q, SEQ_K), torch.randn(q.shape)
    if causal:
        visible = visible & (torch.arange(SEQ_K) <= torch.arange(SEQ_Q)[:, None] + SEQ_K - SEQ_Q)

    def with_gradients(function, q, k, v, grad):
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            o = function(*leaves)
            return o, *torch.autograd.grad(o, leaves, grad)

    def of_torch(*tensors):
        o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors), attn_mask=visible)
        return o.transpose(1, 2)

    found = with_gradients(lambda *x: attention(*x, block_mask=mask, causal=causal), q, k, v, grad)
    assert_as_good_as_torch(found, lambda *x: with_gradients(of_torch, *x), q, k, v, grad)
    assert (found[0][~visible.any(-1).transpose(1, 2)] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_every_backend(block, backend):
    mask = BlockMask.from_topology(topology(block, 4), batch=2, heads=2)
    case = on(backend, Case(f"block {block}", seq_q=SEQ_Q, seq_k=SEQ_K, heads=2, kv_heads=1, block_mask=mask))
    args, kwargs = case.inputs(backend.device)
    actual = backend.run(attention, *args, return_lse=True, **kwargs)
    assert_attention(backend, actual, reference.attention, *args, **kwargs)
    check(backend, case)


# ---- errors ----------------------------------------------------------------------------------------------------------

OF = BlockTopology.from_mask(torch.ones(6, 2, 2, dtype=torch.bool), 64)


@pytest.mark.parametrize(
    ("run", "error", "sentence"),
    [
        (
            lambda: BlockMask.from_topology(OF.to_mask()),
            TypeError,
            "topology must be a fmkernels.BlockTopology, got Tensor.",
        ),
        (
            lambda: BlockMask.from_topology(OF, batch=2),
            ValueError,
            "topology must have as many matrices as there are masks, 2 by batch and heads, got 6.",
        ),
        (
            lambda: BlockMask.from_topology(OF),
            ValueError,
            "topology must have as many matrices as there are masks, 1 by batch and heads, got 6.",
        ),
        (lambda: BlockMask.from_topology(OF, heads=0), ValueError, "heads must be at least 1, got 0."),
        (lambda: BlockMask.from_topology(OF, batch=2.0), TypeError, "batch must be an integer, got float."),
    ],
)
def test_errors(run, error, sentence):
    with pytest.raises(error, match=f"^BlockMask.from_topology: {re.escape(sentence)}$"):
        run()
