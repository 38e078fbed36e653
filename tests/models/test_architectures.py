"""Every architecture of the table equals transformers' own class, read from a folder as transformers writes it.

Random small models in float32. The windows are shorter than the prompts.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file

import eagle_jax
from eagle_jax import DraftModel
from eagle_jax.convert import convert, from_pretrained, to_official
from eagle_jax.models.architectures import ARCHITECTURES, config_of
from eagle_jax.models.cache import KVCache
from eagle_jax.models.config import ExpertsConfig
from eagle_jax.models.fields import ConfigError
from eagle_jax.models.rope import RopeConfig
from eagle_jax.testing import assert_lossless, toy_draft
from tests.models.reference import prompt_pass
from tests.toy import scaled

TOLERANCE = 1e-4
SMALL = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=8)
MIXED = ["sliding_attention", "full_attention"]
GEMMA = dict(head_dim=12, query_pre_attn_scalar=20, sliding_window=4)
GEMMA3_ROPE = {
    "full_attention": dict(rope_type="linear", factor=2.0, rope_theta=1000.0),
    "sliding_attention": dict(rope_type="default", rope_theta=50.0),
}
GPT_OSS_YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, truncate=False, original_max_position_embeddings=8)
# {case: (the config class of transformers, fields)}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", dict(sliding_window=4, head_dim=12)),
    "mistral without a window": ("MistralConfig", dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen2 with windows": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    "qwen3": ("Qwen3Config", dict(head_dim=12)),
    "qwen3 with windows": (
        "Qwen3Config",
        dict(head_dim=12, attention_bias=True, use_sliding_window=True, sliding_window=4, layer_types=MIXED),
    ),
    "gemma2": ("Gemma2Config", GEMMA | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)),
    "gemma2 without caps, exact gelu": (
        "Gemma2Config",
        GEMMA
        | dict(head_dim=20, attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False)
        | dict(hidden_activation="gelu"),
    ),
    "gemma3": ("Gemma3TextConfig", GEMMA | dict(layer_types=MIXED, rope_parameters=GEMMA3_ROPE)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=4)),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(head_dim=12, num_experts=5, num_experts_per_tok=3, moe_intermediate_size=12, norm_topk_prob=True),
    ),
    "qwen3_moe with a dense layer": (
        "Qwen3MoeConfig",
        dict(
            num_experts=40,  # more than tokens
            num_experts_per_tok=3,
            moe_intermediate_size=12,
            decoder_sparse_step=2,
            use_sliding_window=True,
            sliding_window=4,
        ),
    ),
    "gpt_oss": (
        "GptOssConfig",
        dict(
            head_dim=8,
            num_local_experts=5,
            num_experts_per_tok=2,
            sliding_window=4,
            swiglu_limit=0.5,
            rope_parameters=GPT_OSS_YARN,
        ),
    ),
}
# Experts 0 and 1 are the same: their router logits tie, and whichever is chosen, the output is the same.
TWINS = ("mixtral", "gpt_oss")
# One of each architecture, for the tests that compile most.
ONE_EACH = [
    "mistral",
    "qwen2 with windows",
    "qwen3 with windows",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
]
# Of these, the ones most unlike each other; test-long has all.
QUICK = ["qwen2 with windows", "gemma2", "gpt_oss"]
NEW = 16  # tokens


def random_tokens(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], shape, dtype=np.int32)


LENGTHS = np.array([12, 5])
TOKENS = random_tokens(2, 12)


@functools.cache
def theirs(case: str) -> transformers.PreTrainedModel:
    """Makes transformers' model with every parameter random, biases and norms too."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    name, fields = CASES[case]
    config = getattr(transformers, name)(**SMALL | fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if "norm" in name else 0.25 * noise)
            if case in TWINS and name.rpartition("mlp.")[2].startswith(("gate.", "router.", "experts.")):
                weight[1] = weight[0]
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder of a case as `save_pretrained` writes it."""

    @functools.cache
    def write(case: str) -> Path:
        path = tmp_path_factory.mktemp("target")
        theirs(case).save_pretrained(path)
        return path

    return write


@pytest.fixture(scope="module")
def ours(folder):
    """Returns our model of a case, read from its folder."""
    return functools.cache(lambda case: from_pretrained(folder(case))[0])


def their_pass(case: str, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns logits [T, V], and hidden states: the input of each layer, and last the output of the final norm."""
    import torch

    with torch.no_grad():
        out = theirs(case)(torch.from_numpy(tokens.astype(np.int64))[None], output_hidden_states=True)
    return out.logits[0].numpy(), [state[0].numpy() for state in out.hidden_states]


