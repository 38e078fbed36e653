"""Heads of several layers, with windows, biases and norms, equal the same head computed by NumPy from its tensors."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax.convert import to_official
from tests.drafts.kinds import KINDS
from tests.drafts.test_lossless import CONFIG, target_of


def norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def linear(tensors, name, x):
    return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)


def rotate(x, theta):
    """x [positions, heads, head_dim]."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)


def layer(tensors, prefix, config, x, residual, window):
    """Attention over x [positions, input], then the MLP; a residual before each."""
    eps, dim = config.rms_norm_eps, config.head_dim
    q, k, v = (linear(tensors, f"{prefix}self_attn.{one}_proj", x).reshape(len(x), -1, dim) for one in "qkv")
    if config.qk_norm:
        q, k = (norm(y, tensors[f"{prefix}self_attn.{one}_norm.weight"], eps) for one, y in (("q", q), ("k", k)))
    q, k = rotate(q, config.rope.theta), rotate(k, config.rope.theta)
    k, v = (np.repeat(y, config.num_heads // config.num_kv_heads, axis=1) for y in (k, v))
    scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(dim)
    ahead = np.arange(len(x))[:, None] - np.arange(len(x))[None]
    seen = (ahead >= 0) & (ahead < (window or len(x)))
    weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    mixed = np.einsum("nqk,knh->qnh", weights / weights.sum(axis=-1, keepdims=True), v).reshape(len(x), -1)
    x = residual + linear(tensors, f"{prefix}self_attn.o_proj", mixed)
    normed = norm(x, tensors[f"{prefix}post_attention_layernorm.weight"], eps)
    gate, up = (linear(tensors, f"{prefix}mlp.{one}_proj", normed) for one in ("gate", "up"))
    return x + linear(tensors, f"{prefix}mlp.down_proj", gate / (1 + np.exp(-gate)) * up)


def by_hand(draft, target, features, tokens):
    """The head's output and its logits, [positions, ...] float64."""
    config = draft.config
    tensors = {name: np.asarray(array, np.float64) for name, array in to_official(draft).items()}
    eps = config.rms_norm_eps
    embedding = tensors.get("embed_tokens.weight", np.asarray(target.embed[...], np.float64))[tokens]
    if isinstance(draft, eagle_jax.Eagle1Draft):
        pair = norm(embedding, tensors["enorm.weight"], eps), norm(features, tensors["hnorm.weight"], eps)
        x = linear(tensors, "fc", np.concatenate(pair, axis=-1))
        normed = norm(x, tensors["layers.0.input_layernorm.weight"], eps)
        final = norm(layer(tensors, "layers.0.", config, normed, x, None), tensors["norm.weight"], eps)
        return final, final @ np.asarray(draft.output_weight(target), np.float64).T
    if config.fc_norm:
        taps = np.split(features, len(features[0]) // config.target_hidden_size, axis=-1)
        features = np.concatenate([norm(x, tensors[f"fc_norm.{i}.weight"], eps) for i, x in enumerate(taps)], axis=-1)
    if config.norm_before_fc:
        features = norm(features, tensors["input_norm.weight"], eps)
    tensors = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()}
    hidden = linear(tensors, "fc", features)
    windows = config.windows or (None,) * config.num_layers
    normed = norm(hidden, tensors["midlayer.hidden_norm.weight"], eps)
    x = np.concatenate([norm(embedding, tensors["midlayer.input_layernorm.weight"], eps), normed], axis=-1)
    residual = normed if config.norm_before_residual else hidden
    x = layer(tensors, "midlayer.", config, x, residual, windows[0])
    for index in range(1, config.num_layers):
        normed = norm(x, tensors[f"layers.{index}.input_layernorm.weight"], eps)
        x = layer(tensors, f"layers.{index}.", config, normed, x, windows[index])
    final = norm(x, tensors["norm.weight"], eps)
    return final if config.norm_output else x, linear(tensors, "lm_head", final)


@pytest.mark.parametrize("kind", ["eagle3 parts", "eagle3.1", "eagle1 parts"])
def test_a_head_of_many_parts_equals_numpy(kind):
    target, draft = target_of(0), KINDS[kind].build(CONFIG, 1, 6.0)
    rng = np.random.default_rng(2)
    # Norms and biases that are neither 1 nor 0.
    arrays = eagle_jax.models.params.flatten(draft)
    moved = {path: x + 0.3 * rng.standard_normal(x.shape) for path, x in arrays.items() if x.ndim == 1}
    moved.pop("target_ids", None)
    draft = eagle_jax.models.params.load(draft, arrays | {path: x.astype(np.float32) for path, x in moved.items()})
    assert len(moved) >= 5
    width = CONFIG.hidden_size if kind == "eagle1 parts" else draft.fc.shape[1]
    features = rng.standard_normal((7, width)).astype(np.float32)
    tokens = rng.integers(0, CONFIG.vocab_size, 7)
    expected = by_hand(draft, target, features.astype(np.float64), tokens)
    found = eagle_jax.draft_forward(draft, target, features[None], jnp.asarray(tokens[None], jnp.int32), jnp.array([7]))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[0], theirs, atol=2e-4 * np.abs(theirs).max())
