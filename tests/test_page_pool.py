# SPDX-License-Identifier: Apache-2.0
"""`PagePool`: known answers, and errors. Sequences of calls are in test_page_pool_walks.py."""

from array import array

import numpy as np
import pytest
import torch

import fmkernels
from fmkernels import OutOfPages, PagePool


def started(pool, tokens, key=None):
    """A sequence whose tokens have been computed."""
    sequence = pool.add(tokens, key=key)
    tokens = list(tokens)[sequence.num_tokens :]
    assert pool.reserve(sequence, len(tokens)) == []
    pool.extend(sequence, tokens)
    return sequence


# ---- known answers ---------------------------------------------------------------------------------------------------


def test_slots_and_tables_of_a_mixed_batch():
    """One sequence is prefilled, one generates a token, one has three drafts and one waits."""
    pool = PagePool(num_pages=20, page_size=4)
    prefill, waiting = pool.add(range(100, 106)), pool.add([1])
    decode, drafts = started(pool, range(4)), started(pool, range(10, 17))
    assert (decode.pages, drafts.pages) == ([0], [1, 2])
    for sequence, num_tokens in ((prefill, 6), (decode, 1), (drafts, 4)):
        assert pool.reserve(sequence, num_tokens) == []
    batch = pool.batch([prefill, decode, waiting, drafts])
    assert batch.slot_mapping.tolist() == [12, 13, 14, 15, 16, 17, 20, 11, 24, 25, 26]
    assert batch.block_table.tolist() == [[3, 4, 0], [0, 5, 0], [0, 0, 0], [1, 2, 6]]
    assert batch.cache_seqlens.tolist() == [6, 5, 0, 11]
    assert batch.cu_seqlens_q.tolist() == [0, 6, 7, 7, 11]
    dtypes = [t.dtype for t in batch]
    assert dtypes == [torch.int64, torch.int32, torch.int32, torch.int32]
    assert [t.is_contiguous() for t in batch] == [True] * 4


def test_an_empty_batch():
    batch = PagePool(4, 4).batch([])
    assert [t.tolist() for t in batch] == [[], [], [], [0]]
    assert batch.block_table.shape == (0, 0)
    assert PagePool(4, 4).num_free == 4


def test_a_cache_is_written_by_slots_and_read_by_tables():
    pool, keys = PagePool(9, 4), torch.full((9, 4), -1)
    sequences = [pool.add([]) for _ in range(3)]
    lengths = [5, 4, 11]
    for sequence, length in zip(sequences, lengths, strict=True):
        pool.reserve(sequence, length)
    batch = pool.batch(sequences)
    keys.view(-1)[batch.slot_mapping] = torch.arange(sum(lengths))
    rows = keys[batch.block_table.long()].flatten(1)
    read = [row[:n] for row, n in zip(rows, batch.cache_seqlens, strict=True)]
    assert torch.cat(read).tolist() == list(range(sum(lengths)))


def test_a_prompt_is_found_up_to_its_last_token():
    pool = PagePool(8, 4)
    first = started(pool, range(12))
    assert pool.add(range(12)).pages == first.pages[:2]  # the logits of the last token have to be computed
    assert pool.add(range(13)).pages == first.pages
    assert pool.add([0, 1, 2, 3, 9, 5, 6, 7, 8]).pages == first.pages[:1]
    assert pool.add([9, 1, 2, 3, 4, 5, 6, 7, 8]).pages == []
    assert pool.add(range(4, 12)).pages == []  # the tokens of a page, but not those before it
    assert (pool.num_asked_tokens, pool.num_found_tokens) == (12 + 12 + 13 + 9 + 9 + 8, 8 + 12 + 4)
    assert pool.hit_rate == 24 / 63


def test_nothing_is_found_before_it_is_written():
    """Two equal prompts of one step: the second must not read pages that the first has still to fill."""
    pool = PagePool(8, 4)
    first = pool.add(range(8))
    pool.reserve(first, 8)
    assert pool.add(range(8)).num_tokens == 0
    pool.finish(first)  # aborted
    assert pool.add(range(8)).num_tokens == 0
    assert pool.num_free == 8


