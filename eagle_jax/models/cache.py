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
    """The fields of a model's config that determine the shape of its cache.

    A config may also have `windows`: the sliding window of each layer, None for full attention. Such a layer's
    attention must be `ops.attention` with that window in its spec, because its cache may be a ring.
    """

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

    rings: for each layer, its sliding window if its array is a ring (see `CacheLayer`), else None; (): no rings.
    """

    k: list[CacheArray]
    v: list[CacheArray]
    length: Int[Array, " batch"]
    rings: tuple[int | None, ...] = dataclasses.field(default=(), metadata={"static": True})

    @classmethod
    def zeros(cls, config: CacheShape, batch: int, rows: int, dtype: Any, ring_margin: int | None = None) -> KVCache:
        """Allocates an empty cache of `rows` positions for each of `batch` sequences.

        Args:
          ring_margin: the most positions that one write will hold. Layers with a window then get shorter arrays, which
            are rings; see `layer_rows`. None: no rings.
        """
        sizes = [rows] * config.num_layers if ring_margin is None else layer_rows(config, rows, ring_margin)
        windows = zip(_windows_of(config), sizes, strict=True)
        rings = tuple(window if size < rows else None for window, size in windows)
        shapes = [(batch, config.num_kv_heads, size, config.head_dim) for size in sizes]
        return cls(
            k=[jnp.zeros(shape, dtype) for shape in shapes],
            v=[jnp.zeros(shape, dtype) for shape in shapes],
            length=jnp.zeros(batch, jnp.int32),
            rings=rings if any(rings) else (),
        )

    @property
    def rows(self) -> int:
        """The positions that the longest layer can hold. Texts may be longer if all layers are rings."""
        return max(array.shape[2] for array in self.k)

    @property
    def most_new(self) -> int:
        """The most positions that one write may hold.

        In a ring, more would overwrite positions inside the window of the query at `length`.
        """
        return min(array.shape[2] - (window or 0) for array, window in zip(self.k, self._windows, strict=True))

    @property
    def _windows(self) -> tuple[int | None, ...]:
        """The windows of rings, None for other layers."""
        return self.rings or (None,) * len(self.k)

    def layer(self, index: int) -> CacheLayer:
        return CacheLayer(self.k[index], self.v[index], self.length, self._windows[index])

    def with_length(self, length: Int[Array, " batch"]) -> KVCache:
        return dataclasses.replace(self, length=length)

    def write_layer(
        self,
        index: int,
        k: Float[Array, "batch kv_heads new head_dim"],
        v: Float[Array, "batch kv_heads new head_dim"],
        start: Start,
        end: Int[Array, " batch"] | None = None,
    ) -> CacheLayer:
        """Writes new keys and values at `start` into one layer, as `write` does, and returns that layer.

        Args:
          end: the lengths of the texts. A ring takes padding from there on: written further on, it would overwrite
            positions that later queries see.
        """
        layer = self.layer(index)
        if layer.window is not None and end is not None:
            start = jnp.minimum(start, end)
        k, v = (_write(old, new, start, layer.window) for old, new in ((layer.k, k), (layer.v, v)))
        return dataclasses.replace(layer, k=k, v=v)

    def write(self, new_kv: NewKV, start: Start) -> KVCache:
        """Writes new keys and values at `start`.

        Leaves `length` as it is. The caller ensures that they fit: past the end, `dynamic_update_slice` would clamp and
        overwrite committed positions.
        """
        windows = self._windows
        return dataclasses.replace(
            self,
            k=[_write(cache, k, start, window) for cache, (k, _), window in zip(self.k, new_kv, windows, strict=True)],
            v=[_write(cache, v, start, window) for cache, (_, v), window in zip(self.v, new_kv, windows, strict=True)],
        )


def _windows_of(config: CacheShape) -> tuple[int | None, ...]:
    """Returns each layer's sliding window, from the config's `windows` if it has them; None for full attention."""
    windows = getattr(config, "windows", ()) or (None,) * config.num_layers
    return windows[: config.num_layers]


def layer_rows(config: CacheShape, rows: int, ring_margin: int) -> list[int]:
    """Returns the rows of each layer's array: as many as the positions of a sequence, or fewer in a ring.

    A ring holds the window and the positions of one write, in whole tiles.
    """

    def of(window: int | None) -> int:
        return rows if window is None else min(rows, -(-(window + ring_margin) // ROW_TILE) * ROW_TILE)

    return [of(window) for window in _windows_of(config)]


def _write(
    cache: CacheArray, new: Float[Array, "batch kv_heads new head_dim"], start: Start, window: int | None
) -> CacheArray:
    new = new.astype(cache.dtype)
    if window is None and start.ndim == 0:
        return put(cache, new, (0, 0, start, 0))
    if window is not None and new.shape[2] > cache.shape[2] - window:
        raise ValueError(f"a ring of {cache.shape[2]} rows, window {window}, cannot take {new.shape[2]} at once")
    write_each = _write_each if window is None else _write_ring
    start, mesh = jnp.broadcast_to(start, cache.shape[:1]), mesh_of(cache)
    if mesh is None:
        return write_each(cache, new, start)
    spec = fitting(CACHE_RULE, cache.shape, mesh)  # every device writes its own shard
    return jax.shard_map(write_each, mesh=mesh, in_specs=(spec, spec, P(spec[0])), out_specs=spec)(cache, new, start)


def _write_each(
    cache: CacheArray, new: Float[Array, "batch kv_heads new head_dim"], start: Int[Array, " batch"]
) -> CacheArray:
    # One slice for each sequence: a batched update would become a scatter, which copies the cache on TPUs.
    for row in range(cache.shape[0]):
        cache = put(cache, new[row : row + 1], (row, 0, start[row], 0))
    return cache


def _write_ring(
    cache: CacheArray, new: Float[Array, "batch kv_heads new head_dim"], start: Int[Array, " batch"]
) -> CacheArray:
    if new.shape[2] == 1:  # cannot go on past the ring's end
        return _write_each(cache, new, start % cache.shape[2])
    return jax.lax.platform_dependent(cache, new, start, cuda=ring_by_scatter, default=ring_by_slices)


def ring_by_scatter(
    cache: CacheArray, new: Float[Array, "batch kv_heads new head_dim"], start: Int[Array, " batch"]
) -> CacheArray:
    """Writes into rings by a scatter: on a GPU one kernel, in place."""
    batch, _, rows, _ = cache.shape
    row = (start[:, None] + jnp.arange(new.shape[2], dtype=jnp.int32)[None]) % rows
    place = cache.at[jnp.arange(batch, dtype=jnp.int32)[:, None], :, row]
    return place.set(jnp.swapaxes(new, 1, 2), unique_indices=True, mode="promise_in_bounds")


def ring_by_slices(
    cache: CacheArray, new: Float[Array, "batch kv_heads new head_dim"], start: Int[Array, " batch"]
) -> CacheArray:
    """Writes into rings by slices: a CPU runs a scatter as a loop, and a TPU copies the cache for it."""
    # Two slices for each sequence: from `first` on, and the ring's beginning, where the new rows go on past its end.
    # Rows of a slice that are not new are written back as they were.
    batch, heads, rows, head_dim = cache.shape
    count = new.shape[2]
    for row in range(batch):
        first = start[row] % rows
        for place in (jnp.minimum(first, rows - count), jnp.zeros_like(first)):
            at = (row, 0, place, 0)
            old = jax.lax.dynamic_slice(cache, _int32(at), (1, heads, count, head_dim))
            index = (place + jnp.arange(count, dtype=jnp.int32) - first) % rows  # of the new row for each
            values = jnp.take(new[row : row + 1], index, axis=2, mode="clip")
            cache = put(cache, jnp.where((index < count)[:, None], values, old), at)
    return cache


def put(array: jax.Array, new: jax.Array, start: Sequence[int | Int[Array, ""]]) -> jax.Array:
    """Calls `dynamic_update_slice` with int32 indices."""
    return jax.lax.dynamic_update_slice(array, new, _int32(start))


def _int32(start: Sequence[int | Int[Array, ""]]) -> list[Any]:
    """Makes int32 indices of a slice.

    With 64-bit types enabled, Python ints would become int64, which may not be mixed with traced int32 indices.
    """
    return [np.int32(index) if isinstance(index, int) else index.astype(jnp.int32) for index in start]


def take_tokens(new_kv: NewKV, index: Int[Array, "batch taken"]) -> list[tuple[jax.Array, jax.Array]]:
    """Gathers the new tokens at `index` from every layer's keys and values: [batch, kv_heads, taken, head_dim]."""
    gather = jax.vmap(lambda array, i: array[:, i])
    return [(gather(k, index), gather(v, index)) for k, v in new_kv]
