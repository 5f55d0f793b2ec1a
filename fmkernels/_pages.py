# SPDX-License-Identifier: Apache-2.0
"""What a `PagePool` keeps of its pages and of a sequence, and the tokens that it is given."""

from __future__ import annotations

import operator
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .page_pool import PagePool


class OutOfPages(RuntimeError):
    """More pages are needed than are free or cached. The pool and its sequences are as they were before the call.

    `needed` and `available` count pages; finishing or preempting sequences makes more available.
    """

    def __init__(self, op: str, needed: int, num_free: int, num_cached: int) -> None:
        super().__init__(f"{op}: needs {needed} more pages, got {num_free} free and {num_cached} cached ones.")
        self.needed = needed
        self.available = num_free + num_cached


class Pages:
    """A page is used, by one or more sequences; or cached, by none but to be found; or free.

    A page is found by the tokens it holds and the identity of the prefix before them. That of a prefix of no tokens is
    made of the key of the sequence; a longer one has a number of its own, which is not used again. So two contents are
    equal where a dict says so, which compares all tokens of the page; those before them were compared when theirs were.
    """

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages - 1, -1, -1))  # the last is taken first
        self.cached: OrderedDict[int, None] = OrderedDict()  # the first is evicted first
        self.num_references = [0] * num_pages
        self.num_evicted = 0
        # Of pages to be found: the prefix before the page and its tokens, and the prefix that ends with it.
        self._contents: list[tuple[Hashable, bytes] | None] = [None] * num_pages
        self._prefixes = [0] * num_pages
        self._places: dict[tuple[Hashable, bytes], int] = {}  # _contents the other way round
        self._next_prefix = count()

    def find(self, prefix: Hashable, content: bytes) -> int | None:
        """The page that holds this content after this prefix."""
        return self._places.get((prefix, content))

    def prefix_of(self, page: int) -> int:
        """The prefix that ends with a page that can be found."""
        return self._prefixes[page]

    def publish(self, page: int, prefix: Hashable, content: bytes) -> int:
        """The prefix that ends with this content. The page is found from now on, unless another one is."""
        place = self._places.setdefault((prefix, content), page)
        if place == page and self._contents[page] != (prefix, content):
            self.unpublish(page)  # it may be known after a prefix of the same tokens that was lost since
            self._contents[page] = (prefix, content)
            self._prefixes[page] = next(self._next_prefix)
        return self._prefixes[place]

    def unpublish(self, page: int) -> None:
        """The page is not found any more, as another content comes into it."""
        content = self._contents[page]
        if content is not None:
            del self._places[content]
            self._contents[page] = None

    def require(self, op: str, num_pages: int, kept: Iterable[int] = ()) -> None:
        """Raises unless so many pages can be taken while the cached ones among `kept` stay."""
        num_cached = len(self.cached) - sum(self.num_references[page] == 0 for page in kept)
        if num_pages > len(self.free) + num_cached:
            raise OutOfPages(op, num_pages, len(self.free), num_cached)

    def take(self) -> int:
        """A page to write, with one reference: a free one, else the one that was cached first."""
        if self.free:
            page = self.free.pop()
        else:
            page, _ = self.cached.popitem(last=False)
            self.unpublish(page)
            self.num_evicted += 1
        self.num_references[page] = 1
        return page

    def acquire(self, page: int) -> None:
        """One more reference to a page that is used or cached."""
        if self.num_references[page] == 0:
            del self.cached[page]
        self.num_references[page] += 1

    def release(self, page: int) -> None:
        """One reference less; after the last one the page is cached where it can be found, else free."""
        self.num_references[page] -= 1
        if self.num_references[page] == 0:
            if self._contents[page] is None:
                self.free.append(page)
            else:
                self.cached[page] = None


class PagedSequence:
    """A sequence of tokens in a `PagePool`, made by its `add` and `fork` and changed by its methods alone."""

    __slots__ = ("_key", "_num_reserved", "_pages", "_pool", "_prefixes", "_state", "_tokens")

    def __init__(self, pool: PagePool, key: Hashable) -> None:
        self._pool = pool
        self._key = key
        self._tokens = array("q")
        self._pages = array("i")  # those past the last token are of no other sequence
        self._prefixes: list[Hashable] = [(key,)]  # of 0, 1, 2, ... full pages; fewer than there are after `resume`
        self._num_reserved = 0
        self._state = "running"

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return len(self._tokens)

    @property
    def num_reserved(self) -> int:
        """Slots after the tokens that may be written."""
        return self._num_reserved

    @property
    def tokens(self) -> list[int]:
        return self._tokens.tolist()

    @property
    def pages(self) -> list[int]:
        """Those of the tokens and the reserved slots, in order; none unless the sequence is running."""
        return self._pages.tolist()

    @property
    def state(self) -> str:
        """running, preempted or finished"""
        return self._state

    def __repr__(self) -> str:
        return f"PagedSequence({self._state}, {self.num_tokens} tokens, {self.num_reserved} reserved, {self.pages})"


class Batch(NamedTuple):
    """What `append` and `attend` need to know of a batch of sequences, by the names of their arguments; on the CPU."""

    slot_mapping: Tensor  # [total_q], int64: page * page_size + offset of every reserved slot, sequence by sequence
    block_table: Tensor  # [batch, max_pages], int32: the pages of each sequence, in order; 0 after its last
    cache_seqlens: Tensor  # [batch], int32: tokens and reserved slots
    cu_seqlens_q: Tensor  # [batch + 1], int32: where the slots of each sequence begin and end in slot_mapping


def int64_tokens(op: str, tokens: Any) -> array[int]:
    if isinstance(tokens, Tensor):
        tokens = tokens.tolist()
    if type(tokens) is not list:
        if isinstance(tokens, str | bytes | bytearray | memoryview) or not isinstance(tokens, Iterable):
            raise TypeError(f"{op}: tokens must be a list of integers, got {type(tokens).__name__}.")
        tokens = list(tokens)
    try:
        return array("q", tokens)
    except TypeError:
        wrong = next(type(t).__name__ for t in tokens if not _is_integer(t))
        raise TypeError(f"{op}: tokens must be integers, got a {wrong}.") from None
    except OverflowError:
        wrong = next(t for t in tokens if not -(2**63) <= operator.index(t) < 2**63)
        raise ValueError(f"{op}: tokens must be integers of 64 bits, got {wrong}.") from None


def _is_integer(value: Any) -> bool:
    try:
        operator.index(value)  # arrays and tensors have __index__, and some of them only an error in it
    except TypeError:
        return False
    return True
