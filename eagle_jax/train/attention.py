"""Attention of the training-time test: causal over step 0, and each row's own keys of the later steps.

Letters: B batch, S positions, N query heads, K key-value heads, G = N / K, H head dim, M later steps, Q queries of a
block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from eagle_jax.models.layers import dot, merge_parts, softmax_part

BLOCK = 512  # queries whose scores exist at a time


def causal_part(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
    """Causal attention over the keys below each row's length, before normalisation, a block of queries at a time.

    No scores or mask of S x S exist, forward or backward: a block's are computed again for its gradient.

    Args:
      q: [B, K, G, S, H]. k, v: [B, K, S, H]. lengths: [B], at least 1.
    Returns:
      As `softmax_part`, [B, K, G, S, 1], [B, K, G, S, 1] and [B, K, G, S, H].
    """
    batch, kv_heads, groups, width, head_dim = q.shape
    block = min(BLOCK, width)
    count = -(-width // block)
    padded = jnp.pad(q, [(0, 0)] * 3 + [(0, count * block - width), (0, 0)])
    blocks = jnp.moveaxis(padded.reshape(batch, kv_heads, groups, count, block, head_dim), 3, 0)

    @jax.checkpoint
    def part(start_and_queries):
        start, queries = start_and_queries
        rows, keys = start + jnp.arange(block), jnp.arange(width)
        seen = (keys[None, None] <= rows[None, :, None]) & (keys[None, None] < lengths[:, None, None])
        flat = queries.reshape(batch, kv_heads, groups * block, head_dim)
        return softmax_part(flat, k, v, seen, block)

    parts = jax.lax.map(part, (jnp.arange(count) * block, blocks))

    def whole(values):  # [count, B, K, G * Q, X] -> [B, K, G, S, X]
        values = values.reshape(count, batch, kv_heads, groups, block, -1)
        return jnp.moveaxis(values, 0, 3).reshape(batch, kv_heads, groups, count * block, -1)[:, :, :, :width]

    return tuple(map(whole, parts))


def own_part(q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
    """Attention of every row to its own keys of the first `count` later steps; as `causal_part`.

    Args:
      q: [B, K, G, S, H]. k, v: [B, K, M, S, H].
    """
    scores = dot("bkgsh,bkmsh->bkgsm", q, k, jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where((jnp.arange(k.shape[2]) < count)[None, None, None, None], scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - top)
    out = dot("bkgsm,bkmsh->bkgsh", weights.astype(v.dtype), v, jnp.float32)
    return top, weights.sum(axis=-1, keepdims=True), out


def grouped(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, S, N, H] -> [B, K, G, S, H]."""
    batch, width, _, head_dim = q.shape
    return jnp.moveaxis(q.reshape(batch, width, kv_heads, -1, head_dim), 1, 3)


def finished(part: tuple[jax.Array, ...], *more: tuple[jax.Array, ...]) -> jax.Array:
    """Parts of one softmax [B, K, G, S, ...] as its result [B, S, N, H], float32."""
    for other in more:
        part = merge_parts(part, other)
    _, total, out = part
    batch, _, _, width, head_dim = out.shape
    return jnp.moveaxis(out / total, 3, 1).reshape(batch, width, -1, head_dim)
