"""One tiny head in every dialect is one head through the reader."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eagle_jax.convert import HeadChoices
from eagle_jax.convert.heads.dialects import DIALECTS
from eagle_jax.convert.heads.reading import dialect_of
from eagle_jax.convert.heads.rules import official_of, theirs_of
from eagle_jax.models.config import ConfigError
from tests.convert import folders
from tests.convert.folders import DRAFT_IDS, HEAD_CONFIG, Arrays
from tests.convert.reading import (
    ARCHITECTURE,
    EAGLE1_CONFIG,
    SPECULATORS,
    TAPS,
    Change,
    fused,
    parameters,
    read,
    renamed,
    taps,
)


def prefixed(arrays: Arrays) -> Arrays:
    top = ("lm_head.", "d2t", "t2d")
    numbered = renamed(("midlayer.", "layers.0."))(arrays)
    return {name if name.startswith(top) else f"model.{name}": array for name, array in numbered.items()}


def split_fc(arrays: Arrays) -> Arrays:
    rest = {name: array for name, array in arrays.items() if not name.startswith("fc.")}
    fc = arrays["fc.weight"]
    return rest | {"fc1.weight": fc[:, :8], "fc2.weight": fc[:, 8:], "fc1.bias": arrays["fc.bias"]}


def direct_ids(arrays: Arrays) -> Arrays:
    rest = {name: array for name, array in arrays.items() if name not in ("d2t", "t2d")}
    return rest | {"token_id_remap": DRAFT_IDS.astype(np.int32)}


def whole_vocabulary(arrays: Arrays) -> Arrays:
    """Without tables, with the whole lm_head and an embedding."""
    rng = np.random.default_rng(8)
    rest = {name: array for name, array in arrays.items() if name not in ("d2t", "t2d")}
    return rest | {name: folders.normal(rng, (16, 8)) for name in ("lm_head.weight", "embed_tokens.weight")}


def same(arrays: Arrays) -> Arrays:
    return arrays


# Dialect: the kind of head, what its config says beside the sizes, and how it writes the tensors.
WRITTEN: dict[str, tuple[str, str, dict[str, Any], Change]] = {
    "official": ("official", "eagle3", {ARCHITECTURE: ["LlamaForCausalLM"]}, same),
    "SpecForge": ("sglang", "eagle3", {ARCHITECTURE: ["LlamaForCausalLMEagle3"]}, same),
    "SGLang, numbered": (
        "sglang",
        "eagle3",
        {ARCHITECTURE: ["LlamaForCausalLMEagle3"]},
        renamed(("midlayer.", "layers.0.")),
    ),
    "speculators": (
        "speculators",
        "eagle3",
        SPECULATORS,
        renamed(("midlayer.", "layers.0.")),
    ),
    "Model-Optimizer, HF": (
        "modelopt",
        "eagle3",
        {
            ARCHITECTURE: ["LlamaForCausalLMEagle3"],
            "eagle_config": {
                TAPS: [],
                "use_last_layernorm": True,
                "next_layer_regular": True,
                "use_mtp_layernorm": None,
            },
        },
        renamed(("midlayer.", "layers.0.")),
    ),
    "Model-Optimizer, Megatron": ("modelopt", "eagle3", {"eagle_config": {"use_last_layernorm": True}}, same),
    "Model-Optimizer, in a list": ("modelopt", "eagle3", {}, renamed(("midlayer.", "midlayer.0."))),
    "NeMo": (
        "nemo",
        "eagle3",
        {
            ARCHITECTURE: ["LlamaEagle3DraftModel"],
            "num_hidden_layers": 36,
            "model_type": "qwen3",
            "sliding_window": 4,
            "layer_types": ["sliding_attention"] * 36,
        },
        prefixed,
    ),
    "AngelSlim": (
        "angelslim",
        "eagle3",
        {ARCHITECTURE: ["Eagle3LlamaForCausalLM"], "target_model_type": "qwen3", "max_window_layers": 36},
        same,
    ),
    "TensorRT-LLM": ("trtllm", "eagle3", {ARCHITECTURE: ["EAGLE3LlamaForCausalLM"]}, same),
    "TensorRT-LLM, in a list": (
        "trtllm",
        "eagle3",
        {ARCHITECTURE: ["EAGLE3LlamaForCausalLM"], "eagle_config": {"next_layer_regular": True}},
        renamed(("midlayer.", "midlayer.0.")),
    ),
    "CPM.cu": ("cpmcu", "eagle3", {"eagle_num_layers": 1}, direct_ids),
    "CPM.cu, from its trainer": ("cpmcu", "eagle3", {"eagle_num_layers": 1}, renamed(("midlayer.", "model.layers.0."))),
    "NxD": ("official", "eagle3", {}, renamed(("midlayer.", "layers.0."))),
    "official, EAGLE-1": ("official", "eagle1", {}, same),
    "NxD, EAGLE-1": ("official", "eagle1", {"fc_bias": True}, same),
    "CPM.cu, EAGLE-1": ("cpmcu", "eagle1", {}, split_fc),
    "MLC": ("mlc", "eagle1", {"context_window_size": 2048}, fused),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_one_head_in_every_dialect(written: str):
    """Equal parameters and an equal config are equal logits: nothing else goes into them."""
    dialect, kind, fields, change = WRITTEN[written]
    arrays = folders.eagle3_arrays() if kind == "eagle3" else folders.eagle1_arrays()
    sizes = HEAD_CONFIG if kind == "eagle3" else EAGLE1_CONFIG
    plain, config = read(sizes, arrays), sizes | fields
    theirs = change(arrays)
    assert dialect_of(config, theirs) == dialect
    match = read(config, theirs)
    assert (match.kind, match.reading.dialect) == (kind, dialect)
    assert match.model.config == plain.model.config
    folders.assert_same(parameters(match), parameters(plain))
    assert taps(match) == (2, 4, 5)


def test_every_dialect_is_read():
    # test_imports.py has vLLM's EAGLE-1 heads.
    assert {dialect for dialect, *_ in WRITTEN.values()} | {"deepspec", "vllm"} == DIALECTS.keys()


NORM_TENSORS = {
    "enorm": "embed_norm",
    "hnorm": "hidden_norm",
    "layers.0.input_layernorm": "layer.input_norm",
    "norm": "norm",
}
INPUT_NORMS, ATTENTION, OUTPUT = ("enorm", "hnorm"), ("layers.0.input_layernorm",), ("norm",)
FLAGS = ("use_mtp_layernorm", "use_input_layernorm_in_first_layer", "use_last_layernorm")
# EAGLE-1 heads with norms: the dialect, fields of the config, the norms, whether fc has a bias, and changed names.
NORMED: dict[str, tuple[str, dict[str, Any], tuple[str, ...], bool, Change]] = {
    "NeMo": (
        "nemo",
        {ARCHITECTURE: ["LlamaEagleDraftModel"], "num_hidden_layers": 36, "draft_num_hidden_layers": 1}
        | {"model_type": "qwen3", "sliding_window": 4, "layer_types": ["sliding_attention"] * 36},
        (*ATTENTION, *OUTPUT),
        False,
        same,
    ),
    "Megatron": ("modelopt", {"eagle_config": dict.fromkeys(FLAGS, True)}, tuple(NORM_TENSORS), False, same),
    "Megatron, without flags": ("modelopt", {}, tuple(NORM_TENSORS), False, same),
    "Megatron, one flag": (
        "modelopt",
        {"eagle_config": dict(zip(FLAGS, (False, False, True), strict=True)), "bias": True},
        OUTPUT,
        True,
        same,
    ),
    "CPM.cu": (
        "cpmcu",
        {},
        (*INPUT_NORMS, *ATTENTION),
        True,
        renamed(("enorm.", "input_norm1."), ("hnorm.", "input_norm2.")),
    ),
    "CPM.cu, with flags": (
        "cpmcu",
        {"use_input_norm": True, "use_attn_norm": False, "eagle_num_layers": 1},
        INPUT_NORMS,
        True,
        renamed(("enorm.", "model.input_norm1."), ("hnorm.", "model.input_norm2.")),
    ),
}


@pytest.mark.parametrize("written", NORMED)
def test_norms_of_eagle1_heads(written: str):
    dialect, fields, norms, bias, change = NORMED[written]
    rng = np.random.default_rng(3)
    arrays = folders.eagle1_arrays() | {f"{name}.weight": folders.normal(rng, (8,)) for name in norms}
    if not bias:
        del arrays["fc.bias"]
    match = read(EAGLE1_CONFIG | fields, change(arrays))
    config, leaves = match.model.config, parameters(match)
    assert (match.kind, match.reading.dialect) == ("eagle1", dialect)
    assert (config.input_norms, config.attention_norm, config.norm_output, config.fc_bias) == (
        *(set(part) <= set(norms) for part in (INPUT_NORMS, ATTENTION, OUTPUT)),
        bias,
    )
    folders.assert_same(
        {path: leaves[path] for path in map(NORM_TENSORS.__getitem__, norms)},
        {NORM_TENSORS[name]: arrays[f"{name}.weight"] for name in norms},
    )
    assert len(leaves) == len(arrays)


PARTS = {"num_hidden_layers": 2, "fc_norm": True, "norm_output": True, "qk_norm": True}


def two_layers() -> Arrays:
    """An EAGLE-3.1 head of two layers, with norms of q and k, under the official names."""
    rng = np.random.default_rng(9)
    arrays = folders.eagle3_arrays() | folders.layer("layers.1", rng)
    arrays |= {f"fc_norm.{i}.weight": folders.normal(rng, (8,)) for i in range(3)}
    arrays["layers.1.input_layernorm.weight"] = folders.normal(rng, (8,))
    for layer in ("midlayer", "layers.1"):
        arrays |= {f"{layer}.self_attn.{part}_norm.weight": folders.normal(rng, (6,)) for part in "qk"}
    return arrays


LATER = ("layers.1.input_layernorm.", "layers.1.hidden_norm.")
AUX_NORMS = [(f"fc_norm.{i}.", f"aux_norm_{name}.") for i, name in enumerate(("low", "mid", "high"))]
LIST = renamed(("midlayer.", "midlayer.0."), (LATER[0], "midlayer.1.hidden_norm."), ("layers.1.", "midlayer.1."))
# The same for a head of two layers; whether the caller has to say what norm_output means.
TWO_LAYERS: dict[str, tuple[dict[str, Any], Change, bool]] = {
    "official": (PARTS, same, True),
    "SGLang": (
        {name: value for name, value in PARTS.items() if name != "fc_norm"}
        | {"use_aux_norm": True, ARCHITECTURE: ["LlamaForCausalLMEagle3"]},
        renamed(("midlayer.", "layers.0."), LATER, *AUX_NORMS),
        True,
    ),
    "speculators": (
        {
            "speculators_model_type": "eagle3",
            "norm_before_residual": False,
            "fc_norm": True,
            "norm_output": True,
            "num_hidden_layers": None,
            "model_type": None,
            "transformer_layer_config": HEAD_CONFIG | {"num_hidden_layers": 2, "model_type": "qwen3"},
        },
        renamed(("midlayer.", "layers.0.")),
        False,
    ),
    "NeMo": (PARTS | {ARCHITECTURE: ["LlamaEagle3DraftModel"]}, prefixed, False),
    "TensorRT-LLM": (
        {name: value for name, value in PARTS.items() if name != "norm_output"}
        | {ARCHITECTURE: ["EAGLE3LlamaForCausalLM"], "eagle_config": {"return_hidden_post_norm": True}},
        LIST,
        False,
    ),
    "Model-Optimizer": (PARTS | {ARCHITECTURE: ["LlamaForCausalLMEagle3Deep"]}, LIST, True),
}


@pytest.mark.parametrize("written", TWO_LAYERS)
def test_a_head_of_two_layers_in_every_dialect(written: str):
    fields, change, open_norm = TWO_LAYERS[written]
    choices = HeadChoices(norm_output=True)
    plain = read(HEAD_CONFIG | PARTS, two_layers(), choices)
    match = read(HEAD_CONFIG | fields, change(two_layers()), choices if open_norm else None)
    assert match.model.config == plain.model.config and plain.model.config.num_layers == 2
    folders.assert_same(parameters(match), parameters(plain))
    if open_norm:
        with pytest.raises(ConfigError, match="--norm-output"):
            read(HEAD_CONFIG | fields, change(two_layers()))


def test_deepspec():
    """Five taps, norms of q and k, and the whole vocabulary."""
    rng = np.random.default_rng(9)
    arrays = whole_vocabulary(folders.eagle3_arrays()) | {"fc.weight": folders.normal(rng, (8, 40))}
    arrays |= {f"midlayer.self_attn.{part}_norm.weight": folders.normal(rng, (6,)) for part in "qk"}
    fields = {
        ARCHITECTURE: ["Qwen3Eagle3Model"],
        "model_type": "qwen3",
        "draft_vocab_size": None,
        "target_layer_ids": [1, 3, 5, 6, 7],
        "num_target_layers": 8,
        "step_loss_decay": 0.8,
        "ttt_length": 7,
    }
    match = read(HEAD_CONFIG | fields, renamed(("midlayer.", "layers.0."))(arrays))
    config = match.model.config
    assert (taps(match), config.qk_norm, config.draft_vocab_size) == ((2, 4, 6, 7, 8), True, 16)
    plain = HEAD_CONFIG | {"draft_vocab_size": None, "qk_norm": True, TAPS: [2, 4, 6, 7, 8]}
    folders.assert_same(parameters(match), parameters(read(plain, arrays)))


@pytest.mark.parametrize("name", ["midlayer.mlp.up_proj.weight", "layers.2.input_layernorm.weight", "fc.weight", "d2t"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_rules_work_in_both_directions(dialect: str, name: str):
    written = theirs_of(name, DIALECTS[dialect].written)
    assert official_of(written, DIALECTS[dialect].written) == name
