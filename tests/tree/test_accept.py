import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.tree import Tree, accept_greedy, path_to
from tests.tree import oracle


def drawn_tree(tokens) -> Tree:
    # 0 - 1 - 3 - 4
    #  \- 2
    parents = jnp.array([[-1, 0, 0, 1, 3]])
    return Tree(jnp.array([tokens]), parents, jnp.array([[0, 1, 1, 2, 3]]), jnp.zeros((1, 5)))


def choosing(*tokens) -> jax.Array:
    """Logits [1, N, 10] whose argmax at node i is tokens[i]."""
    return jax.nn.one_hot(jnp.array([tokens]), 10)


@pytest.mark.parametrize(
    ("choices", "path", "bonus"),
    [
        ((9, 9, 9, 9, 9), [0], 9),  # nothing agrees: the bonus is the root's own choice
        ((5, 9, 9, 9, 9), [0, 1], 9),
        ((6, 9, 7, 9, 9), [0, 2], 7),
        ((5, 8, 9, 9, 2), [0, 1, 3], 9),
        ((5, 8, 9, 4, 2), [0, 1, 3, 4], 2),
        ((9, 8, 9, 4, 2), [0], 9),  # agreement below a rejected node counts for nothing
    ],
)
def test_drawn_tree(choices, path, bonus):
    accepted = accept_greedy(drawn_tree([1, 5, 6, 8, 4]), choosing(*choices))
    np.testing.assert_array_equal(accepted.path[0], path + [-1] * (5 - len(path)))
    assert accepted.length[0] == len(path) - 1
    assert accepted.bonus[0] == bonus


@pytest.mark.parametrize("num_nodes", [1, 2, 9, 40])
def test_equals_the_walk_on_random_trees(num_nodes):
    rng = np.random.default_rng(num_nodes)
    vocab = 3  # few tokens, so that paths agree often and siblings repeat
    trees = [oracle.random_tree(rng, num_nodes, vocab, 8) for _ in range(64)]
    tokens, parents, depths = (jnp.asarray(np.stack(x)) for x in zip(*trees, strict=True))
    logits = rng.normal(size=(64, num_nodes, vocab)).astype(np.float32)
    result = jax.jit(accept_greedy)(Tree(tokens, parents, depths, jnp.zeros(tokens.shape)), jnp.asarray(logits))
    lengths = []
    for row, (row_tokens, row_parents, _) in enumerate(trees):
        path, bonus = oracle.accept_greedy(row_tokens, row_parents, logits[row])
        np.testing.assert_array_equal(result.path[row], path + [-1] * (num_nodes - len(path)))
        assert (result.length[row], result.bonus[row]) == (len(path) - 1, bonus)
        lengths.append(len(path) - 1)
    assert num_nodes < 9 or max(lengths) >= 2  # the trees do agree somewhere


def test_path_to_every_node():
    tree = drawn_tree([1, 5, 6, 8, 4])
    paths = [path_to(tree, tree.ancestors(), jnp.array([end]))[0].tolist() for end in range(5)]
    assert paths == [[0, -1, -1, -1, -1], [0, 1, -1, -1, -1], [0, 2, -1, -1, -1], [0, 1, 3, -1, -1], [0, 1, 3, 4, -1]]
