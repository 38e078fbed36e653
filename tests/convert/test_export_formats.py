"""export --format for trainers and engines beyond the first three: literal names and fields, and the way back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eagle_jax.convert import export, to_official
from eagle_jax.convert.engine_plan import refusals
from eagle_jax.convert.engines import ENGINES
from eagle_jax.convert.exporting import Exported
from eagle_jax.convert.match import Match, match_draft
from eagle_jax.convert.read import open_checkpoint
from eagle_jax.models import params
from eagle_jax.models.config import ConfigError, RopeConfig
from eagle_jax.models.rope import rope_frequencies
from tests.convert.folders import assert_same, read_arrays
from tests.convert.heads import LLAMA3, eagle1, eagle3, peagle, target

TAPS = "eagle_aux_hidden_state_layer_ids"
FIRST = ("official", "sglang", "vllm")  # test_export.py has their literal files
FORMATS = tuple(name for name in ENGINES if name not in FIRST)
YARN = RopeConfig.from_hf(
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0}}, 32, "yarn"
)
LONGROPE = RopeConfig(
    5e5, "longrope", original_length=32, attention_factor=1.25, short_factors=(1.0, 1.5), long_factors=(2.0, 3.0)
)
LAYER = {
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "post_attention_layernorm.weight",
    "input_layernorm.weight",
    "hidden_norm.weight",
}
TOP = {"fc.weight", "norm.weight", "lm_head.weight", "d2t"}
EMBED = "embed_tokens.weight"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def again(folder: Path) -> Match:
    return match_draft(open_checkpoint(folder), np.dtype(np.float32), num_layers=8)


def written(format: str, draft: Any, tmp_path: Path, **options: Any) -> tuple[Exported, dict[str, Any], set[str]]:
    """Exports a head, and checks that reading gives the same head."""
    done = export(draft, target(real=True), tmp_path / "out", format=format, **options)
    match = again(tmp_path / "out")
    leaves = {path: np.asarray(leaf) for path, leaf in params.flatten(draft).items()}
    read = {path: match.read(path) for path in params.flatten(match.model)}
    assert_same({path: read[path] for path in leaves}, leaves)
    assert match.model.taps(target()) == draft.taps(target())
    return done, config_of(tmp_path / "out"), read_arrays(tmp_path / "out").keys()


# The names of an EAGLE-3 head of one layer, and fields of its config.json.
LITERAL: dict[str, tuple[set[str], dict[str, Any]]] = {
    "speculators": (
        TOP | {"t2d", EMBED} | {f"layers.0.{name}" for name in LAYER},
        {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "norm_before_residual": False},
    ),
    "specforge": (
        TOP | {"t2d", EMBED} | {f"midlayer.{name}" for name in LAYER},
        {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 5},
    ),
    "modelopt": (TOP | {f"layers.0.{name}" for name in LAYER}, {"architectures": ["LlamaForCausalLMEagle3"]}),
    "nemo": (
        {"lm_head.weight", "d2t", "t2d", "model.fc.weight", "model.norm.weight", f"model.{EMBED}"}
        | {f"model.layers.0.{name}" for name in LAYER},
        {"architectures": ["LlamaEagle3DraftModel"], "num_aux_hidden_states": 3},
    ),
    "angelslim": (
        TOP | {"t2d"} | {f"midlayer.{name}" for name in LAYER},
        {"architectures": ["Eagle3LlamaForCausalLM"], "target_model_type": "llama"},
    ),
    "trtllm": (
        TOP | {"t2d"} | {f"midlayer.{name}" for name in LAYER},
        {"architectures": ["EAGLE3LlamaForCausalLM"], "draft_vocab_size": 5},
    ),
    "cpmcu": (TOP | {f"midlayer.{name}" for name in LAYER}, {"eagle_num_layers": 1}),
    "nxd": (TOP | {"t2d", EMBED} | {f"midlayer.{name}" for name in LAYER}, {"architectures": ["LlamaForCausalLM"]}),
}


@pytest.mark.parametrize("format", FORMATS)
def test_the_literal_files(format: str, tmp_path: Path):
    names, fields = LITERAL[format]
    done, config, tensors = written(format, eagle3(), tmp_path)
    assert tensors == names and done.files == ("model.safetensors", "config.json")
    assert fields.items() <= config.items()
    layer = config["transformer_layer_config"] if format == "speculators" else config
    assert (layer["hidden_size"], layer["head_dim"], layer["rope_theta"], layer["num_hidden_layers"]) == (8, 4, 5e5, 1)
    added = [note for note in done.notes if "embed_tokens.weight was added" in note]
    assert len(added) == any(EMBED in name for name in names)


@pytest.mark.parametrize("format", ["specforge", "modelopt", "trtllm"])
@pytest.mark.parametrize("taps", [(2, 5, 7), (3, 5, 6)])
def test_taps_are_written_as_outputs(format: str, taps: tuple[int, ...], tmp_path: Path):
    """The second list would be taken for the official inputs, so that ours tells."""
    done, config, _ = written(format, eagle3(taps=taps), tmp_path)
    outputs = [tap - 1 for tap in taps]
    assert config["eagle_config"][TAPS] == outputs
    assert config.get("eagle_jax_tap_inputs") == (list(taps) if outputs[0] > 1 else None)
    assert any(f"eagle3_layers_to_capture={outputs}" in note for note in done.notes) == (format == "trtllm")


def test_speculators_holds_every_part(tmp_path: Path):
    parts = {
        "num_layers": 2,
        "qk_norm": True,
        "fc_norm": True,
        "norm_output": True,
        "norm_before_residual": True,
        "windows": (None, 4),
        "taps": (0, 2, 4, 6, 7),
        "rope": LLAMA3,
    }
    done, config, tensors = written("speculators", eagle3(num_taps=5, **parts), tmp_path)
    layer = config["transformer_layer_config"]
    assert (layer["model_type"], layer["sliding_window"], layer["num_hidden_layers"]) == ("qwen3", 4, 2)
    assert config[TAPS] == [0, 2, 4, 6, 7] and config["fc_norm"] and config["norm_output"]
    assert {"layers.1.input_layernorm.weight", "layers.1.self_attn.q_norm.weight", "fc_norm.4.weight"} <= tensors
    assert any("verifier" in note for note in done.notes)


@pytest.mark.parametrize("format", ["sglang", "vllm", "nemo", "trtllm"])
def test_eagle_3_1(format: str, tmp_path: Path):
    _, config, tensors = written(format, eagle3(fc_norm=True, norm_output=True), tmp_path)
    prefix = "model." if format == "nemo" else ""
    assert {f"{prefix}fc_norm.{i}.weight" for i in range(3)} <= tensors and config["fc_norm"] is True
    nested = config.get("eagle_config", {})
    assert (nested.get("return_hidden_post_norm"), config.get("norm_output")) == (
        (True, None) if format == "trtllm" else (None, True)
    )
    assert config.get("eagle_jax_norm_output") == (True if format in ("sglang", "vllm") else None)


@pytest.mark.parametrize(
    ("format", "later"), [("trtllm", "midlayer.1.hidden_norm"), ("vllm", "layers.1.input_layernorm")]
)
def test_several_layers(format: str, later: str, tmp_path: Path):
    draft = eagle3(num_layers=2, norm_before_fc=True, attention_bias=True)
    _, config, tensors = written(format, draft, tmp_path)
    assert config["num_hidden_layers"] == 2 and config["eagle_config"]["norm_before_fc"] is True
    first = "midlayer.0." if format == "trtllm" else "layers.0."
    assert {f"{later}.weight", f"{first}hidden_norm.weight", "input_norm.weight"} <= tensors


def test_a_bias_stated_twice_is_written_once(tmp_path: Path):
    _, config, tensors = written("speculators", eagle3(attention_bias=True, qkv_bias=True), tmp_path)
    assert config["transformer_layer_config"]["attention_bias"] is True
    assert {f"layers.0.self_attn.{name}_proj.bias" for name in "qkvo"} <= tensors


def test_a_bias_of_fc(tmp_path: Path):
    _, config, tensors = written("trtllm", eagle3(fc_bias=True), tmp_path)
    assert config["bias"] is True and "fc.bias" in tensors


@pytest.mark.parametrize("format", FORMATS)
def test_a_head_that_borrows_from_its_target(format: str, tmp_path: Path):
    """The target's lm_head is written where the format needs one; the tables of one vocabulary where it wants them."""
    draft = eagle3(own_lm_head=False, draft_vocab_size=16)
    done, _, tensors = written(format, draft, tmp_path)
    assert ("lm_head.weight" in tensors) == (format != "trtllm")
    assert ("d2t" in tensors) == (format not in ("speculators", "modelopt", "trtllm"))
    assert any("lm_head.weight was added" in note for note in done.notes) == (format != "trtllm")


