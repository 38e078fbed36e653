import dataclasses
import functools
from types import SimpleNamespace

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
ADAPTIVE = [
    TreeConfig(depth=5, top_k=3, num_nodes=12, stop_below=0.1),
    TreeConfig(depth=6, top_k=1, num_nodes=7, stop_below=0.1),
    TreeConfig(depth=4, top_k=3, num_nodes=30, stop_below=0.2),  # every candidate
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


@pytest.mark.parametrize("config", CONFIGS + ADAPTIVE, ids=str)
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


# Adaptive growth

ROWS = 16
DRAFT = oracle.ToyDraft(0, 12, 40, scale=1.5)
# Rows differ in how sure the draft is of the first token, hence in how deep they grow.
FIRST = np.random.default_rng(0).normal(size=(ROWS, 12)) * np.linspace(0, 5, ROWS)[:, None]
FIRST = FIRST.astype(np.float32)


def counting_draft(carry, step):
    drafted, calls = carry
    logits, drafted = DRAFT.draft_fn(drafted, step)
    return logits, (drafted, calls + 1)


@functools.partial(jax.jit, static_argnames="config")
def grow_rows(first, config):
    """The trees, and how many draft passes were run."""
    carry = DRAFT.carry(ROWS, config), jnp.int32(0)
    roots = jnp.arange(ROWS, dtype=jnp.int32)
    tree, (_, calls) = config.grow(roots, first, carry, counting_draft, jnp.asarray(DRAFT.target_ids))
    return tree, calls


def rows_of(tree: Tree) -> list[list[np.ndarray]]:
    """tokens, parents, depths and scores, without the root, of each row."""
    fields = jax.device_get((tree.tokens, tree.parents, tree.depths, tree.scores))
    return [[field[row, 1:] for field in fields] for row in range(tree.tokens.shape[0])]


def assert_same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def adaptive_oracle(row: int, config: TreeConfig) -> tuple[dict[str, np.ndarray], int]:
    """The nodes of real candidates, without the root, and the depth that the row grows to.

    All candidates come from the oracle of full growth. Depth d + 1 is grown if depth d was, and if the best candidate
    of depth d is as likely as the threshold.
    """
    logits = FIRST[row].astype(np.float64)
    draft = SimpleNamespace(logits=lambda path: DRAFT.logits(path) if path else logits, target_ids=DRAFT.target_ids)
    everything = dataclasses.replace(config, num_nodes=1 + config.num_candidates, stop_below=0.0)
    full = {name: np.array(values) for name, values in oracle.grow(draft, everything, 0).items()}
    deepest = 1
    while deepest < config.depth:
        chance = np.exp(full["scores"][full["depths"] == deepest].max())
        assert abs(chance - config.stop_below) > 1e-5  # float32 decides as float64 does
        if chance < config.stop_below:
            break
        deepest += 1
    grown = np.flatnonzero((full["depths"] > 0) & (full["depths"] <= deepest))
    kept = sorted(grown[oracle.best(full["scores"][grown].tolist(), config.num_nodes - 1)].tolist())
    index = {0: 0} | {flat: 1 + i for i, flat in enumerate(kept)}
    nodes = {name: full[name][kept] for name in ("tokens", "depths", "scores")}
    return nodes | {"parents": np.array([index[full["parents"][flat]] for flat in kept])}, deepest


@pytest.mark.parametrize("config", ADAPTIVE[:2], ids=str)
def test_a_tiny_threshold_changes_nothing(config):
    plain, plain_calls = grow_rows(FIRST, dataclasses.replace(config, stop_below=0.0))
    adaptive, calls = grow_rows(FIRST, dataclasses.replace(config, stop_below=1e-30))
    assert calls == plain_calls == config.depth - 1
    for one, other in zip(rows_of(plain), rows_of(adaptive), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("config", ADAPTIVE, ids=str)
def test_every_row_stops_where_its_best_node_is_unlikely(config):
    tree, calls = grow_rows(FIRST, config)
    assert_well_formed(tree, config)
    depths_grown = set()
    for row, (tokens, parents, depths, scores) in enumerate(rows_of(tree)):
        expected, deepest = adaptive_oracle(row, config)
        depths_grown.add(deepest)
        count = len(expected["tokens"])
        np.testing.assert_array_equal(tokens[:count], expected["tokens"])
        np.testing.assert_array_equal(parents[:count], expected["parents"])
        np.testing.assert_array_equal(depths[:count], expected["depths"])
        np.testing.assert_allclose(scores[:count], expected["scores"], atol=1e-4)
        assert (scores[count:] == -np.inf).all()
    assert calls == config.depth - 1
    assert depths_grown == set(range(1, config.depth + 1))  # rows of every kind


def test_draft_passes_that_no_row_needs_are_not_run():
    config = ADAPTIVE[0]
    needed = [adaptive_oracle(row, config)[1] - 1 for row in range(ROWS)]
    for count in range(config.depth):
        _, calls = grow_rows(np.broadcast_to(FIRST[needed.index(count)], FIRST.shape), config)
        assert calls == count


@pytest.mark.parametrize("config", ADAPTIVE, ids=str)
def test_a_row_does_not_depend_on_whether_its_neighbours_grow(config):
    together = rows_of(grow_rows(FIRST, config)[0])
    for row in range(ROWS):
        apart = rows_of(grow_rows(np.broadcast_to(FIRST[row], FIRST.shape), config)[0])
        assert_same(apart[row], together[row])


@pytest.mark.parametrize("config", ADAPTIVE[1:], ids=str)
def test_a_threshold_of_1_leaves_an_unsure_draft_its_first_level(config):
    config = dataclasses.replace(config, stop_below=1.0)
    tree, calls = grow_rows(FIRST, config)
    assert calls == 0
    assert_well_formed(tree, config)
    for row, (tokens, _, depths, scores) in enumerate(rows_of(tree)):
        np.testing.assert_array_equal(np.isfinite(scores), depths == 1)
        best = oracle.best(FIRST[row].tolist(), config.top_k)
        np.testing.assert_array_equal(tokens[depths == 1], DRAFT.target_ids[best])


def test_a_draft_as_sure_as_the_threshold_grows_on():
    """Two children of one half each, and then one of probability 1: the paths stay at one half."""
    first = jnp.where(jnp.arange(12) < 2, 0.0, -jnp.inf)

    def draft_fn(calls, step):
        return jnp.broadcast_to(jnp.where(jnp.arange(12) == 3, 0.0, -jnp.inf), (*step.tokens.shape, 12)), calls + 1

    for threshold, expected in ((0.5, 3), (0.51, 0)):
        config = TreeConfig(depth=4, top_k=2, num_nodes=9, stop_below=threshold)
        grow = jax.jit(functools.partial(config.grow, draft_fn=draft_fn))
        tree, calls = grow(jnp.array([9]), first[None], jnp.int32(0))
        assert calls == expected
        assert_well_formed(tree, config)
        assert jnp.isfinite(tree.scores[0, 1:]).sum() == 2 + 2 * expected


@pytest.mark.parametrize("temperature", [0.25, 3])
def test_a_score_temperature_grows_what_divided_logits_do(temperature):
    config = TreeConfig(depth=4, top_k=3, num_nodes=16)
    draft = oracle.ToyDraft(4, 12, 40)
    roots, ids = jnp.array([3, 7]), jnp.asarray(draft.target_ids)
    logits = jnp.broadcast_to(jnp.asarray(draft.logits([]), jnp.float32), (2, 12))

    def divided(carry, step):
        logits, carry = draft.draft_fn(carry, step)
        return logits / temperature, carry

    expected = grow_with(roots, logits / temperature, draft.carry(2, config), divided, ids, config)
    changed = dataclasses.replace(config, score_temperature=temperature)
    tree = grow_with(roots, logits, draft.carry(2, config), draft.draft_fn, ids, changed)
    plain = grow_with(roots, logits, draft.carry(2, config), draft.draft_fn, ids, config)
    for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (np.asarray(tree.scores) != plain.scores).any()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.33])
