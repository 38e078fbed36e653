"""Configs: what is published loads, every field counts, and mathematics that is not implemented is refused by name."""

from __future__ import annotations

import dataclasses
import re

import pytest

from eagle_jax.drafts.eagle.config import DraftConfig, tap_layers
from eagle_jax.models.config import ConfigError, LlamaConfig, RopeConfig

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
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.5)
LONGROPE = dict(
    rope_type="longrope", short_factor=[1.0, 1.5], long_factor=[1.0, 4.0], original_max_position_embeddings=16
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
    "norm_output": (True, dict(norm_output=True)),
    "qkv_bias": (True, dict(qkv_bias=True)),
    "use_qk_norm": (True, dict(qk_norm=True)),
    "use_aux_norm": (True, dict(fc_norm=True)),
    "norm_before_fc": (True, dict(norm_before_fc=True)),
    "sliding_window": (2048, dict(windows=(2048,))),
}
# Norms, which are off unless a head asks for them, and windows.
READ_BY_HEADS = ("sliding_window", "use_sliding_window", "use_qk_norm", "qk_layernorm")


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
    told_by_tensors = {"own_embedding": True, "own_lm_head": False, "fc_bias": True}
    fields = {field.name for field in dataclasses.fields(DraftConfig)}
    # Heads have Llama's values of these; tests/models/test_architectures.py has others.
    by_architecture = {"model_type", "activation", "norm_plus_one", "output_norms", "embedding_scale"}
    by_architecture |= {"local_rope", "attention_scale", "attention_softcap", "logit_softcap", "sinks", "experts"}
    of_eagle1 = {"input_norms", "attention_norm"}  # test_the_norms_of_an_eagle1_head
    assert covered | told_by_tensors.keys() | by_architecture | of_eagle1 | {"window"} == fields
    plain = PLAIN | dict(num_hidden_layers=1)
    for name, value in told_by_tensors.items():
        assert changes(DraftConfig.from_hf(plain), DraftConfig.from_hf(plain, **{name: value})) == {name: value}
    smaller = DraftConfig.from_hf(plain | dict(draft_vocab_size=50), own_lm_head=False)
    assert smaller.own_lm_head  # or there would be none for its vocabulary


@pytest.mark.parametrize(
    ("field", "spellings"),
    [
        ("input_norms", ("input_norms", "use_mtp_layernorm", "use_input_norm")),
        ("attention_norm", ("attention_norm", "use_input_layernorm_in_first_layer", "use_attn_norm")),
        ("norm_output", ("norm_output", "use_last_layernorm")),
    ],
)
def test_the_norms_of_an_eagle1_head(field, spellings):
    plain = PLAIN | {"num_hidden_layers": 1}
    for name in spellings:
        for hf in (plain | {name: True}, plain | {"eagle_config": {name: True}}):
            without, given = (DraftConfig.from_hf(one, kind="eagle1") for one in (plain, hf))
            assert changes(without, given) == {field: True}
    with pytest.raises(ConfigError, match="contradict each other"):
        DraftConfig.from_hf(plain | {spellings[0]: True, "eagle_config": {spellings[1]: False}}, kind="eagle1")


def test_a_head_may_leave_out_its_number_of_layers():
    hf = {name: value for name, value in PLAIN.items() if name != "num_hidden_layers"}
    assert DraftConfig.from_hf(hf).num_layers == 1
    assert DraftConfig.from_hf(PLAIN).num_layers == 4
    with pytest.raises(ConfigError, match="an EAGLE-1 head has one layer, num_hidden_layers is 4"):
        DraftConfig.from_hf(PLAIN, kind="eagle1")


REFUSED = {
    "hidden_act": "gelu",
    "model_type": "qwen3",
    "sliding_window": 4096,
    "use_sliding_window": True,
    "attention_chunk_size": 8192,
    "dual_chunk_attention_config": dict(chunk_size=262144),
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


@pytest.mark.parametrize("kinds", [3, "full", [["full_attention"]], {"0": "full_attention"}])
def test_layer_types_of_another_form_are_refused(kinds):
    with pytest.raises(ConfigError, match=r"layer_types .* not implemented"):
        LlamaConfig.from_hf(PLAIN | {"layer_types": kinds})


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_mathematics_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=rf"some/config\.json: {name}\b.*not implemented"):
        LlamaConfig.from_hf(PLAIN | {name: REFUSED[name]}, "some/config.json")
    for kind in ("eagle1",) if name in READ_BY_HEADS else ("eagle1", "eagle3"):
        with pytest.raises(ConfigError, match=name):
            DraftConfig.from_hf(PLAIN | {"num_hidden_layers": 1, name: REFUSED[name]}, kind=kind)


