"""Attention of training: causal inside each document, and in later steps each row's own keys.

Letters: B batch, S positions, N query heads, K key-value heads, G = N / K, H head dim, M later steps, Q queries of a
block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from eagle_jax.models.layers import dot, merge_parts, softmax_part
from eagle_jax.train.layout import Layout

BLOCK = 512  # queries whose scores exist at a time


def causal_part(q: jax.Array, k: jax.Array, v: jax.Array, text: Layout) -> tuple[jax.Array, ...]:
    """Causal attention inside each document, before normalisation, a block of queries at a time.

    No scores or mask of S x S exist, forward or backward: a block's are computed again for its gradient.

    Args:
      q: [B, K, G, S, H]. k, v: [B, K, S, H]. text: which keys a query sees, at least one.
    Returns:
      As `softmax_part`, [B, K, G, S, 1], [B, K, G, S, 1] and [B, K, G, S, H].
    """
    batch, kv_heads, groups, width, head_dim = q.shape
    block = min(BLOCK, width)
    count = -(-width // block)
    more = count * block - width
    padded = jnp.pad(q, [(0, 0)] * 3 + [(0, more), (0, 0)])
    blocks = jnp.moveaxis(padded.reshape(batch, kv_heads, groups, count, block, head_dim), 3, 0)

    def in_blocks(places, fill):  # [B, S] -> [count, B, Q]
        places = jnp.pad(places, [(0, 0), (0, more)], constant_values=fill)
        return jnp.moveaxis(places.reshape(batch, count, block), 1, 0)

    @jax.checkpoint
    def part(of_block):
        start, queries, first, end = of_block
        rows, keys = start + jnp.arange(block)[None, :, None], jnp.arange(width)[None, None]
        seen = (keys <= rows) & (keys >= first[:, :, None]) & (keys < end[:, :, None])
        flat = queries.reshape(batch, kv_heads, groups * block, head_dim)
        return softmax_part(flat, k, v, seen, block)

    starts = jnp.arange(count) * block
    parts = jax.lax.map(part, (starts, blocks, in_blocks(text.first, 0), in_blocks(text.end, width)))

    def whole(values):  # [count, B, K, G * Q, X] -> [B, K, G, S, X]
        values = values.reshape(count, batch, kv_heads, groups, block, -1)
        return jnp.moveaxis(values, 0, 3).reshape(batch, kv_heads, groups, count * block, -1)[:, :, :, :width]

    return tuple(map(whole, parts))


def causal(q: jax.Array, k: jax.Array, v: jax.Array, text: Layout) -> jax.Array:
    """Causal attention inside each document: q [B, S, N, H], k, v [B, K, S, H] -> [B, S, N, H]."""
    return finished(causal_part(grouped(q, k.shape[1]), k, v, text)).astype(q.dtype)


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
