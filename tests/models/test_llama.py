"""The target equals transformers' Llama, and the recorded tensors of the PyTorch reference."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from eagle_jax.drafts.eagle.config import tap_layers
from eagle_jax.models.config import LlamaConfig
from tests.models.reference import SMALL, load_target, one_step, our_model, prefilled, prompt_pass, random_model

TOLERANCE = 1e-4
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
DYNAMIC = dict(rope_theta=10000.0, rope_scaling=dict(rope_type="dynamic", factor=4.0), max_position_embeddings=16)
YARN = dict(rope_theta=500.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(
    rope_theta=10000.0,
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.5, 2.0],
    long_factor=[1.0, 2.0, 3.0, 5.0],
    original_max_position_embeddings=16,
)
KINDS = {
    "llama2": {},
    "grouped queries": dict(num_key_value_heads=2),
    "one kv head": dict(num_key_value_heads=1),
    "explicit head_dim": dict(head_dim=20, num_key_value_heads=2),
    "tied embeddings": dict(tie_word_embeddings=True),
    "attention_bias": dict(attention_bias=True, num_key_value_heads=2),
    "mlp_bias": dict(mlp_bias=True),
    "eps": dict(rms_norm_eps=0.3),
    "rope_theta": dict(rope_theta=300.0),
    "linear": dict(rope_theta=10000.0, rope_scaling=dict(type="linear", factor=2.5)),
    "dynamic": DYNAMIC,
    "llama3": dict(rope_theta=500000.0, rope_scaling=LLAMA3),
    "llama3, rope_parameters": dict(rope_parameters=LLAMA3 | dict(rope_theta=700.0)),
    "linear, rope_parameters": dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=700.0)),
    "yarn": dict(rope_parameters=YARN | dict(beta_fast=4.0, beta_slow=0.5)),
    "yarn, exact": dict(rope_parameters=YARN | dict(beta_fast=4.0, beta_slow=0.5, truncate=False)),
    "yarn, mscale": dict(rope_parameters=YARN | dict(mscale=2.0, mscale_all_dim=0.7)),
    "yarn, attention_factor": dict(rope_parameters=YARN | dict(attention_factor=0.8)),
    "yarn, no factor": dict(rope_parameters=YARN | dict(factor=None)),
    "longrope": dict(rope_parameters=LONGROPE),
    "longrope, factor": dict(rope_parameters=LONGROPE | dict(factor=3.0, attention_factor=1.3)),
}


SCALED = ("rope_", "linear", "llama3", "yarn", "longrope")


def tokens_of(batch: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SMALL["vocab_size"], (batch, length))


def theirs(model: transformers.LlamaForCausalLM, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """logits [B, T, V], hidden states: the input of each layer, and last the output of the final norm."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(tokens), output_hidden_states=True)
    return out.logits.numpy(), [state.numpy() for state in out.hidden_states]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind):
    model = random_model(**KINDS[kind])
    tokens = tokens_of(2, 40)  # beyond the 16 positions of "dynamic" and of llama3's pretraining
    logits, states = theirs(model, tokens)
    # The fields as published, and as transformers writes them today.
    for hf in (SMALL | KINDS[kind], model.config.to_dict()):
        layers = tuple(range(SMALL["num_hidden_layers"]))
        out, ours = prompt_pass(our_model(model, hf), jnp.asarray(tokens), jnp.full(2, 40), taps=layers)
        np.testing.assert_allclose(ours, logits, atol=TOLERANCE)
        np.testing.assert_allclose(out.taps, np.concatenate(states[:-1], axis=-1), atol=TOLERANCE)
        np.testing.assert_allclose(out.hidden, states[-1], atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 15, 16, 17])
def test_dynamic_rope_around_its_limit(length):
    model = random_model(**DYNAMIC)
    tokens = tokens_of(1, length)
    _, ours = prompt_pass(our_model(model), jnp.asarray(tokens), jnp.full(1, length))
    np.testing.assert_allclose(ours, theirs(model, tokens)[0], atol=TOLERANCE)


def test_random_weights_tell_the_kinds_apart():
    """The comparison can fail: each kind changes the logits of the same weights by far more than the tolerance."""
    tokens = jnp.asarray(tokens_of(1, 40))
    same_shapes = ("eps", "dynamic", *(kind for kind in KINDS if kind.startswith(SCALED)))
    model = random_model()
    plain = prompt_pass(our_model(model), tokens, jnp.full(1, 40))[1]
    for kind in same_shapes:
        changed = prompt_pass(our_model(model, SMALL | KINDS[kind]), tokens, jnp.full(1, 40))[1]
        assert np.abs(changed - plain).max() > 100 * TOLERANCE, kind


