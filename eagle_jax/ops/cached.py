"""Attention to a KV cache: in one product over all its positions, or in blocks up to the filled length.

Letters: B batch, T new tokens, M keys, S cache positions, K key-value heads, G query heads of each, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from eagle_jax.ops.softmax import Part, merge_parts, softmax_part
from eagle_jax.ops.spec import Spec


class CacheLayer(NamedTuple):
    """One layer of a KV cache: k, v [B, K, S, H], whose first `length` [B] positions are committed."""

    k: jax.Array
    v: jax.Array
    length: jax.Array


class Queries(NamedTuple):
    """Queries [B, K, G * T, H] of `tokens` = T new tokens. A window reads their positions [B, T]."""

    grouped: jax.Array
    tokens: int
    spec: Spec
    positions: jax.Array | None

    def part(self, keys: jax.Array, values: jax.Array, positions: jax.Array, filled: jax.Array) -> Part:
        """Attends to keys at positions [1, M], masking those that are not `filled` [B, M]."""
        seen = filled[:, None]
        if self.positions is not None and self.spec.window is not None:
            seen = seen & self.spec.sees(self.positions[:, :, None], positions[:, None])
        return softmax_part(self.grouped, keys, values, seen, self.tokens, self.spec)


def add_whole(queries: Queries, result: Part, cache: CacheLayer) -> Part:
    """Merges `result` with attention to the cache, in one product over all its positions."""
    positions = jnp.arange(cache.k.shape[2], dtype=jnp.int32)[None]
    return merge_parts(result, queries.part(cache.k, cache.v, positions, positions < cache.length[:, None]))


def add_blocks(size: int, queries: Queries, result: Part, cache: CacheLayer) -> Part:
    """Does as `add_whole`, in blocks of `size` positions, up to the longest sequence of the batch."""
    size = min(size, cache.k.shape[2])

    def add_block(index, result):
        start = jnp.minimum(index * size, cache.k.shape[2] - size)  # the last block may overlap the one before
        block_k = jax.lax.dynamic_slice_in_dim(cache.k, start, size, axis=2)
        block_v = jax.lax.dynamic_slice_in_dim(cache.v, start, size, axis=2)
        positions = start + jnp.arange(size, dtype=jnp.int32)[None]
        filled = (positions >= index * size) & (positions < cache.length[:, None])
        return merge_parts(result, queries.part(block_k, block_v, positions, filled))

    return jax.lax.fori_loop(0, -(-jnp.max(cache.length) // size), add_block, result)