def test_the_likeliest_token_of_a_sure_draft_is_drafted_first(temperature):
    """Its log-probability may come out above 0 by rounding: a CPU fuses the division for one row."""
    logits = 8 * jax.random.normal(jax.random.key(0), (256, 64))
    config = TreeConfig(depth=1, top_k=1, num_nodes=2, score_temperature=temperature)

    def first_draft(row):
        tree, _ = config.grow(jnp.zeros(1, jnp.int32), row[None], None, lambda *_: None)
        return tree.tokens[0, 1], tree.scores[0, 1]

    tokens, scores = jax.jit(functools.partial(jax.lax.map, first_draft))(logits)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))
    assert (scores <= 0).all()


@pytest.mark.parametrize("value", [0, -1.0, True, "x", float("nan"), float("inf"), None])
def test_a_score_temperature_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"score_temperature must be a positive number, got"):
        TreeConfig(score_temperature=value)


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "x", float("nan"), float("inf"), None])
def test_a_threshold_that_is_no_probability_is_refused(value):
    with pytest.raises(ValueError, match=r"stop_below must be a probability, 0 to 1, got"):
        TreeConfig(stop_below=value)


def test_the_limits_of_the_threshold_are_accepted():
    assert TreeConfig(stop_below=0) == TreeConfig(stop_below=0.0) == TreeConfig()
    assert TreeConfig(stop_below=1).stop_below == 1
