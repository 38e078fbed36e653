"""Configs: what is published loads, every field counts, and mathematics that is not implemented is refused by name."""

from __future__ import annotations

import dataclasses
import re

import pytest

from eagle_jax.models.config import ConfigError, DraftConfig, LlamaConfig, RopeConfig, tap_layers

PLAIN = dict(
    model_type="llama",
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
COMMON = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", use_cache=True)
LLAMA2_7B = COMMON | dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    pretraining_tp=1,
    rms_norm_eps=1e-5,
    rope_scaling=None,
    tie_word_embeddings=False,
    torch_dtype="float16",
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.02,
)
LLAMA3_8B = LLAMA2_7B | dict(
    attention_bias=False,
    attention_dropout=0.0,
    vocab_size=128256,
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    bos_token_id=128000,
    eos_token_id=128001,
    torch_dtype="bfloat16",
)
LLAMA31_8B = LLAMA3_8B | dict(
    mlp_bias=False, max_position_embeddings=131072, rope_scaling=LLAMA3, eos_token_id=[128001, 128008, 128009]
)
PUBLISHED = {
    "Llama-2-7b": (LLAMA2_7B, (32, 32, 128, RopeConfig(10000.0))),
    "vicuna-7b-v1.3": (
        {name: value for name, value in LLAMA2_7B.items() if name not in ("num_key_value_heads", "rope_scaling")}
        | dict(max_position_embeddings=2048, rms_norm_eps=1e-6, pad_token_id=0, transformers_version="4.28.1"),
        (32, 32, 128, RopeConfig(10000.0)),
    ),
    "Meta-Llama-3-8B": (LLAMA3_8B, (32, 8, 128, RopeConfig(500000.0))),
    "Llama-3.1-8B-Instruct": (LLAMA31_8B, (32, 8, 128, RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192))),
    "Llama-3.2-1B": (
        LLAMA31_8B
        | dict(
            head_dim=64,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            tie_word_embeddings=True,
            rope_scaling=LLAMA3 | dict(factor=32.0),
        ),
        (16, 8, 64, RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)),
    ),
    "Llama-3.3-70B-Instruct": (
        LLAMA31_8B
        | dict(
            head_dim=128,
            hidden_size=8192,
            intermediate_size=28672,
            num_attention_heads=64,
            num_hidden_layers=80,
        ),
        (80, 8, 128, RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)),
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        LLAMA31_8B | dict(bos_token_id=128000, eos_token_id=128001, transformers_version="4.43.0.dev0"),
        (32, 8, 128, RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)),
    ),
}
# yuhuili/EAGLE3-LLaMA3.1-Instruct-8B
EAGLE3_HEAD = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    bos_token_id=128000,
    eos_token_id=128001,
    pad_token_id=0,
    hidden_act="silu",
    hidden_size=4096,
    initializer_range=0.02,
    intermediate_size=14336,
    max_position_embeddings=2048,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=1,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    torch_dtype="float16",
    transformers_version="4.28.1",
    use_cache=True,
    vocab_size=128256,
    draft_vocab_size=32000,
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_targets(name):
    hf, (layers, kv_heads, head_dim, rope) = PUBLISHED[name]
    config = LlamaConfig.from_hf(hf)
    assert (config.num_layers, config.num_kv_heads, config.head_dim, config.rope) == (layers, kv_heads, head_dim, rope)
    assert config.num_heads * config.head_dim == config.hidden_size == hf["hidden_size"]
    assert config.tie_word_embeddings == (name == "Llama-3.2-1B")
    assert config.rms_norm_eps == hf["rms_norm_eps"]


def test_published_head():
    config = DraftConfig.from_hf(EAGLE3_HEAD)
    assert (config.vocab_size, config.draft_vocab_size, config.target_hidden_size) == (128256, 32000, 4096)
    assert config.rope == RopeConfig(10000.0)
    assert tap_layers(config, 32) == (2, 16, 29)