HEAD = PLAIN | dict(num_hidden_layers=1)
# Where a config may hold a field of the head: {name of the place: the config with these fields there}.
PLACED = {
    "": lambda fields: HEAD | fields,
    "eagle_config.": lambda fields: HEAD | dict(eagle_config=fields),
    "transformer_layer_config.": lambda fields: HEAD | dict(transformer_layer_config=fields),
    "text_config.": lambda fields: HEAD | dict(text_config=fields),
    "model.": lambda fields: dict(model_type="eagle", architectures=["EAGLEModel"], model=HEAD | fields),
    "model.eagle_config.": lambda fields: dict(model_type="eagle", model=HEAD | dict(eagle_config=fields)),
}
# Mathematics of heads: fields with a value that is not implemented, and one that states what is.
SWITCHES = dict(
    use_mtp_layernorm=(True, False),
    eh_proj_before_attn=(True, False),
    use_input_layernorm_in_first_layer=(False, True),
    use_last_layernorm=(False, True),
    use_aux_hidden_state=(False, True),
    parallel_drafting=(True, False),
    parallel_draft_step=(4, 1),
    mask_token_id=(7, None),
    num_depths=(8, 1),
    block_size=(16, None),
    dflash_config=(dict(projector_type="domino"), {}),
    aux_hidden_state_layer_ids=([2, 16, 29], []),
    hidden_act=("gelu", "silu"),
    logit_scale=(0.5, 1.0),
)


@pytest.mark.parametrize("place", PLACED)
@pytest.mark.parametrize("name", SWITCHES)
def test_mathematics_of_heads_is_refused_wherever_it_is_stated(place, name):
    other, neutral = SWITCHES[name]
    with pytest.raises(ConfigError, match=rf"{re.escape(place + name)}\b.*not implemented"):
        DraftConfig.from_hf(PLACED[place]({name: other}))
    assert DraftConfig.from_hf(PLACED[place]({name: neutral})) == DraftConfig.from_hf(HEAD)


@pytest.mark.parametrize("place", PLACED)
@pytest.mark.parametrize("name", [name for name in DRAFT_FIELDS if name not in ("eagle_config", "bias")])
def test_every_draft_field_is_read_wherever_it_is_stated(place, name):
    value, expected = DRAFT_FIELDS[name]
    if name == "eagle_aux_hidden_state_layer_ids" and place.endswith("eagle_config."):
        expected = dict(taps=(2, 3))  # there it names outputs
    assert changes(DraftConfig.from_hf(HEAD), DraftConfig.from_hf(PLACED[place]({name: value}))) == expected


