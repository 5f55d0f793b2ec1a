# SPDX-License-Identifier: Apache-2.0
"""speculative verification: the walk of the definition, exact distributions, known answers, errors, and torch."""

import math

import pytest
import torch
from chi_square import FALSE_ALARM, chi_square
from torch.library import opcheck

from fmkernels import _library, reference, verify_chain, verify_tree
from fmkernels._library import ops
from fmkernels.testing import backends

BACKENDS = backends("speculative_verify")
TREE = [-1, -1, 0, 0, 1, 2, -1, 6]  # three children of the root, of which each has some


def numbers(batch, device="cpu"):
    generator = torch.Generator().manual_seed(batch)
    draws = (torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator) for _ in range(2))
    return dict(zip(("seed", "offset"), (t.to(device) for t in draws), strict=True))


def distributions(*shape, seed=0, spread=1.0):
    return torch.softmax(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread, -1)


def drawn(probs, seed=0):
    """One token of each row of [..., vocab]."""
    flat = probs.reshape(-1, probs.shape[-1])
    return torch.multinomial(flat, 1, generator=torch.Generator().manual_seed(seed)).view(probs.shape[:-1])


def tree_inputs(batch, vocab, parents, device="cpu", with_draft=True, spread=1.0):
    """(draft_tokens, parents, target_probs), draft_probs or None; some nodes are absent."""
    num_nodes = len(parents)
    target = distributions(batch, num_nodes + 1, vocab, seed=1, spread=spread)
    draft = distributions(batch, num_nodes, vocab, seed=2, spread=spread)
    rows = torch.tensor(parents) + 1
    tokens = drawn(draft[:, rows], seed=3)
    tokens[torch.rand(tokens.shape, generator=torch.Generator().manual_seed(4)) < 0.05] = -1
    args = (tokens.to(device), torch.tensor(parents).to(device), target.to(device))
    return args, draft.to(device) if with_draft else None


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("with_draft", [True, False], ids=["draft probs", "no draft probs"])
@pytest.mark.parametrize("vocab", [1, 5, 700])
@pytest.mark.parametrize("parents", [TREE, [-1, 0, 1, 2], [-1, -1, -1, -1]], ids=["tree", "chain", "siblings"])
def test_tokens_are_those_of_the_definition(parents, vocab, with_draft, backend):
    args, draft = tree_inputs(12, vocab, parents, backend.device, with_draft)
    randoms = numbers(12, backend.device)
    actual = backend.run(verify_tree, *args, **randoms, draft_probs=draft)
    expected = reference.verify_tree(*args, **randoms, draft_probs=draft)
    assert all(map(torch.equal, actual, expected))
    if parents == [-1, 0, 1, 2]:
        chain = backend.run(verify_chain, args[0], args[2], **randoms, draft_probs=draft)
        assert all(map(torch.equal, chain, expected[:2]))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_request_does_not_depend_on_its_batch_or_the_threads(backend):
    args, draft = tree_inputs(9, 300, TREE, backend.device)
    randoms = numbers(9, backend.device)
    together = backend.run(verify_tree, *args, **randoms, draft_probs=draft)
    for i in (0, 4, 8):
        one = slice(i, i + 1)
        alone = backend.run(
            verify_tree,
            args[0][one],
            args[1],
            args[2][one],
            **{name: value[one] for name, value in randoms.items()},
            draft_probs=draft[one],
        )
        assert all(torch.equal(part, whole[one]) for part, whole in zip(alone, together, strict=True))
    torch.set_num_threads(2)
    assert all(map(torch.equal, backend.run(verify_tree, *args, **randoms, draft_probs=draft), together))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("with_draft", [True, False])