def test_tap_after_the_last_layer_is_the_stream_before_the_norm():
    model = our_model(random_model())
    out, _ = prompt_pass(model, jnp.asarray(tokens_of(1, 5)), jnp.full(1, 5), taps=(2,))
    stream = np.asarray(out.taps)
    scale = 1 / np.sqrt(np.mean(stream**2, -1, keepdims=True) + SMALL["rms_norm_eps"])
    np.testing.assert_allclose(stream * scale * np.asarray(model.norm[...]), out.hidden, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "prompt"),
    [("grouped queries", 7), ("attention_bias", 7), ("llama3", 7), ("dynamic", 7), ("dynamic", 20), ("longrope", 7)],
)
def test_greedy_decoding_equals_transformers(kind, prompt):
    """Twenty cached steps; "dynamic" and "longrope" cross their limit of 16 positions on the way, or start beyond."""
    torch, steps = pytest.importorskip("torch"), 20
    model = random_model(**KINDS[kind])
    tokens = tokens_of(1, prompt)
    ours = our_model(model)
    lengths = jnp.full(1, prompt)
    logits, cache = prefilled(ours, jnp.asarray(tokens), lengths, rows=prompt + steps)
    with torch.no_grad():
        out = model(torch.from_numpy(tokens), use_cache=True)
        for step in range(steps):
            expected = out.logits[:, -1]
            np.testing.assert_allclose(logits, expected.numpy(), atol=TOLERANCE, err_msg=f"step {step}")
            token = expected.argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            logits, cache = one_step(ours, jnp.asarray(token.numpy()), cache, lengths)
    np.testing.assert_allclose(logits, out.logits[:, -1].numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["grouped queries", "dynamic"])
def test_ragged_batch_equals_each_row_alone(kind):
    model = our_model(random_model(**KINDS[kind]))
    lengths, width, steps = [5, 21, 13], 24, 6
    tokens = np.zeros((3, width), np.int32)
    for row, length in enumerate(lengths):
        tokens[row, :length] = tokens_of(1, length, seed=row)[0]
    later = tokens_of(3, steps, seed=9)

    def run(rows: list[int]) -> np.ndarray:
        prompts, prompt_lengths = jnp.asarray(tokens[rows]), jnp.asarray([lengths[row] for row in rows])
        logits, cache = prefilled(model, prompts, prompt_lengths, rows=width + steps)
        seen = [logits]
        for step in range(steps):
            logits, cache = one_step(model, jnp.asarray(later[rows, step : step + 1]), cache, prompt_lengths)
            seen.append(logits)
        return np.stack(seen, axis=1)

    together = run([0, 1, 2])
    for row in range(3):
        np.testing.assert_allclose(together[row], run([row])[0], atol=1e-5)


def test_a_tree_pass_equals_each_branch_alone():
    """Four new tokens, two of them siblings, under an ancestor mask with a cache: each as if its path were the text."""
    model = our_model(random_model(num_key_value_heads=2))
    prompt, nodes = tokens_of(1, 6), tokens_of(1, 4, seed=5)
    parents, depths = [-1, 0, 0, 2], [0, 1, 1, 2]
    paths = [[0], [0, 1], [0, 2], [0, 2, 3]]
    assert all(parents[path[-1]] == (path[-2] if len(path) > 1 else -1) for path in paths)
    mask = np.zeros((1, 4, 4), bool)
    for node, path in enumerate(paths):
        mask[0, node, path] = True
    _, cache = prefilled(model, jnp.asarray(prompt), jnp.full(1, 6), rows=10)
    positions = jnp.asarray([6 + depth for depth in depths])[None]

    @jax.jit
    def verify(model, cache):
        out = model(jnp.asarray(nodes), positions, jnp.asarray(mask), prompt_lengths=jnp.full(1, 6), cache=cache)
        return model.logits(out.hidden)

    texts = np.zeros((4, 9), np.int32)  # prompt and path, right-padded: one text a row
    for row, path in enumerate(paths):
        texts[row, : 6 + len(path)] = [*prompt[0], *nodes[0, path]]
    alone = prompt_pass(model, jnp.asarray(texts), jnp.full(4, 6))[1]
    for node, depth in enumerate(depths):
        np.testing.assert_allclose(verify(model, cache)[0, node], alone[node, 6 + depth], atol=1e-5)


def test_bfloat16_model_computes_in_bfloat16_and_gives_float32_logits():
    model = our_model(random_model(num_key_value_heads=2, attention_bias=True, mlp_bias=True))
    tokens, lengths = jnp.asarray(tokens_of(1, 9)), jnp.full(1, 9)
    half = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), model)
    out, logits = prompt_pass(half, tokens, lengths, taps=(1,))
    assert out.hidden.dtype == out.taps.dtype == out.new_kv[0][0].dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    exact = prompt_pass(model, tokens, lengths)[1]
    assert 1e-4 < np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["t1", "t2"])
def test_recorded_forward_pass(golden, name):
    folder = golden / "weights" / f"{name}_target"
    config = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))
    model = load_target(config, load_file(folder / "model.safetensors"))
    recorded = np.load(golden / f"target_forward_{name}.npz")
    taps = tuple(int(layer) for layer in recorded["tap_layer_indices"])
    # The reference tests its three indices with `or`: where two coincide (6 layers), it taps that layer once.
    assert taps == tuple(sorted(set(tap_layers(None, config.num_layers))))
    for prompt in range(3):
        tokens = jnp.asarray(recorded[f"p{prompt}/input_ids"])[None]
        out, logits = prompt_pass(model, tokens, jnp.full(1, tokens.shape[1]), taps=taps)
        np.testing.assert_allclose(logits[0], recorded[f"p{prompt}/logits"], atol=TOLERANCE)
        np.testing.assert_allclose(out.hidden[0], recorded[f"p{prompt}/final_hidden"], atol=TOLERANCE)
        expected = np.concatenate([recorded[f"p{prompt}/tap{index}"] for index in range(len(taps))], axis=-1)
        np.testing.assert_allclose(out.taps[0], expected, atol=TOLERANCE)