@pytest.mark.parametrize("place", [place for place in PLACED if place])
@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("rope_theta", 5e5, 1e4),
        ("rope_scaling", LLAMA3, LLAMA3 | dict(factor=32.0)),
        ("draft_vocab_size", 50, 60),
        ("norm_before_residual", True, False),
        ("attention_bias", True, False),
        ("rms_norm_eps", 1e-5, 1e-6),
        ("target_hidden_size", 64, 96),
    ],
)
def test_fields_that_contradict_each_other_are_named_both(place, name, value, other):
    config = PLACED[place]({name: value})
    assert DraftConfig.from_hf(config | {name: value}) == DraftConfig.from_hf(config)
    with pytest.raises(ConfigError, match=rf"{name} = .*{re.escape(place + name)} = .*contradict each other"):
        DraftConfig.from_hf(config | {name: other})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(eagle_config=dict(new_norm=True)), "eagle_config.new_norm = True is not known"),
        (dict(eagle_config=dict(new_norm=False)), "eagle_config.new_norm = False is not known"),
        (dict(eagle_config=[1]), r"eagle_config must be an object, got \[1\]"),
        (dict(draft_config=dict(norm_output=True)), "draft_config holds norm_output, which are not read there"),
        (dict(fc_norm=True, norm_before_fc=True), "fc_norm and norm_before_fc exclude each other"),
        (dict(num_hidden_layers=2, next_layer_regular=False), "next_layer_regular = False is not implemented"),
        (dict(layer_types=["sliding_attention"]), "sliding_window is missing"),
        (
            dict(sliding_window=4, layer_types=["full_attention"] * 2),
            "layer_types must list a kind for each of 1",
        ),
        (
            dict(sliding_window=4, use_sliding_window=True, max_window_layers=28),
            "max_window_layers = 28 is not implemented; name the layers that slide",
        ),
        (dict(bias=True, eagle_fc_bias=False), "bias = True and eagle_fc_bias = False contradict"),
        (dict(rope_theta=1e4, rope_parameters=dict(rope_theta=5e5)), "rope_theta = 10000.0 and rope_parameters.rope_t"),
        (
            dict(rope_scaling=LLAMA3, rope_parameters=dict(rope_type="default")),
            "rope_scaling = .*and rope_parameters =",
        ),
        (dict(rope_scaling="llama3"), "rope_scaling must be an object, got 'llama3'"),
        (dict(truncated_vocab_size=64), "truncated_vocab_size 64 for vocab_size 128 is not implemented"),
        (dict(num_aux_hidden_states=5), "num_aux_hidden_states is 5, eagle_aux.* names none, which means 3"),
        (
            dict(num_aux_hidden_states=3, eagle_config=dict(eagle_aux_hidden_state_layer_ids=[1, 2])),
            "num_aux_hidden_states is 3, .* names 2",
        ),
    ],
)
def test_configs_of_heads_that_are_refused(fields, message):
    with pytest.raises(ConfigError, match=f"some/config.json: {message}"):
        DraftConfig.from_hf(HEAD | fields, "some/config.json")


def test_what_nvidia_writes_beside_the_mathematics_is_accepted():
    written = dict(next_layer_regular=True, parallel_draft_heads_num_layers=1, parallel_draft_step=1, has_lm_head=True)
    written |= dict(use_input_layernorm_in_first_layer=True, use_last_layernorm=True, use_mtp_layernorm=None)
    written |= dict(use_aux_hidden_state=True, eagle_aux_hidden_state_layer_ids=[])
    config = HEAD | dict(eagle_config=written, quantization_config=None, max_window_layers=28)
    window = dict(use_sliding_window=False, sliding_window=4096)  # switched off
    assert DraftConfig.from_hf(config | window) == DraftConfig.from_hf(HEAD)
    assert DraftConfig.from_hf(HEAD | dict(truncated_vocab_size=128)) == DraftConfig.from_hf(HEAD)
    few = HEAD | dict(truncated_vocab_size=64, draft_vocab_size=64)
    assert DraftConfig.from_hf(few, kind="eagle1").draft_vocab_size == 64


@pytest.mark.parametrize(
    ("name", "standard", "other"),
    [
        ("use_aux_hidden_state", False, True),
        ("skip_prenorm", True, False),
        ("norm_before_residual", False, True),
        ("norm_before_fc", False, True),
        ("fc_norm", False, True),
        ("use_aux_norm", False, True),
        ("return_hidden_post_norm", False, True),
        ("eagle_aux_hidden_state_layer_ids", [], [1, 2]),
    ],
)
def test_an_eagle1_head_has_other_standards(name, standard, other):
    for place in ("", "eagle_config."):
        plain = DraftConfig.from_hf(HEAD, kind="eagle1")
        assert DraftConfig.from_hf(PLACED[place]({name: standard}), kind="eagle1") == plain
        with pytest.raises(ConfigError, match=name):
            DraftConfig.from_hf(PLACED[place]({name: other}), kind="eagle1")


def test_windows_of_a_head_s_layers():
    def windows(**fields):
        return DraftConfig.from_hf(HEAD | dict(num_hidden_layers=2) | fields).windows

    assert windows(sliding_window=8) == windows(sliding_window=8, layer_types=["sliding_attention"] * 2) == (8, 8)
    assert windows(sliding_window=8, layer_types=["full_attention", "sliding_attention"]) == (None, 8)
    assert windows(sliding_window=8, use_sliding_window=False) == windows(layer_types=["full_attention"] * 2) == ()


