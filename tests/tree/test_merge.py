"""merge_chains against a trie: few tokens, so that chains share beginnings, and share them with more than one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_jax.tree import Tree, accept_greedy, merge_chains
from tests.tree import oracle

SHAPES = [(1, 1), (1, 4), (3, 1), (2, 3), (5, 3), (3, 6)]  # chains, tokens of each
BATCH = 4

merge = jax.jit(merge_chains)
accept = jax.jit(accept_greedy)


@st.composite
def cases(draw):
    """Roots [B], chains [B, G, L], valid [B, G, L] and the size of the vocabulary."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    count, length = draw(st.sampled_from(SHAPES))
    vocab = draw(st.integers(1, 4))
    chains = rng.integers(0, vocab, (BATCH, count, length)).astype(np.int32)
    valid = rng.random(chains.shape) < 0.7
    return rng.integers(0, vocab, BATCH).astype(np.int32), chains, valid, vocab


def children(parents: np.ndarray, node: int) -> list[int]:
    return [child for child in range(1, len(parents)) if parents[child] == node]


def first_child(tokens, parents, node: int, token: int) -> int | None:
    return next((child for child in children(parents, node) if tokens[child] == token), None)


@given(cases())
def test_equals_a_trie(case):
    roots, chains, valid, _ = case
    tree = jax.device_get(merge(roots, chains, valid))
    _, count, length = chains.shape
    for row, root in enumerate(roots):
        # The node of a text is that of the first chain that begins with it.
        node = {(): 0}
        parents, depths, scores = [-1], [0], [0.0]
        for g in range(count):
            text = tuple(chains[row, g].tolist())
            for i in range(length):
                parents.append(node[text[:i]])
                depths.append(i + 1)
                scores.append(0.0 if valid[row, g, i] else -np.inf)
                node.setdefault(text[: i + 1], 1 + g * length + i)
        np.testing.assert_array_equal(tree.tokens[row], [root, *chains[row].reshape(-1)])
        np.testing.assert_array_equal(tree.parents[row], parents)
        np.testing.assert_array_equal(tree.depths[row], depths)
        np.testing.assert_array_equal(tree.scores[row], scores)
    assert [x.dtype for x in jax.tree.leaves(tree)] == [np.int32, np.int32, np.int32, np.float32]


@given(cases())
def test_every_chain_is_a_path_of_first_siblings(case):
    roots, chains, valid, _ = case
    tree = jax.device_get(merge(roots, chains, valid))
    _, count, length = chains.shape
    for tokens, parents, depths, texts in zip(tree.tokens, tree.parents, tree.depths, chains, strict=True):
        assert parents[0] == -1 and (parents[1:] >= 0).all() and (parents[1:] < np.arange(1, len(parents))).all()
        np.testing.assert_array_equal(depths[1:], depths[parents[1:]] + 1)
        on_a_path = {0}
        for text in texts:
            node = 0
            for i, token in enumerate(text):
                node = first_child(tokens, parents, node, token)
                assert node is not None and depths[node] == i + 1
                on_a_path.add(node)
        # The rest are duplicates: leaves, with an earlier sibling of the same token.
        for node in set(range(1, 1 + count * length)) - on_a_path:
            assert not children(parents, node)
            assert first_child(tokens, parents, parents[node], tokens[node]) < node


@given(cases(), st.integers(0, 10**6))
def test_greedy_decoding_accepts_the_longest_agreement_of_any_chain(case, seed):
    roots, chains, valid, vocab = case
    tree = merge(roots, chains, valid)
    # The target's choice is a function of the text, which is the same for duplicates.
    choose = np.random.default_rng(seed).integers(0, vocab, (BATCH, 4**6 * 2))

    def choice(row, text):
        return choose[row, sum(4**i * int(token) for i, token in enumerate(text)) % choose.shape[1]]

    count, length = chains.shape[1:]
    logits = np.zeros((BATCH, 1 + count * length, 4), np.float32)
    longest = np.zeros(BATCH, int)
    for row in range(BATCH):
        tokens, below = np.asarray(tree.tokens[row]), oracle.ancestors(np.asarray(tree.parents[row]))
        below[:, 0] = False
        for node, on_path in enumerate(below):
            logits[row, node, choice(row, tokens[on_path])] = 1
        for text in chains[row]:
            agreed = 0
            while agreed < length and choice(row, text[:agreed]) == text[agreed]:
                agreed += 1
            longest[row] = max(longest[row], agreed)
    np.testing.assert_array_equal(accept(tree, logits).length, longest)


def test_the_drawn_example():
    a, b, c, d, e = range(5)
    tree = merge_chains(jnp.array([9]), jnp.array([[[a, b, c], [a, d, e]]]), jnp.ones((1, 2, 3), bool))
    assert isinstance(tree, Tree)
    np.testing.assert_array_equal(tree.tokens, [[9, a, b, c, a, d, e]])
    np.testing.assert_array_equal(tree.parents, [[-1, 0, 1, 2, 0, 1, 5]])


@pytest.mark.parametrize("valid", [True, False])
def test_equal_chains_follow_the_first(valid):
    tree = merge_chains(jnp.array([9]), jnp.ones((1, 3, 2), jnp.int32), jnp.full((1, 3, 2), valid))
    np.testing.assert_array_equal(tree.parents, [[-1, 0, 1, 0, 1, 0, 1]])
    np.testing.assert_array_equal(tree.scores[0, 1:], np.full(6, 0.0 if valid else -np.inf))