def test_eagle1(tmp_path: Path):
    draft, its_target = eagle1(), target(real=True)
    done, config, tensors = written("nxd", draft, tmp_path)
    assert config["fc_bias"] is False and "bias" not in config
    lm_head = read_arrays(tmp_path / "out")["lm_head.weight"]
    assert lm_head.tobytes() == np.asarray(its_target.lm_head[...]).tobytes()  # an unused copy
    done, config, tensors = written("cpmcu", draft, tmp_path, overwrite=True)
    assert "fc.bias" in tensors and "lm_head.weight" not in tensors and config["bias"] is True
    assert any("all zero" in note for note in done.notes)


NORMS = {"enorm.weight", "hnorm.weight", "layers.0.input_layernorm.weight", "norm.weight"}
# Norms of an EAGLE-1 head: the parts, the names of their tensors, and fields of the config.
EAGLE1_NORMS: dict[str, tuple[dict[str, bool], set[str], dict[str, Any]]] = {
    "modelopt": (
        {"input_norms": True, "attention_norm": True, "norm_output": True},
        NORMS | {"lm_head.weight"},
        {
            "architectures": ["LlamaForCausalLMEagle"],
            "eagle_config": {
                "use_mtp_layernorm": True,
                "use_input_layernorm_in_first_layer": True,
                "use_last_layernorm": True,
            },
        },
    ),
    "nemo": (
        {"attention_norm": True, "norm_output": True},
        {"layers.0.input_layernorm.weight", "norm.weight", EMBED},
        {"architectures": ["LlamaEagleDraftModel"], "draft_num_hidden_layers": 1},
    ),
    "cpmcu": (
        {"input_norms": True},
        {"input_norm1.weight", "input_norm2.weight", "fc.bias"},
        {"use_input_norm": True, "use_attn_norm": False, "eagle_num_layers": 1},
    ),
}


