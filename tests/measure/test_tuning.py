"""Tuning: what a large tree tells of smaller ones, and what the parts of a cycle cost."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import BestPrefixes, TreeConfig
from eagle_jax.measure import phases, tuning, tuning_blocks
from eagle_jax.measure.tuning import Costs, Seen
from eagle_jax.measure.tuning_blocks import BlockCosts
from eagle_jax.testing import toy_draft, toy_target
from tests.drafts.kinds import KINDS
from tests.drafts.test_lossless import CONFIG, target_of
from tests.toy import golden_pair


def seen(parents, scores, accepted) -> Seen:
    """One cycle's tree; depths follow from parents."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return Seen(*(np.array([part]) for part in (parents, depths, scores, np.array(accepted, bool))))


#        0
#      1   2        scores: -1 -2, their children -1.5 (of 1), -4 (of 1), -2.5 (of 2), and -3 below node 3
#    3  4  5
#   6
TREE = seen([-1, 0, 0, 1, 1, 2, 3], [0.0, -1, -2, -1.5, -4, -2.5, -3], [1, 1, 0, 1, 0, 0, 1])


@pytest.mark.parametrize(
    ("tree", "kept"),
    [
        (TreeConfig(3, 2, 7), [1, 2, 3, 4, 5, 6]),
        (TreeConfig(3, 2, 4), [1, 2, 3]),  # the best three
        (TreeConfig(3, 1, 4), [1, 3, 6]),  # first children alone
        (TreeConfig(1, 2, 3), [1, 2]),
        (TreeConfig(2, 2, 5), [1, 2, 3, 5]),
    ],
)
def test_the_nodes_that_a_smaller_tree_keeps(tree, kept):
    assert np.flatnonzero(tuning.smaller(TREE, tree)[0]).tolist() == kept


def test_only_the_best_nodes_of_a_level_have_children():
    """Of the nodes 1 and 2 of the first level a tree of width 1 expands node 1."""
    chain = seen([-1, 0, 0, 1, 2, 2], [0.0, -1, -2, -1.5, -2.1, -2.2], [1, 1, 0, 1, 0, 0])
    assert np.flatnonzero(tuning.smaller(chain, TreeConfig(2, 1, 3))[0]).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("tree", "tokens"), [(TreeConfig(3, 2, 7), 4), (TreeConfig(2, 2, 5), 3), (TreeConfig(3, 2, 3), 3)]
)
def test_tokens_to_expect_are_the_accepted_nodes_kept_and_the_bonus(tree, tokens):
    assert tuning.expected_tokens(TREE, tree) == tokens


@pytest.mark.parametrize(
    ("small", "temperature"),
    [
        (TreeConfig(2, 2, 5), 1.0),
        (TreeConfig(4, 1, 5), 1.0),
        (TreeConfig(4, 4, 16), 1.0),
        (TreeConfig(4, 3, 9), 0.5),
    ],
)
def test_a_large_tree_holds_the_small_one_that_the_draft_would_grow(small, temperature, monkeypatch):
    monkeypatch.setattr(tuning, "DEPTH", 5)
    target, draft = golden_pair()
    prompts = [list(b"def add(a, b):\n    return"), list(b"import os, sys\nfor "), list(b"x = 1\ny = ")]
    large = tuning.large_tree((8,), temperature)
    small = dataclasses.replace(small, score_temperature=temperature)

    def paths(tree, row, nodes):
        found = set()
        for node in nodes:
            path = []
            while node > 0:
                path.append(int(tree.tokens[row, node]))
                node = int(tree.parents[row, node])
            found.add(tuple(path[::-1]))
        return found

    big = jax.device_get(eagle_jax.propose(target, draft, *eagle_jax.pad(prompts), tree=large))
    own = jax.device_get(eagle_jax.propose(target, draft, *eagle_jax.pad(prompts), tree=small))
    kept = tuning.smaller(Seen(big.parents, big.depths, big.scores, np.zeros_like(big.depths, bool)), small)
    for row in range(len(prompts)):
        wanted = paths(own, row, range(1, small.num_nodes))
        assert paths(big, row, np.flatnonzero(kept[row])) == wanted


@pytest.mark.parametrize("kind", ["dflash", "dspark", "p-eagle"])
def test_the_large_tree_of_one_draft_pass_holds_its_smaller_ones(kind):
    """Also where every node has candidates of its own (dspark)."""
    draft = KINDS[kind].build(CONFIG, 1, 6.0)
    most = draft.config.draft_vocab_size or CONFIG.vocab_size
    nodes = tuning_blocks.nodes_for(draft)
    assert nodes == tuple(count for count in tuning_blocks.NODES if count <= most)
    prompts = eagle_jax.pad([[3, 4, 5], [6, 7], [2, 2, 2, 2]])
    big, own = (
        jax.device_get(eagle_jax.propose(target_of(0), draft, *prompts, tree=BestPrefixes(4, nodes)))
        for nodes in (most, 5)
    )
    kept = tuning.best(big.depths > 0, big.scores, 4)
    for row in range(3):
        np.testing.assert_array_equal(big.tokens[row, kept[row]], own.tokens[row, 1:])
        np.testing.assert_array_equal(big.depths[row, kept[row]], own.depths[row, 1:])


