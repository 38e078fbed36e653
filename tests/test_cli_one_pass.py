"""bench --drafts and tune with heads that draft all depths in one pass, from folders as their authors write them."""

from __future__ import annotations

import argparse
import json

import jax
import pytest
from safetensors.numpy import save_file

from eagle_jax import DFlash, DFlashConfig, DSpark, DSparkConfig, PEagle, PEagleConfig
from eagle_jax.cli import main, tune
from eagle_jax.cli.options.model_options import with_head_options
from eagle_jax.convert import to_official
from eagle_jax.measure import tuning_blocks

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
}
QWEN3 = SIZES | {"model_type": "qwen3", "block_size": 4}
READS = {"mask_token_id": 1, "target_layer_ids": [1, 4]}
CONFIGS = {
    "dflash": QWEN3 | {"dflash_config": READS},
    "dspark": QWEN3
    | READS
    | {"markov_rank": 4, "markov_head_type": "gated", "enable_confidence_head": True}
    | {"confidence_head_with_markov": True},
    "peagle": SIZES | {"draft_vocab_size": 256, "mask_token_id": 1, "num_depths": 4},
}


def make(kind: str, hf: dict):
    if kind == "peagle":
        return PEagle(PEagleConfig.from_hf(hf, own_lm_head=True, own_embedding=True), 3, jax.random.key(0))
    config, draft = (DFlashConfig, DFlash) if kind == "dflash" else (DSparkConfig, DSpark)
    return draft(config.from_hf(hf), jax.random.key(0))


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A folder for each kind, and prompts."""
    root = tmp_path_factory.mktemp("heads")
    for kind, hf in CONFIGS.items():
        (root / kind).mkdir()
        (root / kind / "config.json").write_text(json.dumps(hf))
        save_file(to_official(make(kind, hf)), root / kind / "model.safetensors")
    (root / "prompts.jsonl").write_text(json.dumps({"tokens": list(b"import os\n")}) + "\n")
    return root


def test_the_options_of_a_head_reach_its_kind_alone():
    asked = argparse.Namespace(draft_window=(4, 16), confidence=0.5)
    dspark, peagle = (with_head_options(make(kind, CONFIGS[kind]), asked) for kind in ("dspark", "peagle"))
    assert dspark.config.confidence_threshold == 0.5
    assert peagle.config.window == (4, 16)


def options(golden, heads) -> list[str]:
    models = ["--target", str(golden / "weights" / "t1_target"), "--dtype", "float32"]
    return [*models, "--prompts", str(heads / "prompts.jsonl"), "--max-new-tokens", "8", "--repeats", "1"]


@pytest.mark.slow
def test_bench_compares_them(golden, heads, tmp_path):
    names = [f"{kind}={heads / kind}" for kind in CONFIGS]
    drafts = ["--drafts", ",".join(["plain", *names]), "--draft-tree", "dspark=expand:3,2,6", "--confidence", "0.5"]
    assert main(["bench", *options(golden, heads), *drafts, "--json", str(tmp_path / "out.json")]) == 0
    found = {one["name"]: one for one in json.loads((tmp_path / "out.json").read_text())["drafts"]}
    assert list(found) == ["plain", *CONFIGS]
    assert all(found[kind]["identical_rows"] == 1 for kind in CONFIGS)
    assert "the best 63 prefixes, depth 3" in found["dflash"]["proposes"]  # a block of 4
    assert "top_k 2, 6 nodes" in found["dspark"]["proposes"]
    assert "the best 63 prefixes, depth 4" in found["peagle"]["proposes"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "deepest"), [("dflash", 3), ("dspark", 4), ("peagle", 4)])
def test_tune_chooses_the_depth_and_the_nodes(kind, deepest, golden, heads, monkeypatch):
    monkeypatch.setattr(tuning_blocks, "NODES", (2, 5))
    monkeypatch.setattr(tuning_blocks, "DEPTHS", (1,))
    monkeypatch.setattr(tune, "CANDIDATES", 1)
    assert main(["tune", *options(golden, heads), "--draft", str(heads / kind)]) == 0
    (entry,) = json.loads((heads / kind / "tuned.json").read_text())
    tree, costs = entry["tree"], entry["costs_ms"]
    assert (tree["depth"], tree["num_nodes"]) in {(1, 2), (1, 5), (deepest, 5)}
    assert entry["measured"]["tokens_a_second"] > 0
    assert set(costs["block"]) == {"1", str(deepest)} and set(costs["verify"]) == set(costs["grow"]) == {"2", "5"}