@pytest.mark.parametrize(
    ("format", "rope"),
    [(format, YARN) for format in ("sglang", "vllm", "speculators")]
    + [("speculators", dataclasses.replace(YARN, truncate=False, attention_factor=1.5)), ("speculators", LONGROPE)],
)
def test_yarn_and_longrope(format: str, rope: RopeConfig, tmp_path: Path):
    """transformers, from whose classes the engines take a config.json, finds our frequencies in what is written."""
    _, config, _ = written(format, eagle3(rope=rope), tmp_path)
    fields = config["transformer_layer_config"] if format == "speculators" else config
    theirs = LlamaConfig(**{name: value for name, value in fields.items() if name not in ("model_type", "torch_dtype")})
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope.kind](theirs, "cpu", seq_len=8)
    np.testing.assert_allclose(frequencies.numpy(), rope_frequencies(rope, 4), rtol=1e-6)
    assert factor == pytest.approx(rope.attention_factor)


@pytest.mark.parametrize("format", EAGLE1_NORMS)
def test_norms_of_eagle1_heads(format: str, tmp_path: Path):
    parts, names, fields = EAGLE1_NORMS[format]
    _, config, tensors = written(format, eagle1(**parts), tmp_path)
    assert fields.items() <= config.items() and "num_aux_hidden_states" not in config
    plain = {"fc.weight"} | {f"layers.0.{name}" for name in LAYER - {"input_layernorm.weight", "hidden_norm.weight"}}
    assert tensors == names | plain


