# SPDX-License-Identifier: Apache-2.0
"""Speculative verification by its definition, a place after another, in the integers of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .sampling import random_bits

_ONE = 1 << 40


def _weights(probs: Tensor) -> Tensor | None:
    """int64 [vocab]; None where one is NaN."""
    if probs.isnan().any():
        return None
    return (probs.double().clamp(0, 1) * _ONE).floor().long()


def verify_tree(
    draft_tokens: Tensor,
    parents: Tensor,
    target_probs: Tensor,
    *,
    seed: Tensor,
    offset: Tensor,
    draft_probs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, num_accepted, nodes) of `fmkernels.verify_tree`."""
    batch, num_nodes = draft_tokens.shape
    tokens = draft_tokens.new_full((batch, num_nodes + 1), -1)
    nodes = draft_tokens.new_full((batch, num_nodes), -1)
    num_accepted = draft_tokens.new_zeros(batch)
    for row in range(batch):
        seed_of_row, offset_of_row = int(seed[row]), int(offset[row])
        parents_of_row = (parents if parents.dim() == 1 else parents[row]).tolist()
        place, path = -1, []
        while True:
            r = _weights(target_probs[row, place + 1])
            p = r
            children = [i for i in range(place + 1, num_nodes) if parents_of_row[i] == place]
            children = [i for i in children if 0 <= int(draft_tokens[row, i]) < target_probs.shape[2]]
            q = _weights(draft_probs[row, place + 1]) if draft_probs is not None and children else None
            if draft_probs is not None and children and (q is None or q.sum() == 0):
                r = None
            alpha, accepted = 0.0, None
            for node in children if r is not None and r.sum() > 0 else []:
                token = int(draft_tokens[row, node])
                coin = (random_bits(seed_of_row, offset_of_row, node + 1, 2) >> 11) * 2.0**-53
                q_token, q_sum = (1, 1) if q is None else (int(q[token]), int(q.sum()))
                if coin * float(int(r.sum())) * float(q_token) < float(int(r[token])) * float(q_sum):
                    accepted = node
                    break
                if q is None:
                    r = r.clone()
                    r[token] = 0
                else:
                    alpha += float(int(r.sum())) / float(q_sum)
                    r = (p - (q.double() * alpha).long()).clamp(min=0)
                    if r.sum() == 0:
                        r, alpha = p, 0.0
            if accepted is not None:
                path.append(accepted)
                place = accepted
                continue
            if r is not None and r.sum() > 0:
                sums = r.cumsum(0)
                number = int(sums[-1]) * random_bits(seed_of_row, offset_of_row, 0, 2) >> 64
                tokens[row, len(path)] = int((sums <= number).sum())
            break
        tokens[row, : len(path)] = draft_tokens[row, path]
        nodes[row, : len(path)] = torch.tensor(path, dtype=torch.int64)
        num_accepted[row] = len(path)
    return tokens, num_accepted, nodes


def verify_chain(
    draft_tokens: Tensor, target_probs: Tensor, *, seed: Tensor, offset: Tensor, draft_probs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(tokens, num_accepted) of `fmkernels.verify_chain`."""
    parents = torch.arange(-1, draft_tokens.shape[1] - 1)
    tree = verify_tree(draft_tokens, parents, target_probs, seed=seed, offset=offset, draft_probs=draft_probs)
    return tree[0], tree[1]
