"""KVCache: the keys and values of committed tokens.

Letters: B batch, K key-value heads, S rows, H head dim, T new tokens.

Rows at and past a sequence's length hold anything: attention masks them by `length`, and the next commit
overwrites them. So rejected tree nodes need no cleaning up, and a finished row needs no care.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from eagle_jax.ops.cached import CacheLayer
from eagle_jax.sharding import CACHE_RULE, fitting, mesh_of

# Cache rows come in whole tiles of the accelerators' matrix products; else XLA pads, that is copies, the cache.
ROW_TILE = 128

NewKV = Sequence[tuple[jax.Array, jax.Array]]  # the keys and values of T new tokens, a [B, K, T, H] pair a layer


class CacheShape(Protocol):
    """The numbers of a model's config that give its cache its shape."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int:
        """K."""

    @property
    def head_dim(self) -> int:
        """H."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """k, v: one [B, K, S, H] array a layer (a list, not a stack: no slicing copies); length [B] int32."""

    k: list[jax.Array]
    v: list[jax.Array]
    length: jax.Array

    @classmethod
    def zeros(cls, config: CacheShape, batch: int, rows: int, dtype: Any) -> KVCache:
        """An empty cache of `rows` rows for each of `batch` sequences."""
        shape = (batch, config.num_kv_heads, rows, config.head_dim)
        return cls(
            k=[jnp.zeros(shape, dtype) for _ in range(config.num_layers)],
            v=[jnp.zeros(shape, dtype) for _ in range(config.num_layers)],
            length=jnp.zeros(batch, jnp.int32),
        )

    @property
    def rows(self) -> int:
        """S, the rows a sequence can hold."""
        return self.k[0].shape[2]

    def layer(self, index: int) -> CacheLayer:
        return CacheLayer(self.k[index], self.v[index], self.length)

    def with_length(self, length: jax.Array) -> KVCache:
        return dataclasses.replace(self, length=length)

    def write_layer(self, index: int, k: jax.Array, v: jax.Array, start: jax.Array) -> CacheLayer:
        """One layer with new rows, as `write` puts them there."""
        return CacheLayer(_write(self.k[index], k, start), _write(self.v[index], v, start), self.length)

    def write(self, new_kv: NewKV, start: jax.Array) -> KVCache:
        """The cache with new keys and values at `start`, one offset [] for the whole batch or one a sequence [B].

        `length` stays. The caller leaves room: past the last row, `dynamic_update_slice` would clamp and
        overwrite committed rows.
        """
        return dataclasses.replace(
            self,
            k=[_write(cache, new, start) for cache, (new, _) in zip(self.k, new_kv, strict=True)],
            v=[_write(cache, new, start) for cache, (_, new) in zip(self.v, new_kv, strict=True)],
        )


def _write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    new = new.astype(cache.dtype)
    if start.ndim == 0:
        return put(cache, new, (0, 0, start, 0))
    mesh = mesh_of(cache)
    if mesh is None:
        return _write_each(cache, new, start)
    spec = fitting(CACHE_RULE, cache.shape, mesh)  # every device writes its own part
    return jax.shard_map(_write_each, mesh=mesh, in_specs=(spec, spec, P(spec[0])), out_specs=spec)(cache, new, start)


def _write_each(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    # One slice a sequence: a batched update would become a scatter, which TPUs answer with copies.
    for row in range(cache.shape[0]):
        cache = put(cache, new[row : row + 1], (row, 0, start[row], 0))
    return cache


def put(array: jax.Array, new: jax.Array, start: Sequence[int | jax.Array]) -> jax.Array:
    """`dynamic_update_slice` with int32 indices: Python's would be int64 where 64-bit types are on, and not mix."""
    place = [np.int32(index) if isinstance(index, int) else index.astype(jnp.int32) for index in start]
    return jax.lax.dynamic_update_slice(array, new, place)


def take_tokens(new_kv: NewKV, index: jax.Array) -> NewKV:
    """The keys and values [B, K, T, H] of the new tokens at index [B, R]: [B, K, R, H], for every layer."""
    gather = jax.vmap(lambda array, i: array[:, i])
    return [(gather(k, index), gather(v, index)) for k, v in new_kv]
