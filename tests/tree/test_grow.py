import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.tree import Tree, TreeConfig
from tests.tree import oracle

CONFIGS = [
    TreeConfig(depth=1, top_k=3, num_nodes=4),
    TreeConfig(depth=2, top_k=2, num_nodes=5),
    TreeConfig(depth=6, top_k=1, num_nodes=7),  # a chain
    TreeConfig(depth=4, top_k=3, num_nodes=16),
    TreeConfig(depth=3, top_k=4, num_nodes=37),  # every candidate
    TreeConfig(depth=8, top_k=10, num_nodes=60),
]


@functools.partial(jax.jit, static_argnames=("config", "draft_fn"))
def grow_with(roots, logits, carry, draft_fn, target_ids, config):
    return config.grow(roots, logits, carry, draft_fn, target_ids)[0]


def assert_well_formed(tree: Tree, config: TreeConfig) -> None:
    """What holds for any tree: order, depths, scores that never rise along a path, no orphan."""
    for tokens, parents, depths, scores in zip(
        *map(np.asarray, (tree.tokens, tree.parents, tree.depths, tree.scores)), strict=True
    ):
        assert tokens.shape == (config.num_nodes,)
        assert parents[0] == -1 and depths[0] == 0 and scores[0] == 0
        assert (parents[1:] >= 0).all() and (parents[1:] < np.arange(1, config.num_nodes)).all()
        np.testing.assert_array_equal(depths[1:], depths[parents[1:]] + 1)
        assert (scores[1:] <= scores[parents[1:]]).all()
        assert depths.max() <= config.depth


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_the_oracle(config):
    vocab = max(12, config.top_k)
    for seed in range(2):
        draft = oracle.ToyDraft(seed, vocab, 40)
        roots = np.array([3, 7], np.int32)
        logits = np.broadcast_to(draft.logits([]).astype(np.float32), (2, vocab))
        tree = grow_with(
            jnp.asarray(roots),
            jnp.asarray(logits),
            draft.carry(2, config),
            draft.draft_fn,
            jnp.asarray(draft.target_ids),
            config,
        )
        assert_well_formed(tree, config)
        for row, root in enumerate(roots):
            expected = oracle.grow(draft, config, int(root))
            np.testing.assert_array_equal(tree.tokens[row], expected["tokens"])
            np.testing.assert_array_equal(tree.parents[row], expected["parents"])
            np.testing.assert_array_equal(tree.depths[row], expected["depths"])
            np.testing.assert_allclose(tree.scores[row], expected["scores"], atol=1e-4)


def constant_draft(logits, step):
    """Every node's children have these logits [V] (the carry), whatever the path: ties everywhere."""
    return jnp.broadcast_to(logits[None, None], (*step.tokens.shape, logits.shape[0])), logits


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "logits",
    [
        np.zeros(12),  # all equal
        np.where(np.arange(12) == 5, 3000.0, 0.0),  # saturated: the best child ties with its parent at 0
        np.where(np.arange(12) < 6, 1e5, -1e5),  # many at -inf
        np.full(12, np.nan),
        np.where(np.arange(12) == 2, np.nan, 1.0),
        np.where(np.arange(12) == 2, np.inf, 1.0),
        np.full(12, -np.inf),
    ],
    ids=["equal", "saturated", "underflow", "nan", "one-nan", "inf", "minus-inf"],
)
def test_ties_and_broken_logits_never_orphan_a_node(config, logits):
    logits = jnp.asarray(logits, jnp.float32)
    tree = grow_with(jnp.array([4]), logits[None], logits, constant_draft, None, config)
    assert_well_formed(tree, config)
    assert (tree.tokens >= 0).all() and (tree.tokens < 12).all()


def test_ties_go_to_the_lowest_flat_index():
    config = TreeConfig(depth=2, top_k=2, num_nodes=4)
    tree = grow_with(jnp.array([9]), jnp.zeros((1, 4)), jnp.zeros(4), constant_draft, None, config)
    # Level 0 proposes tokens 0 and 1 (log 1/4 each); level 1 would add log 1/16: the first of those is kept.
    np.testing.assert_array_equal(tree.tokens[0], [9, 0, 1, 0])
    np.testing.assert_array_equal(tree.parents[0], [-1, 0, 0, 1])
    np.testing.assert_allclose(tree.scores[0], np.log([1, 1 / 4, 1 / 4, 1 / 16]), rtol=1e-6)


def test_top_k_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="top_k = 10 exceeds the draft vocabulary of 7"):
        TreeConfig().grow(jnp.array([0]), jnp.zeros((1, 7)), jnp.zeros(7), constant_draft)
