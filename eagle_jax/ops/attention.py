"""Attention over the rows of a cache and over new rows, in parts of one softmax.

Letters: B batch, T new tokens, M rows of new keys, S cache rows, N query heads, K key-value heads, G = N / K,
H head dim.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eagle_jax.ops.linear import dot

# Rows of a cache attended to at a time when going through it in blocks: for a chunk of a prompt, and on a CPU.
CACHE_BLOCK = 512
CPU_CACHE_BLOCK = 128

# What `softmax_part` returns.
Part = tuple[jax.Array, ...]


class CacheLayer(NamedTuple):
    """One layer of a cache: k, v [B, K, S, H], of which the first `length` [B] rows are committed."""

    k: jax.Array
    v: jax.Array
    length: jax.Array


class Window(NamedTuple):
    """Sliding-window mask with sinks: a query sees positions below `first` and from its `oldest` [B, T] on."""

    first: int
    oldest: jax.Array

    def sees(self, positions: jax.Array) -> jax.Array:
        """Marks which of the positions [B or 1, M] each query sees: [B, T, M] bool."""
        return (positions < self.first)[:, None] | (positions[:, None] >= self.oldest[:, :, None])


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    cache: CacheLayer | None = None,
    *,
    window: Window | None = None,
    in_blocks: bool = False,
) -> jax.Array:
    """Attends to the positions of a cache and to new ones: one softmax, computed in parts and merged.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, M, H] new rows.
      mask: [B, T, M], True where a query sees a new row. Every query must see at least one.
      cache: every query sees its rows below `length`; row i is position i.
      window: limits what a query sees of the cache.
      in_blocks: go through the cache in blocks, and only as far as it is filled. For many queries (a chunk of a
        prompt), whose scores over the whole cache would be large beside it.
    Returns:
      [B, T, N, H].
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    # Query heads that share a key-value head become more queries of it, [B, K, G * T, H]: a plain batched product.
    grouped = jnp.moveaxis(q.reshape(batch, tokens, kv_heads, -1, head_dim), 1, 3)
    grouped = grouped.reshape(batch, kv_heads, -1, head_dim)

    with jax.named_scope("new_kv"):
        result = softmax_part(grouped, k, v, mask, tokens)
    # Without the barrier XLA concatenates new keys and cache into one matmul, which copies the cache.
    queries = _Queries(jax.lax.optimization_barrier(grouped), tokens, window)
    with jax.named_scope("cache"):
        if cache is not None and in_blocks:
            result = _add_blocks(queries, CACHE_BLOCK, result, cache)
        elif cache is not None:
            # A CPU saves the arithmetic on unused rows; accelerators, bound by bytes and launches, want one product.
            in_cpu_blocks = functools.partial(_add_blocks, queries, CPU_CACHE_BLOCK)
            whole = functools.partial(_add_whole, queries)
            result = jax.lax.platform_dependent(result, cache, cpu=in_cpu_blocks, default=whole)
    total, out = result[1:]
    out = (out / total).reshape(batch, kv_heads, -1, tokens, head_dim)
    return jnp.moveaxis(out, 3, 1).reshape(batch, tokens, heads, head_dim).astype(q.dtype)


class _Queries(NamedTuple):
    """Queries [B, K, G * T, H] of `tokens` T positions, and which positions of a cache they may see."""

    grouped: jax.Array
    tokens: int
    window: Window | None

    def part(self, keys: jax.Array, values: jax.Array, positions: jax.Array, filled: jax.Array) -> Part:
        """Attends to keys at positions [1, M], where `filled` [B, M]."""
        filled = filled[:, None]
        seen = filled if self.window is None else filled & self.window.sees(positions)
        return softmax_part(self.grouped, keys, values, seen, self.tokens)


def _add_whole(queries: _Queries, result: Part, cache: CacheLayer) -> Part:
    positions = jnp.arange(cache.k.shape[2], dtype=jnp.int32)[None]
    return merge_parts(result, queries.part(cache.k, cache.v, positions, positions < cache.length[:, None]))


def _add_blocks(queries: _Queries, size: int, result: Part, cache: CacheLayer) -> Part:
    """Goes through the cache in blocks of `size` positions, as far as any sequence fills it."""
    size = min(size, cache.k.shape[2])

    def add_block(index, result):
        start = jnp.minimum(index * size, cache.k.shape[2] - size)  # the last block may overlap the one before
        block_k = jax.lax.dynamic_slice_in_dim(cache.k, start, size, axis=2)
        block_v = jax.lax.dynamic_slice_in_dim(cache.v, start, size, axis=2)
        positions = start + jnp.arange(size, dtype=jnp.int32)[None]
        filled = (positions >= index * size) & (positions < cache.length[:, None])
        return merge_parts(result, queries.part(block_k, block_v, positions, filled))

    return jax.lax.fori_loop(0, -(-jnp.max(cache.length) // size), add_block, result)


def softmax_part(q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, tokens: int) -> Part:
    """Computes attention of q [B, K, G * T, H] over some of the keys, before normalisation.

    Returns:
      The largest score and the sum of exponentials [B, K, G * T, 1], and the weighted values [B, K, G * T, H]; float32.
    """
    batch, kv_heads, queries, head_dim = q.shape
    scores = dot("bkqh,bksh->bkqs", q, keys, jnp.float32) * head_dim**-0.5
    scores = scores.reshape(batch, kv_heads, -1, tokens, keys.shape[2])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf).reshape(batch, kv_heads, queries, keys.shape[2])
    # If all keys are masked the maximum is -inf; clamp it so that exp gives 0, not NaN.
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - top)
    out = dot("bkqs,bksh->bkqh", weights.astype(values.dtype), values, jnp.float32)
    return top, weights.sum(axis=-1, keepdims=True), out


def merge_parts(a: Part, b: Part) -> Part:
    """Merges two parts of one softmax."""
    top = jnp.maximum(a[0], b[0])
    scale_a, scale_b = jnp.exp(a[0] - top), jnp.exp(b[0] - top)
    return top, a[1] * scale_a + b[1] * scale_b, a[2] * scale_a + b[2] * scale_b
