"""Heads made by SpecForge and by speculators: their names and their config fields come in, and go out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_jax import Eagle1Draft, Eagle3Draft
from eagle_jax.convert import convert, export, from_pretrained, load, to_official
from eagle_jax.models.config import ConfigError
from tests.convert import folders
from tests.convert.folders import CONFIG, assert_same, read_arrays

TARGET = CONFIG | {"num_hidden_layers": 8, "architectures": ["LlamaForCausalLM"]}

# What SpecForge's configs and save_pretrained write (it keeps rope_scaling beside rope_parameters).
SPECFORGE = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "draft_vocab_size": 5,
    "dtype": "float32",
    "eos_token_id": 1,
    "head_dim": 6,
    "hidden_act": "silu",
    "hidden_size": 8,
    "initializer_range": 0.02,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "max_window_layers": 36,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "rope_theta": 500000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "5.3.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 16,
}
# What speculators' save_pretrained writes: the layer's config is nested.
SPECULATORS_LAYER = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 6,
    "hidden_act": "silu",
    "hidden_size": 8,
    "initializer_range": 0.02,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 32,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "use_cache": True,
    "vocab_size": 16,
}
VERIFIER = {
    "default_proposal_method": "greedy",
    "proposal_methods": [
        {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1}
    ],
    "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "some/target"},
}
SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "draft_vocab_size": 5,
    "dtype": "float32",
    "eagle_aux_hidden_state_layer_ids": [1, 4, 7],
    "embed_requires_grad": False,
    "fc_norm": False,
    "norm_before_fc": False,
    "norm_before_residual": True,
    "norm_output": False,
    "speculators_config": VERIFIER | {"algorithm": "eagle3"},
    "speculators_model_type": "eagle3",
    "speculators_version": "0.7.0",
    "target_hidden_size": None,
    "tie_word_embeddings": False,
    "transformer_layer_config": SPECULATORS_LAYER,
    "transformers_version": "4.57.1",
}
SPECULATORS_EAGLE1 = {
    "architectures": ["EagleSpeculator", "LlamaDecoderLayer"],
    "fusion_bias": True,
    "layernorms": False,
    "speculators_config": VERIFIER | {"algorithm": "eagle"},
    "speculators_model_type": "eagle",
    "speculators_version": "0.1.0",
    "torch_dtype": "float32",
    "transformer_layer_architecture": "LlamaDecoderLayer",
    "transformer_layer_config": SPECULATORS_LAYER,
}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return folders.write_safetensors(tmp_path / "target", TARGET, folders.llama_arrays(layers=8))


def speculators_arrays() -> folders.Arrays:
    rng = np.random.default_rng(5)
    return folders.eagle3_arrays("layers.0") | {"embed_tokens.weight": folders.normal(rng, (16, 8))}


def fusion_arrays() -> folders.Arrays:
    arrays = {name: array for name, array in folders.eagle1_arrays().items() if "embed" not in name}
    return {
        name.replace("fc.", "fusion_fc.").replace("layers.0.", "transformer."): array for name, array in arrays.items()
    }


@pytest.mark.parametrize("embedding", [False, True])  # exports for SGLang leave it out, those for transformers do not
def test_specforge(target: Path, tmp_path: Path, embedding: bool):
    arrays = folders.eagle3_arrays()
    if embedding:
        arrays["embed_tokens.weight"] = folders.normal(np.random.default_rng(5), (16, 8))
    model, draft = from_pretrained(target, folders.write_safetensors(tmp_path / "head", SPECFORGE, arrays))
    assert isinstance(draft, Eagle3Draft)
    assert_same(to_official(draft), arrays)
    config = draft.config
    assert (config.rope.theta, config.rope.kind, config.rms_norm_eps) == (500000.0, "default", 1e-5)
    assert (config.taps, config.norm_before_residual, config.own_embedding) == (None, False, embedding)
    export(draft, model, tmp_path / "out", format="vllm")
    assert_same(to_official(from_pretrained(target, tmp_path / "out")[1]), arrays)


def test_specforge_taps_are_outputs(target: Path, tmp_path: Path):
    taps = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 3, 6], "use_aux_hidden_state": True}}
    head = folders.write_safetensors(tmp_path / "head", SPECFORGE | taps, folders.eagle3_arrays())
    model, draft = from_pretrained(target, head)
    assert draft.taps(model) == (1, 4, 7)
    export(draft, model, tmp_path / "out", format="sglang")
    assert_same(read_arrays(tmp_path / "out"), folders.eagle3_arrays())  # its names are SGLang's


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_output": True}, r"norm_output = True means EAGLE-3\.1 .* but SpecForge .* convert --norm-output"),
        ({"model_type": "qwen3"}, "model_type = 'qwen3' is not implemented"),
    ],
)
def test_specforge_refusals(target: Path, tmp_path: Path, fields: dict[str, Any], message: str):
    head = folders.write_safetensors(tmp_path / "head", SPECFORGE | fields, folders.eagle3_arrays())
    with pytest.raises(ConfigError, match=message):
        from_pretrained(target, head)


def test_speculators(target: Path, tmp_path: Path):
    arrays = speculators_arrays()
    head = folders.write_safetensors(tmp_path / "head", SPECULATORS, arrays)
    model, draft = from_pretrained(target, head)
    assert isinstance(draft, Eagle3Draft)
    config = draft.config
    assert (config.rope.kind, config.rope.theta, config.rope.original_length) == ("llama3", 500000.0, 32)
    assert (config.vocab_size, config.draft_vocab_size, config.rms_norm_eps) == (16, 5, 1e-5)
    assert config.norm_before_residual and config.own_embedding
    assert draft.taps(model) == (1, 4, 7)  # inputs
    assert_same(to_official(draft), {name.replace("layers.0.", "midlayer."): array for name, array in arrays.items()})

    # A converted folder keeps the config as it came.
    again = load(convert(target, head, tmp_path / "converted"))[1]
    assert again.config == config
    assert_same(to_official(again), to_official(draft))
    export(again, model, tmp_path / "out", format="vllm")
    assert_same(read_arrays(tmp_path / "out"), arrays)  # its names are vLLM's
    assert from_pretrained(target, tmp_path / "out")[1].config == config


def test_speculators_without_draft_vocabulary(target: Path, tmp_path: Path):
    """No tables then; and old versions saved the target's last weights, too."""
    rng = np.random.default_rng(6)
    arrays = speculators_arrays() | {"lm_head.weight": folders.normal(rng, (16, 8))}
    del arrays["d2t"], arrays["t2d"]
    saved = arrays | {
        "verifier_norm.weight": folders.normal(rng, (8,)),
        "verifier_lm_head.weight": folders.normal(rng, (16, 8)),
    }
    config = SPECULATORS | {"draft_vocab_size": 16, "norm_before_residual": False}
    _, draft = from_pretrained(target, folders.write_safetensors(tmp_path / "head", config, saved))
    official = to_official(draft)
    assert not official.pop("d2t").any() and official.pop("t2d").all()
    assert_same(official, {name.replace("layers.0.", "midlayer."): array for name, array in arrays.items()})
    assert not draft.config.norm_before_residual and draft.target_ids is None


