# SPDX-License-Identifier: Apache-2.0
"""BlockMask: built from a function, converted from torch's, held to its layout; and its errors.

Attention with one stands in test_attention_block_mask.py.
"""

import dataclasses
import re

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from fmkernels import BlockMask, _block_mask_build, create_block_mask

DOCUMENTS = torch.tensor([[0] * 70 + [1] * 100 + [2] * 3 + [3] * 227, [0] * 128 + [1] * 200 + [2] * 72])
PREFIX = torch.tensor([90, 17])

# name: (mask, whether it differs between batch entries, between heads)
MASKS = {
    "documents": (lambda b, h, i, j: DOCUMENTS[0, i] == DOCUMENTS[0, j], False, False),
    "documents of each sequence": (lambda b, h, i, j: DOCUMENTS[b, i] == DOCUMENTS[b, j], True, False),
    "prefix": (lambda b, h, i, j: (j <= i) | (j < PREFIX[b]), True, False),
    "dilated": (lambda b, h, i, j: (i - j) % 3 == 0, False, False),
    "sliding and global": (lambda b, h, i, j: ((i - j).abs() <= 20) | (j < 5) | (i < 5), False, False),
    "a window of each head": (lambda b, h, i, j: (i - j).abs() <= 10 + 40 * h, False, True),
    "one short row": (lambda b, h, i, j: (i != 130) | (j < 32), False, False),
    "few queries of one head": (lambda b, h, i, j: (i < 64) | (h > 0), False, True),
    "stripes": (lambda b, h, i, j: ((i + 9 * h) // 32 + j // 50 + b) % 3 == 0, True, True),
    "one hidden key": (lambda b, h, i, j: j != 70, False, False),  # the smallest hole
    "blocks": (lambda b, h, i, j: (i // 128 + j // 128) % 2 == 0, False, False),
    "rows that see nothing": (lambda b, h, i, j: (i // 70 % 2 == 0) & (j > i), False, False),
    "causal": (lambda b, h, i, j: j <= i, False, False),
    "everything": (lambda b, h, i, j: i >= 0, False, False),
    "nothing": (lambda b, h, i, j: i < 0, False, False),
}
SIZES = [(400, 400), (128, 256), (130, 63), (1, 65), (5, 3)]


def arguments(name, seq_q, seq_k, batch=2, heads=4):
    """Of create_block_mask, torch's and ours."""
    mask, of_batch, of_heads = MASKS[name]
    return mask, batch if of_batch else None, heads if of_heads else None, seq_q, seq_k


def dense(mask, batch, heads, seq_q, seq_k):
    """The mask by its definition."""
    b, h = (torch.arange(n or 1) for n in (batch, heads))
    i, j = torch.arange(seq_q), torch.arange(seq_k)
    visible = mask(b[:, None, None, None], h[:, None, None], i[:, None], j)
    return visible.expand(batch or 1, heads or 1, seq_q, seq_k)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
@pytest.mark.parametrize("name", MASKS)
def test_the_mask_is_that_of_the_function(name, seq_q, seq_k, block):
    args = arguments(name, seq_q, seq_k)
    mask = create_block_mask(*args, block=block)
    assert torch.equal(mask.to_dense(), dense(*args))
    assert mask.block == block
    assert mask.shape == (args[1] or 1, args[2] or 1, seq_q, seq_k)
    mask.check_values()


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_only_blocks_with_a_visible_pair_are_listed_and_whole_ones_have_no_tile(name, block):
    args = arguments(name, 400, 333)
    mask = create_block_mask(*args, block=block)
    num_visible, size = (
        torch.nn.functional.pad(t.int(), (0, -333 % block, 0, -400 % block))
        .unflatten(-1, (-1, block))
        .unflatten(-3, (-1, block))
        .sum((-3, -1))
        for t in (dense(*args), torch.ones(400, 333))
    )
    listed = num_visible.nonzero()
    assert mask.column_indices.tolist() == listed[:, 3].tolist()
    assert (mask.tile_idx == -1).tolist() == (num_visible == size)[tuple(listed.T)].tolist()
    assert mask.row_offsets.diff(dim=-1).tolist() == (num_visible > 0).sum(-1).tolist()
    assert mask.sparsity == pytest.approx(1 - len(listed) / num_visible.numel())
    assert len({tuple(tile) for tile in mask.tiles.flatten(1).tolist()}) == len(mask.tiles), "two tiles are alike"


@pytest.mark.parametrize("name", MASKS)
def test_the_lists_of_key_blocks_hold_the_same_blocks(name):
    mask = create_block_mask(*arguments(name, 400, 333), block=64)

    def blocks(offsets, indices, tile_idx):
        lines = torch.arange(offsets[..., :-1].numel()).repeat_interleave(offsets.diff(dim=-1).flatten())
        head, line = lines // (offsets.shape[2] - 1), lines % (offsets.shape[2] - 1)
        return head.tolist(), line.tolist(), indices.tolist(), tile_idx.tolist()

    head, row, column, tile = blocks(*mask.tensors[:3])
    head_t, column_t, row_t, tile_t = blocks(*mask.tensors[3:6])
    assert sorted(zip(head, row, column, tile, strict=True)) == sorted(
        zip(head_t, row_t, column_t, tile_t, strict=True)
    )
    assert sorted(zip(head_t, column_t, row_t, strict=True)) == list(zip(head_t, column_t, row_t, strict=True))


def test_the_diagonal_of_a_causal_mask_is_one_tile():
    mask = create_block_mask(*arguments("causal", 1024, 1024))
    assert mask.tiles.shape == (1, 128, 4)
    assert mask.column_indices.numel() == 36


def test_a_bit_of_a_tile_is_a_pair():
    mask = create_block_mask(lambda b, h, i, j: (i == 3) & (j == 66), None, None, 100, 100)
    words = torch.zeros(1, 128, 4, dtype=torch.int32)
    words[0, 3, 2] = 1 << 2
    assert torch.equal(mask.tiles, words)


@pytest.mark.parametrize("strip_elements", [1, 128 * 512, 3 * 128 * 512])
def test_strips_of_queries_have_no_part_in_the_result(strip_elements, monkeypatch):
    """And a strip is the largest thing that is evaluated at a time."""
    args = arguments("documents of each sequence", 400, 400)
    whole = create_block_mask(*args)
    evaluate, sizes = _block_mask_build._evaluate, []

    def note(mask, b, h, queries, seq_k, device):
        sizes.append(len(queries) * seq_k)
        return evaluate(mask, b, h, queries, seq_k, device)

    monkeypatch.setattr(_block_mask_build, "_evaluate", note)
    monkeypatch.setattr(_block_mask_build, "_STRIP_ELEMENTS", strip_elements)
    assert all(map(torch.equal, create_block_mask(*args).tensors, whole.tensors))
    assert max(sizes) <= max(strip_elements, 128 * 400)
    assert sum(sizes) == 2 * 400 * 400


def test_the_function_is_one_that_torch_takes_too():
    """It may index with i and j as with numbers, and reduce: it runs under vmap."""
    codes = torch.randint(0, 2, (150, 8), generator=torch.Generator().manual_seed(0))
    mask = create_block_mask(lambda b, h, i, j: (codes[i] == codes[j]).sum() > 4, None, None, 150, 150, block=64)
    assert torch.equal(mask.to_dense()[0, 0], (codes[:, None] == codes).sum(-1) > 4)


@pytest.mark.parametrize("sizes", [(0, 10), (10, 0), (0, 0)])
def test_nothing_to_see(sizes):
    mask = create_block_mask(*arguments("everything", *sizes))
    assert mask.to_dense().shape == (1, 1, *sizes)
    assert mask.sparsity == 0 or sizes == (10, 0)


# ---- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("seq_q", "seq_k"), SIZES)
@pytest.mark.parametrize("name", MASKS)
def test_the_mask_of_torch_becomes_the_same(name, seq_q, seq_k, block):
    args = arguments(name, seq_q, seq_k)
    theirs = flex.create_block_mask(*args, device="cpu", BLOCK_SIZE=block)
    ours = create_block_mask(*args, block=block)
    converted = BlockMask.from_flex(theirs)
    assert all(map(torch.equal, converted.tensors, ours.tensors))
    assert converted.shape == ours.shape


def test_blocks_that_torch_is_given_count_as_they_are_listed():
    """Partial blocks are what the mask shows of them, whole blocks all of it, even where the mask hides."""
    lists = [
        torch.tensor(x, dtype=torch.int32)[None, None] for x in ([1, 1], [[1, 9], [0, 9]], [0, 1], [[9, 9], [1, 9]])
    ]
    theirs = flex.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=64, mask_mod=lambda b, h, i, j: i > j)
    expected = torch.zeros(128, 128, dtype=torch.bool)
    expected[64:, :64] = True
    expected[64:, 64:] = True
    assert torch.equal(BlockMask.from_flex(theirs).to_dense()[0, 0], expected)
    flat = flex.BlockMask.from_kv_blocks(
        *(t[0, 0] for t in lists[:2]), BLOCK_SIZE=64
    )  # no batch, no heads, no mask_mod
    expected[:64, 64:], expected[64:, 64:] = True, False
    assert torch.equal(BlockMask.from_flex(flat).to_dense()[0, 0], expected)


def test_masks_of_torch_that_cannot_be_converted():
    def made(**kwargs):
        return flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, device="cpu", **kwargs)

    for sizes in ((32, 32), (64, 128), (256, 256)):
        sentence = f"BlockMask.from_flex: BLOCK_SIZE must be (64, 64) or (128, 128), got {sizes}."
        with pytest.raises(ValueError, match=re.escape(sentence)):
            BlockMask.from_flex(made(BLOCK_SIZE=sizes))
    wrong = made()
    wrong.seq_lengths = (100, 256)
    with pytest.raises(ValueError, match=r"seq_lengths must fill the 2 x 2 blocks of 128, got \(100, 256\)\.$"):
        BlockMask.from_flex(wrong)


# ---- the class -------------------------------------------------------------------------------------------------------


def test_what_a_mask_tells_about_itself():
    mask = create_block_mask(*arguments("causal", 256, 256))
    assert repr(mask) == (
        "BlockMask(shape=[1, 1, 256, 256], block=128, device='cpu', blocks=3, partial=2, tiles=1, sparsity=25.0%)"
    )
    there = mask.to("meta")
    assert there.device.type == "meta"
    assert [t.device.type for t in there.tensors] == ["meta"] * 7
    assert [t.shape for t in there.tensors] == [t.shape for t in mask.tensors]
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.seq_q = 3


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((None, None, None, 5, 5), TypeError, "mask must be callable with (b, h, i, j), got NoneType."),
        ((min, 0, None, 5, 5), ValueError, "batch must be at least 1, got 0."),
        ((min, None, 2.0, 5, 5), TypeError, "heads must be an integer, got float."),
        ((min, None, None, -1, 5), ValueError, "seq_q must be at least 0, got -1."),
        ((min, None, None, 5, "5"), TypeError, "seq_k must be an integer, got str."),
        ((lambda b, h, i, j: i - j, None, None, 5, 5), ValueError, "mask must return bool, got int64."),
    ],
)
def test_arguments_that_are_refused(arguments, error, sentence):
    with pytest.raises(error) as caught:
        create_block_mask(*arguments)
    assert str(caught.value) == f"create_block_mask: {sentence}"


@pytest.mark.parametrize("block", [32, 256, 128.5, None])
def test_other_blocks_are_refused(block):
    with pytest.raises(ValueError, match=rf"^create_block_mask: block must be 64 or 128, got {block}\.$"):
        create_block_mask(lambda b, h, i, j: i == j, None, None, 5, 5, block=block)


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("row_offsets", lambda t: t[..., :-1], ValueError),
        ("row_offsets", lambda t: t[0], ValueError),
        ("row_offsets", lambda t: t.expand(0, -1, -1), ValueError),
        ("column_offsets", lambda t: t.expand(1, 2, -1).contiguous(), ValueError),
        ("column_indices", lambda t: t.long(), ValueError),
        ("column_indices", lambda t: t.tolist(), TypeError),
        ("tile_idx", lambda t: t[:-1], ValueError),
        ("row_indices", lambda t: torch.stack([t, t], 1)[:, 0], ValueError),
        ("transposed_tile_idx", lambda t: t.to("meta"), ValueError),
        ("tiles", lambda t: t[:, :32], ValueError),
        ("tiles", lambda t: t[..., :1], ValueError),
    ],
)
def test_tensors_that_make_no_mask(name, change, error):
    mask = create_block_mask(*arguments("documents", 400, 400))
    with pytest.raises(error, match=rf"^BlockMask: {name} must .*, got .*\.$"):
        dataclasses.replace(mask, **{name: change(getattr(mask, name))})
