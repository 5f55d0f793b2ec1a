# SPDX-License-Identifier: Apache-2.0
"""`PagePool` and `paged_kv` together: whatever an engine does, a sequence's attention is that over its tokens alone."""

import random

import torch

from fmkernels import OutOfPages, PagePool, paged_kv

HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 2, 16, 50


class Engine:
    """One layer of attention over a paged cache. Keys and values follow from token, position and key."""

    def __init__(self, num_pages, page_size):
        self.pool = PagePool(num_pages, page_size)
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(2, VOCABULARY, KV_HEADS, HEAD_DIM, generator=generator)
        self.caches = [torch.full((num_pages, page_size, KV_HEADS, HEAD_DIM), torch.nan) for _ in range(2)]
        self.hosts = {}

    def keys_and_values(self, key, tokens, first):
        """[2, tokens, kv_heads, head_dim]"""
        positions = torch.arange(first, first + len(tokens))[:, None, None]
        return self.embedding[:, tokens] + 0.1 * positions + key

    def reserve(self, sequence, num_tokens):
        pairs = self.pool.reserve(sequence, num_tokens)
        if pairs:
            src, dst = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
            for cache in self.caches:
                paged_kv.copy_pages(cache, src, dst)

    def run(self, batch):
        """Writes the tokens of {sequence: (key, tokens)} to reserved slots; returns what attention gives for each."""
        step = self.pool.batch(batch)
        new = [self.keys_and_values(key, tokens, s.num_tokens) for s, (key, tokens) in batch.items()]
        k, v = torch.cat(new, 1)
        paged_kv.append(k, v, *self.caches, step.slot_mapping)
        q = k.repeat_interleave(HEADS // KV_HEADS, 1)
        o = paged_kv.attend(q, *self.caches, step.block_table, step.cache_seqlens, cu_seqlens_q=step.cu_seqlens_q)
        return o.split([len(tokens) for _, tokens in batch.values()])

    def preempt(self, sequence):
        pages = torch.tensor(self.pool.preempt(sequence), dtype=torch.int32)
        self.hosts[sequence] = [torch.empty(len(pages), *cache.shape[1:]) for cache in self.caches]
        for cache, host in zip(self.caches, self.hosts[sequence], strict=True):
            paged_kv.swap_out(cache, pages, host)

    def resume(self, sequence):
        pages = torch.tensor(self.pool.resume(sequence), dtype=torch.int32)
        for cache, host in zip(self.caches, self.hosts.pop(sequence), strict=True):
            paged_kv.swap_in(cache, pages, host[len(host) - len(pages) :])

    def expected(self, key, tokens, num_queries):
        """The same from a cache of its own."""
        k, v = self.keys_and_values(key, tokens, 0)
        q = k[len(tokens) - num_queries :].repeat_interleave(HEADS // KV_HEADS, 1)
        lengths = [torch.tensor(x, dtype=torch.int32) for x in ([[0]], [len(tokens)], [0, num_queries])]
        return paged_kv.attend(q, k[None], v[None], *lengths[:2], cu_seqlens_q=lengths[2])


def test_an_engine_under_pressure():
    """Chunked prefills, forks, drafts that are rejected, truncation, preemption both ways; every bit as if alone."""
    rng, engine = random.Random(0), Engine(num_pages=40, page_size=4)
    pool, tokens_of, keys, waiting = engine.pool, {}, {}, {}
    seen = dict.fromkeys(("found", "forked", "preempted", "computed again"), 0)
    prompts = [rng.choices(range(VOCABULARY), k=30) for _ in range(3)]
    for _ in range(120):
        if len(tokens_of) < 8:
            prompt = prompts[rng.randrange(3)][: rng.randint(1, 30)] + rng.choices(range(VOCABULARY), k=3)
            key = rng.randrange(2)
            sequence = pool.add(prompt, key=key)
            keys[sequence], tokens_of[sequence] = key, prompt[: sequence.num_tokens]
            waiting[sequence] = prompt[sequence.num_tokens :]
            seen["found"] += sequence.num_tokens
        running = [s for s in tokens_of if s.state == "running"]
        batch = {}
        for sequence in running:
            tokens = waiting[sequence][:7] or rng.choices(range(VOCABULARY), k=rng.randint(1, 4))
            try:
                engine.reserve(sequence, len(tokens))
            except OutOfPages:
                if rng.random() < 0.7:
                    engine.preempt(sequence)
                    seen["preempted"] += 1
                else:
                    pool.finish(sequence)
                    again = pool.add(sequence.tokens, key=keys[sequence])
                    keys[again], tokens_of[again] = keys[sequence], again.tokens
                    waiting[again] = tokens_of.pop(sequence)[again.num_tokens :] + waiting[sequence]
                    seen["computed again"] += 1
                continue
            batch[sequence] = (keys[sequence], tokens)
        for (sequence, (key, tokens)), o in zip(batch.items(), engine.run(batch) if batch else (), strict=True):
            whole = tokens_of[sequence] + tokens
            assert torch.equal(o, engine.expected(key, whole, len(tokens)))
            accepted = tokens if waiting[sequence] else tokens[: rng.randint(1, len(tokens))]
            pool.extend(sequence, accepted)
            tokens_of[sequence] += accepted
            waiting[sequence] = waiting[sequence][len(accepted) :]
            if rng.random() < 0.1:
                pool.truncate(sequence, rng.randint(0, sequence.num_tokens))
                waiting[sequence] = tokens_of[sequence][sequence.num_tokens :] + waiting[sequence]
                del tokens_of[sequence][sequence.num_tokens :]
            elif rng.random() < 0.1:
                child = pool.fork(sequence)
                keys[child], tokens_of[child], waiting[child] = key, tokens_of[sequence][:], waiting[sequence][:]
                seen["forked"] += 1
            elif sequence.num_tokens > 50 or rng.random() < 0.1:
                pool.finish(sequence)
                del tokens_of[sequence]
        for sequence in tokens_of:
            if sequence.state == "preempted" and pool.num_free + pool.num_cached > 20:
                engine.resume(sequence)
    assert min(seen.values()) >= 5, seen
    for sequence in tokens_of:
        pool.finish(sequence)
    assert pool.num_free + pool.num_cached == pool.num_pages