def test_a_block_is_as_good_as_its_tokens_by_its_cost():
    sizes = {"verify": {2: 1.5, 3: 2.0, 4: 4.0}, "block": {1: 0.25, 3: 0.5}, "grow": {2: 0.3, 3: 0.3, 4: 0.3}}
    costs = BlockCosts(plain=1.0, **sizes, rest=0.25)
    expected = tuning_blocks.expectations({1: seen([-1, 0, 0], [0.0, -1, -2], [1, 0, 1]), 3: TREE}, costs)
    found = {(one.tree.depth, one.tree.num_nodes): (one.tokens, one.ms) for one in expected}
    assert found == {(1, 2): (1, 2.0), (1, 3): (2, 2.5), (1, 4): (2, 4.5), (3, 4): (3, 4.75)}
    assert [one.rate for one in expected] == sorted((one.rate for one in expected), reverse=True)
    assert [one.tree.num_nodes for one in tuning.of_each_size(expected)] == [3, 4, 2]


def test_nodes_that_are_not_grown_cost_nothing():
    """Each level below the first is cheaper by as much as one of the deepest tree."""
    costs = BlockCosts(
        plain=1.0, verify={2: 1.0, 8: 1.0}, block={1: 2.0, 2: 3.0, 5: 6.0}, grow={2: 1.0, 8: 5.0}, rest=0.5
    )
    assert [costs.cycle(BestPrefixes(depth, 8)) for depth in (1, 2, 5)] == [3.5, 4.5, 7.5]
    assert [costs.cycle(BestPrefixes(depth, 2)) for depth in (1, 2, 5)] == [3.5, 3.5, 3.5]


def test_rates_of_acceptance_by_depth_and_rank():
    assert tuning.by_depth(TREE) == [1, 1, 1]
    assert tuning.by_rank(TREE) == [1]
    second = seen([-1, 0, 0], [0.0, -1, -2], [1, 0, 1])
    assert tuning.by_rank(second) == [0, 1]


def test_the_expected_rate_is_tokens_by_the_cost_of_the_cycle():
    costs = Costs(plain=1.0, verify={3: 2.0, 4: 4.0}, level={1: 0.25, 2: 0.5}, draft=0.5, rest=0.25)
    expected = tuning.expectations({1.0: TREE}, costs)
    sizes = {(one.tree.depth, one.tree.top_k, one.tree.num_nodes): one for one in expected}
    assert set(sizes) == {(1, 2, 3), (2, 1, 3), (2, 2, 3), (2, 2, 4), (3, 1, 4), (3, 2, 4)}
    one = sizes[3, 2, 4]
    assert one.ms == pytest.approx(4.0 + 0.5 + 2 * 0.5 + 0.25)
    assert one.rate == pytest.approx(1000 * one.tokens / one.ms)
    assert [one.rate for one in expected] == sorted((one.rate for one in expected), reverse=True)


def test_the_fastest_of_each_size_is_tried_out():
    costs = Costs(plain=1.0, verify={3: 2.0, 4: 4.0}, level={1: 0.25, 2: 0.5}, draft=0.5, rest=0.25)
    expected = tuning.expectations({1.0: TREE}, costs)
    tried = tuning.of_each_size(expected)
    assert sorted(one.tree.num_nodes for one in tried) == [3, 4] and tried[0] == expected[0]
    for one in tried:
        assert one.rate == max(other.rate for other in expected if other.tree.num_nodes == one.tree.num_nodes)


def test_costs_are_of_the_state_s_batch():
    """Every size that was asked for is measured, and a cycle's cost is the sum of its parts."""
    target = toy_target()
    draft = toy_draft(target)
    start = jax.jit(eagle_jax.prefill, static_argnames=("max_new_tokens", "tree"))
    prompts = eagle_jax.pad([[1, 2, 3]] * 2)
    state = start(target, draft, *prompts, max_new_tokens=phases.RUNS * 8, tree=TreeConfig(4, 2, 8))
    calls = []
    costs = tuning.measure_costs(target, draft, state, 1, (8,), (2,), lambda: calls.append(1))
    assert len(calls) == tuning.measurements((8,), (2,))
    assert set(costs.verify) == {8} and set(costs.level) == {2}
    assert min(costs.plain, costs.draft, *costs.verify.values()) > 0
    tree = TreeConfig(3, 2, 8)
    assert costs.cycle(tree) == pytest.approx(costs.verify[8] + costs.draft + 2 * costs.level[2] + costs.rest)
    assert jnp.all(state.lengths == 4)
