"""The text part of a multimodal checkpoint equals transformers' own model, under either form of its tensor names."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from eagle_jax.convert import CheckpointError, convert, from_pretrained, load
from eagle_jax.models import params
from eagle_jax.models.architectures import config_of
from eagle_jax.models.fields import ConfigError
from eagle_jax.models.rope import RopeConfig
from tests.convert import folders
from tests.models.reference import prompt_pass

TEXT = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    query_pre_attn_scalar=20,
    sliding_window=4,
    layer_types=["sliding_attention", "full_attention"],
)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
# What the config.json of Gemma 3 4B states.
SPARSE = {
    "model_type": "gemma3",
    "eos_token_id": [1, 106],
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


@pytest.fixture(scope="module")
def theirs() -> transformers.PreTrainedModel:
    """Makes transformers' model; its lm_head is its own, though the text part's config says that it is tied."""
    torch = pytest.importorskip("torch")
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, tie_word_embeddings=False
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 0.25 * noise)
    return model


@pytest.fixture(scope="module")
def folder(theirs: transformers.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder that `save_pretrained` writes."""
    path = tmp_path_factory.mktemp("gemma3")
    theirs.save_pretrained(path)
    return path


def renamed(name: str) -> str:
    """Returns the name that a tensor has in the modules of transformers, and in files of some of its versions."""
    name = name.removeprefix("language_model.")
    if name.startswith("lm_head."):
        return name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"


def test_the_text_part_equals_transformers(theirs, folder, tmp_path):
    import torch

    tokens = np.random.default_rng(1).integers(0, TEXT["vocab_size"], (2, 9))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    converted = convert(folder, None, tmp_path / "converted")
    target, _ = load(converted)
    _, logits = prompt_pass(target, jnp.asarray(tokens, jnp.int32), jnp.array([9, 9]), taps=())
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    config = json.loads((converted / "target" / "config.json").read_text())
    assert config["model_type"] == "gemma3_text" and "text_config" not in config and "vision_config" not in config
    convert(folder, None, converted)  # holds this conversion already


def test_either_form_of_the_names_is_read(folder, tmp_path):
    arrays = folders.read_arrays(folder)
    config = json.loads((folder / "config.json").read_text())
    assert {"language_model.lm_head.weight", "multi_modal_projector.mm_soft_emb_norm.weight"} <= arrays.keys()
    other = {renamed(name): array for name, array in arrays.items()}
    assert {"lm_head.weight", "model.language_model.norm.weight"} <= other.keys()
    one, two = (
        params.flatten(from_pretrained(folders.write_safetensors(tmp_path / key, config, held))[0])
        for key, held in (("one", arrays), ("other", other))
    )
    assert one.keys() == two.keys() and all(np.array_equal(one[path], two[path]) for path in one)

    twice = folders.write_safetensors(
        tmp_path / "twice", config, arrays | {"lm_head.weight": arrays["language_model.lm_head.weight"]}
    )
    with pytest.raises(CheckpointError, match="stand for the same tensor"):
        convert(twice, None, tmp_path / "out")
    unknown = folders.write_safetensors(
        tmp_path / "unknown", config, arrays | {"audio_tower.weight": arrays["language_model.model.norm.weight"]}
    )
    with pytest.raises(CheckpointError, match=r"'audio_tower.weight' has no place"):
        convert(unknown, None, tmp_path / "out")


def test_sizes_that_a_published_config_omits():
    config = config_of(SPARSE)
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert (config.hidden_size, config.num_layers, config.windows[:6]) == (2560, 34, (1024,) * 5 + (None,))
    assert config.rope == RopeConfig(1e6, "linear", 8.0) and config.local_rope == RopeConfig(1e4)
    assert config.tie_word_embeddings and config.model_type == "gemma3_text"
    assert not config_of(SPARSE | {"tie_word_embeddings": False}).tie_word_embeddings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_config": None}, "text_config must be an object, got None"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type = 'llama' is not implemented"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config = .* is not implemented"),
        (
            {"text_config": SPARSE["text_config"] | {"use_bidirectional_attention": True}},
            "use_bidirectional_attention = True is not implemented",
        ),
    ],
)
def test_refusals(fields, message):
    with pytest.raises(ConfigError, match=message):
        config_of(SPARSE | fields)
