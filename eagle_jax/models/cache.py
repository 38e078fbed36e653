"""KVCache: the keys and values of committed tokens.

Letters: B batch, K key-value heads, S cache positions, H head dim, T new tokens.

Positions at and past a sequence's length hold garbage: attention masks them by `length`, and the next commit overwrites
them. Rejected tree nodes and finished sequences therefore need no cleaning up.
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

# Caches hold a multiple of so many positions, a tile of accelerators' matmuls; else XLA pads, and so copies, the cache.
ROW_TILE = 128

NewKV = Sequence[tuple[jax.Array, jax.Array]]  # keys and values of T new tokens, a [B, K, T, H] pair for each layer


class CacheShape(Protocol):
    """The fields of a model's config that determine the shape of its cache."""

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
    """Keys and values k, v, one [B, K, S, H] array for each layer, and the committed length [B] int32.

    A list, not a stacked array: slicing a stack would copy each layer.
    """

    k: list[jax.Array]
    v: list[jax.Array]
    length: jax.Array

    @classmethod
    def zeros(cls, config: CacheShape, batch: int, rows: int, dtype: Any) -> KVCache:
        """Allocates an empty cache of `rows` positions for each of `batch` sequences."""
        shape = (batch, config.num_kv_heads, rows, config.head_dim)
        return cls(
            k=[jnp.zeros(shape, dtype) for _ in range(config.num_layers)],
            v=[jnp.zeros(shape, dtype) for _ in range(config.num_layers)],
            length=jnp.zeros(batch, jnp.int32),
        )

    @property
    def rows(self) -> int:
        """S, the positions that a sequence can hold."""
        return self.k[0].shape[2]

    def layer(self, index: int) -> CacheLayer:
        return CacheLayer(self.k[index], self.v[index], self.length)

    def with_length(self, length: jax.Array) -> KVCache:
        return dataclasses.replace(self, length=length)

    def write_layer(self, index: int, k: jax.Array, v: jax.Array, start: jax.Array) -> CacheLayer:
        """Writes new keys and values at `start` into one layer, as `write` does, and returns that layer."""
        return CacheLayer(_write(self.k[index], k, start), _write(self.v[index], v, start), self.length)

    def write(self, new_kv: NewKV, start: jax.Array) -> KVCache:
        """Writes new keys and values at `start`: one offset [] for the whole batch, or one for each sequence [B].

        Leaves `length` as it is. The caller ensures that they fit: past the end, `dynamic_update_slice` would clamp and
        overwrite committed positions.
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
    spec = fitting(CACHE_RULE, cache.shape, mesh)  # every device writes its own shard
    return jax.shard_map(_write_each, mesh=mesh, in_specs=(spec, spec, P(spec[0])), out_specs=spec)(cache, new, start)


def _write_each(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    # One slice for each sequence: a batched update would become a scatter, which copies the cache on TPUs.
    for row in range(cache.shape[0]):
        cache = put(cache, new[row : row + 1], (row, 0, start[row], 0))
    return cache


def put(array: jax.Array, new: jax.Array, start: Sequence[int | jax.Array]) -> jax.Array:
    """Calls `dynamic_update_slice` with int32 indices.

    With 64-bit types enabled, Python ints would become int64, which may not be mixed with traced int32 indices.
    """
    place = [np.int32(index) if isinstance(index, int) else index.astype(jnp.int32) for index in start]
    return jax.lax.dynamic_update_slice(array, new, place)


def take_tokens(new_kv: NewKV, index: jax.Array) -> NewKV:
    """Gathers new tokens at index [B, R] from every layer's keys and values: [B, K, T, H] -> [B, K, R, H]."""
    gather = jax.vmap(lambda array, i: array[:, i])
    return [(gather(k, index), gather(v, index)) for k, v in new_kv]