def test_norms_of_eagle_3_1():
    both = DraftConfig.from_hf(HEAD | dict(fc_norm=True, norm_output=True))
    assert (both.fc_norm, both.norm_before_fc, both.norm_output) == (True, False, True)
    assert DraftConfig.from_hf(HEAD | dict(use_aux_norm=True, eagle_config=dict(return_hidden_post_norm=True))) == both


def test_bias_of_fc():
    def bias(fields, **options):
        return DraftConfig.from_hf(HEAD | fields, kind="eagle1", **options).fc_bias

    assert [bias({name: value}) for name in ("bias", "fusion_bias", "eagle_fc_bias") for value in (True, False)] == [
        *(True, False),
        *(True, False),
        *(True, False),
    ]
    assert bias({}) and not bias({}, fc_bias=False) and bias(dict(bias=True), fc_bias=False)
    # Official EAGLE-3 configs may say bias = True, and their heads have none.
    assert not DraftConfig.from_hf(HEAD | dict(bias=True)).fc_bias
    with pytest.raises(ConfigError, match=r"bias = False, but the head has a tensor fc\.bias"):
        DraftConfig.from_hf(HEAD | dict(bias=False), fc_bias=True)


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
    for scaling in (YARN, LONGROPE):
        plain = RopeConfig.from_hf(dict(rope_scaling=scaling), 64, "here")
        for name, value, field in (
            ("factor", 8.0, "factor" if scaling is YARN else "attention_factor"),
            ("original_max_position_embeddings", 32, "original_length"),
            ("attention_factor", 1.5, "attention_factor"),
            *([("beta_fast", 3.0, "beta_fast"), ("beta_slow", 2.0, "beta_slow")] if scaling is YARN else []),
            *([("truncate", False, "truncate"), ("mscale", 0.7, "attention_factor")] if scaling is YARN else []),
            *([(f"{n}_factor", [1.0, 5.0], f"{n}_factors") for n in ("short", "long")] if scaling is LONGROPE else []),
        ):
            changed = RopeConfig.from_hf(dict(rope_scaling=scaling | {name: value}), 64, "here")
            assert field in changes(plain, changed), name
    dynamic = dict(rope_scaling=dict(type="dynamic", factor=2.0))
    assert RopeConfig.from_hf(dynamic, 99, "here").original_length == 99


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (dict(rope_scaling=dict(type="axial", factor=4.0)), "rope type 'axial' is not implemented"),
        (dict(rope_scaling=YARN | dict(truncate=1)), "rope type 'yarn': truncate must be true or false, got 1"),
        (dict(rope_scaling=YARN | dict(beta_fast=-1)), "beta_fast must be a positive number, got -1"),
        (dict(rope_scaling=YARN | dict(mrope_section=[1, 1])), "yarn': mrope_section = .1, 1. is not implemented"),
        (dict(rope_scaling=YARN | dict(rope_type="longrope")), "short_factor must list a number for each freq.* None"),
        (dict(rope_scaling=LONGROPE | dict(long_factor=[1, "2"])), "long_factor must be a positive number, got '2'"),
        (
            dict(rope_scaling=dict(rope_type="linear", type="dynamic", factor=2.0)),
            "rope_type = 'linear' and type = 'dynamic' contr",
        ),
        (dict(rope_scaling=dict(rope_type=["linear"], factor=2.0)), r"rope type \['linear'\] is not implemented"),
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
    assert tap_layers(head_with_taps(target_layer_ids=[1, 15, 28]), 32) == (2, 16, 29)
    assert head_with_taps(**{name: []}).taps is head_with_taps(eagle_config={name: []}).taps is None
    assert head_with_taps(**{name: []}, eagle_config={name: [1, 15, 28]}).taps == (2, 16, 29)
    with pytest.raises(ConfigError, match=rf"{name} and eagle_config.{name} name different layers"):
        head_with_taps(**{name: [1, 15, 28]}, eagle_config={name: [1, 15, 28]})


@pytest.mark.parametrize("value", ["2,16,29", [2.0], [-1, 3], [True], 5])
def test_impossible_tap_layers(value):
    for fields in (
        dict(eagle_aux_hidden_state_layer_ids=value),
        dict(eagle_config=dict(eagle_aux_hidden_state_layer_ids=value)),
    ):
        with pytest.raises(ConfigError, match="eagle_aux_hidden_state_layer_ids must list layer indices"):
            head_with_taps(**fields)
