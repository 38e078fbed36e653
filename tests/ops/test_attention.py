"""Attention against NumPy in float64, and by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.ops.attention import CACHE_BLOCK, CacheLayer, attention


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax_attention(q, k, v, mask):
    """q [B, T, N, H]; k, v [B, K, M, H]; mask [B, T, M] -> [B, T, N, H], one query at a time, float64."""
    batch, tokens, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(batch, tokens, heads):
        scores = k[b, n // group].astype(np.float64) @ q[b, t, n] / np.sqrt(head_dim)
        weights = np.where(mask[b, t], np.exp(scores - scores[mask[b, t]].max()), 0)
        out[b, t, n] = weights / weights.sum() @ v[b, n // group]
    return out


def random_mask(seed: int, batch: int, tokens: int, rows: int) -> np.ndarray:
    """Each query sees a random half of the rows, and row t modulo their number."""
    mask = np.random.default_rng(seed).random((batch, tokens, rows)) < 0.5
    mask[:, np.arange(tokens), np.arange(tokens) % rows] = True
    return mask


attend = jax.jit(attention, static_argnames="in_blocks")


@pytest.mark.parametrize("tokens", [1, 5, 65, 130])
def test_attention_equals_numpy(tokens):
    q, k, v = normal(0, 2, tokens, 4, 6), normal(1, 2, 2, tokens, 6), normal(2, 2, 2, tokens, 6)
    mask = random_mask(3, 2, tokens, tokens)
    np.testing.assert_allclose(attend(q, k, v, mask), softmax_attention(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize(
    ("tokens", "rows", "in_blocks"),
    [
        (1, 11, False),
        (130, 11, False),
        # In blocks: fewer rows than one block, exactly one, several, a part of one.
        (130, 11, True),
        (1, CACHE_BLOCK, True),
        (9, 2 * CACHE_BLOCK, True),
        (9, 2 * CACHE_BLOCK + 5, True),
    ],
)
def test_cached_attention_equals_attention_over_everything(tokens, rows, in_blocks):
    """Old rows below each sequence's length and new rows under a mask: one softmax over both."""
    lengths = np.array([0, 4, rows])
    q, k, v = normal(0, 3, tokens, 4, 6), normal(1, 3, 2, tokens, 6), normal(2, 3, 2, tokens, 6)
    old_k, old_v = normal(3, 3, 2, rows, 6), normal(4, 3, 2, rows, 6)
    mask = random_mask(5, 3, tokens, tokens)
    both = attend(q, k, v, mask, CacheLayer(old_k, old_v, lengths), in_blocks=in_blocks)
    seen = np.broadcast_to(np.arange(rows) < lengths[:, None, None], (3, tokens, rows))
    all_k, all_v = np.concatenate([old_k, k], axis=2), np.concatenate([old_v, v], axis=2)
    all_rows = np.concatenate([seen, mask], axis=-1)
    np.testing.assert_allclose(both, attend(q, all_k, all_v, all_rows), atol=2e-6)
    some = slice(tokens // 2, tokens // 2 + 3)  # the oracle is slow
    expected = softmax_attention(q[:, some], all_k, all_v, all_rows[:, some])
    np.testing.assert_allclose(both[:, some], expected, atol=2e-6)


def test_rows_past_the_length_hold_anything():
    q, k, v = normal(0, 1, 2, 2, 4), normal(1, 1, 2, 2, 4), normal(2, 1, 2, 2, 4)
    old = np.full((1, 2, 5, 4), 1e30, np.float32)
    old[:, :, :3] = normal(3, 1, 2, 3, 4)
    mask, length = np.ones((1, 2, 2), bool), np.array([3])
    short = attend(q, k, v, mask, CacheLayer(old[:, :, :3], old[:, :, :3], length))
    np.testing.assert_array_equal(np.isfinite(short), True)
    np.testing.assert_allclose(attend(q, k, v, mask, CacheLayer(old, old, length)), short, atol=1e-6)


def test_attention_survives_large_scores():
    """Differences of scores beyond float32's exponent: the largest one takes all."""
    q = np.full((1, 1, 1, 2), 100, np.float32)
    k = np.array([[[[100, 100], [-100, -100]]]], np.float32)
    v = np.array([[[[1, 2], [3, 4]]]], np.float32)
    seen = np.ones((1, 1, 1), bool)
    for new, old in ((0, 1), (1, 0)):
        cache = CacheLayer(k[:, :, old : old + 1], v[:, :, old : old + 1], np.array([1]))
        out = attend(q, k[:, :, new : new + 1], v[:, :, new : new + 1], seen, cache)
        np.testing.assert_array_equal(out[0, 0, 0], [1, 2])


def test_attention_keeps_bfloat16():
    q, k, v = (jnp.asarray(normal(i, 1, 3, 2, 4)).astype(jnp.bfloat16) for i in range(3))
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    out = attend(q, k, v, np.ones((1, 3, 3), bool))
    assert out.dtype == jnp.bfloat16
    exact = softmax_attention(*(np.asarray(x, np.float32) for x in (q, k, v)), np.ones((1, 3, 3), bool))
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.03)
