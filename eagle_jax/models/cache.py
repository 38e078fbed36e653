"""KVCache: the keys and values of committed tokens.

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
from jaxtyping import Array, Float, Int

from eagle_jax.ops.cached import CacheLayer
from eagle_jax.sharding import CACHE_RULE, fitting, mesh_of

# Caches hold a multiple of so many positions, a tile of accelerators' matmuls; else XLA pads, and so copies, the cache.
ROW_TILE = 128

# Keys and values of new tokens, a pair for each layer.
NewKV = Sequence[tuple[Float[Array, "batch kv_heads new head_dim"], Float[Array, "batch kv_heads new head_dim"]]]
CacheArray = Float[Array, "batch kv_heads cache head_dim"]
Start = Int[Array, ""] | Int[Array, " batch"]  # a position for the whole batch, or one for each sequence


class CacheShape(Protocol):
    """The fields of a model's config that determine the shape of its cache."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values, an array for each layer, and how many positions of each sequence are committed.

    A list, not a stacked array: slicing a stack would copy each layer.
    """

    k: list[CacheArray]
    v: list[CacheArray]
    length: Int[Array, " batch"]

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
        """The positions that a sequence can hold."""
        return self.k[0].shape[2]

    def layer(self, index: int) -> CacheLayer:
        return CacheLayer(self.k[index], self.v[index], self.length)

    def with_length(self, length: Int[Array, " batch"]) -> KVCache:
        return dataclasses.replace(self, length=length)

    def write_layer(
        self,
        index: int,
        k: Float[Array, "batch kv_heads new head_dim"],
        v: Float[Array, "batch kv_heads new head_dim"],
        start: Start,
    ) -> CacheLayer:
        """Writes new keys and values at `start` into one layer, as `write` does, and returns that layer."""
        return CacheLayer(_write(self.k[index], k, start), _write(self.v[index], v, start), self.length)

    def write(self, new_kv: NewKV, start: Start) -> KVCache:
        """Writes new keys and values at `start`.

        Leaves `length` as it is. The caller ensures that they fit: past the end, `dynamic_update_slice` would clamp and
        overwrite committed positions.
        """
        return dataclasses.replace(
            self,
            k=[_write(cache, new, start) for cache, (new, _) in zip(self.k, new_kv, strict=True)],
            v=[_write(cache, new, start) for cache, (_, new) in zip(self.v, new_kv, strict=True)],
        )


def _write(cache: CacheArray, new: Float[Array, "batch kv_heads new head_dim"], start: Start) -> CacheArray:
    new = new.astype(cache.dtype)
    if start.ndim == 0:
        return put(cache, new, (0, 0, start, 0))
    mesh = mesh_of(cache)
    if mesh is None:
        return _write_each(cache, new, start)
    spec = fitting(CACHE_RULE, cache.shape, mesh)  # every device writes its own shard
    return jax.shard_map(_write_each, mesh=mesh, in_specs=(spec, spec, P(spec[0])), out_specs=spec)(cache, new, start)


def _write_each(
    cache: CacheArray, new: Float[Array, "batch kv_heads new head_dim"], start: Int[Array, " batch"]
) -> CacheArray:
    # One slice for each sequence: a batched update would become a scatter, which copies the cache on TPUs.
    for row in range(cache.shape[0]):
        cache = put(cache, new[row : row + 1], (row, 0, start[row], 0))
    return cache


def put(array: jax.Array, new: jax.Array, start: Sequence[int | Int[Array, ""]]) -> jax.Array:
    """Calls `dynamic_update_slice` with int32 indices.

    With 64-bit types enabled, Python ints would become int64, which may not be mixed with traced int32 indices.
    """
    place = [np.int32(index) if isinstance(index, int) else index.astype(jnp.int32) for index in start]
    return jax.lax.dynamic_update_slice(array, new, place)


def take_tokens(new_kv: NewKV, index: Int[Array, "batch taken"]) -> list[tuple[jax.Array, jax.Array]]:
    """Gathers the new tokens at `index` from every layer's keys and values: [batch, kv_heads, taken, head_dim]."""
    gather = jax.vmap(lambda array, i: array[:, i])
    return [(gather(k, index), gather(v, index)) for k, v in new_kv]
