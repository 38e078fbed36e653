import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.tree import Tree, TreeConfig
from tests.tree import oracle


def test_ancestors_of_a_drawn_tree():
    # 0 - 1 - 3 - 4
    #  \- 2
    parents = jnp.array([[-1, 0, 0, 1, 3]])
    tree = Tree(tokens=parents, parents=parents, depths=parents, scores=parents.astype(jnp.float32))
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    np.testing.assert_array_equal(tree.ancestors()[0], np.array(expected, bool))


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 17, 64])
def test_ancestors_equal_the_walk(num_nodes):
    rng = np.random.default_rng(num_nodes)
    # A chain is the deepest tree; the others are random.
    parents = np.stack([np.arange(num_nodes) - 1] + [oracle.random_tree(rng, num_nodes, 5, 64)[1] for _ in range(5)])
    parents = jnp.asarray(parents, jnp.int32)
    tree = Tree(tokens=parents, parents=parents, depths=parents, scores=parents.astype(jnp.float32))
    np.testing.assert_array_equal(tree.ancestors(), [oracle.ancestors(row) for row in np.asarray(parents)])


def test_tree_has_exactly_four_fields():
    assert [field.name for field in dataclasses.fields(Tree)] == ["tokens", "parents", "depths", "scores"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(depth=0), "depth must be a positive integer"),
        (dict(top_k=0), "top_k must be a positive integer"),
        (dict(num_nodes=-3), "num_nodes must be a positive integer"),
        (dict(depth=2.0), "depth must be a positive integer, got 2.0"),
        (dict(depth=True), "depth must be a positive integer, got True"),
        (dict(num_nodes=1), "2 is the smallest tree"),
        (dict(depth=1, top_k=4, num_nodes=6), "at most 5"),
        (dict(depth=3, top_k=2, num_nodes=12), "at most 11"),
    ],
)
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TreeConfig(**fields)


def test_largest_sizes_are_accepted():
    TreeConfig(depth=1, top_k=4, num_nodes=5)
    TreeConfig(depth=3, top_k=2, num_nodes=11)
    assert TreeConfig() == TreeConfig(depth=8, top_k=10, num_nodes=60)
