"""export: the literal files of each format, read back bit for bit."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from transformers import LlamaConfig as TransformersConfig

import eagle_jax
from eagle_jax import Eagle1Draft, Eagle3Draft, Llama
from eagle_jax.cli import main
from eagle_jax.convert import convert, export, from_pretrained, to_official
from eagle_jax.convert.loading import load_head
from eagle_jax.drafts.eagle.drafting import with_window
from eagle_jax.models import params
from eagle_jax.models.config import ConfigError, RopeConfig
from tests.convert import folders
from tests.convert.folders import assert_same, read_arrays
from tests.convert.heads import LLAMA3, eagle1, eagle3, filled, target

PAIR = Path(eagle_jax.__file__).parent / "pair"
FORMATS = ("official", "sglang", "vllm")
WEIGHTS = {"official": "pytorch_model.bin", "sglang": "model.safetensors", "vllm": "model.safetensors"}
# What all formats say of a head of these sizes.
COMMON = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LAYER = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "post_attention_layernorm.weight",
]
EAGLE3_LAYER = [*LAYER, "input_layernorm.weight", "hidden_norm.weight"]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def reread(folder: Path, own_target: Llama, tmp_path: Path, dtype: str = "float32") -> Any:
    """The head of an exported folder, by the same way in as any other: beside a target's checkpoint."""
    c = own_target.config
    hf = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "torch_dtype": "float32",
    }
    arrays = to_official(filled(own_target, 7))
    path = folders.write_safetensors(tmp_path / "target", hf, arrays)
    return from_pretrained(path, folder, dtype=dtype)[1]