def test_greedy_chains_keep_what_the_target_says(with_draft, backend):
    """One-hot targets: the accepted tokens are those up to the first that differs, and the bonus is the target's."""
    target = torch.tensor([[3, 1, 4, 1], [3, 1, 4, 1], [3, 1, 4, 1], [2, 7, 1, 8]])
    draft = torch.tensor([[3, 1, 4], [3, 0, 4], [5, 1, 4], [2, -1, 1]])
    probs = torch.nn.functional.one_hot(target, 9).float().to(backend.device)
    draft_probs = torch.nn.functional.one_hot(draft.clamp(min=0), 9).float().to(backend.device) if with_draft else None
    randoms = numbers(4, backend.device)
    tokens, count = backend.run(verify_chain, draft.to(backend.device), probs, **randoms, draft_probs=draft_probs)
    assert count.tolist() == [3, 1, 0, 1]
    assert tokens.tolist() == [[3, 1, 4, 1], [3, 1, -1, -1], [3, -1, -1, -1], [2, 7, -1, -1]]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_greedy_trees_follow_the_path_of_the_target(backend):
    tokens = torch.tensor([[5, 6, 7, 8, 1, 2, 3, 4]])
    target = torch.full((1, 9), 9)
    target[0, 0], target[0, 1], target[0, 4] = 5, 8, 0  # root: node 0; after node 0: node 3; after node 3: no child
    probs = torch.nn.functional.one_hot(target, 10).float()
    args = (t.to(backend.device) for t in (tokens, torch.tensor(TREE), probs))
    actual = backend.run(verify_tree, *args, **numbers(1, backend.device))
    assert actual[0].tolist() == [[5, 8, 0, -1, -1, -1, -1, -1, -1]]
    assert actual[1].tolist() == [2]
    assert actual[2].tolist() == [[0, 3, -1, -1, -1, -1, -1, -1]]


def test_a_draft_of_the_target_itself_is_always_accepted():
    probs = distributions(500, 4, 30)
    draft = drawn(probs[:, :3])
    _, count = verify_chain(draft, probs, **numbers(500), draft_probs=probs[:, :3].contiguous())
    assert (count == 3).all()


# ---- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["far", "near", "none", "greedy"])
def test_chains_have_the_distribution_of_the_target(draft):
    """Chi-square over the pairs of the first two tokens of 100,000 requests; the second depends on the first.

    A right verification fails with a probability of FALSE_ALARM. Where only one token comes, the second is drawn from
    the target as a next step would.
    """
    count, vocab = 100_000, 5
    first = distributions(1, vocab, seed=5)[0]
    second = distributions(vocab, vocab, seed=6, spread=1.5)  # by the first token
    q = {"near": (first + 0.2) / (first + 0.2).sum(), "greedy": first}.get(draft, distributions(1, vocab, seed=7)[0])
    q_second = distributions(vocab, vocab, seed=8)
    drafts = torch.stack([drawn(q.expand(count, -1), 1), torch.zeros(count, dtype=torch.int64)], 1)
    if draft == "greedy":  # a certain draft, as of n-grams
        drafts[:, 0] = first.argmax()
    drafts[:, 1] = drawn(q_second[drafts[:, 0]], 2)
    target = torch.stack([first.expand(count, -1), second[drafts[:, 0]], distributions(count, vocab)], 1)
    probs = torch.stack([q.expand(count, -1), q_second[drafts[:, 0]]], 1) if draft in ("far", "near") else None
    numbers_of = torch.arange(count)
    tokens, accepted = verify_chain(drafts, target, seed=numbers_of, offset=numbers_of * 0, draft_probs=probs)
    a, b = tokens[:, 0], tokens[:, 1]
    b = torch.where(accepted > 0, b, drawn(second[a], 3))
    observed = (a * vocab + b).bincount(minlength=vocab**2).double()
    expected = (first.double()[:, None] * second.double()).flatten()
    assert chi_square(observed, expected / expected.sum() * count) > FALSE_ALARM
    assert 0.1 < (accepted > 0).double().mean() < 0.98  # both ways were taken