@pytest.mark.parametrize(
    ("make", "format", "message"),
    [
        (
            lambda: eagle1(input_norms=True),
            "nemo",
            "input_norms is true, it has no norms before fc; attention_norm is false",
        ),
        (
            lambda: eagle1(norm_output=True),
            "cpmcu",
            r"norm_output is true, .* if there is one .*can hold it: modelopt\)",
        ),
        (lambda: eagle1(attention_norm=True), "official", "its layer has no norm before attention"),
        (lambda: eagle1(fc_bias=True), "modelopt", "fc.bias"),
        (eagle1, "trtllm", "it is an EAGLE-1 head, which the engine does not read"),
        (lambda: eagle3(taps=(2, 5, 7)), "nemo", r"taps layers \[2, 5, 7\], the engine always reads \[2, 4, 5\]"),
        (lambda: eagle3(taps=(0, 5, 7)), "modelopt", "reads the inputs of 1 to 7"),
        (lambda: eagle3(num_taps=2, taps=(2, 5)), "specforge", "taps 2 layers, the engine reads 3"),
        (
            lambda: eagle3(norm_output=True, fc_norm=True),
            "specforge",
            "norm_output is true, its next step reads .* before",
        ),
        (lambda: eagle3(norm_before_residual=True), "trtllm", "norm_before_residual is true"),
        (lambda: eagle3(num_layers=2), "nemo", "it has 2 layers, the engine's heads have one"),
        (lambda: eagle3(qk_norm=True), "trtllm", "qk_norm is true, its layer has no such norms"),
        (lambda: eagle3(windows=(4,)), "modelopt", r"windows is \(4,\), its layers attend to all positions"),
        (lambda: eagle3(num_layers=2, windows=(4, 8)), "speculators", "a config.json states one size"),
        (lambda: eagle3(fc_bias=True), "modelopt", r"fc.bias of an EAGLE-3 .*can hold it: trtllm\)"),
        (lambda: eagle3(attention_bias=True), "angelslim", "attention_bias is true, its layer has no such bias"),
        (lambda: eagle3(rope=RopeConfig(1e6, "linear", 4.0)), "angelslim", "rope_theta is 1e.06"),
        (lambda: eagle3(rope=RopeConfig(1e6)), "cpmcu", "its RoPE is not the target's"),
        (lambda: eagle3(own_embedding=True), "modelopt", "embed_tokens is its own"),
        (
            lambda: eagle3(rope=YARN),
            "trtllm",
            r"rope type 'yarn' is not read.*can hold it: sglang, vllm, speculators\)",
        ),
        (
            lambda: eagle3(rope=dataclasses.replace(YARN, truncate=False)),
            "vllm",
            r"its yarn has .* and truncate false, .*can hold it: speculators\)",
        ),
        (lambda: eagle3(rope=LONGROPE), "sglang", r"rope type 'longrope' is not read.*can hold it: speculators\)"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(make: Any, format: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        export(make(), target(), tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["specforge", "nemo", "cpmcu", "nxd"])
def test_a_wider_target(format: str):
    draft = eagle3(own_embedding=True, target_hidden_size=12)
    refused = [reason for reason in refusals(draft, target(hidden=12), format) if "target_hidden_size is 12" in reason]
    assert bool(refused) == (format in ("cpmcu", "nxd"))


def test_an_abstract_target_of_which_weights_are_needed(tmp_path: Path):
    with pytest.raises(ConfigError, match="has no embed of its own, and the target is abstract"):
        export(eagle3(), target(), tmp_path / "out", format="nxd")


def test_a_cast_head(tmp_path: Path):
    draft = eagle3(dtype=jnp.bfloat16)
    done = export(draft, target(real=True), tmp_path / "out", format="nemo", dtype="float32")
    assert done.shapes["model.fc.weight"] == ((8, 24), "float32") and done.config["torch_dtype"] == "float32"
    assert_same(
        {"lm_head.weight": read_arrays(tmp_path / "out")["lm_head.weight"]},
        {"lm_head.weight": to_official(draft)["lm_head.weight"].astype(np.float32)},
    )


@pytest.mark.parametrize(
    ("format", "prefix", "fields"),
    [
        ("vllm", "", {"parallel_drafting": True, "pard_token": 11, "num_depths": 6}),
        ("nemo", "model.", {"parallel_drafting": True, "mask_token_id": 11, "num_depths": 6}),
        ("speculators", "", {"speculators_model_type": "peagle", "mask_token_id": 11}),
    ],
)
def test_a_p_eagle_head(tmp_path: Path, format: str, prefix: str, fields: dict[str, Any]):
    """Two layers, and mask_hidden under that name; its config is the same after reading back."""
    head = peagle(own_embedding=True)
    _, config, tensors = written(format, head, tmp_path)
    assert "mask_hidden" in tensors and f"{prefix}layers.1.input_layernorm.weight" in tensors
    nested = config.get("transformer_layer_config", config)
    assert config.items() >= fields.items() and nested["num_hidden_layers"] == 2
    read = again(tmp_path / "out").model.config
    assert (read.mask_token_id, read.num_depths, read.num_layers) == (11, 6, 2)
    if format == "speculators":
        assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 6


def test_a_p_eagle_head_for_an_engine_without_them(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"SGLang cannot run .* P-EAGLE head.*can hold it: vllm, speculators, nemo"):
        written("sglang", peagle(own_embedding=True), tmp_path)