def test_rejected_drafts_are_never_found():
    pool = PagePool(8, 4)
    sequence = started(pool, range(3))
    pool.reserve(sequence, 5)
    pool.extend(sequence, [3, 4])
    assert (sequence.num_tokens, sequence.num_reserved, sequence.pages) == (5, 3, [0, 1])
    assert pool.reserve(sequence, 4) == []
    assert (sequence.num_reserved, sequence.pages) == (4, [0, 1, 2])
    pool.extend(sequence, [5])
    pool.finish(sequence)
    assert (pool.num_free, pool.num_cached) == (7, 1)


def test_keys_share_with_equal_keys_alone():
    pool = PagePool(20, 2)
    private = object()
    for key in (None, -1, -2, "lora", ("lora", 1), private):  # the hashes of -1 and -2 are equal
        assert started(pool, range(4), key).num_tokens == 4
        assert pool.num_found_tokens == 0
    assert pool.add(range(5), key=("lora", 1)).num_tokens == 4
    assert pool.add(range(5), key=object()).num_tokens == 0


def test_tokens_with_equal_hashes_are_not_shared():
    pool = PagePool(20, 2)
    assert hash((0, 0)) == hash((0, 2**61 - 1))
    started(pool, [0, 0, 1, 1])
    assert started(pool, [0, 2**61 - 1, 1, 1]).pages == [2, 3]
    assert pool.num_found_tokens == 0


def test_beams_copy_the_last_page_when_they_write():
    pool = PagePool(8, 4)
    parent = started(pool, range(6))
    beams = [pool.fork(parent) for _ in range(3)]
    pool.finish(parent)
    assert pool.num_used == 2
    assert [pool.reserve(beam, 1) for beam in beams] == [[(1, 2)], [(1, 3)], []]
    assert [beam.pages for beam in beams] == [[0, 2], [0, 3], [0, 1]]
    for token, beam in enumerate(beams):
        pool.extend(beam, [token])
    assert [pool.reserve(beam, 1) for beam in beams] == [[], [], []]
    assert [beam.tokens[-2:] for beam in beams] == [[5, 0], [5, 1], [5, 2]]


def test_a_copy_needs_a_page_too():
    pool = PagePool(2, 4)
    parent = started(pool, range(6))
    beam = pool.fork(parent)
    with pytest.raises(OutOfPages, match="reserve: needs 1 more pages, got 0 free and 0 cached ones"):
        pool.reserve(beam, 1)
    assert (parent.pages, beam.pages, beam.num_reserved) == ([0, 1], [0, 1], 0)
    pool.finish(parent)
    assert pool.reserve(beam, 1) == []


def test_a_page_that_others_may_find_is_not_written_in_place():
    """A full page becomes the last page by truncation; another sequence finds it; the first one goes on elsewhere."""
    pool = PagePool(8, 4)
    first = started(pool, range(8))
    pool.truncate(first, 6)
    second = pool.add(range(9))
    assert second.pages == [0, 1]
    assert pool.reserve(first, 1) == [(1, 2)]
    pool.finish(second)
    pool.truncate(first, 2)
    assert pool.reserve(first, 1) == []  # nobody else has page 0: it is not found from now on
    assert pool.add(range(9)).num_tokens == 0


def test_the_longest_prefix_of_the_oldest_prompt_is_evicted_first():
    pool = PagePool(6, 2)
    for begin in (0, 10):
        pool.finish(started(pool, range(begin, begin + 6)))
    assert (pool.num_free, pool.num_cached, pool.num_evicted) == (0, 6, 0)
    pool.finish(pool.add(range(7)))  # used last
    newcomer = pool.add([])
    pool.reserve(newcomer, 4)
    assert newcomer.pages == [5, 4]
    assert pool.num_evicted == 2
    assert pool.add(range(10, 17)).num_tokens == 2
    assert pool.add(range(7)).num_tokens == 6