@pytest.mark.parametrize("bias", [False, True])
def test_speculators_eagle1(target: Path, tmp_path: Path, bias: bool):
    arrays = fusion_arrays()
    if not bias:
        del arrays["fusion_fc.bias"]
    head = folders.write_safetensors(tmp_path / "head", SPECULATORS_EAGLE1 | {"fusion_bias": bias}, arrays)
    model, draft = from_pretrained(target, head)
    assert isinstance(draft, Eagle1Draft) and draft.config.fc_bias is bias and draft.embed is None
    official = {
        name.replace("fusion_fc.", "fc.").replace("transformer.", "layers.0."): array for name, array in arrays.items()
    }
    assert_same(to_official(draft), official)
    assert_same(to_official(load(convert(target, head, tmp_path / "converted"))[1]), official)
    export(draft, model, tmp_path / "out", format="sglang")
    written = read_arrays(tmp_path / "out")
    assert_same({name: array for name, array in written.items() if bias or name != "fc.bias"}, official)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (SPECULATORS, {"speculators_model_type": "peagle"}, "'peagle', but a tensor mask_hidden.* is missing"),
        (SPECULATORS, {"speculators_model_type": "dflash"}, "speculators_model_type = 'dflash' is not implemented"),
        (SPECULATORS, {"norm_before_residual": None}, "norm_before_residual is missing; take it from"),
        (SPECULATORS, {"draft_vocab_size": None}, "draft_vocab_size is missing; take it from"),
        (SPECULATORS, {"norm_before_fc": True, "fc_norm": True}, "fc_norm and norm_before_fc exclude each other"),
        (SPECULATORS, {"transformer_layer_config": None}, "transformer_layer_config must be an object, got None"),
        (SPECULATORS_EAGLE1, {"layernorms": True}, "layernorms = True is not implemented"),
        (SPECULATORS_EAGLE1, {"fusion_bias": None}, "fusion_bias is missing; take it from"),
        (
            SPECULATORS_EAGLE1,
            {"transformer_layer_architecture": "Qwen3DecoderLayer"},
            "transformer_layer_architecture = 'Qwen3DecoderLayer' is not implemented",
        ),
    ],
)
def test_speculators_refusals(
    target: Path, tmp_path: Path, config: dict[str, Any], fields: dict[str, Any], message: str
):
    arrays = speculators_arrays() if config is SPECULATORS else fusion_arrays()
    head = folders.write_safetensors(tmp_path / "head", config | fields, arrays)
    with pytest.raises(ConfigError, match=message):
        from_pretrained(target, head)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma2"}, "model_type = 'gemma2' is not implemented"),
        (
            {"sliding_window": 4, "layer_types": ["chunked_attention"]},
            "layer_types 'chunked_attention' is not",
        ),
    ],
)
def test_layers_that_are_refused(target: Path, tmp_path: Path, fields: dict[str, Any], message: str):
    config = SPECULATORS | {"transformer_layer_config": SPECULATORS_LAYER | fields}
    head = folders.write_safetensors(tmp_path / "head", config, speculators_arrays())
    with pytest.raises(ConfigError, match=message):
        from_pretrained(target, head)
