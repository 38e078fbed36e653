"""LookupFirst: which rows copy, and what they propose. That no text changes: tests/drafts/test_lossless.py."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax import Context, Draft, LookupFirst, Proposal, TreeConfig
from eagle_jax.tree import NO_PARENT, merge_chains


class Sevens(Draft):
    """A chain of two sevens, drawn from a distribution that knows nothing else."""

    def propose(self, target, context, tree, noise=None):
        chain = jnp.full((len(context.root), 1, 2), 7, jnp.int32)
        grown = merge_chains(context.root, chain, jnp.ones(chain.shape, bool))
        return Proposal(grown, jnp.zeros((len(context.root), 3, 10)).at[:, :2, 7].set(1))


@pytest.mark.parametrize("length", [2, 4])
def test_each_row_copies_where_its_last_tokens_occurred_before(length):
    tokens = jnp.array([[1, 2, 3, 4, 5, 1, 2, 0], [1, 2, 3, 4, 5, 6, 2, 0]])  # two tokens match; only one
    last = jnp.array([6, 6])
    root = jnp.array([2, 2])
    context = Context(tokens, last + 1, last, root, last, (), None, None, None)
    draft = LookupFirst(Sevens(), length=length)
    tree, probs = draft.propose(None, context, TreeConfig())
    unused = [2] * (length - 2)  # repeat the root
    np.testing.assert_array_equal(tree.tokens, [[2, *[3, 4, 5, 1][:length]], [2, 7, 7, *unused]])
    np.testing.assert_array_equal(tree.parents[0], [NO_PARENT, *range(length)])
    np.testing.assert_array_equal(tree.parents[1], [NO_PARENT, 0, 1, *[2] * len(unused)])
    np.testing.assert_array_equal(tree.depths[1], [0, 1, 2, *[3] * len(unused)])
    assert tree.depths.max() <= max(length, 2)
    np.testing.assert_array_equal(np.isfinite(tree.scores), [[True] * (length + 1), [True] * 3 + [False] * len(unused)])
    assert not probs[0].any(), "a copy is not drawn"
    np.testing.assert_array_equal(probs[1].argmax(-1)[:2], [7, 7])
    assert not probs[1, 2:].any(), "unused nodes are not children of a node that something was drawn at"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "LookupFirst.length must be a positive integer, got 0"),
        ({"ngram": 2.0}, "LookupFirst.ngram must be a positive integer, got 2.0"),
        ({"least": 4}, "LookupFirst.least must be at most ngram, 3, got 4"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LookupFirst(Sevens(), **settings)
