"""Heads that draft blocks (DFlash, DSpark): one tiny head in every dialect is one head through the reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.convert import HeadChoices, convert, load, load_draft, to_official
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.heads.block_reading import block_dialect_of
from eagle_jax.convert.heads.blocks import BLOCKS
from eagle_jax.drafts.dspark import DSpark
from eagle_jax.models import params
from eagle_jax.models.config import ConfigError
from tests.convert.folders import HEAD_CONFIG, Arrays, assert_same, eagle3_arrays, write_safetensors
from tests.convert.heads import dflash, dspark, target
from tests.convert.reading import Change, parameters, read, renamed

# The layers of such a head as a config.json states them.
LAYERS = {
    "model_type": "qwen3",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
BLOCK = {"mask_token_id": 15, "target_layer_ids": [1, 4]}
MARKOV = {"markov_rank": 3, "markov_head_type": "vanilla"}
CONFIDENCE = {"enable_confidence_head": True, "confidence_head_with_markov": True}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "use_sliding_window": True}
SPECULATORS = {
    "speculators_model_type": "dflash",
    "speculators_config": {"algorithm": "dflash"},
    "speculators_version": "0.5.0",
    "transformer_layer_config": LAYERS,
    "draft_vocab_size": 16,
    "block_size": 4,
    "mask_token_id": 15,
    "aux_hidden_state_layer_ids": [2, 5],
    "target_hidden_size": None,
    "sample_from_anchor": False,
    "sliding_window_non_causal": False,
}
OF_DSPARK = SPECULATORS | MARKOV | CONFIDENCE | {"speculators_model_type": "dspark", "sample_from_anchor": True}


def zlab(**own: Any) -> dict[str, Any]:
    return LAYERS | {"architectures": ["DFlashDraftModel"], "block_size": 4, "dflash_config": BLOCK | own}


def same(arrays: Arrays) -> Arrays:
    return arrays


FLAT_NAMES = renamed(("markov_head.", ""), ("confidence_head.proj", "confidence_proj"))
LITERAL_OWN = {"own_embedding": True, "own_lm_head": True}
# Case: the dialect, the head, what its config.json says, and how it writes the tensors.
WRITTEN: dict[str, tuple[str, Any, dict[str, Any], Change]] = {
    "z-lab": ("block", dflash, zlab(), same),
    "z-lab, Qwen3.5": ("block", dflash, zlab(block_size=4) | {"block_size": None}, same),
    "JetSpec": ("block", lambda: dflash(causal=True), zlab(causal_head=True), same),
    "Model-Optimizer, windows": (
        "block",
        lambda: dflash(windows=(4, 4)),
        zlab(use_swa=True, swa_window_size=4, causal=False) | {"sliding_window": 4},
        same,
    ),
    "NeMo": (
        "block nemo",
        lambda: dflash(windows=(4, None)),
        zlab(block_size=4) | SLIDING | {"architectures": ["Qwen3DFlashDraftModel"], "is_causal": False},
        same,
    ),
    "NeMo, JetSpec": (
        "block nemo",
        lambda: dflash(causal=True),
        zlab(causal=True, block_size=4) | {"architectures": ["Qwen3DFlashDraftModel"], "is_causal": False},
        same,
    ),
    "DeepSpec, DFlash": (
        "block deepspec",
        lambda: dflash(from_root=True, **LITERAL_OWN),
        LAYERS
        | BLOCK
        | {"architectures": ["Qwen3DSparkModel"], "block_size": 4, "markov_rank": 0, "enable_confidence_head": False}
        | {"num_anchors": 512},
        same,
    ),
    "DeepSpec": (
        "block deepspec",
        lambda: dspark(**LITERAL_OWN),
        LAYERS | BLOCK | MARKOV | CONFIDENCE | {"architectures": ["Qwen3DSparkModel"], "block_size": 4},
        same,
    ),
    "SpecForge, DSpark": (
        "block specforge",
        lambda: dspark(markov_type="gated"),
        zlab(
            **MARKOV | CONFIDENCE | {"markov_head_type": "gated"},
            projector_type="dspark",
            attention_mode="gqa",
            confidence_head_alpha=1.0,
        )
        | {"architectures": ["DSparkDraftModel"], "target_hidden_size": None},
        same,
    ),
    "Model-Optimizer, DSpark": (
        "block modelopt",
        lambda: dspark(markov_type="rnn"),
        zlab(
            **MARKOV | {"markov_head_type": "rnn"}, projector_type="dspark", shift_label=True, use_confidence_head=True
        ),
        FLAT_NAMES,
    ),
    "speculators": ("block speculators", dflash, SPECULATORS, same),
    "speculators, some tokens": (
        "block speculators",
        lambda: dflash(draft_vocab_size=5, windows=(4, None), causal_windows=True, **LITERAL_OWN),
        SPECULATORS | {"draft_vocab_size": 5, "transformer_layer_config": LAYERS | SLIDING | {"model_type": "llama"}},
        same,
    ),
    "speculators, windows both ways": (
        "block speculators",
        lambda: dflash(windows=(4, None), taps=(0, 5)),
        SPECULATORS
        | {"transformer_layer_config": LAYERS | SLIDING, "sliding_window_non_causal": True}
        | {"aux_hidden_state_layer_ids": [0, 5]},
        same,
    ),
    "speculators, DSpark": (
        "block speculators",
        lambda: dspark(draft_vocab_size=5, **LITERAL_OWN),
        OF_DSPARK | {"draft_vocab_size": 5},
        same,
    ),
    "speculators, DSpark after the root": (
        "block speculators",
        lambda: dspark(from_root=False),
        OF_DSPARK | {"sample_from_anchor": False},
        same,
    ),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_one_head_in_every_dialect(written: str):
    """Equal parameters and an equal config are equal logits: nothing else goes into them."""
    dialect, make, config, change = WRITTEN[written]
    head = make()
    arrays = change(to_official(head))
    assert block_dialect_of(config, arrays) == dialect
    match = read(config, arrays | {"verifier_norm.weight": np.ones(8, np.float32)})
    assert match.reading.dialect == dialect and type(match.model) is type(head)
    assert match.model.config == head.config
    assert_same(parameters(match), {path: np.asarray(leaf) for path, leaf in params.flatten(head).items()})


def test_every_dialect_is_read():
    assert {dialect for dialect, *_ in WRITTEN.values()} == BLOCKS.keys()


def without(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {field: value for field, value in config.items() if field != name}


OPEN = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4, "use_sliding_window": True}
# What a file leaves open: its config, the choices that settle it, the option of the command, and the config then.
LEFT_OPEN: dict[str, tuple[dict[str, Any], dict[str, Any], str, dict[str, Any]]] = {
    "windows": (zlab() | OPEN, {"causal_windows": True}, "--causal-windows", {"causal_windows": True}),
    "windows, both ways": (zlab() | OPEN, {"causal_windows": False}, "--causal-windows", {"causal_windows": False}),
    "windows of speculators": (
        without(SPECULATORS, "sliding_window_non_causal") | {"transformer_layer_config": LAYERS | OPEN},
        {"causal_windows": True},
        "--causal-windows",
        {"causal_windows": True},
    ),
    "the root": (without(OF_DSPARK, "sample_from_anchor"), {"from_root": False}, "--from-root", {"from_root": False}),
    "the mask token": (without(SPECULATORS, "mask_token_id"), {"mask_token": 3}, "--mask-token", {"mask_token_id": 3}),
    "the layers": (
        without(SPECULATORS, "aux_hidden_state_layer_ids"),
        {"taps": (0, 3)},
        "--taps",
        {"taps": (0, 3)},
    ),
}


@pytest.mark.parametrize("case", LEFT_OPEN)
def test_what_a_file_leaves_open_is_asked_for(case: str):
    config, choices, option, expected = LEFT_OPEN[case]
    windows = {"windows": (4, 4)} if "windows" in case else {}
    arrays = to_official((dspark if case == "the root" else dflash)(**windows))
    with pytest.raises(ConfigError, match=rf"Choose.*{option} ?|list.*{option}"):
        read(config, arrays)
    match = read(config, arrays, HeadChoices(**choices))
    assert {name: getattr(match.model.config, name) for name in expected} == expected
    assert "as chosen" in match.reading.reasons.values()


@pytest.mark.parametrize(
    ("config", "names", "choices", "message"),
    [
        (SPECULATORS | {"speculators_model_type": "dflash2"}, {}, {}, "'dflash2' is not implemented"),
        (SPECULATORS | {"novelty": 3}, {}, {}, "novelty = 3 is not known.*--ignore-field novelty"),
        (zlab(novelty=3), {}, {}, "dflash_config.novelty = 3 is not known"),
        (zlab(projector_type="domino"), {}, {}, "projector_type = 'domino' is not implemented"),
        (SPECULATORS | {"draft_vocab_size": 5}, {}, {}, "lm_head.weight.* missing"),
        (SPECULATORS | {"hidden_size": 16}, {}, {}, "hidden_size = 16 and transformer_layer_config.hidden_size = 8"),
        (SPECULATORS | {"target_hidden_size": 16}, {}, {}, "hidden_size = 8 and target_hidden_size = 16"),
        (SPECULATORS | {"transformer_layer_config": None}, {}, {}, "transformer_layer_config must be an object"),
        (zlab(), {"candidate_selector.predecessor_codebook": (16, 2)}, {}, "DFlash 2, which is not implemented"),
        (zlab(), {"mask_embedding.weight": (8,)}, {}, "a variant of DFlash, which is not implemented"),
        (zlab(), {"novel.weight": (8,)}, {}, "novel.weight.* has no place in the model"),
        (zlab(), {}, {"norm_output": True}, "has no norm_output to choose"),
    ],
)
def test_refusals_name_the_thing(
    config: dict[str, Any], names: dict[str, tuple[int, ...]], choices: dict[str, Any], message: str
):
    arrays = to_official(dflash()) | {name: np.zeros(shape, np.float32) for name, shape in names.items()}
    with pytest.raises((ConfigError, CheckpointError), match=message):
        read(config, arrays, HeadChoices(**choices))


def test_a_converted_folder_keeps_the_reading(tmp_path: Path):
    """With a draft vocabulary, and what was chosen of the windows."""
    head = dspark(draft_vocab_size=5, windows=(4, None), causal_windows=True, **LITERAL_OWN)
    config = OF_DSPARK | {"draft_vocab_size": 5, "transformer_layer_config": LAYERS | SLIDING}
    its_target, choices = target(real=True), HeadChoices(causal_windows=True)
    sizes = LAYERS | {"model_type": "llama", "num_hidden_layers": 8}
    source = write_safetensors(tmp_path / "target", sizes, to_official(its_target))
    folder = write_safetensors(tmp_path / "head", without(config, "sliding_window_non_causal"), to_official(head))
    out = convert(source, folder, tmp_path / "out", head=choices)
    for loaded in (load(out)[1], load_draft(folder, its_target, head=choices)):
        assert type(loaded) is DSpark and loaded.config == head.config
        assert_same(*({path: np.asarray(leaf) for path, leaf in params.flatten(one).items()} for one in (loaded, head)))


def test_an_eagle_head_drafts_no_blocks():
    with pytest.raises(ConfigError, match="has no from_root to choose"):
        read(HEAD_CONFIG, eagle3_arrays(), HeadChoices(from_root=True))


def test_an_unknown_field_may_be_ignored():
    arrays = to_official(dflash())
    ignored = HeadChoices(ignored=("novelty",))
    assert read(SPECULATORS | {"novelty": 3}, arrays, ignored).model.config == read(SPECULATORS, arrays).model.config
    assert jnp.result_type(read(zlab(novelty=3), arrays, ignored).model.fc) == jnp.float32