# Field, another value, what the parsed config then holds.
FIELDS = {
    "vocab_size": (64, dict(vocab_size=64)),
    "hidden_size": (64, dict(hidden_size=64, head_dim=16)),
    "intermediate_size": (40, dict(intermediate_size=40)),
    "num_hidden_layers": (3, dict(num_layers=3)),
    "num_attention_heads": (8, dict(num_heads=8, num_kv_heads=8, head_dim=4)),
    "num_key_value_heads": (2, dict(num_kv_heads=2)),
    "head_dim": (10, dict(head_dim=10)),
    "rms_norm_eps": (1e-3, dict(rms_norm_eps=1e-3)),
    "rope_theta": (5.0, dict(rope=RopeConfig(5.0))),
    "max_position_embeddings": (77, dict(max_position_embeddings=77)),
    "tie_word_embeddings": (True, dict(tie_word_embeddings=True)),
    "attention_bias": (True, dict(attention_bias=True)),
    "mlp_bias": (True, dict(mlp_bias=True)),
}
DRAFT_FIELDS = {
    "draft_vocab_size": (50, dict(draft_vocab_size=50)),
    "target_hidden_size": (96, dict(target_hidden_size=96)),
    "eagle_aux_hidden_state_layer_ids": ([1, 2], dict(taps=(1, 2))),
    "eagle_config": (dict(eagle_aux_hidden_state_layer_ids=[1, 2]), dict(taps=(2, 3))),
    "norm_before_residual": (True, dict(norm_before_residual=True)),
    "bias": (False, dict(fc_bias=False)),
    "qkv_bias": (True, dict(qkv_bias=True)),
}


def changes(before, after) -> dict:
    return {name: value for name, value in vars(after).items() if value != vars(before)[name]}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_read(name):
    value, expected = FIELDS[name]
    assert changes(LlamaConfig.from_hf(PLAIN), LlamaConfig.from_hf(PLAIN | {name: value})) == expected
    assert LlamaConfig.from_hf(PLAIN | {name: None}) == LlamaConfig.from_hf(PLAIN) if name not in PLAIN else True


@pytest.mark.parametrize("name", DRAFT_FIELDS)
def test_every_draft_field_is_read(name):
    value, expected = DRAFT_FIELDS[name]
    plain = PLAIN | dict(num_hidden_layers=1)
    assert changes(DraftConfig.from_hf(plain), DraftConfig.from_hf(plain | {name: value})) == expected


def test_no_field_is_left_out():
    """A field added to a config needs a row above."""
    covered = {field for _, expected in (*FIELDS.values(), *DRAFT_FIELDS.values()) for field in expected}
    assert covered | {"own_embedding", "window"} == {field.name for field in dataclasses.fields(DraftConfig)}
    plain = PLAIN | dict(num_hidden_layers=1)
    assert changes(DraftConfig.from_hf(plain), DraftConfig.from_hf(plain, own_embedding=True)) == {
        "own_embedding": True
    }


def test_a_head_may_leave_out_its_one_layer():
    hf = {name: value for name, value in PLAIN.items() if name != "num_hidden_layers"}
    assert DraftConfig.from_hf(hf).num_layers == 1
    with pytest.raises(ConfigError, match="a head has one layer, num_hidden_layers is 4"):
        DraftConfig.from_hf(PLAIN)


REFUSED = {
    "hidden_act": "gelu",
    "model_type": "qwen3",
    "sliding_window": 4096,
    "use_sliding_window": True,
    "attention_chunk_size": 8192,
    "partial_rotary_factor": 0.5,
    "rope_interleaved": True,
    "no_rope_layers": [1, 0, 1],
    "use_qk_norm": True,
    "qk_layernorm": True,
    "clip_qkv": 8.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logits_scaling": 8.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078125,
    "num_local_experts": 8,
    "kv_lora_rank": 512,
    "quantization_config": dict(quant_method="fp8"),
    "layer_types": ["full_attention", "sliding_attention"],
    "lm_head_bias": True,
}


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_mathematics_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"some/config\.json: {name}\b.*not implemented"):
        LlamaConfig.from_hf(PLAIN | {name: REFUSED[name]}, "some/config.json")
    with pytest.raises(ConfigError, match=name):
        DraftConfig.from_hf(PLAIN | {"num_hidden_layers": 1, name: REFUSED[name]})


