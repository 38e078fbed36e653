"""Attention to a KV cache: in one product over all its positions, or in blocks up to the filled length."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.ops.softmax import Part, merge_parts, softmax_part
from eagle_jax.ops.spec import Spec


@functools.partial(jax.tree_util.register_dataclass, data_fields=("k", "v", "length"), meta_fields=("window",))
@dataclasses.dataclass(frozen=True)
class CacheLayer:
    """One layer of a KV cache, whose positions below `length` are committed.

    window: None if row i holds position i. Else the layer is a ring: position p is in row p mod `cache`, and a query
      sees no further back than this sliding window.
    """

    k: Float[Array, "batch kv_heads cache head_dim"]
    v: Float[Array, "batch kv_heads cache head_dim"]
    length: Int[Array, " batch"]
    window: int | None = None

    def positions(self, rows: Int[Array, "1 kv"]) -> tuple[Int[Array, "#batch kv"], Bool[Array, "batch kv"]]:
        """Returns the positions that rows hold, and which of them are committed.

        A row of a ring holds the last position below `length` that belongs there. If a write past `length` has
        overwritten it, it is outside the window of every later query; see `KVCache.most_new`.
        """
        length = self.length[:, None]
        if self.window is None:
            return rows, rows < length
        # A ring of 4 rows and length 6: rows 0 to 3 hold positions 4, 5, 2, 3.
        held = length - 1 - (length - 1 - rows) % self.k.shape[2]
        return held, held >= 0


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
        positions: Int[Array, "#batch kv"],
        filled: Bool[Array, "batch kv"],
    ) -> Part:
        """Attends to keys at these positions, masking those that are not `filled`."""
        seen = filled[:, None]
        if self.positions is not None and self.spec.window is not None:
            seen = seen & self.spec.sees(self.positions[:, :, None], positions[:, None])
        return softmax_part(self.grouped, keys, values, seen, self.tokens, self.spec)


def add_whole(queries: Queries, result: Part, cache: CacheLayer) -> Part:
    """Merges `result` with attention to the cache, in one product over all its positions."""
    rows = jnp.arange(cache.k.shape[2], dtype=jnp.int32)[None]
    return merge_parts(result, queries.part(cache.k, cache.v, *cache.positions(rows)))


def add_blocks(size: int, queries: Queries, result: Part, cache: CacheLayer) -> Part:
    """Does as `add_whole`, in blocks of `size` rows, up to the longest sequence of the batch."""
    size = min(size, cache.k.shape[2])

    def add_block(index, result):
        start = jnp.minimum(index * size, cache.k.shape[2] - size)  # the last block may overlap the one before
        block_k = jax.lax.dynamic_slice_in_dim(cache.k, start, size, axis=2)
        block_v = jax.lax.dynamic_slice_in_dim(cache.v, start, size, axis=2)
        rows = start + jnp.arange(size, dtype=jnp.int32)[None]
        unseen = rows >= index * size
        positions, committed = cache.positions(rows)
        return merge_parts(result, queries.part(block_k, block_v, positions, unseen & committed))

    longest = jnp.max(cache.length)
    if cache.window is not None:
        longest = jnp.minimum(longest, cache.k.shape[2])
    return jax.lax.fori_loop(0, -(-longest // size), add_block, result)
