"""eagle-jax tune, and the commands that use the tree it saved."""

from __future__ import annotations

import argparse
import functools
import json
import shutil

import jax
import pytest

from eagle_jax import BestPrefixes, TreeConfig
from eagle_jax.cli import main, tune
from eagle_jax.cli import tuned as tuned_trees
from eagle_jax.cli.options.model_options import add_model_arguments
from eagle_jax.cli.options.tree_options import choose_tree
from eagle_jax.measure import machine, tuning
from tests.drafts.kinds import KINDS
from tests.toy import TARGET

HEAD = "weights/t1_eagle3_dv96"


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


@pytest.mark.parametrize("kind", ["dflash", "dspark", "p-eagle"])
def test_the_tuned_tree_of_one_draft_pass_is_used(kind, golden, tmp_path):
    head = jax.eval_shape(functools.partial(KINDS[kind].build, TARGET, 1, 1.0))
    entry = {"device": machine.device_name(), "dtype": "float32", "batch": 1, "tree": {"depth": 2, "num_nodes": 4}}
    tuned_trees.write(tmp_path, entry)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    args = parser.parse_args(["--target", str(golden / "weights" / "t1_target"), "--draft", str(tmp_path)])
    args.tree = None
    choice = choose_tree(head, args)
    assert (choice.tree, choice.origin) == (BestPrefixes(2, 4), "tuned on this device for batch 1")
    other = jax.eval_shape(functools.partial(KINDS["medusa"].build, TARGET, 1, 1.0))
    assert choose_tree(other, args).origin == "the default"  # of a kind that is not tuned


def test_a_draft_without_a_folder_cannot_be_tuned(golden, capsys):
    assert main(["tune", "--target", str(golden / "weights" / "t1_target")]) == 2
    assert "there is no EAGLE head here" in capsys.readouterr().err
