"""Attention to a KV cache: in one product over all its positions, or in blocks up to the filled length."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.ops.softmax import Part, merge_parts, softmax_part
from eagle_jax.ops.spec import Spec


class CacheLayer(NamedTuple):
    """One layer of a KV cache, whose first `length` positions are committed."""

    k: Float[Array, "batch kv_heads cache head_dim"]
    v: Float[Array, "batch kv_heads cache head_dim"]
    length: Int[Array, " batch"]


class Queries(NamedTuple):
    """Queries of `tokens` new tokens, grouped as `softmax` says. A window reads their positions."""

    grouped: Float[Array, "batch kv_heads queries head_dim"]
    tokens: int
    spec: Spec
    positions: Int[Array, "batch new"] | None

    def part(
        self,
        keys: Float[Array, "batch kv_heads kv head_dim"],
        values: Float[Array, "batch kv_heads kv head_dim"],
        positions: Int[Array, "1 kv"],
        filled: Bool[Array, "batch kv"],
    ) -> Part:
        """Attends to keys at these positions, masking those that are not `filled`."""
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
