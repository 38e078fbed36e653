"""A DFlash head equals a transcription of its published description in NumPy, position by position."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax import Committed, ConfigError, StaticTree, TargetOutput, generate
from eagle_jax.models import params
from tests.drafts.kinds import KINDS
from tests.drafts.test_head_parts import norm, rotate
from tests.drafts.test_lossless import CONFIG, target_of


def logits_by_hand(draft, target, features, block, first):
    """features [context, taps * hidden] of the positions before `first`, the block's. -> logits [block - 1, vocab]."""
    config, eps = draft.config, draft.config.rms_norm_eps
    w = {path: np.asarray(array, np.float64) for path, array in params.flatten(draft).items()}
    context = norm(features @ w["fc"].T, w["hidden_norm"], eps)
    x = np.asarray(target.embed[...], np.float64)[block]
    groups = config.num_heads // config.num_kv_heads
    keys_at = np.arange(first + len(block))
    queries_at = keys_at[first:]

    def heads(x, path, one, positions=None):
        y = np.einsum("td,nhd->tnh", x, w[f"{path}.attention.{one}"])
        if positions is None:
            return y
        y = norm(y, w[f"{path}.attention.{one}_norm"], eps)
        whole = np.zeros((positions[-1] + 1, *y.shape[1:]))  # `rotate` counts from 0
        whole[positions] = y
        return rotate(whole, config.rope.theta)[positions]

    for index, window in enumerate(config.windows):
        path = f"layers.{index}"
        h = norm(x, w[f"{path}.input_norm"], eps)
        both = np.concatenate([context, h])
        q = heads(h, path, "q", queries_at)
        k, v = heads(both, path, "k", keys_at), heads(both, path, "v")
        k, v = (np.repeat(y, groups, axis=1) for y in (k, v))
        scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(config.head_dim)
        seen = np.ones((len(block), len(keys_at)), bool)
        if window is not None:
            seen &= (keys_at > queries_at[:, None] - window) | (keys_at >= first)
        if config.causal:
            seen &= keys_at <= queries_at[:, None]
        weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
        mixed = np.einsum("nqk,knh->qnh", weights / weights.sum(axis=-1, keepdims=True), v)
        x = x + mixed.reshape(len(block), -1) @ w[f"{path}.attention.o"].T
        h = norm(x, w[f"{path}.post_attention_norm"], eps)
        gate, up = (h @ w[f"{path}.mlp.{one}"].T for one in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{path}.mlp.down"].T
    return norm(x, w["norm"], eps)[1:] @ np.asarray(target.output_weight(), np.float64).T


@jax.jit
def run(target, draft, tokens, lengths):
    """Runs a block of 4 after contexts of 7 and 4 positions; the first sequence gets its last 3 in a second commit."""
    positions = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), (2, 8))
    mask = jnp.broadcast_to(jnp.tri(8, dtype=bool), (2, 8, 8))
    output = target(tokens, positions, mask, prompt_lengths=lengths, taps=draft.taps(target))
    memory = draft.start(target, 2, 128)
    for start, count in ((0, (4, 4)), (4, (3, 0))):
        new = slice(start, start + 4)
        taken = TargetOutput(output.hidden[:, new], output.taps[:, new])
        counts = jnp.full(2, start, jnp.int32), jnp.array(count, jnp.int32)
        memory = draft.update(target, memory, Committed(tokens[:, new], tokens[:, new], *counts, taken, lengths))
    root = tokens[jnp.arange(2), lengths - 1]
    return output.taps, root, draft.block_logits(target, memory, root, 4, lengths)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_numpy(causal):
    target, draft = target_of(0), KINDS["dflash"].build(CONFIG, 1, 6.0)
    draft.config = dataclasses.replace(draft.config, causal=causal)
    tokens = np.random.default_rng(0).integers(2, CONFIG.vocab_size, (2, 8)).astype(np.int32)
    features, root, ours = run(target, draft, tokens, np.array([8, 5], np.int32))
    for row, length in enumerate((8, 5)):
        block = np.array([int(root[row]), 1, 1, 1])
        before = np.asarray(features, np.float64)[row, : length - 1]
        theirs = logits_by_hand(draft, target, before, block, length - 1)
        np.testing.assert_allclose(ours[row], theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours).max() > 1


def test_what_does_not_fit_is_refused():
    target, draft = target_of(0), KINDS["dflash"].build(CONFIG, 1, 6.0)
    prompt = jnp.array([[3, 4, 5]], jnp.int32), jnp.array([3], jnp.int32)
    with pytest.raises(ValueError, match=r"depth 5 needs a block of 6.*trained on blocks of 5.*depth 4 or less"):
        generate(target, draft, *prompt, tree=StaticTree.chain(5), max_new_tokens=2)
    draft.config = dataclasses.replace(draft.config, taps=(0, CONFIG.num_layers + 1))
    with pytest.raises(ConfigError, match=rf"taps layer {CONFIG.num_layers + 1}, the target has {CONFIG.num_layers}"):
        generate(target, draft, *prompt, tree=StaticTree.chain(2), max_new_tokens=2)