@pytest.mark.parametrize("with_draft", [True, False])
def test_trees_have_the_distribution_of_the_target(with_draft):
    """Three children of the root, of which the second has two more; chi-square over pairs, as for chains."""
    count, vocab, parents = 100_000, 4, torch.tensor([-1, -1, -1, 1, 1])
    first, second = distributions(1, vocab, seed=9)[0], distributions(vocab, vocab, seed=10)
    q, q_second = distributions(1, vocab, seed=11)[0], distributions(vocab, vocab, seed=12)
    children = [drawn(q.expand(count, -1), i) for i in range(3)]
    children += [drawn(q_second[children[1]], i) for i in (3, 4)]
    drafts = torch.stack(children, 1)
    rows = [first.expand(count, -1), *(second[c] for c in children[:3]), *[distributions(count, vocab)] * 2]
    target = torch.stack(rows, 1)
    draft = torch.stack([q.expand(count, -1), q.expand(count, -1), q_second[children[1]], *rows[:2]], 1)
    order = torch.arange(count)
    tokens, accepted, nodes = verify_tree(
        drafts, parents, target, seed=order * 0 + 3, offset=order, draft_probs=draft if with_draft else None
    )
    a = tokens[:, 0]
    b = torch.where(accepted > 0, tokens[:, 1], drawn(second[a], 5))
    observed = (a * vocab + b).bincount(minlength=vocab**2).double()
    expected = (first.double()[:, None] * second.double()).flatten()
    assert chi_square(observed, expected / expected.sum() * count) > FALSE_ALARM
    assert {-1, 0, 1, 2} == set(nodes[:, 0].tolist())
    assert {-1, 3, 4} == set(nodes[:, 1].tolist())


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_rows_that_are_no_distribution_end_a_walk(backend):
    """And touch no other request, and no place before them."""
    probs = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3]] * 4), 6).float()
    draft = torch.tensor([[1, 2]] * 4)
    probs[1, 1, 5], probs[2, 0] = math.nan, 0.0
    tokens, count = backend.run(
        verify_chain, draft.to(backend.device), probs.to(backend.device), **numbers(4, backend.device)
    )
    assert tokens.tolist() == [[1, 2, 3], [1, -1, -1], [-1, -1, -1], [1, 2, 3]]
    assert count.tolist() == [2, 1, 0, 2]
    draft_probs = torch.full((4, 2, 6), 1 / 6)
    draft_probs[3, 1, 0] = math.nan
    args = (draft.to(backend.device), probs.to(backend.device))
    tokens, _ = backend.run(
        verify_chain, *args, **numbers(4, backend.device), draft_probs=draft_probs.to(backend.device)
    )
    assert tokens[3].tolist() == [1, -1, -1]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_strides_change_no_tokens(backend):
    args, draft = tree_inputs(5, 40, TREE, backend.device)
    randoms = numbers(5, backend.device)
    expected = backend.run(verify_tree, *args, **randoms, draft_probs=draft)
    tokens, parents, target = args
    wide = torch.cat([target, target * math.nan], 2)[..., :40].transpose(0, 1).contiguous().transpose(0, 1)
    column = torch.stack([tokens, tokens], 2)[..., 0]
    actual = backend.run(verify_tree, column, parents.expand(5, -1).contiguous(), wide, **randoms, draft_probs=draft)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_without_drafts_a_token_is_drawn(backend):
    probs = distributions(6, 1, 30).to(backend.device)
    nothing = torch.zeros(6, 0, dtype=torch.int64, device=backend.device)
    tokens, count = backend.run(verify_chain, nothing, probs, **numbers(6, backend.device))
    assert torch.equal(tokens, reference.verify_chain(nothing, probs, **numbers(6, backend.device))[0])
    assert (count == 0).all()
    assert verify_chain(nothing[:0], probs[:0], **numbers(0))[0].shape == (0, 1)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "cpu"], ids=str)
def test_a_gpu_takes_what_is_no_node_as_absent(backend, monkeypatch):
    args, _ = tree_inputs(4, 20, TREE, backend.device)
    tokens, parents, target = args
    wrong, absent = tokens.clone(), tokens.clone()
    wrong[:, 2], wrong[:, 1], absent[:, 1:3] = 20, -7, -1
    randoms = numbers(4, backend.device)
    actual = backend.run(verify_tree, wrong, parents, target, **randoms)
    assert all(map(torch.equal, actual, backend.run(verify_tree, absent, parents, target, **randoms)))
    no_parent, gone = parents.clone(), tokens.clone()
    no_parent[0], no_parent[3], gone[:, [0, 3]] = 5, -9, -1
    actual = backend.run(verify_tree, tokens, no_parent, target, **randoms)
    assert all(map(torch.equal, actual, backend.run(verify_tree, gone, parents, target, **randoms)))
    monkeypatch.setattr(_library, "check_values", True)  # as FMKERNELS_CHECK=1
    with pytest.raises(ValueError, match="draft_tokens must be from -1 to 19, got"):
        backend.run(verify_tree, wrong, parents, target, **randoms)


# ---- errors ----------------------------------------------------------------------------------------------------------