# A head, its target, what a format's config.json says beside COMMON, and the tensors beside the layer's.
HEADS: dict[str, tuple[Any, Any, dict[str, dict[str, Any] | None], list[str]]] = {
    "draft vocabulary": (
        lambda: eagle3(),
        lambda: target(),
        {
            "official": {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 5},
            "sglang": {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 5},
            "vllm": {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 5},
        },
        ["fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"],
    ),
    "one vocabulary": (
        lambda: eagle3(draft_vocab_size=16),
        lambda: target(),
        {
            "official": {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 16},
            "sglang": {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 16},
            "vllm": {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 16},
        },
        ["fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"],
    ),
    "wider target": (
        lambda: eagle3(own_embedding=True, target_hidden_size=12),
        lambda: target(hidden=12),
        {
            "official": {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 5, "target_hidden_size": 12},
            "sglang": {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 5, "target_hidden_size": 12},
            "vllm": {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 5, "target_hidden_size": 12},
        },
        ["fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d", "embed_tokens.weight"],
    ),
    "taps": (  # layers 1, 4 and 7 by their inputs: the outputs of 0, 3 and 6
        lambda: eagle3(taps=(1, 4, 7)),
        lambda: target(),
        {
            "official": None,
            "sglang": {
                "architectures": ["LlamaForCausalLMEagle3"],
                "draft_vocab_size": 5,
                "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 3, 6]},
            },
            "vllm": {
                "architectures": ["LlamaForCausalLMEagle3"],
                "draft_vocab_size": 5,
                "eagle_aux_hidden_state_layer_ids": [1, 4, 7],
            },
        },
        ["fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"],
    ),
    "default taps by name": (  # those of eight layers
        lambda: eagle3(taps=(2, 4, 5)),
        lambda: target(),
        {
            "official": {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 5},
            "sglang": {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 5},
            "vllm": {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 5},
        },
        ["fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"],
    ),
    "norm before residual": (
        lambda: eagle3(norm_before_residual=True),
        lambda: target(),
        {
            "official": None,
            "sglang": None,
            "vllm": {
                "architectures": ["LlamaForCausalLMEagle3"],
                "draft_vocab_size": 5,
                "norm_before_residual": True,
            },
        },
        ["fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"],
    ),
    "EAGLE-1": (
        lambda: eagle1(fc_bias=True),
        lambda: target(),
        {
            "official": {"architectures": ["LlamaForCausalLM"], "bias": True},
            "sglang": {"architectures": ["LlamaForCausalLMEagle"]},
            "vllm": None,
        },
        ["fc.weight", "fc.bias"],
    ),
    "EAGLE-1 without bias": (
        lambda: eagle1(),
        lambda: target(),
        {
            "official": {"architectures": ["LlamaForCausalLM"], "bias": False},
            "sglang": {"architectures": ["LlamaForCausalLMEagle"]},
            "vllm": {"architectures": ["EagleLlamaForCausalLM"], "bias": False},
        },
        ["fc.weight"],
    ),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", HEADS)
def test_each_head_in_each_format(name: str, format: str, tmp_path: Path):
    make, make_target, expected, tensors = HEADS[name]
    draft, its_target = make(), make_target()
    out = tmp_path / "out"
    if expected[format] is None:
        with pytest.raises(ConfigError, match="cannot run this head"):
            export(draft, its_target, out, format=format)
        assert list(tmp_path.iterdir()) == []
        return
    done = export(draft, its_target, out, format=format)
    assert config_of(out) == COMMON | expected[format] == done.config
    assert sorted(path.name for path in out.iterdir()) == sorted(["config.json", WEIGHTS[format]]) == sorted(done.files)
    is_eagle3 = isinstance(draft, Eagle3Draft)
    prefix = "layers.0." if not is_eagle3 or format == "vllm" else "midlayer."
    names = {*tensors, *(prefix + name for name in (EAGLE3_LAYER if is_eagle3 else LAYER))}
    written = read_arrays(out)
    added = {"fc.bias"} if name == "EAGLE-1 without bias" and format == "sglang" else set()
    assert written.keys() == names | added == done.shapes.keys()
    for one in added:
        assert written[one].shape == (8,) and not written[one].any()
    assert len(done.notes) == len(added)

    # Values: by the arrays that the head was made of, and by the way in.
    source = to_official(draft)
    for one in names:
        assert written[one].tobytes() == source[one.replace("layers.0.", "midlayer.") if is_eagle3 else one].tobytes()
    again = reread(out, its_target, tmp_path)
    assert_same({key: value for key, value in to_official(again).items() if key not in added}, source)
    ours, theirs = (dataclasses.asdict(one.config) for one in (draft, again))
    irrelevant = {"fc_bias"} if is_eagle3 or added else {"draft_vocab_size"} if not is_eagle3 else set()
    irrelevant |= {"taps"} if name == "default taps by name" else set()
    assert {key for key in ours if ours[key] != theirs[key]} <= irrelevant
    if is_eagle3:
        assert again.taps(its_target) == draft.taps(its_target)


@pytest.mark.parametrize("format", FORMATS)
def test_vocabulary_tables_are_offsets(format: str, tmp_path: Path):
    draft = eagle3()
    export(draft, target(), tmp_path / "out", format=format)
    arrays = read_arrays(tmp_path / "out")
    ids = np.asarray(draft.target_ids)
    assert arrays["d2t"].dtype == np.int64 and arrays["t2d"].dtype == np.bool_
    np.testing.assert_array_equal(arrays["d2t"] + np.arange(5), ids)
    np.testing.assert_array_equal(np.flatnonzero(arrays["t2d"]), ids)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", None])
def test_dtypes(format: str, dtype: str | None, tmp_path: Path):
    draft = eagle3(jnp.float32 if dtype else jnp.bfloat16)
    done = export(draft, target(), tmp_path / "out", format=format, dtype=dtype)
    kept = dtype or "bfloat16"
    assert done.config["torch_dtype"] == kept
    source = to_official(draft)
    for name, array in read_arrays(tmp_path / "out").items():
        expected = source[name.replace("layers.0.", "midlayer.")]
        expected = expected if name in ("d2t", "t2d") else expected.astype(jnp.dtype(kept))
        assert array.dtype == expected.dtype and array.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize("format", ["sglang", "vllm"])
def test_transformers_reads_the_config(format: str, tmp_path: Path):
    """Both engines take their config from transformers."""
    export(eagle3(rope=LLAMA3, taps=(1, 4, 7)), target(), tmp_path / "out", format=format)
    config = TransformersConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    assert (config.head_dim, config.num_key_value_heads, config.draft_vocab_size) == (4, 1, 5)
    assert config.dtype == importlib.import_module("torch").float32


def test_ropes(tmp_path: Path):
    linear = eagle3(rope=RopeConfig(10000.0, "linear", 4.0))
    for format in FORMATS:
        export(linear, target(), tmp_path / format, format=format)
        name = "type" if format == "official" else "rope_type"
        assert config_of(tmp_path / format)["rope_scaling"] == {name: "linear", "factor": 4.0}
    dynamic = eagle3(rope=RopeConfig(10000.0, "dynamic", 4.0, original_length=64))
    export(dynamic, target(), tmp_path / "dynamic", format="official")
    assert config_of(tmp_path / "dynamic")["rope_scaling"] == {"type": "dynamic", "factor": 4.0}


@pytest.mark.parametrize("format", ["sglang", "vllm"])
def test_biases_of_the_layer(format: str, tmp_path: Path):
    draft = eagle1(attention_bias=True)
    export(draft, target(), tmp_path / "out", format=format)
    assert config_of(tmp_path / "out")["attention_bias"] is True
    written = read_arrays(tmp_path / "out")
    for name in "qkvo":
        key = f"layers.0.self_attn.{name}_proj.bias"
        assert written[key].tobytes() == to_official(draft)[key].tobytes()


def test_one_tap_is_for_sglang_alone(tmp_path: Path):
    draft = eagle3(num_taps=2, taps=(2, 5))
    export(draft, target(), tmp_path / "out", format="sglang")
    assert config_of(tmp_path / "out")["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 4]


def test_a_window_is_noted(tmp_path: Path):
    done = export(with_window(eagle3(), 4, 16), target(), tmp_path / "out", format="vllm")
    (note,) = done.notes
    assert "window" in note


def test_without_torch_the_official_format_is_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = export(eagle3(), target(), tmp_path / "out", format="official")
    assert done.files == ("model.safetensors", "config.json") and "PyTorch" in done.notes[0]
    assert_same(read_arrays(tmp_path / "out"), to_official(eagle3()))
    modes = {file: (tmp_path / "out" / file).stat().st_mode for file in done.files}
    assert len(set(modes.values())) == 1, modes  # weights can be read by whoever may read the rest


@pytest.mark.parametrize(("head", "format"), [("head", f) for f in FORMATS] + [("head_eagle1", f) for f in FORMATS[:2]])
def test_the_embedded_pair(head: str, format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = PAIR / head, tmp_path / "out"
    options = ["export", "--target", str(PAIR / "target"), "--draft", str(source), "--format", format]
    assert main([*options, "--out", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in (format, WEIGHTS[format], "fc.weight", "hidden_size 192", "bit for bit"):
        assert part in printed
    assert_same(to_official(from_pretrained(PAIR / "target", out)[1]), read_arrays(source))
    assert main([*options, "--out", str(out)]) == 2 and "is not empty" in capsys.readouterr().err
    assert main([*options, "--out", str(out), "--overwrite", "--dtype", "float32"]) == 0
    assert config_of(out)["torch_dtype"] == "float32"


def test_the_command_reads_a_converted_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, out = tmp_path / "model", tmp_path / "out"
    convert(PAIR / "target", PAIR / "head_eagle1", model)
    assert main(["export", "--model", str(model), "--out", str(out), "--format", "sglang"]) == 0
    assert_same(to_official(from_pretrained(PAIR / "target", out)[1]), read_arrays(PAIR / "head_eagle1"))
    # Only the draft and the target's embedding are read.
    its_target, draft = load_head(model)
    assert [path for path, leaf in params.flatten(its_target).items() if hasattr(leaf, "__array__")] == ["embed"]
    assert isinstance(draft, Eagle1Draft)

    capsys.readouterr()
    assert main(["export", "--model", str(model), "--out", str(tmp_path / "no"), "--format", "vllm"]) == 2
    assert "fc.bias" in capsys.readouterr().err and not (tmp_path / "no").exists()
    for bad in (tmp_path, model):
        assert main(["export", "--model", str(model), "--out", str(bad), "--format", "sglang", "--overwrite"]) == 2
        assert "is or contains the source" in capsys.readouterr().err
    convert(PAIR / "target", None, tmp_path / "alone")
    assert main(["export", "--model", str(tmp_path / "alone"), "--out", str(tmp_path / "no"), "--format", "vllm"]) == 2
    assert "holds no draft" in capsys.readouterr().err
    assert main(["export", "--target", "a", "--out", "b", "--format", "vllm"]) == 2
    assert "either --model, or --target and --draft" in capsys.readouterr().err


def test_the_heads_own_dtype(tmp_path: Path):
    """Not the target's, and not what the head's config says of weights that are stored in another one."""
    wide = {
        name: a.astype(np.float32) if a.dtype == jnp.bfloat16 else a for name, a in read_arrays(PAIR / "head").items()
    }
    source = folders.write_safetensors(tmp_path / "head", config_of(PAIR / "head"), wide)
    _, draft = load_head(PAIR / "target", source)
    assert draft is not None
    export(draft, load_head(PAIR / "target", source)[0], tmp_path / "out", format="sglang")
    assert_same(read_arrays(tmp_path / "out"), wide)
