# SPDX-License-Identifier: Apache-2.0
"""`PagePool`, the host's book of a paged KV cache: which tokens of which sequence are in which page."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._pages import Batch, OutOfPages, PagedSequence, Pages, int64_tokens

__all__ = ["Batch", "OutOfPages", "PagePool", "PagedSequence"]


class PagePool:
    """Allocates the pages of a KV cache to sequences: shared prefixes, copy on write, eviction, preemption.

    A step of an engine: `reserve` slots, copy the pages that it asks for, run the model over `batch`, and `extend` by
    the tokens that were written. A page can be found once it is full and `extend` has said so: never what was not
    written, or was drafted and rejected. A page that no sequence needs any more stays cached until it is needed for
    something else; the one that has been in no sequence for longest goes first.

    The pages that a call wants copied are to be copied, on the stream of the model, before those of the next call and
    before the next step; those of one `reserve` after another, with no other change between them, in any order. Nothing
    here touches the device. Deterministic. For one thread. O(1) a page.

    Args:
        num_pages: pages of the cache, which are 0 to num_pages - 1.
        page_size: tokens a page holds; num_pages * page_size must be below 2**31.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came; nothing has changed.
        OutOfPages: by `reserve` and `resume`; nothing has changed.

    After Kwon et al. 2023, PagedAttention. Prefixes are found by comparing their tokens, not digests of them.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        check.integer("PagePool", "num_pages", num_pages, 1)
        check.integer("PagePool", "page_size", page_size, 1)
        if num_pages * page_size >= 2**31:
            raise ValueError(f"PagePool: num_pages * page_size must be below 2**31, got {num_pages * page_size}.")
        self.page_size = page_size
        self.num_asked_tokens = 0  # given to `add` so far
        self.num_found_tokens = 0  # those of them that were in the cache
        self._book = Pages(num_pages)

    @property
    def num_pages(self) -> int:
        return len(self._book.num_references)

    @property
    def num_free(self) -> int:
        """Pages that hold nothing of use. They and the cached ones can be reserved."""
        return len(self._book.free)

    @property
    def num_cached(self) -> int:
        """Pages that no sequence has and a new one may find."""
        return len(self._book.cached)

    @property
    def num_used(self) -> int:
        """Pages that sequences have, each counted once."""
        return self.num_pages - self.num_free - self.num_cached

    @property
    def num_evicted(self) -> int:
        """Cached pages that were needed for something else so far."""
        return self._book.num_evicted

    @property
    def hit_rate(self) -> float:
        """The part of the tokens given to `add` that was in the cache; 0 before the first."""
        return self.num_found_tokens / max(1, self.num_asked_tokens)

    def __repr__(self) -> str:
        counts = f"{self.num_used} used, {self.num_cached} cached, {self.num_free} free"
        return f"PagePool(num_pages={self.num_pages}, page_size={self.page_size}; {counts})"

    def add(self, tokens: Iterable[int], *, key: Hashable = None) -> PagedSequence:
        """A new sequence that begins with the longest prefix of `tokens` that full pages in the pool hold.

        The engine goes on at tokens[sequence.num_tokens]: at least the last token is left, for its logits.

        Args:
            tokens: the prompt, integers of 64 bits: a list, an array or a tensor.
            key: whatever else keys and values depend on: a LoRA, the version of the weights, the salt of a tenant.
                Only equal keys share; object() shares with nobody.
        """
        tokens = int64_tokens("PagePool.add", tokens)
        try:
            hash(key)
        except TypeError:
            raise TypeError(f"PagePool.add: key must be hashable, got {type(key).__name__}.") from None
        sequence = PagedSequence(self, key)
        sequence._pages.extend(self._find(sequence._prefixes, tokens, (len(tokens) - 1) // self.page_size))
        for page in sequence._pages:
            self._book.acquire(page)
        sequence._tokens += tokens[: len(sequence._pages) * self.page_size]
        self.num_asked_tokens += len(tokens)
        self.num_found_tokens += sequence.num_tokens
        return sequence

    def fork(self, sequence: PagedSequence) -> PagedSequence:
        """A second sequence with the same tokens in the same pages: for beams, and for more samples of a prompt.

        Reserved slots stay with `sequence`. Of those that share a last page, all but the last one to write get a copy.
        """
        self._expect("fork", sequence)
        child = PagedSequence(self, sequence._key)
        child._tokens += sequence._tokens
        child._pages += sequence._pages[: self._pages_for(sequence.num_tokens)]
        child._prefixes = sequence._prefixes[:]
        for page in child._pages:
            self._book.acquire(page)
        return child

    def reserve(self, sequence: PagedSequence, num_tokens: int) -> list[tuple[int, int]]:
        """Makes the next `num_tokens` slots after the tokens the sequence's own, to be written.

        The number replaces that of the call before, and `extend` uses slots up. With drafts: reserve for all of them,
        and extend by those that were accepted.

        Returns:
            Pairs (source, destination) of pages to copy before a slot is written: one where the last page is shared,
            none elsewhere.
        """
        self._expect("reserve", sequence)
        check.integer("PagePool.reserve", "num_tokens", num_tokens, 0)
        book, pages = self._book, sequence._pages
        index, offset = divmod(len(sequence._tokens), self.page_size)
        writes_last = num_tokens > 0 and offset > 0  # the page of the last token, which others may have or find
        is_shared = writes_last and book.num_references[pages[index]] > 1
        num_new = max(0, self._pages_for(len(sequence._tokens) + num_tokens) - len(pages))
        book.require("PagePool.reserve", num_new + is_shared)
        copies = []
        if is_shared:
            copies.append((pages[index], book.take()))
            book.release(pages[index])
            pages[index] = copies[0][1]
        elif writes_last:
            book.unpublish(pages[index])
        for _ in range(num_new):
            pages.append(book.take())
        sequence._num_reserved = num_tokens
        return copies

    def extend(self, sequence: PagedSequence, tokens: Iterable[int]) -> None:
        """Appends the tokens whose keys and values are in the first reserved slots."""
        self._expect("extend", sequence)
        tokens = int64_tokens("PagePool.extend", tokens)
        if len(tokens) > sequence._num_reserved:
            raise ValueError(
                f"PagePool.extend: tokens must be at most the {sequence._num_reserved} reserved, got {len(tokens)}."
            )
        sequence._tokens += tokens
        sequence._num_reserved -= len(tokens)
        prefixes = sequence._prefixes
        for index in range(len(prefixes) - 1, sequence.num_tokens // self.page_size):
            content = self._content(sequence._tokens, index)
            prefixes.append(self._book.publish(sequence._pages[index], prefixes[-1], content))

    def truncate(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Takes back all but the first `num_tokens` tokens, and all reserved slots."""
        self._expect("truncate", sequence)
        check.integer("PagePool.truncate", "num_tokens", num_tokens, 0)
        if num_tokens > sequence.num_tokens:
            raise ValueError(
                f"PagePool.truncate: num_tokens must be at most the {sequence.num_tokens} there are, got {num_tokens}."
            )
        self._release(sequence, self._pages_for(num_tokens))
        del sequence._tokens[num_tokens:]
        del sequence._prefixes[num_tokens // self.page_size + 1 :]

    def finish(self, sequence: PagedSequence) -> None:
        """The end of a sequence, complete or aborted, running or preempted. Its full pages stay cached."""
        self._expect("finish", sequence, ("running", "preempted"))
        self._release(sequence, 0)
        sequence._state = "finished"

    def preempt(self, sequence: PagedSequence) -> list[int]:
        """Takes a sequence's pages away until `resume`. To compute it anew instead, `finish` it and `add` its tokens.

        Returns:
            The pages of its tokens, in order, to be copied to the host.
        """
        self._expect("preempt", sequence)
        pages = sequence.pages[: self._pages_for(sequence.num_tokens)]
        self._release(sequence, 0)
        sequence._state = "preempted"
        return pages

    def resume(self, sequence: PagedSequence) -> list[int]:
        """Gives a preempted sequence pages again; those that are still cached, as far as they are.

        Returns:
            The pages that the host's copy goes to. They are the last ones of the sequence and belong to as many of the
            last ones that `preempt` returned.
        """
        self._expect("resume", sequence, ("preempted",))
        num_pages = self._pages_for(sequence.num_tokens)
        prefixes: list[Hashable] = [(sequence._key,)]
        found = self._find(prefixes, sequence._tokens, sequence.num_tokens // self.page_size)
        self._book.require("PagePool.resume", num_pages - len(found), found)
        for page in found:
            self._book.acquire(page)
        taken = [self._book.take() for _ in range(len(found), num_pages)]
        sequence._pages.extend(found + taken)
        sequence._prefixes = prefixes  # the others when they are there, after the next `extend`
        sequence._state = "running"
        return taken

    def batch(self, sequences: Iterable[PagedSequence]) -> Batch:
        """The reserved slots and the pages of running sequences, no two the same, for one step of the model."""
        if not isinstance(sequences, Iterable):
            raise TypeError(f"PagePool.batch: sequences must be a list, got {type(sequences).__name__}.")
        sequences = list(sequences)
        for sequence in sequences:
            self._expect("batch", sequence)
        if len(set(sequences)) < len(sequences):
            raise ValueError("PagePool.batch: sequences must be different, got one twice.")
        slots = array("q")
        for sequence in sequences:
            position, end = sequence.num_tokens, sequence.num_tokens + sequence._num_reserved
            while position < end:
                index, offset = divmod(position, self.page_size)
                count = min(self.page_size - offset, end - position)
                slot = sequence._pages[index] * self.page_size + offset
                slots.extend(range(slot, slot + count))
                position += count
        row_bytes = 4 * max((len(sequence._pages) for sequence in sequences), default=0)
        table = bytearray().join(sequence._pages.tobytes().ljust(row_bytes, b"\0") for sequence in sequences)
        return Batch(
            _tensor(slots, torch.int64),
            _tensor(table, torch.int32).view(len(sequences), row_bytes // 4),
            _tensor(array("i", [s.num_tokens + s._num_reserved for s in sequences]), torch.int32),
            _tensor(array("i", accumulate((s._num_reserved for s in sequences), initial=0)), torch.int32),
        )

    def _find(self, prefixes: list[Hashable], tokens: array[int], num_pages: int) -> list[int]:
        """The pages that hold the tokens, at most `num_pages` and as far as there are any; appends their prefixes."""
        found = []
        for index in range(num_pages):
            page = self._book.find(prefixes[-1], self._content(tokens, index))
            if page is None:
                break
            found.append(page)
            prefixes.append(self._book.prefix_of(page))
        return found

    def _release(self, sequence: PagedSequence, num_kept: int) -> None:
        """Gives pages back, the last first: of two prefixes the longer one is evicted first."""
        for page in reversed(sequence._pages[num_kept:]):
            self._book.release(page)
        del sequence._pages[num_kept:]
        sequence._num_reserved = 0

    def _content(self, tokens: array[int], index: int) -> bytes:
        return tokens[index * self.page_size : (index + 1) * self.page_size].tobytes()

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _expect(self, method: str, sequence: Any, states: tuple[str, ...] = ("running",)) -> None:
        """Raises unless it is a sequence of this pool in one of the states."""
        if not isinstance(sequence, PagedSequence):
            raise TypeError(f"PagePool.{method}: sequence must be a PagedSequence, got {type(sequence).__name__}.")
        if sequence._pool is not self:
            raise ValueError(f"PagePool.{method}: sequence must be of this pool, got another's.")
        if sequence._state not in states:
            expected = " or ".join(states)
            raise ValueError(f"PagePool.{method}: sequence must be {expected}, got one that is {sequence._state}.")


def _tensor(values: array[int] | bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)