LONGS, TOKENS, PROBS = torch.zeros(2).long(), torch.zeros(2, 3).long(), torch.full((2, 4, 5), 0.2)
LAYOUT, SHAPE = "[batch, num_nodes + 1, vocab]", "must have the shape [2, 4, 5] for these tokens"
ERRORS = [
    ({"draft_tokens": None}, TypeError, "draft_tokens must be a tensor, got NoneType."),
    ({"draft_tokens": TOKENS.int()}, ValueError, "draft_tokens must be int64, got int32."),
    ({"draft_tokens": LONGS}, ValueError, "draft_tokens must be [batch, num_nodes], got 1 dimensions [2]."),
    ({"draft_tokens": TOKENS + 5}, ValueError, "draft_tokens must be from -1 to 4, got 5."),
    ({"parents": [0]}, TypeError, "parents must be a tensor, got list."),
    ({"parents": TOKENS}, ValueError, "parents must be -1 or an earlier node, got 0 of node 0."),
    ({"parents": TOKENS[:, :2]}, ValueError, "parents must have the shape of draft_tokens, [2, 3], got [2, 2]."),
    ({"target_probs": PROBS[0]}, ValueError, f"target_probs must be {LAYOUT}, got 2 dimensions [4, 5]."),
    ({"target_probs": PROBS.half()}, ValueError, "target_probs must be float32, got float16."),
    ({"target_probs": PROBS[:, 1:]}, ValueError, f"target_probs {SHAPE}, got [2, 3, 5]."),
    ({"target_probs": PROBS[..., :0]}, ValueError, "target_probs must have a vocabulary from 1 to 8388608, got 0."),
    ({"draft_probs": PROBS}, ValueError, "draft_probs must have the shape [2, 3, 5] for these tokens, got [2, 4, 5]."),
    ({"draft_probs": PROBS[:, 1:].double()}, ValueError, "draft_probs must be float32, got float64."),
    ({"seed": LONGS.int()}, ValueError, "seed must be int64, got int32."),
    ({"offset": LONGS[:1]}, ValueError, "offset must have as many elements as draft_tokens has rows, 2, got 1."),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "sentence"), ERRORS)
def test_wrong_arguments(wrong, error, sentence):
    right = {"draft_tokens": TOKENS, "parents": torch.tensor([-1, 0, 1]), "target_probs": PROBS}
    with pytest.raises(error) as raised:
        verify_tree(**{**right, "seed": LONGS, "offset": LONGS, **wrong})
    assert str(raised.value) == f"verify_tree: {sentence}"


HOSTILE = [
    [LONGS, TOKENS.int(), TOKENS[:1], TOKENS[:, :2], TOKENS + 5, TOKENS - 2],
    [PROBS[0], PROBS.half(), PROBS[:1], PROBS[:, :2], PROBS[..., :0], torch.zeros(2, 4, 10)[..., ::2]],
    [LONGS[:1], LONGS.int(), TOKENS, torch.zeros(4).long()[::2]],
    [LONGS[:1], LONGS.int()],
    [PROBS, PROBS[:, 1:, :4], PROBS[:, 1:].double(), torch.zeros(2, 3, 10)[..., ::2]],
    [TOKENS + 3, TOKENS - 2, TOKENS[:1], TOKENS.int()],
]


@pytest.mark.parametrize("position", range(6))
def test_the_op_itself_refuses(position):
    right = [TOKENS, PROBS, LONGS, LONGS, PROBS[:, 1:], TOKENS - 1]
    ops.speculative_verify(*right)
    for value in HOSTILE[position]:
        with pytest.raises(RuntimeError):
            ops.speculative_verify(*right[:position], value, *right[position + 1 :])


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.namespace == "fmkernels"], ids=str)
@pytest.mark.parametrize("with_draft", [True, False])
def test_opcheck(with_draft, backend):
    (tokens, parents, target), draft = tree_inputs(3, 9, TREE, backend.device, with_draft)
    args = (tokens, target, *numbers(3, backend.device).values(), draft, parents.expand(3, -1))
    opcheck(torch.ops.fmkernels.speculative_verify.default, args)
    opcheck(torch.ops.fmkernels.speculative_verify.default, (*args[:5], None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic):
    torch._dynamo.reset()
    chain = torch.compile(verify_chain, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    tree = torch.compile(verify_tree, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (3, 5):
        (tokens, parents, target), draft = tree_inputs(batch, 9, TREE)
        randoms = numbers(batch)
        args = (tokens, parents, target)
        expected = verify_tree(*args, **randoms, draft_probs=draft)
        assert all(map(torch.equal, tree(*args, **randoms, draft_probs=draft), expected))
        assert all(map(torch.equal, chain(tokens, target, **randoms), verify_chain(tokens, target, **randoms)))