@pytest.fixture(scope="module")
def prompts(ours):
    """Returns what a case's model makes of a ragged batch: (output, logits)."""
    tokens, lengths = jnp.asarray(TOKENS), jnp.asarray(LENGTHS)
    return functools.cache(lambda case: prompt_pass(ours(case), tokens, lengths, taps=(0, 1)))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_taps_of_a_ragged_batch(case, prompts):
    out, logits = prompts(case)
    for row, length in enumerate(LENGTHS):
        expected, states = their_pass(case, TOKENS[row, :length])
        np.testing.assert_allclose(logits[row, :length], expected, atol=TOLERANCE)
        np.testing.assert_allclose(out.taps[row, :length], np.concatenate(states[:-1], axis=-1), atol=TOLERANCE)
        np.testing.assert_allclose(out.hidden[row, :length], states[-1], atol=TOLERANCE)


PARENTS, DEPTHS = [-1, 0, 0, 2, 3, 4], [0, 1, 1, 2, 3, 4]
PATHS = [[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 3, 4], [0, 2, 3, 4, 5]]


@pytest.mark.parametrize("case", CASES)
def test_a_tree_pass_equals_a_pass_over_each_path(case, ours, prompts):
    """Nodes under an ancestor mask, with a cache; the deepest nodes' windows end inside the tree."""
    model, nodes = ours(case), random_tokens(2, 6, seed=5)
    mask = np.zeros((2, 6, 6), bool)
    for node, path in enumerate(PATHS):
        assert PARENTS[node] == (path[-2] if len(path) > 1 else -1) and DEPTHS[node] == len(path) - 1
        mask[:, node, path] = True
    cache = KVCache.zeros(model.config, 2, TOKENS.shape[1] + 6, model.dtype)
    cache = cache.write(prompts(case)[0].new_kv, jnp.zeros((), jnp.int32)).with_length(jnp.asarray(LENGTHS))
    logits = verify(model, jnp.asarray(nodes), jnp.asarray(mask), cache)
    for row, length in enumerate(LENGTHS):
        for node, path in enumerate(PATHS):
            expected, _ = their_pass(case, np.concatenate([TOKENS[row, :length], nodes[row, path]]))
            np.testing.assert_allclose(logits[row, node], expected[-1], atol=TOLERANCE, err_msg=f"node {node}")


@jax.jit
def verify(model, nodes, mask, cache):
    positions = cache.length[:, None] + jnp.asarray(DEPTHS)[None]
    out = model(nodes, positions, mask, prompt_lengths=cache.length, cache=cache)
    return model.logits(out.hidden)


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in ONE_EACH]
)
def test_speculative_text_is_their_greedy_text(case, ours):
    """Every new token is the argmax of transformers' pass over the whole text. The target's first layer drafts."""
    target = ours(case)
    small = copy.copy(target)
    small.config = dataclasses.replace(target.config, num_layers=1)
    small.layers = nnx.List(target.layers[:1])
    tree = eagle_jax.TreeConfig(depth=3, top_k=2, num_nodes=6)
    tokens, lengths = jnp.asarray(TOKENS), jnp.asarray(LENGTHS)
    out = eagle_jax.generate(target, DraftModel(small), tokens, lengths, tree=tree, max_new_tokens=NEW)
    assert out.accepted[:, 1:].sum() > 0 and out.accepted[:, :-1].sum() > 0  # some are accepted, not all
    for row, length in enumerate(LENGTHS):
        text = np.asarray(out.tokens)[row, : length + NEW]
        logits = their_pass(case, text)[0][length - 1 : -1]
        chosen = logits[np.arange(NEW), text[length:]]
        np.testing.assert_allclose(chosen, logits.max(axis=-1), atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_EACH)
def test_decoding_with_a_head_is_lossless(case, folder):
    """Greedy and sampled texts have the target's own distribution, and no sequence depends on another."""
    config = config_of(json.loads((folder(case) / "config.json").read_text()) | dict(vocab_size=7))
    target = scaled(ARCHITECTURES[config.model_type].model(config, jax.random.key(0), jnp.float32), 12.0)
    report = assert_lossless(toy_draft(target), target=target)
    assert report.accepted > 0


