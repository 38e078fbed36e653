"""Each published trap of the formats of heads is a case: refused by name, or read where other readers pass over it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from eagle_jax.convert.error import CheckpointError
from eagle_jax.models.config import ConfigError
from tests.convert import folders
from tests.convert.folders import HEAD_CONFIG, Arrays
from tests.convert.reading import (
    ARCHITECTURE,
    EAGLE1_CONFIG,
    MAY_BE_EITHER,
    OUTPUTS,
    SPECULATORS,
    TAPS,
    fused,
    parameters,
    read,
)

QKV = {"q": 12, "k": 6, "v": 6}  # rows of their weights
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
    "P-EAGLE": ("eagle3", {}, MASK, "num_depths is missing, .*--num-depths"),
    "P-EAGLE of NeMo": (
        "eagle3",
        {"num_depths": 4},
        {f"model.{name}": array for name, array in MASK.items()},
        "mask_token_id is missing.*--mask-token",
    ),
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
    "frequent tokens without their table": (
        "eagle1",
        {"truncated_vocab_size": 4},
        {},
        "truncated_vocab_size = 4 limits the head to tokens .*--token-map",
    ),
    "two tables of frequent tokens": (
        "eagle1",
        {},
        {"token_id_remap": np.arange(4), "token_map": np.arange(4)},
        "token_id_remap, token_map .* tables of one vocabulary",
    ),
    "a table that is none": ("eagle1", {}, {"token_id_remap": np.ones((4, 2), np.int32)}, r"shape \(4, 2\)"),
    "frequent tokens twice": ("eagle1", {}, {"token_id_remap": np.array([3, 3])}, "several draft ids to one target id"),
    "frequent tokens of another target": ("eagle1", {}, {"token_id_remap": np.array([3, 16])}, "first is 1 -> 16"),
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
    "a norm that its tensors lack": (
        "eagle3",
        {"eagle_config": {"norm_before_fc": True}},
        {},
        "'input_norm.weight' is missing .*norm_before_fc asks for",
    ),
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
    sglang = {ARCHITECTURE: ["LlamaForCausalLMEagle3"], "qkv_bias": True}
    biases = {f"midlayer.self_attn.{part}_proj.bias": np.full(size, 0.5, np.float32) for part, size in QKV.items()}
    assert (read(HEAD_CONFIG | sglang, arrays | biases).read("layer.attention.q_bias") == 0.5).all()
    rope = read(
        HEAD_CONFIG | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, arrays
    ).model.config.rope
    assert rope.theta == 5e5  # as transformers 5 writes it
    assert read(HEAD_CONFIG, arrays).model.config.rope.theta == 10000  # never the target's
    own = read(HEAD_CONFIG, arrays | {"embed_tokens.weight": np.ones((16, 8), np.float32)})
    assert own.model.config.own_embedding and not read(HEAD_CONFIG, arrays).model.config.own_embedding


def test_the_longest_text_of_the_training_limits_no_head():
    """Official heads state max_position_embeddings = 2048. The draft's RoPE is the same with any other."""
    short, long = (
        read(HEAD_CONFIG | {"max_position_embeddings": length}, folders.eagle3_arrays()).model.config
        for length in (4, 2048)
    )
    assert dataclasses.replace(short, max_position_embeddings=2048) == long
