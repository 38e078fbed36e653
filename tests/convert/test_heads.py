"""One tiny head in every dialect is one head through the reader; each published trap of the formats is a case."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eagle_jax.convert import HeadChoices, convert, from_pretrained, load
from eagle_jax.convert.__main__ import main
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.heads.dialects import DIALECTS
from eagle_jax.convert.heads.reading import dialect_of
from eagle_jax.convert.heads.rules import official_of, theirs_of
from eagle_jax.convert.match import Match, match_draft
from eagle_jax.convert.read import Checkpoint, Tensor
from eagle_jax.drafts.eagle.config import tap_layers
from eagle_jax.models import params
from eagle_jax.models.config import ConfigError
from tests.convert import folders
from tests.convert.folders import CONFIG, DRAFT_IDS, HEAD_CONFIG, Arrays

TAPS = "eagle_aux_hidden_state_layer_ids"
EAGLE1_CONFIG = CONFIG | {"num_hidden_layers": 1}
Change = Callable[[Arrays], Arrays]


def in_memory(config: dict[str, Any], arrays: Arrays) -> Checkpoint:
    """A checkpoint that no file holds: what a reader sees of a folder."""
    tensors = {
        name: Tensor(name, Path("head/model.safetensors"), a.shape, a.dtype.name, lambda a=a: a)
        for name, a in arrays.items()
    }
    return Checkpoint("head", Path("head"), config, tensors, (Path("head/model.safetensors"),))


def read(config: dict[str, Any], arrays: Arrays, choices: HeadChoices | None = None, layers: int = 8) -> Match:
    return match_draft(in_memory(config, arrays), np.dtype(np.float32), choices, layers)


def parameters(match: Match) -> Arrays:
    return {path: match.read(path) for path in params.flatten(match.model)}


def taps(match: Match, layers: int = 8) -> tuple[int, ...]:
    return tap_layers(match.model.config, layers)


def renamed(*pairs: tuple[str, str]) -> Change:
    """Replaces beginnings of names."""

    def change(arrays: Arrays) -> Arrays:
        out = {}
        for name, array in arrays.items():
            old, new = next(((old, new) for old, new in pairs if name.startswith(old)), ("", ""))
            out[new + name.removeprefix(old)] = array
        return out

    return change


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


def fused(arrays: Arrays) -> Arrays:
    out = dict(arrays)
    for whole, parts in (("self_attn.qkv", ("q", "k", "v")), ("mlp.gate_up", ("gate", "up"))):
        room = whole.partition(".")[0]
        names = [f"layers.0.{room}.{part}_proj.weight" for part in parts]
        out[f"layers.0.{whole}_proj.weight"] = np.concatenate([out.pop(name) for name in names])
    return out


def whole_vocabulary(arrays: Arrays) -> Arrays:
    """Without tables, with the whole lm_head and an embedding."""
    rng = np.random.default_rng(8)
    rest = {name: array for name, array in arrays.items() if name not in ("d2t", "t2d")}
    return rest | {name: folders.normal(rng, (16, 8)) for name in ("lm_head.weight", "embed_tokens.weight")}


def same(arrays: Arrays) -> Arrays:
    return arrays


ARCHITECTURE = "architectures"
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
        {"speculators_model_type": "eagle3", "norm_before_residual": False, "transformer_layer_config": HEAD_CONFIG},
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


OUTPUTS = {"eagle_config": {TAPS: [1, 4, 6]}}
MAY_BE_EITHER = {"eagle_config": {TAPS: [2, 4, 6]}}
SPECULATORS = WRITTEN["speculators"][2]
# Ids of tapped layers: the config's fields, the layers of the target, the layers whose input is read, and why.
CONVENTIONS: dict[str, tuple[dict[str, Any], int, tuple[int, ...], str]] = {
    "none": ({}, 32, (2, 16, 29), "names no layers, so they are the official ones"),
    "eagle_config from 1": (OUTPUTS, 8, (2, 5, 7), "names outputs: it begins with 1"),
    "eagle_config from 0": ({"eagle_config": {TAPS: [0, 3, 6]}}, 8, (1, 4, 7), "names outputs: it begins with 0"),
    "the official inputs in eagle_config": ({"eagle_config": {TAPS: [2, 16, 29]}}, 32, (2, 16, 29), "names inputs"),
    "after the last layer": ({"eagle_config": {TAPS: [3, 18, 36]}}, 36, (3, 18, 36), "has no layer 36"),
    "target_layer_ids": ({"target_layer_ids": [3, 4, 6]}, 8, (4, 5, 7), "target_layer_ids does in every framework"),
    "at the top level": ({TAPS: [1, 4, 7]}, 8, (1, 4, 7), "at the top level, as vLLM reads it"),
    "speculators": (SPECULATORS | {TAPS: [1, 4, 7]}, 8, (1, 4, 7), "speculators writes it so"),
    "two fields": ({TAPS: [2, 5, 7]} | OUTPUTS, 8, (2, 5, 7), "at the top level"),
    "one field tells the other": ({TAPS: [3, 5, 7]} | MAY_BE_EITHER, 8, (3, 5, 7), "at the top level"),
    "ours": ({"eagle_jax_tap_inputs": [3, 5, 7]} | MAY_BE_EITHER, 8, (3, 5, 7), "eagle_jax_tap_inputs names inputs"),
}


@pytest.mark.parametrize("case", CONVENTIONS)
def test_which_layers_are_read_and_why(case: str):
    fields, layers, expected, because = CONVENTIONS[case]
    match = read(HEAD_CONFIG | fields, folders.eagle3_arrays(), layers=layers)
    assert taps(match, layers) == expected
    reason = match.reading.reasons[TAPS]
    assert reason.startswith(f"the inputs of layers {', '.join(map(str, expected))} are read; ") and because in reason


@pytest.mark.parametrize(
    ("fields", "choice", "expected"),
    [
        (MAY_BE_EITHER, "inputs", (2, 4, 6)),
        (MAY_BE_EITHER, "outputs", (3, 5, 7)),
        (MAY_BE_EITHER, (1, 2, 3), (1, 2, 3)),
        (OUTPUTS, "inputs", (1, 4, 6)),
        ({}, (1, 2, 3), (1, 2, 3)),
    ],
)
def test_a_choice_comes_first(fields: dict[str, Any], choice: Any, expected: tuple[int, ...]):
    match = read(HEAD_CONFIG | fields, folders.eagle3_arrays(), HeadChoices(taps=choice))
    assert taps(match) == expected and "as chosen" in match.reading.reasons[TAPS]


MASK = {"mask_hidden": np.ones((1, 1, 24), np.float32)}
NORM_OUTPUT = {"norm_output": True}
# Trap: kind of head, fields, further tensors, and the message.
TRAPS: dict[str, tuple[str, dict[str, Any], Arrays, str]] = {
    "ids that may name either": (
        "eagle3",
        MAY_BE_EITHER,
        {},
        r"\[2, 4, 6\] may name .* inputs of \[2, 4, 6\].* inputs of \[3, 5, 7\].*convert --taps",
    ),
    "ids that contradict": (
        "eagle3",
        {TAPS: [1, 4, 7]} | OUTPUTS,
        {},
        f"{TAPS} and eagle_config.{TAPS} name different",
    ),
    "norm_output of SpecForge": ("eagle3", NORM_OUTPUT, {}, "means EAGLE-3.1 in .* but SpecForge .*--norm-output"),
    "norm_before_residual": (
        "eagle3",
        {name: value for name, value in SPECULATORS.items() if name != "norm_before_residual"},
        {},
        "missing; .* speculators means false by that, vLLM true.*--norm-before-residual",
    ),
    "P-EAGLE": ("eagle3", {}, MASK, "'mask_hidden' belongs to P-EAGLE"),
    "P-EAGLE of NeMo": ("eagle3", {}, {f"model.{name}": array for name, array in MASK.items()}, "belongs to P-EAGLE"),
    "eh_proj": (
        "eagle3",
        {},
        {"eh_proj.weight": np.ones((8, 16), np.float32)},
        "'eh_proj.weight' belongs to a projection before the layer",
    ),
    "MLA": ("eagle3", {}, {"midlayer.self_attn.kv_b_proj.weight": np.ones(3)}, "multi-head latent attention"),
    "one of Megatron's two norms": (
        "eagle1",
        {},
        {"hnorm.weight": np.ones(8, np.float32)},
        "'enorm.weight' is missing",
    ),
    "one of MiniCPM's two norms": (
        "eagle1",
        {},
        {"input_norm1.weight": np.ones(8, np.float32)},
        "'hnorm.weight' is missing",
    ),
    "norms that its framework lacks": (
        "eagle1",
        {},
        {"norm.weight": np.ones(8, np.float32)},
        "norm.weight' has no place",
    ),
    "a norm that its config denies": (
        "eagle1",
        {"eagle_config": {"use_last_layernorm": False}},
        {"norm.weight": np.ones(8, np.float32)},
        "norm.weight' has no place",
    ),
    "a norm that its config alone has": ("eagle1", {"norm_output": True}, {}, "'norm.weight' is missing"),
    "norms of an EAGLE-1 head in another": (
        "eagle3",
        {"input_norms": True},
        {},
        "input_norms = True is not implemented",
    ),
    "enorm of an EAGLE-3 head": ("eagle3", {}, {"enorm.weight": np.ones(8, np.float32)}, "enorm.weight' has no place"),
    "FR-Spec": ("eagle1", {}, {"token_id_remap": np.arange(4)}, "'token_id_remap' limits an EAGLE-1 head"),
    "quantized": ("eagle3", {}, {"fc.qweight": np.ones((3, 3), np.int32)}, "'fc.qweight' belongs to quantized weights"),
    "an unknown field": ("eagle3", {"residual_gate": 0.5}, {}, "residual_gate = 0.5 is not known.*--ignore-field"),
    "an unknown field in a layer": (
        "eagle3",
        {"transformer_layer_config": {"residual_gate": 0.5}},
        {},
        "transformer_layer_config.residual_gate = 0.5 is not known",
    ),
    "an unknown tensor": ("eagle3", {}, {"gate.weight": np.ones(3, np.float32)}, "'gate.weight' has no place"),
    "a bias that its config does not state": (
        "eagle3",
        {},
        {"midlayer.self_attn.q_proj.bias": np.ones(12, np.float32)},
        "q_proj.bias' has no place",
    ),
    "norms of both kinds": (
        "eagle3",
        {"fc_norm": True, "norm_before_fc": True},
        {},
        "fc_norm and norm_before_fc exclude each other",
    ),
    "a norm that its config does not state": (
        "eagle3",
        {},
        {"fc_norm.0.weight": np.ones(8, np.float32)},
        "fc_norm.0.weight' has no place",
    ),
    "a norm that its tensors lack": ("eagle3", {"norm_before_fc": True}, {}, "'input_norm.weight' is missing"),
    "a vocabulary without its table": (
        "eagle3",
        {"draft_vocab_size": 4},
        {"lm_head.weight": np.ones((4, 8), np.float32)},
        r"'d2t' has shape \(5,\)",
    ),
    "two RoPEs": (
        "eagle3",
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {},
        "rope_theta = 10000.0 and rope_parameters.rope_theta = 500000.0 contradict each other",
    ),
    "layers that all read the embedding": (
        "eagle3",
        {
            "num_hidden_layers": 2,
            "eagle_config": {"next_layer_regular": False},
            ARCHITECTURE: ["LlamaForCausalLMEagle3"],
        },
        folders.layer("layers.1", np.random.default_rng(0), 16),
        "next_layer_regular = False is not implemented",
    ),
    "two names of one tensor": ("eagle3", {}, {"model.fc.weight": np.ones((8, 24), np.float32)}, "the same tensor"),
    "fused tensors that do not divide": (
        "eagle1",
        {},
        {"layers.0.self_attn.qkv_proj.weight": np.ones((7, 8), np.float32)},
        r"does not divide into parts of \[2, 1, 1\]",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_are_refused_by_name(trap: str):
    kind, fields, more, message = TRAPS[trap]
    arrays, sizes = (
        (folders.eagle3_arrays(), HEAD_CONFIG) if kind == "eagle3" else (folders.eagle1_arrays(), EAGLE1_CONFIG)
    )
    with pytest.raises((CheckpointError, ConfigError)) as raised:
        read(sizes | fields, arrays | more)
    assert re.search(message, str(raised.value)), raised.value


@pytest.mark.parametrize("value", [0, -3, 1.5, "x", [1], [[1]], {"a": 1}, [True]])
@pytest.mark.parametrize(
    "name",
    [
        ARCHITECTURE,
        "model_type",
        "eagle_config",
        "num_attention_heads",
        "num_hidden_layers",
        "target_layer_ids",
        "eagle_jax_tap_inputs",
        "norm_output",
        "speculators_model_type",
        "transformer_layer_config",
    ],
)
def test_damaged_configs_are_refused_by_name(name: str, value: Any):
    """Or read, where the field computes nothing; never with another exception."""
    for sizes, arrays in ((HEAD_CONFIG, folders.eagle3_arrays()), (EAGLE1_CONFIG, fused(folders.eagle1_arrays()))):
        try:
            read(sizes | {name: value}, arrays)
        except (CheckpointError, ConfigError) as error:
            assert str(error)


def test_what_is_read_and_not_dropped():
    """Differences that other readers pass over."""
    arrays = folders.eagle3_arrays()
    without_table = {name: array for name, array in arrays.items() if name not in ("d2t", "t2d")}
    with pytest.raises(CheckpointError, match="d2t is missing"):
        parameters(read(HEAD_CONFIG, without_table))
    biased = read(HEAD_CONFIG, arrays | {"fc.bias": np.full(8, 0.5, np.float32)})
    assert biased.model.config.fc_bias and (biased.read("fc_bias") == 0.5).all()
    rope = read(
        HEAD_CONFIG | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, arrays
    ).model.config.rope
    assert rope.theta == 5e5  # as transformers 5 writes it
    assert read(HEAD_CONFIG, arrays).model.config.rope.theta == 10000  # never the target's
    own = read(HEAD_CONFIG, arrays | {"embed_tokens.weight": np.ones((16, 8), np.float32)})
    assert own.model.config.own_embedding and not read(HEAD_CONFIG, arrays).model.config.own_embedding


def test_choices_settle_what_is_open():
    arrays = folders.eagle3_arrays()
    plain = read(HEAD_CONFIG | NORM_OUTPUT, arrays, HeadChoices(norm_output=False))
    assert plain.model.config == read(HEAD_CONFIG, arrays).model.config
    assert plain.reading.reasons["norm_output"] == "as chosen"
    open_residual = {name: value for name, value in SPECULATORS.items() if name != "norm_before_residual"}
    for chosen in (False, True):
        match = read(HEAD_CONFIG | open_residual, arrays, HeadChoices(norm_before_residual=chosen))
        assert match.model.config.norm_before_residual is chosen
    unknown = read(HEAD_CONFIG | {"residual_gate": 0.5}, arrays, HeadChoices(ignored=("residual_gate",)))
    assert unknown.model.config == read(HEAD_CONFIG, arrays).model.config
    for head in (folders.eagle1_arrays(), folders.llama_arrays(1), folders.medusa_arrays()):
        with pytest.raises(ConfigError, match="is no EAGLE-3 head"):
            read(EAGLE1_CONFIG, head, HeadChoices(taps="inputs"))


@pytest.mark.parametrize("bad", ["input", (), (1, -1), (1.5,), [1, 2]])
def test_choices_of_no_meaning(bad: Any):
    with pytest.raises(ValueError, match="taps must be 'inputs', 'outputs' or a tuple"):
        HeadChoices(taps=bad)


def test_layers_are_counted_by_the_tensors_where_the_config_is_the_targets():
    """The official head of a 13B model says 40 layers."""
    match = read(HEAD_CONFIG | {"num_hidden_layers": 40}, folders.eagle3_arrays())
    assert match.model.config.num_layers == 1 and "40 is the target's" in match.reading.reasons["num_hidden_layers"]


def test_a_converted_folder_keeps_the_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = folders.write_safetensors(tmp_path / "target", CONFIG | {"num_hidden_layers": 8}, folders.llama_arrays(8))
    head = folders.write_safetensors(tmp_path / "head", HEAD_CONFIG | MAY_BE_EITHER, folders.eagle3_arrays())
    with pytest.raises(ConfigError, match="may name layers"):
        from_pretrained(target, head)
    out = convert(target, head, tmp_path / "out", head=HeadChoices(taps="outputs"))
    assert load(out)[1].config.taps == (3, 5, 7)
    with pytest.raises(CheckpointError, match="holds another conversion"):
        convert(target, head, out, head=HeadChoices(taps="inputs"))
    convert(target, head, out, head=HeadChoices(taps="outputs"))

    options = ["--target", str(target), "--draft", str(head), "--out", str(tmp_path / "again")]
    assert main(options) == 2 and "--taps" in capsys.readouterr().err
    assert main([*options, "--taps", "3,5,x"]) == 2 and "--taps must be" in capsys.readouterr().err
    assert main([*options, "--taps", "3, 5, 7"]) == 0
    assert "taps: the inputs of layers 3, 5, 7 are read; as chosen" in capsys.readouterr().out
    assert load(tmp_path / "again")[1].config.taps == (3, 5, 7)


def test_folders_of_older_versions_are_read_as_they_were(tmp_path: Path):
    target = folders.write_safetensors(tmp_path / "target", CONFIG | {"num_hidden_layers": 8}, folders.llama_arrays(8))
    head = folders.write_safetensors(tmp_path / "head", HEAD_CONFIG | OUTPUTS, folders.eagle3_arrays())
    out = convert(target, head, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["draft"]["reading"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert load(out)[1].config.taps == (2, 5, 7)
    convert(target, head, out)  # the same conversion
    with pytest.raises(CheckpointError, match="holds another conversion"):
        convert(target, head, out, head=HeadChoices(taps="inputs"))
