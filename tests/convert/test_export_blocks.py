"""export of heads that draft blocks (DFlash, DSpark): literal names and fields, the way back, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_jax.convert import export, to_official
from eagle_jax.convert.block_engines import BLOCK_ENGINES
from eagle_jax.convert.engine_plan import needed
from eagle_jax.convert.exporting import Exported
from eagle_jax.convert.match import Match, match_draft
from eagle_jax.convert.read import open_checkpoint
from eagle_jax.models import params
from eagle_jax.models.config import ConfigError
from eagle_jax.models.rope import RopeConfig
from tests.convert.folders import assert_same, read_arrays
from tests.convert.heads import dflash, dspark, eagle3, target
from tests.convert.test_blocks import LITERAL_OWN

EMBED, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
TARGET = target(real=True)


def written(format: str, head: Any, tmp_path: Path, **options: Any) -> tuple[Exported, dict[str, Any], Match]:
    """Exports a head, and checks that reading gives the same head."""
    done = export(head, TARGET, tmp_path / "out", format=format, **options)
    match = match_draft(open_checkpoint(tmp_path / "out"), np.dtype(np.float32), num_layers=8)
    assert type(match.model) is type(head)
    leaves = {path: np.asarray(leaf) for path, leaf in params.flatten(head).items()}
    read = {path: match.read(path) for path in params.flatten(match.model)}
    borrowed = {"embed": np.asarray(TARGET.embed), "lm_head": np.asarray(TARGET.output_weight())}
    assert_same(read, {path: (borrowed | leaves)[path] for path in read})
    assert leaves.keys() - read.keys() <= borrowed.keys()
    return done, json.loads((tmp_path / "out" / "config.json").read_text()), match


# Format and head: fields of config.json, those of its nested object, and names beyond DFlash's that its files have.
LITERAL: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    ("official", "dflash"): ({"architectures": ["DFlashDraftModel"], "block_size": 4}, {"mask_token_id": 15}, set()),
    ("official", "dspark"): (
        {"architectures": ["Qwen3DSparkModel"], "mask_token_id": 15, "target_layer_ids": [1, 4], "markov_rank": 3},
        {},
        {EMBED, LM_HEAD, "markov_head.markov_w1.weight", "confidence_head.proj.bias"},
    ),
    ("speculators", "dflash"): (
        {"speculators_model_type": "dflash", "aux_hidden_state_layer_ids": [2, 5], "draft_vocab_size": 16}
        | {"sample_from_anchor": False, "sliding_window_non_causal": True, "mask_token_id": 15},
        {},
        {EMBED, LM_HEAD},
    ),
    ("speculators", "dspark"): (
        {"speculators_model_type": "dspark", "sample_from_anchor": True, "markov_head_type": "vanilla"},
        {},
        {EMBED, LM_HEAD, "markov_head.markov_w2.weight"},
    ),
    ("specforge", "dflash"): ({"architectures": ["DFlashDraftModel"]}, {"target_layer_ids": [1, 4]}, set()),
    ("specforge", "dspark"): (
        {"architectures": ["DSparkDraftModel"], "block_size": 4},
        {"projector_type": "dspark", "attention_mode": "gqa", "markov_rank": 3, "confidence_head_with_markov": True},
        {"markov_head.markov_w1.weight"},
    ),
    ("nemo", "dflash"): (
        {"architectures": ["Qwen3DFlashDraftModel"], "is_causal": False, "block_size": 4},
        {"block_size": 4, "mask_token_id": 15},
        set(),
    ),
    ("nemo", "dspark"): ({"architectures": ["Qwen3DSparkModel"]}, {}, {EMBED, LM_HEAD}),
    ("deepspec", "dspark"): ({"architectures": ["Qwen3DSparkModel"], "num_anchors": 512}, {}, {EMBED, LM_HEAD}),
    ("modelopt", "dflash"): ({"architectures": ["DFlashDraftModel"]}, {"target_layer_ids": [1, 4]}, set()),
    ("modelopt", "dspark"): (
        {"architectures": ["DFlashDraftModel"]},
        {"projector_type": "dspark", "shift_label": True, "use_confidence_head": True, "markov_rank": 3},
        {"markov_w1.weight", "markov_w2.weight", "confidence_proj.weight", "confidence_proj.bias"},
    ),
}


@pytest.mark.parametrize(("format", "kind"), LITERAL)
def test_the_literal_files(format: str, kind: str, tmp_path: Path):
    fields, nested, beyond = LITERAL[format, kind]
    head = {"dflash": dflash, "dspark": dspark}[kind]()
    done, config, _ = written(format, head, tmp_path)
    assert fields.items() <= config.items() and nested.items() <= config.get("dflash_config", {}).items()
    names = read_arrays(tmp_path / "out").keys()
    assert beyond <= names and (EMBED in names) == (EMBED in beyond)
    assert len([note for note in done.notes if "was added, the target's" in note]) == 2 * (EMBED in beyond)
    assert set(needed(head, format)) == ({"embed", "lm_head"} if EMBED in beyond else set())
    if format == "speculators":
        layer = config["transformer_layer_config"]
        assert (layer["model_type"], layer["hidden_size"], layer["rope_theta"]) == ("qwen3", 8, 5e5)
        method = config["speculators_config"]["proposal_methods"][0]
        assert method == {"proposal_type": "greedy", "speculative_tokens": head.config.deepest}
    else:
        assert (config["num_hidden_layers"], config["head_dim"], config["rope_theta"]) == (2, 4, 5e5)


@pytest.mark.parametrize("windows", [{}, {"causal_windows": True}])
def test_speculators_holds_every_part(tmp_path: Path, windows: dict[str, bool]):
    parts = {"draft_vocab_size": 5, "from_root": True, "windows": (4, None), "taps": (0, 3)}
    done, config, match = written("speculators", dflash(**parts, **LITERAL_OWN, **windows), tmp_path)
    assert config["sliding_window_non_causal"] is (not windows) and config["draft_vocab_size"] == 5
    assert match.model.config.causal_windows is bool(windows) and match.model.config.taps == (0, 3)
    assert {"d2t", "t2d"} <= done.shapes.keys() and any("verifier" in note for note in done.notes)


def test_windows_say_what_they_see(tmp_path: Path):
    """Readers of this form differ on the default."""
    for name, format, parts, nested, top in (
        ("a", "official", {}, False, None),
        ("b", "official", {"causal_windows": True}, None, False),
        ("c", "specforge", {"causal_windows": True}, None, False),
        ("d", "nemo", {}, False, None),
    ):
        _, config, _ = written(format, dflash(windows=(4, None), **parts), tmp_path / name)
        assert config["dflash_config"].get("causal") is nested and config.get("sliding_window_non_causal") is top


def test_copies_of_the_targets_weights_are_left_out(tmp_path: Path):
    """As of a head that came in by speculators or DeepSpec; other weights are refused."""
    own = dflash(**LITERAL_OWN)
    with pytest.raises(
        ConfigError, match=r"embed_tokens.weight is its own.*lm_head.weight is its own.*: speculators\)"
    ):
        export(own, TARGET, tmp_path / "out", format="official")
    rows = {"embed": TARGET.embed[...], "lm_head": TARGET.output_weight()}
    done, _, match = written("official", params.load(own, params.flatten(own) | rows), tmp_path)
    assert not {EMBED, LM_HEAD} & done.shapes.keys() and not match.model.config.own_embedding
    assert len([note for note in done.notes if "was left out, a copy of the target's" in note]) == 2


def test_a_deepspec_dflash_head(tmp_path: Path):
    """It drafts at the root, too: the network of DSpark without its heads."""
    _, config, match = written("deepspec", dflash(from_root=True), tmp_path)
    assert config["markov_rank"] == 0 and match.model.config.deepest == 4


def test_bfloat16(tmp_path: Path):
    done = export(dspark(), TARGET, tmp_path / "out", format="modelopt", dtype="bfloat16")
    assert {dtype for _, dtype in done.shapes.values()} == {"bfloat16"} and done.config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("make", "format", "message"),
    [
        (lambda: dflash(taps=(0, 2)), "official", r"it taps the input of layer 0.*\(formats that can hold it: specul"),
        (lambda: dflash(taps=(2, 8)), "official", "it taps the output of the last layer"),
        (lambda: dflash(from_root=True), "nemo", r"output at the root.*: deepspec, speculators\)"),
        (lambda: dflash(), "deepspec", "output at the root predicts no token"),
        (lambda: dflash(causal=True), "speculators", r"its block is causal.*: official, nemo\)"),
        (lambda: dflash(windows=(4, None)), "specforge", "with a window see the whole block"),
        (lambda: dflash(windows=(4, None), causal_windows=True), "nemo", "are causal in the block"),
        (lambda: dflash(windows=(4, 8)), "official", r"cannot state windows = \(4, 8\)"),
        (lambda: dflash(rope=RopeConfig(5e5, "linear", 2.0)), "speculators", "cannot state rope"),
        (lambda: dflash(draft_vocab_size=5, **LITERAL_OWN), "official", r"some of the tokens.*: speculators\)"),
        (lambda: dflash(), "vllm", r"format vllm has no place for a DFlash head.*: official, speculators, specforge"),
        (lambda: dspark(markov_rank=0, confidence_with_markov=False), "modelopt", "no Markov head.*reads no Markov"),
        (lambda: dspark(markov_rank=0, confidence=False, confidence_with_markov=False), "speculators", "neither a"),
        (lambda: eagle3(), "deepspec", "format deepspec is for heads that draft blocks, not for an EAGLE-3 head"),
    ],
)
def test_refusals_name_the_thing(make: Any, format: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        export(make(), TARGET, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_every_format_is_tested():
    made = {(format, kind) for format, kinds in BLOCK_ENGINES.items() for kind in kinds}
    assert made - {("deepspec", "dflash")} == LITERAL.keys()


def test_the_head_of_the_export_is_unchanged(tmp_path: Path):
    head = dflash()
    before = to_official(head)
    export(head, TARGET, tmp_path / "out", format="speculators")
    assert_same(to_official(head), before)