def test_a_preempted_sequence_copies_back_what_the_cache_lost():
    pool = PagePool(4, 2)
    sequence = started(pool, range(7))
    assert pool.preempt(sequence) == [0, 1, 2, 3]
    assert (sequence.state, sequence.pages, sequence.num_tokens) == ("preempted", [], 7)
    assert (pool.num_free, pool.num_cached) == (1, 3)
    other = pool.add([])
    pool.reserve(other, 4)  # the free page and the end of the prefix
    with pytest.raises(OutOfPages, match="resume: needs 2 more pages, got 0 free and 0 cached ones") as raised:
        pool.resume(sequence)
    assert (raised.value.needed, raised.value.available) == (2, 0)
    pool.finish(other)
    assert pool.resume(sequence) == [3, 2]
    assert sequence.pages == [0, 1, 3, 2]
    assert pool.add(range(7)).num_tokens == 4  # the third page is found once it has been copied
    pool.reserve(sequence, 1)
    pool.extend(sequence, [7])
    assert pool.add(range(9)).num_tokens == 8


def test_a_page_is_found_after_one_prefix_alone():
    """What precedes it is computed twice and lost once: the page moves to the prefix that is there."""
    pool = PagePool(6, 1)
    first = started(pool, [1, 2, 3])
    pool.preempt(first)
    hog = pool.add([])
    pool.reserve(hog, 6)
    pool.finish(hog)
    pages = pool.resume(first)
    second = pool.fork(first)
    again = started(pool, [1])
    pool.extend(first, [])  # the first page is that of `again`, the others follow it
    found = pool.add([1, 2, 3, 4])
    assert found.pages == [*again.pages, *pages[1:]]
    pool.finish(found)
    pool.finish(again)
    hog = pool.add([])
    pool.reserve(hog, 3)
    assert pool.add([1, 2, 3, 4]).pages == []
    pool.extend(second, [])
    assert pool.add([1, 2, 3, 4]).pages == pages
    assert sorted(pool._book._places.values()) == sorted(pages)


def test_reserving_replaces_the_number_and_keeps_the_pages():
    pool = PagePool(4, 2)
    sequence = started(pool, range(3))
    for num_tokens, num_pages in ((4, 4), (1, 4), (0, 4), (5, 4)):
        assert pool.reserve(sequence, num_tokens) == []
        assert (sequence.num_reserved, len(sequence.pages)) == (num_tokens, num_pages)
    pool.truncate(sequence, 3)
    assert (sequence.num_reserved, len(sequence.pages), pool.num_free) == (0, 2, 2)


def test_a_prompt_of_very_many_pages():
    pool = PagePool(20_000, 1)
    pool.finish(started(pool, range(20_000)))
    sequence = pool.add(range(20_001))
    assert (sequence.num_tokens, pool.num_used) == (20_000, 20_000)


# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda x: array("i", x), np.array, torch.tensor])
def test_kinds_of_token_lists(kind):
    pool = PagePool(4, 2)
    sequence = pool.add(kind([1, 2, 3]))
    pool.reserve(sequence, 3)
    pool.extend(sequence, kind([1, 2, 3]))
    assert sequence.tokens == [1, 2, 3]
    assert pool.add(kind([1, 2, 3])).num_tokens == 2