@pytest.mark.parametrize("name", ["norm_before_fc", "fc_norm", "norm_output", "parallel_drafting"])
def test_unknown_head_mathematics_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name} = True is not implemented"):
        DraftConfig.from_hf(PLAIN | {"num_hidden_layers": 1, name: True})
    assert DraftConfig.from_hf(PLAIN | {"num_hidden_layers": 1, name: False})


def test_heads_without_target_states_are_refused():
    with pytest.raises(ConfigError, match="use_aux_hidden_state = False is not implemented"):
        DraftConfig.from_hf(PLAIN | dict(num_hidden_layers=1, eagle_config=dict(use_aux_hidden_state=False)))


def test_neutral_values_are_accepted():
    neutral = dict(sliding_window=None, use_sliding_window=False, partial_rotary_factor=1.0, num_experts=0)
    neutral |= dict(layer_types=["full_attention"] * 4, quantization_config=None, hidden_act="silu")
    assert LlamaConfig.from_hf(PLAIN | neutral) == LlamaConfig.from_hf(PLAIN)


SCALINGS = [
    (dict(type="linear", factor=2.0), RopeConfig(7.0, "linear", 2.0)),
    (dict(type="dynamic", factor=3), RopeConfig(7.0, "dynamic", 3.0, original_length=2048)),
    (LLAMA3, RopeConfig(7.0, "llama3", 8.0, 1.0, 4.0, 8192)),
    (LLAMA3 | dict(type="llama3"), RopeConfig(7.0, "llama3", 8.0, 1.0, 4.0, 8192)),
    (dict(rope_type="default"), RopeConfig(7.0)),
    (None, RopeConfig(7.0)),
]


@pytest.mark.parametrize(("scaling", "expected"), SCALINGS)
def test_both_spellings_of_rope_agree(scaling, expected):
    older = PLAIN | dict(rope_theta=7.0, rope_scaling=scaling)
    newer = PLAIN | dict(rope_parameters=(scaling or dict(rope_type="default")) | dict(rope_theta=7.0))
    assert LlamaConfig.from_hf(older).rope == LlamaConfig.from_hf(newer).rope == expected


