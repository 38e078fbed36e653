"""Tuning: what a large tree tells of smaller ones, and the command."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import TreeConfig
from eagle_jax.cli import machine, main, tune
from eagle_jax.decode import propose
from eagle_jax.measure import phases, tuning
from eagle_jax.measure.tuning import Costs, Seen

HEAD = "weights/t1_eagle3_dv96"


@pytest.fixture(scope="module")
def pair(golden):
    return eagle_jax.from_pretrained(golden / "weights" / "t1_target", golden / HEAD, dtype="float32")


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


@pytest.mark.parametrize("small", [TreeConfig(2, 2, 5), TreeConfig(5, 1, 6), TreeConfig(4, 3, 9), TreeConfig(4, 4, 16)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_large_tree_holds_the_small_one_that_the_draft_would_grow(pair, small, temperature):
    target, draft = pair
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


@pytest.fixture(scope="module")
def tuned(golden, tmp_path_factory):
    """A head's folder after `eagle-jax tune` with few trees."""
    folder = tmp_path_factory.mktemp("tuned") / "head"
    shutil.copytree(golden / HEAD, folder)
    prompts = folder.with_name("prompts.jsonl")
    prompts.write_text(json.dumps({"tokens": list(b"import os\n")}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "NODES", (2, 4))
        patch.setattr(tuning, "WIDTHS", (2,))
        patch.setattr(tuning, "DEPTH", 2)
        patch.setattr(tune, "CANDIDATES", 2)
        patch.setattr(tuning, "TEMPERATURES", (0.5,))
        models = ["--target", str(golden / "weights" / "t1_target"), "--draft", str(folder), "--dtype", "float32"]
        options = ["--prompts", str(prompts), "--max-new-tokens", "16", "--repeats", "1"]
        assert main(["tune", *models, *options]) == 0
    return folder, models, prompts


def test_the_fastest_tree_is_saved_with_what_was_expected_and_measured(tuned):
    (entry,) = json.loads((tuned[0] / "tuned.json").read_text())
    assert entry["device"] == machine.device_name()
    assert (entry["dtype"], entry["batch"]) == ("float32", 1)
    tree = TreeConfig(**entry["tree"])
    assert tree.num_nodes in (2, 4) and tree.top_k == 2 and tree.depth <= 2 and tree.score_temperature == 0.5
    assert entry["expected"]["tokens_a_second"] > 0 and entry["measured"]["tokens_a_second"] > 0


def test_commands_use_the_tuned_tree_on_the_same_device_with_the_same_dtype(tuned, tmp_path, capsys):
    folder, models, prompts = tuned
    entry = json.loads((folder / "tuned.json").read_text())[0]
    report = tmp_path / "bench.json"

    def tree_of(*options):
        arguments = ["--prompts", str(prompts), "--max-new-tokens", "4", "--repeats", "1", "--json", str(report)]
        assert main(["bench", *models, *arguments, *options]) == 0
        return json.loads(report.read_text())["tree"]

    default = {"depth": 8, "top_k": 10, "num_nodes": 60, "score_temperature": 1.0}
    assert tree_of() == {name: value for name, value in entry["tree"].items() if value}
    assert tree_of("--tree", "2,2,3")["num_nodes"] == 3
    assert "(tuned on this device for batch 1)" in capsys.readouterr().out
    for key, value in (("device", "a TPU"), ("dtype", "bfloat16")):
        (folder / "tuned.json").write_text(json.dumps([entry | {key: value}]))
        assert tree_of() == default
    for damaged in ([{}], [entry | {"batch": 0}], [entry | {"batch": "1"}], {"a": 1}, None):
        (folder / "tuned.json").write_text(json.dumps(damaged))
        for command in ("bench", "tune"):
            assert main([command, *models, "--prompts", str(prompts)]) == 2
            assert "tuned.json: not a file of `eagle-jax tune`" in capsys.readouterr().err


def test_a_draft_without_a_folder_cannot_be_tuned(golden, capsys):
    assert main(["tune", "--target", str(golden / "weights" / "t1_target")]) == 2
    assert "there is no EAGLE head here" in capsys.readouterr().err


def test_a_part_of_a_cycle_multiplies_in_its_loop_alone(pair):
    """XLA moves out of a loop what does not change in it, and the part would seem to take less time."""
    target, draft = pair
    tree = TreeConfig(2, 1, 3)
    shaped = jax.eval_shape
    prompt = jax.ShapeDtypeStruct((1, 3), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    state = shaped(functools.partial(eagle_jax.prefill, max_new_tokens=99, tree=tree), target, draft, *prompt)
    nodes = shaped(functools.partial(propose, tree=tree), target, draft, state).tree
    verified = shaped(phases.verifications, target, draft, state, nodes)
    for lowered in (
        phases.verifications.lower(target, draft, state, nodes),
        phases.updates.lower(target, draft, state, nodes, *verified, tree=tree),
    ):
        loops, outside = lowered.compile().as_text().split("\nENTRY ")
        products = re.compile(r" dot\(|kind=kCustom")
        assert products.search(loops) and not products.search(outside)


def test_costs_are_of_the_state_s_batch(pair):
    """Every size that was asked for is measured, and a cycle's cost is the sum of its parts."""
    target, draft = pair
    state = eagle_jax.prefill(
        target, draft, *eagle_jax.pad([[1, 2, 3]] * 2), max_new_tokens=phases.RUNS * 8, tree=TreeConfig(4, 2, 8)
    )
    calls = []
    costs = tuning.measure_costs(target, draft, state, 1, (8,), (2,), lambda: calls.append(1))
    assert len(calls) == tuning.measurements((8,), (2,))
    assert set(costs.verify) == {8} and set(costs.level) == {2}
    assert min(costs.plain, costs.draft, *costs.verify.values()) > 0
    tree = TreeConfig(3, 2, 8)
    assert costs.cycle(tree) == pytest.approx(costs.verify[8] + costs.draft + 2 * costs.level[2] + costs.rest)
    assert jnp.all(state.lengths == 4)