@pytest.mark.parametrize("case", CASES)
def test_tensors_are_written_as_they_were_read(case, ours, folder):
    written = to_official(ours(case))
    expected = load_file(folder(case) / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(written[name], array)


@pytest.mark.parametrize("case", CASES)
def test_older_files_state_rope_in_fields_of_their_own(case, folder):
    written = json.loads((folder(case) / "config.json").read_text())
    ropes = written.pop("rope_parameters")
    older = written | dict(torch_dtype=written.pop("dtype"))
    if "full_attention" in ropes:
        local, ropes = ropes["sliding_attention"], ropes["full_attention"]
        older["rope_local_base_freq"] = local["rope_theta"]
    older["rope_theta"] = ropes.pop("rope_theta")
    older["rope_scaling"] = None if ropes == {"rope_type": "default"} else {"type": ropes.pop("rope_type"), **ropes}
    assert config_of(older) == config_of(json.loads((folder(case) / "config.json").read_text()))


@pytest.mark.parametrize("case", ["qwen3 with windows", "gemma3"])
def test_a_converted_folder_holds_the_same_model(case, folder, ours, tmp_path):
    loaded, _ = eagle_jax.load(convert(folder(case), None, tmp_path / "converted"))
    assert loaded.config == ours(case).config
    jax.tree.map(np.testing.assert_array_equal, loaded, ours(case))


GEMMA2 = dict(model_type="gemma2", hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh")
GEMMA2 |= dict(use_bidirectional_attention=None)
GEMMA3 = dict(model_type="gemma3_text", sliding_window=512, attn_logit_softcapping=None)
# Fields of a config.json that an architecture reads, other values, and what its config then holds.
QWEN2 = dict(model_type="qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
MIXTRAL = dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
QWEN3_MOE = dict(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
GPT_OSS = dict(model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=2)
PUBLISHED_YARN = dict(rope_type="yarn", factor=32.0, truncate=False, original_max_position_embeddings=4096)
READ = [
    (dict(model_type="mistral"), dict(windows=(4096, 4096))),
    (dict(model_type="mistral", sliding_window=None), dict(windows=())),
    (dict(model_type="mistral", sliding_window=4, layer_types=MIXED), dict(windows=(4, None))),
    (dict(model_type="mistral", attention_bias=True), dict(attention_bias=True)),
    (QWEN2, dict(windows=(None, 4), qkv_bias=True)),
    (QWEN2 | dict(layer_types=MIXED), dict(windows=(4, None))),
    (QWEN2 | dict(use_sliding_window=False), dict(windows=())),
    (dict(model_type="qwen2", sliding_window=4), dict(windows=(), qkv_bias=True, qk_norm=False)),
    (dict(model_type="qwen3"), dict(head_dim=128, qk_norm=True, qkv_bias=False)),
    (GEMMA2, dict(windows=(4096, None), logit_softcap=30.0, attention_softcap=50.0, attention_scale=None)),
    (GEMMA2, dict(head_dim=256, model_type="gemma2")),
    (GEMMA2, dict(norm_plus_one=True, output_norms=True, embedding_scale=32**0.5, tie_word_embeddings=True)),
    (GEMMA2 | dict(query_pre_attn_scalar=16), dict(attention_scale=0.25, activation="gelu_pytorch_tanh")),
    (GEMMA2 | dict(final_logit_softcapping=None, attn_logit_softcapping=None), dict(logit_softcap=None)),
    (GEMMA2 | dict(hidden_activation="silu", hidden_act=None), dict(activation="silu")),
    (GEMMA2 | dict(hidden_activation="gelu", hidden_act=None), dict(activation="gelu")),
    (GEMMA2 | dict(attn_logit_softcapping=0.0), dict(attention_softcap=None)),
    (GEMMA3, dict(windows=(512, 512), qk_norm=True, rope=RopeConfig(1e6), local_rope=RopeConfig(1e4))),
    (GEMMA3 | dict(sliding_window_pattern=2), dict(windows=(512, None), logit_softcap=None)),
    # As older files write it.
    (
        GEMMA3 | dict(rope_theta=5e5, rope_local_base_freq=7.0, rope_scaling=dict(rope_type="linear", factor=8.0)),
        dict(rope=RopeConfig(5e5, "linear", 8.0), local_rope=RopeConfig(7.0)),
    ),
    (MIXTRAL, dict(windows=(), experts=ExpertsConfig(4, 2, 48), rope=RopeConfig(1e6))),
    (MIXTRAL | dict(sliding_window=4, rope_theta=5.0), dict(windows=(4, 4), rope=RopeConfig(5.0))),
    (MIXTRAL | dict(rope_parameters=dict(rope_theta=5.0, rope_type="default")), dict(rope=RopeConfig(5.0))),
    (QWEN3_MOE, dict(qk_norm=True, windows=(), experts=ExpertsConfig(4, 2, 12, normalised=False))),
    (QWEN3_MOE | dict(norm_topk_prob=True), dict(experts=ExpertsConfig(4, 2, 12))),
    (QWEN3_MOE | dict(mlp_only_layers=[1]), dict(experts=ExpertsConfig(4, 2, 12, False, dense_layers=(1,)))),
    (QWEN3_MOE | dict(decoder_sparse_step=2), dict(experts=ExpertsConfig(4, 2, 12, False, dense_layers=(0,)))),
    (GPT_OSS, dict(windows=(128, None), sinks=True, attention_bias=True, head_dim=64)),
    (GPT_OSS, dict(experts=ExpertsConfig(4, 2, 48, bias=True, clamp=(1.702, 7.0)))),
    (
        GPT_OSS,
        dict(rope=RopeConfig.from_hf(dict(rope_theta=150000.0, rope_scaling=PUBLISHED_YARN), 64, "")),
    ),
    (GPT_OSS | dict(rope_parameters=dict(rope_theta=9.0)), dict(rope=RopeConfig(9.0))),
    (GPT_OSS | dict(quantization_config=dict(quant_method="mxfp4")), dict(sinks=True)),
    (dict(model_type="llama"), dict(windows=(), qkv_bias=False, qk_norm=False)),
    (dict(model_type=None), dict(model_type="llama")),
]


@pytest.mark.parametrize(("fields", "expected"), READ)
def test_fields_of_an_architecture(fields, expected):
    config = config_of(SMALL | fields)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type="phi9"), f"model_type = 'phi9' is not implemented .accepted: {', '.join(ARCHITECTURES)}"),
        (dict(model_type=["llama"]), "model_type = .'llama'. is not implemented"),
        (dict(model_type="llama", sliding_window=4), "sliding_window = 4 is not implemented"),
        (dict(model_type="mistral", use_sliding_window=True), "use_sliding_window = True is not implemented"),
        (dict(model_type="mistral", sliding_window=-1), "sliding_window must be a positive integer, got -1"),
        (QWEN2 | dict(sliding_window=None), "sliding_window is missing"),
        (QWEN2 | dict(max_window_layers=None), "max_window_layers must be a number of layers, got None"),
        (QWEN2 | dict(layer_types=MIXED[:1]), "layer_types must list a kind for each of 2 layers"),
        (QWEN2 | dict(layer_types=["linear_attention"] * 2), "layer_types 'linear_attention' is not implemented"),
        (QWEN2 | dict(use_sliding_window=False, layer_types=MIXED), "sliding_window is missing"),
        (GEMMA2 | dict(hidden_activation="gelu"), "hidden_activation = 'gelu' and hidden_act = 'gelu_pyt.* contradict"),
        (GEMMA3 | dict(hidden_activation="relu"), "hidden_activation = 'relu' is not implemented"),
        (GEMMA3 | dict(attn_logit_softcapping=5.0), "attn_logit_softcapping = 5.0 is not implemented"),
        (GEMMA3 | dict(use_bidirectional_attention=True), "use_bidirectional_attention = True is not implemented"),
        (GEMMA3 | dict(query_pre_attn_scalar=None), "query_pre_attn_scalar must be a positive number, got None"),
        (GEMMA3 | dict(rope_parameters=dict(rope_theta=5.0)), "rope_parameters must state full_attention and sliding"),
        (
            GEMMA3 | dict(rope_parameters=dict(sliding_attention=dict(rope_type="dynamic", factor=2.0))),
            "rope type 'dynamic' in layers with a window is not implemented",
        ),
        (MIXTRAL | dict(num_experts=5), "num_local_experts = 4 and num_experts = 5 contradict each other"),
        (MIXTRAL | dict(num_experts_per_tok=5), "num_experts_per_tok is 5, but there are 4 experts"),
        (QWEN3_MOE | dict(moe_intermediate_size=None), "moe_intermediate_size is missing"),
        (QWEN3_MOE | dict(mlp_only_layers="all"), "mlp_only_layers must list layer indices"),
        (GPT_OSS | dict(swiglu_limit=None), "swiglu_limit must be a positive number, got None"),
        (GPT_OSS | dict(quantization_config=dict(quant_method="fp8")), "quantization_config = .* is not implemented"),
        (QWEN2 | dict(attn_logit_softcapping=5.0), "attn_logit_softcapping = 5.0 is not implemented"),
    ],
)
def test_what_an_architecture_does_not_read_is_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=f"some/config.json: {message}"):
        config_of(SMALL | fields, "some/config.json")