def test_each_number_of_a_rope_scaling_is_read():
    plain = RopeConfig.from_hf(dict(rope_scaling=LLAMA3), 2048, "here")
    for name, field in (
        ("factor", "factor"),
        ("low_freq_factor", "low_freq_factor"),
        ("high_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings", "original_length"),
    ):
        scaling = LLAMA3 | {name: 3}
        assert changes(plain, RopeConfig.from_hf(dict(rope_scaling=scaling), 2048, "here")) == {field: 3}
    dynamic = dict(rope_scaling=dict(type="dynamic", factor=2.0))
    assert RopeConfig.from_hf(dynamic, 99, "here").original_length == 99


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (dict(rope_scaling=dict(type="yarn", factor=4.0)), "rope type 'yarn' is not implemented"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=4.0)), "rope type 'longrope' is not implemented"),
        (dict(rope_scaling=dict(rope_type="linear", type="dynamic", factor=2.0)), "rope_type and type.*differ"),
        (dict(rope_scaling=dict(type="linear")), "linear.*: factor must be a positive number, got None"),
        (dict(rope_scaling=dict(type="linear", factor=-1)), "linear.*: factor must be a positive number, got -1"),
        (dict(rope_scaling=dict(type="linear", factor=True)), "linear.*: factor must be a positive number, got True"),
        (dict(rope_scaling=LLAMA3 | dict(low_freq_factor=None)), "low_freq_factor must be a positive number, got None"),
        (dict(rope_scaling=LLAMA3 | dict(high_freq_factor=1.0)), "low_freq_factor 1.0 must be below high_freq_factor"),
        (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "partial_rotary_factor 0.5 is not implemented"),
        (dict(rope_parameters=dict(full_attention=dict(rope_theta=1.0))), "per layer type.*not implemented"),
        (dict(rope_theta="10000"), "rope_theta must be a positive number, got '10000'"),
        (dict(rope_theta=0), "rope_theta must be a positive number, got 0"),
    ],
)
def test_rope_that_is_refused(rope, message):
    with pytest.raises(ConfigError, match=message):
        LlamaConfig.from_hf(PLAIN | rope)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *[(name, None, f"{name} is missing") for name in PLAIN if name != "model_type"],
        ("vocab_size", 0, "vocab_size must be a positive integer, got 0"),
        ("hidden_size", "32", "hidden_size must be a positive integer, got '32'"),
        ("intermediate_size", 48.0, "intermediate_size must be a positive integer, got 48.0"),
        ("num_hidden_layers", True, "num_hidden_layers must be a positive integer, got True"),
        ("num_key_value_heads", 3, "4 attention heads do not divide into 3 key-value heads"),
        ("hidden_size", 34, "hidden_size 34 does not divide into 4 heads; give head_dim"),
        ("head_dim", 7, "head_dim 7 is odd"),
        ("head_dim", -8, "head_dim must be a positive integer, got -8"),
        ("rms_norm_eps", 0, "rms_norm_eps must be a positive number, got 0"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps must be a positive number, got '1e-5'"),
        ("max_position_embeddings", -1, "max_position_embeddings must be a positive integer, got -1"),
        ("tie_word_embeddings", "false", "tie_word_embeddings must be true or false, got 'false'"),
        ("attention_bias", 1, "attention_bias must be true or false, got 1"),
        ("mlp_bias", "true", "mlp_bias must be true or false, got 'true'"),
    ],
)
def test_impossible_values_name_the_field(field, value, message):
    with pytest.raises(ConfigError, match=re.escape(f"some/config.json: {message}")):
        LlamaConfig.from_hf(PLAIN | {field: value}, "some/config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("draft_vocab_size", 0), ("target_hidden_size", "x"), ("bias", 1), ("norm_before_residual", "no")],
)
def test_impossible_draft_values_name_the_field(field, value):
    with pytest.raises(ConfigError, match=f"{field} must be"):
        DraftConfig.from_hf(PLAIN | {"num_hidden_layers": 1, field: value})


def head_with_taps(**fields):
    return DraftConfig.from_hf(PLAIN | dict(num_hidden_layers=1) | fields)


def test_tap_layers():
    name = "eagle_aux_hidden_state_layer_ids"
    assert tap_layers(None, 32) == (2, 16, 29)
    assert tap_layers(head_with_taps(), 8) == (2, 4, 5)
    assert tap_layers(head_with_taps(), 6) == (2, 3, 3)  # indices that coincide are repeated
    assert tap_layers(None, 2) == (0, 1, 2)
    # The nested field names layers whose output is read, the top-level one layers whose input is read.
    assert tap_layers(head_with_taps(eagle_config={name: [1, 15, 28]}), 32) == (2, 16, 29)
    assert tap_layers(head_with_taps(**{name: [2, 16, 29]}), 32) == (2, 16, 29)
    assert tap_layers(head_with_taps(**{name: [2, 16, 29]}, eagle_config={name: [1, 15, 28]}), 32) == (2, 16, 29)
    assert tap_layers(head_with_taps(eagle_config=dict(use_aux_hidden_state=True)), 32) == (2, 16, 29)
    with pytest.raises(ConfigError, match=rf"eagle_config.{name} and {name} name different layers"):
        head_with_taps(**{name: [1, 15, 28]}, eagle_config={name: [1, 15, 28]})


@pytest.mark.parametrize("value", ["2,16,29", [], [2.0], [-1, 3], [True], 5])
def test_impossible_tap_layers(value):
    for fields in (
        dict(eagle_aux_hidden_state_layer_ids=value),
        dict(eagle_config=dict(eagle_aux_hidden_state_layer_ids=value)),
    ):
        with pytest.raises(ConfigError, match="eagle_aux_hidden_state_layer_ids must list layer indices"):
            head_with_taps(**fields)