SIZES = "PagePool: num_pages * page_size must be below 2**31, got"
ERRORS = [
    (lambda pool, s: PagePool(0, 4), ValueError, "PagePool: num_pages must be at least 1, got 0."),
    (lambda pool, s: PagePool(4, 1.0), TypeError, "PagePool: page_size must be an integer, got float."),
    (lambda pool, s: PagePool(2**29, 4), ValueError, f"{SIZES} 2147483648."),
    (lambda pool, s: pool.add(3), TypeError, ".add: tokens must be a list of integers, got int."),
    (lambda pool, s: pool.add(b"12345678"), TypeError, ".add: tokens must be a list of integers, got bytes."),
    (lambda pool, s: pool.add([1, 2.0]), TypeError, ".add: tokens must be integers, got a float."),
    (lambda pool, s: pool.add(torch.zeros(2, 2).int()), TypeError, ".add: tokens must be integers, got a list."),
    (lambda pool, s: pool.add(np.zeros((2, 2), int)), TypeError, ".add: tokens must be integers, got a ndarray."),
    (lambda pool, s: pool.add([1, torch.tensor(1.5)]), TypeError, ".add: tokens must be integers, got a Tensor."),
    (lambda pool, s: pool.add([1], key=[]), TypeError, ".add: key must be hashable, got list."),
    (lambda pool, s: pool.fork(None), TypeError, ".fork: sequence must be a PagedSequence, got NoneType."),
    (lambda pool, s: pool.reserve(s, -1), ValueError, ".reserve: num_tokens must be at least 0, got -1."),
    (lambda pool, s: pool.reserve(s, True), TypeError, ".reserve: num_tokens must be an integer, got bool."),
    (lambda pool, s: pool.reserve(s, 99), OutOfPages, ".reserve: needs 25 more pages, got 4 free and 0 cached ones."),
    (lambda pool, s: pool.extend(s, [1, 2, 3]), ValueError, ".extend: tokens must be at most the 2 reserved, got 3."),
    (lambda pool, s: pool.extend(s, "12"), TypeError, ".extend: tokens must be a list of integers, got str."),
    (lambda pool, s: pool.extend(s, [2**63]), ValueError, f".extend: tokens must be integers of 64 bits, got {2**63}."),
    (lambda pool, s: pool.truncate(s, 7), ValueError, ".truncate: num_tokens must be at most the 6 there are, got 7."),
    (lambda pool, s: pool.resume(s), ValueError, ".resume: sequence must be preempted, got one that is running."),
    (lambda pool, s: pool.batch(s), TypeError, ".batch: sequences must be a list, got PagedSequence."),
    (lambda pool, s: pool.batch([s, s]), ValueError, ".batch: sequences must be different, got one twice."),
    (lambda pool, s: PagePool(1, 1).finish(s), ValueError, ".finish: sequence must be of this pool, got another's."),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "sentence"), ERRORS)
def test_wrong_arguments_change_nothing(call, error, sentence):
    pool = PagePool(6, 4)
    sequence = started(pool, range(6))
    pool.reserve(sequence, 2)
    before = repr(pool), repr(sequence)
    with pytest.raises(error) as raised:
        call(pool, sequence)
    assert str(raised.value) == (sentence if sentence.startswith("PagePool") else f"PagePool{sentence}")
    assert (repr(pool), repr(sequence)) == before


@pytest.mark.parametrize("state", ["preempted", "finished"])
def test_what_a_sequence_without_pages_refuses(state):
    pool = PagePool(6, 4)
    sequence = started(pool, range(6))
    pool.preempt(sequence) if state == "preempted" else pool.finish(sequence)
    calls = {"fork": (), "reserve": (1,), "extend": ([],), "truncate": (0,), "preempt": ()}
    for method, args in calls.items():
        with pytest.raises(
            ValueError, match=f"^PagePool.{method}: sequence must be running, got one that is {state}.$"
        ):
            getattr(pool, method)(sequence, *args)
    if state == "finished":
        with pytest.raises(ValueError, match="finish: sequence must be running or preempted, got one that is finished"):
            pool.finish(sequence)
    else:
        pool.finish(sequence)
    assert sequence.tokens == list(range(6))


def test_the_public_names():
    assert issubclass(fmkernels.OutOfPages, RuntimeError)
    assert repr(PagePool(6, 4)) == "PagePool(num_pages=6, page_size=4; 0 used, 0 cached, 6 free)"
    pool = PagePool(6, 4)
    assert repr(started(pool, [7])) == "PagedSequence(running, 1 tokens, 0 reserved, [0])"
