"""StaticTree: the published tree of EAGLE-1, growth against a walk of the paths, and what a draft sees of it."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.tree import PUBLISHED_TREES, DraftStep, StaticTree, Tree
from tests.tree import oracle

VOCAB, TARGET_VOCAB = 12, 40

TREES = {
    "depth-1": [[0], [1], [2]],
    "one-node": [[0]],
    "rank-alone": [[0], [3], [1], [2], [3, 1], [3, 0], [3, 1, 0]],  # of its level only the last has children
    "later-parents": [[0], [1], [2], [1, 0], [2, 0], [2, 1], [2, 1, 0], [2, 1, 1], [1, 0, 0], [2, 1, 1, 0]],
    "wide-then-narrow": [[0], [1], [0, 0], [1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0, 0]],
    "last-of-the-vocabulary": [[r] for r in range(VOCAB)] + [[VOCAB - 1, r] for r in range(VOCAB)],
}
ALL = {name: StaticTree(paths) for name, paths in TREES.items()} | {"chain": StaticTree.chain(6)} | PUBLISHED_TREES


def with_children(tree: StaticTree) -> list[list[tuple[int, ...]]]:
    """The nodes that have children, by depth from the root on, in order of path."""
    levels = [[path for path in [(), *tree.paths] if len(path) == depth] for depth in range(tree.depth)]
    return [sorted(path for path in level if any(p[:-1] == path for p in tree.paths)) for level in levels]


# The published tree of EAGLE-1


@pytest.fixture(scope="module")
def eagle(golden):
    name = "static_tree_mc_sim_7b_63"
    return StaticTree(json.loads((golden / f"{name}.json").read_text())), np.load(golden / f"{name}.npz")


@functools.partial(jax.jit, static_argnames=("tree", "vocab"))
def shape_of(tree: StaticTree, vocab: int = VOCAB) -> Tree:
    """The tree of a draft with the same logits everywhere."""

    def draft_fn(carry, step):
        return jnp.zeros((*step.tokens.shape, vocab)), carry

    return tree.grow(jnp.zeros(1, jnp.int32), jnp.zeros((1, vocab)), None, draft_fn)[0]


def test_the_published_tree_is_the_reference_s(eagle):
    tree, gold = eagle
    assert tree == PUBLISHED_TREES["eagle"] and tree.num_nodes == 26 and tree.depth == 5
    shape = shape_of(tree)
    np.testing.assert_array_equal(shape.ancestors(), gold["tree_attn_mask"][0] > 0)
    np.testing.assert_array_equal(shape.depths[0], gold["tree_position_ids"])

    leaves = sorted(path for path in tree.paths if not any(p[:-1] == path for p in tree.paths))
    rows = [[tree.node_of[path[:depth]] for depth in range(len(path) + 1)] for path in leaves]
    np.testing.assert_array_equal([row + [-1] * (6 - len(row)) for row in rows], gold["retrieve_indices"])


def test_the_published_tree_takes_its_tokens_from_the_reference_s_places(eagle):
    """The reference numbers 10 proposals for each node with children, in the order that they are expanded."""
    tree, gold = eagle
    expanded = [(), *(path for level in tree.steps for path in level)]
    places = [0] + [1 + 10 * expanded.index(path[:-1]) + path[-1] for path in tree.paths]
    np.testing.assert_array_equal(places, gold["tree_indices"])


def test_the_published_trees_have_their_published_sizes():
    sizes = {name: tree.num_nodes for name, tree in PUBLISHED_TREES.items()}
    assert sizes.pop("eagle") == 26
    assert len(sizes) == 9 and set(sizes.values()) == {64}
    assert all(tree.ranks <= 10 and tree.width <= 10 and 3 <= tree.depth <= 5 for tree in PUBLISHED_TREES.values())


# Growth


class Recorder:
    """A toy draft that keeps what it was handed: carry (drafted, calls [], DraftSteps [L, ...])."""

    def __init__(self, seed: int):
        self.toy = oracle.ToyDraft(seed, VOCAB, TARGET_VOCAB)

    def carry(self, tree: StaticTree, batch: int):
        steps, rows = tree.depth - 1, (tree.depth - 1) * tree.width
        shapes = [(batch, tree.width), (batch, tree.width), (batch, tree.width, rows), ()]
        log = DraftStep(*(jnp.full((steps, *shape), -1, jnp.int32) for shape in shapes))
        return jnp.zeros((batch, rows), jnp.int32), jnp.int32(0), log

    def draft_fn(self, carry, step: DraftStep):
        drafted, calls, log = carry
        log = jax.tree.map(lambda all, one: all.at[calls].set(one.astype(jnp.int32)), log, step)
        logits, drafted = self.toy.draft_fn(drafted, step)
        return logits, (drafted, calls + 1, log)


RECORDER = Recorder(3)
ROOTS = np.array([3, 7], np.int32)
# Rows differ from the root on; what stands below a node depends on its path.
FIRST = np.stack([RECORDER.toy.logits([]), np.random.default_rng(4).normal(size=VOCAB)]).astype(np.float32)


@functools.partial(jax.jit, static_argnames="tree")
def grow_with(roots, logits, carry, target_ids, tree):
    return tree.grow(roots, logits, carry, RECORDER.draft_fn, target_ids)


def expected_texts(tree: StaticTree, row: int) -> dict[tuple[int, ...], tuple[list[int], float]]:
    """Of each path, its tokens below the root and its score."""
    known: dict = {(): ([], 0.0)}
    for path in tree.paths:
        text, score = known[path[:-1]]
        log_probs = oracle.log_softmax(RECORDER.toy.logits(text) if text else FIRST[row].astype(np.float64))
        choice = oracle.best(list(log_probs), path[-1] + 1)[-1]
        known[path] = ([*text, int(RECORDER.toy.target_ids[choice])], score + log_probs[choice])
    return known


@pytest.mark.parametrize("name", ALL)
def test_growth_equals_the_walk_and_the_draft_sees_what_it_should(name):
    tree = ALL[name]
    target_ids = jnp.asarray(RECORDER.toy.target_ids)
    grown, (_, calls, log) = grow_with(ROOTS, FIRST, RECORDER.carry(tree, 2), target_ids, tree)
    grown, log = jax.device_get((grown, log))
    paths = [(), *sorted(tree.paths, key=lambda path: (len(path), path))]
    for row, root in enumerate(ROOTS):
        expected = expected_texts(tree, row)
        np.testing.assert_array_equal(grown.tokens[row], [root, *(expected[path][0][-1] for path in paths[1:])])
        np.testing.assert_array_equal(grown.parents[row], [-1, *(paths.index(path[:-1]) for path in paths[1:])])
        np.testing.assert_array_equal(grown.depths[row], [len(path) for path in paths])
        np.testing.assert_allclose(grown.scores[row], [expected[path][1] for path in paths], atol=1e-4)
    assert all(x.dtype == np.int32 for x in (grown.tokens, grown.parents, grown.depths))

    # One call for each depth but the last, of the nodes that have children.
    assert calls == tree.depth - 1
    levels = with_children(tree)[1:]
    assert tree.steps == levels and tree.width == max([1, *map(len, levels)])
    np.testing.assert_array_equal(log.level, np.arange(tree.depth - 1))
    assert np.isin(log.tokens, RECORDER.toy.target_ids).all()  # beyond the last node, too
    drafted = {path: level * tree.width + slot for level, nodes in enumerate(levels) for slot, path in enumerate(nodes)}
    for level, nodes in enumerate(levels):
        for slot, path in enumerate(nodes):
            visible = sorted(drafted[path[:depth]] for depth in range(1, len(path) + 1))
            for row in range(2):
                assert log.tokens[level, row, slot] == expected_texts(tree, row)[path][0][-1]
                assert log.parents[level, row, slot] == (0 if level == 0 else levels[level - 1].index(path[:-1]))
                assert np.flatnonzero(log.mask[level, row, slot]).tolist() == visible
        # A row sees nothing that is not yet drafted; a softmax over nothing would not be a number.
        assert not log.mask[level, :, :, (level + 1) * tree.width :].any()
        assert log.mask[level].any(axis=-1).all()


def test_without_target_ids_tokens_are_the_draft_s():
    """The likeliest child of a token is the next of the vocabulary."""
    tree = StaticTree(TREES["later-parents"])
    first = FIRST[:, ::-1]

    def draft_fn(carry, step):
        return -((jnp.arange(VOCAB)[None, None] - step.tokens[..., None] - 1) % VOCAB).astype(jnp.float32), carry

    plain = jax.jit(lambda roots, first: tree.grow(roots, first, None, draft_fn)[0])(ROOTS, first)
    best = np.argsort(-first[0])
    np.testing.assert_array_equal(plain.tokens[0, 1:4], best[:3])
    node = tree.node_of
    assert plain.tokens[0, node[1, 0]] == (best[1] + 1) % VOCAB
    assert plain.tokens[0, node[2, 1]] == (best[2] + 2) % VOCAB
    assert plain.tokens[0, node[2, 1, 1, 0]] == (best[2] + 5) % VOCAB


def test_a_tree_of_depth_1_needs_no_draft_step():
    def draft_fn(carry, step):
        raise AssertionError("called")

    carry = {"any": jnp.arange(3)}
    tree, same = StaticTree(TREES["depth-1"]).grow(jnp.asarray(ROOTS), jnp.asarray(FIRST), carry, draft_fn)
    assert same is carry
    np.testing.assert_array_equal(tree.tokens[:, 1:], np.argsort(-FIRST, axis=1)[:, :3])


# What a static tree is


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([[0], [1, 0]], r"path \[1, 0\] of the static tree lacks its parent, \[1\]"),
        ([[0], [0, 0, 0]], r"path \[0, 0, 0\] of the static tree lacks its parent, \[0, 0\]"),
        ([[0], [1], (0, 2), [0, 2]], r"path \[0, 2\] is twice"),
        ([[1], [1]], r"path \[1\] is twice"),
        ([], "at least one path; for plain decoding pass draft=None"),
        ([[0], []], r"such as \[0, 2, 0\], got \[\]"),
        ([[0], [True]], r"list of child ranks .* got \[True\]"),
        ([[0], [-1]], r"got \[-1\]"),
        ([[0], [0, 1.0]], r"got \[0, 1.0\]"),
        (["0"], "got '0'"),
        ("01", "got '0'"),
        ([0, 1], "got 0"),
        ([["0"]], r"got \['0'\]"),
        ([None], "got None"),
    ],
)
def test_what_is_no_tree_is_refused(paths, message):
    with pytest.raises(ValueError, match=message):
        StaticTree(paths)


def test_a_rank_beyond_the_draft_vocabulary_is_refused():
    tree = StaticTree([[0], [0, 4]])
    assert shape_of(tree, vocab=5).tokens[0, 2] == 4
    with pytest.raises(ValueError, match="rank 4 of the static tree exceeds the draft vocabulary of 4"):
        shape_of(tree, vocab=4)


def test_the_same_paths_are_the_same_tree():
    paths = TREES["later-parents"]
    trees = {StaticTree(paths), StaticTree(paths[::-1]), StaticTree(tuple(map(tuple, paths)))}
    assert len(trees) == 1
    assert StaticTree(paths) == StaticTree(paths[::-1]) != StaticTree(paths[:-1])
    assert hash(StaticTree(paths)) == hash(StaticTree(paths[::-1]))


def test_a_chain_has_one_node_a_level():
    assert StaticTree.chain(3) == StaticTree([[0], [0, 0], [0, 0, 0]])
    tree = StaticTree.chain(5)
    assert (tree.depth, tree.num_nodes, tree.width, tree.ranks) == (5, 6, 1, 1)
    np.testing.assert_array_equal(shape_of(tree).parents[0], [-1, 0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="at least one path"):
        StaticTree.chain(0)
