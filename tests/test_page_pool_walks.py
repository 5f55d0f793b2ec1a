# SPDX-License-Identifier: Apache-2.0
"""`PagePool`: any sequence of calls, against a model of the cache."""

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fmkernels import OutOfPages, PagePool

TOKENS = [0, 2**61 - 1]  # all tuples of the two have the same hash
KEYS = [-1, -2]  # so have these
RANDOM = st.randoms(use_true_random=True)  # seeded by hypothesis
GARBAGE = "garbage"


@dataclass
class Expected:
    """What a sequence should be. `drafts`: tokens in its reserved slots, once written."""

    key: object
    tokens: list
    pages: list
    num_reserved: int = 0
    drafts: list = field(default_factory=list)
    host: list | None = None  # the contents of its pages while it is preempted

    def content(self, position):
        """What a slot should hold: keys and values depend on all tokens so far and on the key."""
        return (self.key, *self.tokens[: position + 1])


class Engine(RuleBasedStateMachine):
    """Does to a dict of slots what the pool says, and nothing else; `sequences` are those that have not finished.

    `findable` is what full pages were said to hold, by content, until another content comes into the page. With
    `released`, the unused pages of it, oldest first, it tells what `add` finds and what is evicted. It does so until a
    page is lost while a longer prefix is known that goes on from it: then `is_plain` ends, since the pool may not find
    what comes after a gap. Whether what it finds is right is seen from the slots, always.
    """

    @initialize(num_pages=st.integers(1, 12), page_size=st.integers(1, 3))
    def start(self, num_pages, page_size):
        self.pool = PagePool(num_pages, page_size)
        self.page_size = page_size
        self.slots = {}
        self.sequences = {}
        self.finished = []
        self.findable = {}
        self.released = []
        self.is_plain = True
        self.num_asked = self.num_found = 0
        self.pairs = []  # of all `reserve` since the last call that gave pages back or shared them
        self.seen = Counter()

    # -- the model

    def pages_for(self, num_tokens):
        return -(-num_tokens // self.page_size)

    def full_prefixes(self, expected):
        ends = range(self.page_size, len(expected.tokens) + 1, self.page_size)
        return [(expected.key, *expected.tokens[:end]) for end in ends]

    def references(self):
        return Counter(page for expected in self.sequences.values() for page in expected.pages)

    def page(self, page):
        return [self.slots.get((page, offset)) for offset in range(self.page_size)]

    def fill(self, page, contents):
        self.slots.update({(page, offset): content for offset, content in enumerate(contents)})

    def lose(self, page):
        """Another content comes into the page."""
        for prefix in [prefix for prefix, place in self.findable.items() if place == page]:
            del self.findable[prefix]
            known = list(self.findable)
            known += [p for expected in self.sequences.values() for p in self.full_prefixes(expected) if expected.pages]
            if any(len(p) >= len(prefix) and p[: len(prefix)] == prefix for p in known):
                self.is_plain = False

    def take(self, page):
        """The pool gives a page out to be written."""
        assert self.references()[page] == 0
        if self.is_plain:
            in_use_or_cached = {*self.references(), *self.released}
            free = [p for p in range(self.pool.num_pages) if p not in in_use_or_cached]
            assert page in free if free else page == self.released[0]
        if page in self.released:
            self.released.remove(page)
        self.lose(page)
        self.fill(page, [GARBAGE] * self.page_size)

    def release(self, expected, num_kept):
        gone = expected.pages[num_kept:]
        del expected.pages[num_kept:]
        self.pairs = []
        references, findable = self.references(), set(self.findable.values())
        self.released += [page for page in reversed(gone) if references[page] == 0 and page in findable]

    def match(self, key, tokens, num_pages):
        """The pages of the longest known prefix of at most so many pages."""
        pages = []
        for index in range(num_pages):
            page = self.findable.get((key, *tokens[: (index + 1) * self.page_size]))
            if page is None:
                break
            pages.append(page)
        return pages

    def num_available(self, kept=()):
        return self.pool.num_pages - len({*self.references(), *kept})

    def state_of_pool(self):
        sequences = [(repr(s), s.tokens, s._prefixes[:]) for s in self.sequences]
        return sequences, repr(vars(self.pool._book)), self.pool.num_asked_tokens, self.pool.num_found_tokens

    def draw(self, rng, state="running"):
        """A sequence in this state; where there is none, one is brought into it."""
        candidates = [s for s in self.sequences if s.state == state]
        if candidates:
            sequence = rng.choice(candidates)
        elif state == "running":
            sequence = self.add_prompt([], None)
        else:
            sequence, _ = self.draw(rng)
            self.preempt_one(sequence)
        return sequence, self.sequences[sequence]

    # -- the calls

    def add_prompt(self, prompt, key):
        found = self.match(key, prompt, (len(prompt) - 1) // self.page_size)
        sequence = self.pool.add(prompt, key=key)
        if self.is_plain:
            assert sequence.pages == found
            self.seen[f"add: {min(len(found), 3)} pages found"] += 1
        assert sequence.num_tokens == len(sequence.pages) * self.page_size < max(1, len(prompt))
        self.released = [page for page in self.released if page not in sequence.pages]
        self.sequences[sequence] = Expected(key, prompt[: sequence.num_tokens], sequence.pages)
        self.num_asked += len(prompt)
        self.num_found += sequence.num_tokens
        return sequence

    def reserve_slots(self, sequence, num_tokens):
        """False: there are too few pages."""
        expected = self.sequences[sequence]
        index, offset = divmod(len(expected.tokens), self.page_size)
        writes_last = num_tokens > 0 and offset > 0
        num_copies = int(writes_last and self.references()[expected.pages[index]] > 1)
        num_new = max(0, self.pages_for(len(expected.tokens) + num_tokens) - len(expected.pages))
        if num_new + num_copies > self.num_available():
            before = self.state_of_pool()
            with pytest.raises(OutOfPages) as raised:
                self.pool.reserve(sequence, num_tokens)
            assert (raised.value.needed, raised.value.available) == (num_new + num_copies, self.num_available())
            assert self.state_of_pool() == before
            self.seen["reserve: out of pages"] += 1
            return False
        copies = self.pool.reserve(sequence, num_tokens)
        self.seen[f"reserve: {num_copies} copies"] += 1
        assert len(copies) == num_copies
        for source, destination in copies:
            assert source == expected.pages[index]
            contents = self.page(source)
            self.take(destination)
            self.fill(destination, contents)
            expected.pages[index] = destination
        if writes_last and not copies:
            self.lose(expected.pages[index])
        assert sequence.pages[: len(expected.pages)] == expected.pages
        for page in sequence.pages[len(expected.pages) :]:
            self.take(page)
            expected.pages.append(page)
        expected.num_reserved = num_tokens
        expected.drafts = expected.drafts[:num_tokens]
        self.pairs += copies
        sources, destinations = ({pair[i] for pair in self.pairs} for i in (0, 1))
        assert len(destinations) == len(self.pairs), "no page is copied to twice"
        assert not sources & destinations, "the copies of several calls have no order"
        return True

    def run_model(self, drafts):
        """Fills the reserved slots of the sequences with the keys and values of their drafts, in one batch."""
        batch = self.pool.batch(drafts)
        slots = batch.slot_mapping.tolist()
        assert len(set(slots)) == len(slots)
        places = [divmod(slot, self.page_size) for slot in slots]
        assert not {page for page, _ in places} & set(self.findable.values()), "what others may find is written to"
        ends = batch.cu_seqlens_q.tolist()
        for sequence, begin, end in zip(drafts, ends[:-1], ends[1:], strict=True):
            expected = self.sequences[sequence]
            assert end - begin == expected.num_reserved == len(drafts[sequence])
            expected.drafts = drafts[sequence]
            for index, place in enumerate(places[begin:end]):
                self.slots[place] = (expected.key, *expected.tokens, *expected.drafts[: index + 1])

    def accept(self, sequence, num_tokens):
        expected = self.sequences[sequence]
        accepted = expected.drafts[:num_tokens]
        self.pool.extend(sequence, accepted)
        expected.tokens += accepted
        expected.num_reserved -= len(accepted)
        expected.drafts = expected.drafts[len(accepted) :]
        for page, prefix in zip(expected.pages, self.full_prefixes(expected), strict=False):
            self.findable.setdefault(prefix, page)

    def preempt_one(self, sequence):
        expected = self.sequences[sequence]
        pages = self.pool.preempt(sequence)
        assert pages == expected.pages[: self.pages_for(len(expected.tokens))]
        expected.host = [self.page(page) for page in pages]
        self.release(expected, 0)
        expected.num_reserved, expected.drafts = 0, []

    @rule(rng=RANDOM)
    def add(self, rng):
        known = [(e.key, e.tokens) for e in self.sequences.values()] + self.finished
        key, prefix = rng.choice([*known, (rng.choice(KEYS), [])])
        prompt = prefix + rng.choices(TOKENS, k=rng.randrange(8))
        sequence = self.add_prompt(prompt, key)
        rest = prompt[sequence.num_tokens :]
        if rng.random() < 0.7 and self.reserve_slots(sequence, len(rest)):
            self.run_model({sequence: rest})
            self.accept(sequence, len(rest))

    @rule(rng=RANDOM)
    def fork(self, rng):
        sequence, expected = self.draw(rng)
        num_pages = self.pages_for(len(expected.tokens))
        child = Expected(expected.key, expected.tokens[:], expected.pages[:num_pages])
        self.sequences[self.pool.fork(sequence)] = child
        self.pairs = []

    @rule(rng=RANDOM)
    def reserve(self, rng):
        self.reserve_slots(self.draw(rng)[0], rng.randrange(9))

    @rule(rng=RANDOM)
    def write(self, rng):
        chosen = [s for s in self.sequences if s.state == "running" and rng.random() < 0.7]
        self.run_model({s: rng.choices(TOKENS, k=self.sequences[s].num_reserved) for s in chosen})

    @rule(rng=RANDOM)
    def extend(self, rng):
        sequence, expected = self.draw(rng)
        self.accept(sequence, rng.randint(0, len(expected.drafts)))

    @rule(rng=RANDOM)
    def step(self, rng):
        sequence, _ = self.draw(rng)
        drafts = rng.choices(TOKENS, k=rng.randrange(6))
        if self.reserve_slots(sequence, len(drafts)):
            self.run_model({sequence: drafts})
            self.accept(sequence, rng.randint(0, len(drafts)))

    @rule(rng=RANDOM)
    def truncate(self, rng):
        sequence, expected = self.draw(rng)
        num_tokens = rng.randint(0, len(expected.tokens))
        self.pool.truncate(sequence, num_tokens)
        del expected.tokens[num_tokens:]
        self.release(expected, self.pages_for(num_tokens))
        expected.num_reserved, expected.drafts = 0, []

    @rule(rng=RANDOM)
    def preempt(self, rng):
        self.preempt_one(self.draw(rng)[0])

    @rule(rng=RANDOM)
    def resume(self, rng):
        sequence, expected = self.draw(rng, "preempted")
        num_pages = self.pages_for(len(expected.tokens))
        found = self.match(expected.key, expected.tokens, len(expected.tokens) // self.page_size)
        before = self.state_of_pool()
        try:
            taken = self.pool.resume(sequence)
        except OutOfPages:
            taken = None
        if self.is_plain:
            assert (taken is None) == (num_pages - len(found) > self.num_available(found))
        if taken is None:
            assert self.state_of_pool() == before
            self.seen["resume: out of pages"] += 1
            return
        num_found = num_pages - len(taken)
        if self.is_plain:
            assert sequence.pages[:num_found] == found
        self.seen[f"resume: {min(num_found, 2)} pages found, {min(len(taken), 2)} copied"] += 1
        expected.pages = sequence.pages[:num_found]
        self.released = [page for page in self.released if page not in expected.pages]
        for page in taken:
            self.take(page)
            self.fill(page, expected.host[len(expected.pages)])
            expected.pages.append(page)
        assert sequence.pages == expected.pages
        self.pairs = []
        expected.host = None

    @rule(rng=RANDOM)
    def finish(self, rng):
        sequence, expected = self.draw(rng, rng.choice(["running", "preempted"]))
        self.pool.finish(sequence)
        assert (sequence.state, sequence.tokens, sequence.pages) == ("finished", expected.tokens, [])
        self.release(expected, 0)
        del self.sequences[sequence]
        self.finished = [*self.finished, (expected.key, expected.tokens)][-4:]

    # -- what holds after each of them

    @invariant()
    def every_sequence_reads_its_tokens(self):
        running = {s: expected for s, expected in self.sequences.items() if expected.host is None}
        batch = self.pool.batch(running)
        lengths = [len(e.tokens) + e.num_reserved for e in running.values()]
        assert batch.cache_seqlens.tolist() == lengths
        for (sequence, expected), row in zip(running.items(), batch.block_table.tolist(), strict=True):
            assert sequence.tokens == expected.tokens
            assert sequence.num_reserved == expected.num_reserved
            assert row == sequence.pages + [0] * (len(row) - len(sequence.pages))
            for position in range(len(expected.tokens)):
                place = row[position // self.page_size], position % self.page_size
                assert self.slots[place] == expected.content(position)

    @invariant()
    def every_page_is_counted(self):
        references = self.references()
        assert [s.pages for s in self.sequences] == [e.pages for e in self.sequences.values()]
        assert self.pool._book.num_references == [references[page] for page in range(self.pool.num_pages)]
        free, cached = self.pool._book.free, list(self.pool._book.cached)
        assert sorted([*free, *cached, *references]) == list(range(self.pool.num_pages))
        assert (self.pool.num_free, self.pool.num_cached) == (len(free), len(cached))
        assert self.pool.num_used == len(references)
        assert (self.pool.num_asked_tokens, self.pool.num_found_tokens) == (self.num_asked, self.num_found)
        if self.is_plain:
            assert cached == self.released

    @invariant()
    def every_page_that_can_be_found_holds_what_is_looked_for(self):
        book = self.pool._book
        assert {content: page for page, content in enumerate(book._contents) if content is not None} == book._places
        for (_, content), page in book._places.items():
            whole = self.slots[page, self.page_size - 1]
            assert np.frombuffer(content, np.int64).tolist() == list(whole[-self.page_size :])


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=30, stateful_step_count=30)


def walk(seed, num_steps):
    """A random walk; in the time it reaches more than hypothesis does. Returns what it has seen."""
    rng, engine = random.Random(seed), Engine()
    engine.start(rng.randint(1, 12), rng.randint(1, 3))
    rules = [
        engine.add,
        engine.fork,
        engine.fork,
        engine.reserve,
        engine.write,
        engine.extend,
        engine.step,
        engine.step,
    ]
    rules += [engine.truncate, engine.preempt, engine.resume, engine.finish, engine.finish]
    for _ in range(num_steps):
        rng.choice(rules)(rng=rng)
        engine.every_sequence_reads_its_tokens()
        engine.every_page_is_counted()
        engine.every_page_that_can_be_found_holds_what_is_looked_for()
    engine.seen[f"plain to the end: {engine.is_plain}"] += 1
    return engine.seen


def test_random_walks():
    seen = sum((walk(seed, 100) for seed in range(80)), Counter())
    wanted = [f"add: {found} pages found" for found in range(4)]
    wanted += [f"resume: {found} pages found, {copied} copied" for found in range(3) for copied in range(2)]
    wanted += ["reserve: 1 copies", "reserve: out of pages", "resume: out of pages"]
    wanted += ["plain to the end: True", "plain to the end: False"]
    assert min((seen[what], what) for what in wanted) >= (10, "")


@pytest.mark.slow
def test_many_random_walks():
    for seed in range(1000, 2000):
        walk(seed, 200)
