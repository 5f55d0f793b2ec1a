# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: which drafted tokens a target model keeps, without changing what it would have said."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _check as check
from ._library import call, ops, register_fake
from .sampling import MAX_VOCAB


def verify_chain(
    draft_tokens: Tensor,
    target_probs: Tensor,
    *,
    seed: Tensor,
    offset: Tensor,
    draft_probs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keeps the beginning of a drafted chain, and one token more, distributed as the target alone would be.

    Token i, with p = target_probs[:, i] and q = draft_probs[:, i], is accepted with probability min(1, p / q) at it; at
    the first rejection the last token is drawn from max(p - q, 0), and where all are accepted, from the last p. Without
    draft_probs the draft is taken as certain of its tokens: q is 1 at them.

    Args:
        draft_tokens: [batch, num_draft], int64, any strides; -1 ends the chain of a request early. On the CPU other
            values outside the vocabulary are an error; on CUDA with FMKERNELS_CHECK=1 too, else they are taken as -1.
        target_probs: [batch, num_draft + 1, vocab], float32, any strides with a contiguous last dimension: row i is the
            target's distribution before draft token i, after temperature and filters; one-hot rows verify greedily.
        seed: [batch], int64, of each request.
        offset: [batch], int64, to be changed before every call of a request, as by adding 1.
        draft_probs: [batch, num_draft, vocab], float32: the distributions from which the draft tokens were drawn.

    Returns:
        (tokens, num_accepted): tokens [batch, num_draft + 1], int64: num_accepted [batch], int64, accepted tokens, then
        the last token, drawn from the target (the bonus), then -1. Where the next distribution holds a NaN or is 0 the
        last token is -1.

    Raises:
        ValueError, TypeError: one sentence with the argument, its rule and what came.

    CPU and CUDA (sm_80 and later). Not differentiable. Deterministic: a function of the request, its seed and its
    offset, the same in every batch and on every device. Probabilities are rounded down to multiples of 2**-40, and need
    sum to 1 only roughly. Leviathan, Kalman and Matias 2023, algorithm 1.
    """
    args = (draft_tokens, target_probs, seed, offset, draft_probs, None)
    tokens, num_accepted, _ = _verify("verify_chain", args)
    return tokens, num_accepted


def verify_tree(
    draft_tokens: Tensor,
    parents: Tensor,
    target_probs: Tensor,
    *,
    seed: Tensor,
    offset: Tensor,
    draft_probs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps a path of a drafted tree, and one token more, distributed as the target alone would be.

    From the root, whose p is target_probs[:, 0], the children of a place are tried in their order: each is accepted
    with probability min(1, r / q) at its token, where r begins as p and becomes max(r - q, 0), normalised, after a
    rejection. From the accepted child i the walk goes on with p = target_probs[:, i + 1]; where none is accepted, the
    last token is drawn from r. The children of a place are independent draws from its row of draft_probs; without
    draft_probs they may be any tokens, as the most likely ones: q is 1 at each.

    Args:
        draft_tokens: [batch, num_nodes], int64, any strides; -1 is no node. Other values outside the vocabulary are
            errors as in `verify_chain`.
        parents: [batch, num_nodes] or [num_nodes], int64: an earlier node, or -1 for the root. On CUDA without
            FMKERNELS_CHECK=1 a node with another parent is taken as absent.
        target_probs: [batch, num_nodes + 1, vocab], float32, any strides with a contiguous last dimension: row 0 is the
            target's distribution at the root, row i + 1 that after node i.
        seed: [batch], int64, of each request.
        offset: [batch], int64, to be changed before every call of a request, as by adding 1.
        draft_probs: [batch, num_nodes, vocab], float32: row 0 is the distribution of the root's children, row i + 1
            that of the children of node i.

    Returns:
        (tokens, num_accepted, nodes): as `verify_chain`; nodes [batch, num_nodes], int64, are the accepted nodes, then
        -1.

    Raises, support and determinism: as `verify_chain`. Miao et al. 2024 (SpecInfer), multi-step speculative sampling.
    """
    check.is_tensor("verify_tree", "parents", parents)
    if parents.dim() == 1 and isinstance(draft_tokens, Tensor) and draft_tokens.dim() == 2:
        parents = parents.expand(draft_tokens.shape[0], -1)
    return _verify("verify_tree", (draft_tokens, target_probs, seed, offset, draft_probs, parents))


def _verify(op: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return call(ops.speculative_verify, args, functools.partial(_check_tensors, op))


def _check_tensors(
    op: str, tokens: Tensor, target: Tensor, seed: Tensor, offset: Tensor, draft: Tensor | None, parents: Tensor | None
) -> None:
    check.is_tensor(op, "draft_tokens", tokens)
    check.dtype(op, "draft_tokens", tokens, (torch.int64,))
    what = "num_draft" if parents is None else "num_nodes"
    check.rank(op, "draft_tokens", tokens, 2, f"[batch, {what}]")
    batch, num_nodes = tokens.shape
    check.is_tensor(op, "target_probs", target)
    check.rank(op, "target_probs", target, 3, f"[batch, {what} + 1, vocab]")
    if not 1 <= target.shape[2] <= MAX_VOCAB:
        raise ValueError(f"{op}: target_probs must have a vocabulary from 1 to {MAX_VOCAB}, got {target.shape[2]}.")
    for name, probs, rows in (("target_probs", target, num_nodes + 1), ("draft_probs", draft, num_nodes)):
        if probs is None:
            continue
        check.is_tensor(op, name, probs)
        check.same_device(op, name, probs, "draft_tokens", tokens)
        check.dtype(op, name, probs, (torch.float32,))
        if list(probs.shape) != [batch, rows, target.shape[2]]:
            expected = [batch, rows, target.shape[2]]
            raise ValueError(f"{op}: {name} must have the shape {expected} for these tokens, got {list(probs.shape)}.")
        check.last_dim_contiguous(op, name, probs)
    for name, numbers in (("seed", seed), ("offset", offset)):
        check.one_a_row(op, name, numbers, torch.int64, "draft_tokens", tokens)
    if parents is not None:
        check.is_tensor(op, "parents", parents)
        check.same_device(op, "parents", parents, "draft_tokens", tokens)
        check.dtype(op, "parents", parents, (torch.int64,))
        check.shape(op, "parents", parents, "draft_tokens", tokens)
    _check_values(op, tokens, target.shape[2], parents)
    check.kernel_exists(op, "speculative_verify", tokens)


def _check_values(op: str, tokens: Tensor, vocab: int, parents: Tensor | None) -> None:
    if not check.sees_values(tokens):
        return
    wrong = tokens[(tokens < -1) | (tokens >= vocab)]
    if wrong.numel() > 0:
        raise ValueError(f"{op}: draft_tokens must be from -1 to {vocab - 1}, got {wrong[0].item()}.")
    if parents is not None:
        is_wrong = (parents < -1) | (parents >= torch.arange(parents.shape[1], device=parents.device))
        if is_wrong.any():
            row, node = is_wrong.nonzero()[0].tolist()
            parent = parents[row, node].item()
            raise ValueError(f"{op}: parents must be -1 or an earlier node, got {parent} of node {node}.")


@register_fake("speculative_verify")
def _(*args):
    _check_tensors("speculative_verify", *args)
    tokens = args[0]
    batch, num_nodes = tokens.shape
    return tokens.new_empty(batch, num_nodes + 1), tokens.new_empty(batch), tokens.new_empty(batch, num_nodes)
