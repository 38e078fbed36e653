"""Attention: the one door, to a cache while decoding and causal while training, and where a backend is picked.

Letters: B batch, T new tokens, M new keys, S positions, N query heads, K key-value heads, G = N / K, H head dim.

What a layer's queries see and how its scores are made is its `Spec`. A backend says which specs it computes; those
that do not know a spec leave it to plain XLA.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eagle_jax.ops import flash
from eagle_jax.ops.cached import CacheLayer, Queries, add_blocks, add_whole
from eagle_jax.ops.causal import OwnKV, blocks_gradient, finished, grouped, in_blocks, own_part, rounded_blocks
from eagle_jax.ops.layout import Layout
from eagle_jax.ops.softmax import Part, add_sinks, merge_parts, softmax_part
from eagle_jax.ops.spec import PLAIN, Spec

# Positions of a cache attended to at a time when going through it in blocks: for a chunk of a prompt, and on a CPU.
CACHE_BLOCK = 512
CPU_CACHE_BLOCK = 128


class Backend(NamedTuple):
    """A way to compute attention.

    compute: what it does; its table says how it is called.
    platform: where it is picked, "cpu", "cuda" or "tpu"; None: where no other is.
    supports: (spec, q) -> whether it computes this spec for queries of q's dtype and head dim.
    """

    compute: Any
    platform: str | None = None
    supports: Callable[[Spec, jax.Array], bool] = lambda spec, q: True


# (queries, the new keys' part, cache) -> their merged part. A CPU saves the arithmetic on unused positions;
# accelerators, bound by bytes and launches, want one product.
CACHED = (Backend(functools.partial(add_blocks, CPU_CACHE_BLOCK), "cpu"), Backend(add_whole))
# The same for many queries (a chunk of a prompt): their scores over the whole cache would be large beside it.
CACHED_LONG = (Backend(functools.partial(add_blocks, CACHE_BLOCK)),)


class Causal(NamedTuple):
    """Causal attention with a gradient: part(q, k, v, text, spec) and gradient(q, k, v, text, spec, of_part)."""

    part: Callable[..., Part]
    gradient: Callable[..., tuple[jax.Array, ...]]


def by_kernel(kernel: flash.Kernel) -> Causal:
    """Causal attention by a flash kernel."""
    return Causal(functools.partial(flash.flash_part, kernel), functools.partial(flash.gradient, kernel))


CAUSAL = (
    Backend(by_kernel(flash.triton), "cuda", flash.supports),
    Backend(by_kernel(flash.splash), "tpu", flash.supports),
    Backend(Causal(rounded_blocks, blocks_gradient)),
)


def pick(backends: Sequence[Backend], spec: Spec, q: jax.Array) -> dict[str | None, Any]:
    """The backends that support a spec: {platform: what computes it}, None for every other platform."""
    return {backend.platform: backend.compute for backend in backends if backend.supports(spec, q)}


def by_platform(ways: dict[str | None, Callable[..., Any]], *args: Any) -> Any:
    """Calls what `pick` found for the platform that a program is compiled for."""
    others = {platform: way for platform, way in ways.items() if platform is not None}
    return jax.lax.platform_dependent(*args, default=ways[None], **others) if others else ways[None](*args)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    cache: CacheLayer | None = None,
    *,
    spec: Spec = PLAIN,
    positions: jax.Array | None = None,
    limit_new: bool = True,
    in_blocks: bool = False,
) -> jax.Array:
    """Attends to the positions of a cache and to new ones: one softmax, computed in parts and merged.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, M, H] new keys and values.
      mask: [B, T, M], True where a query sees a new key. Every query must see at least one.
      cache: every query sees its positions below `length`, as far as its window shows them.
      spec: what the layer's queries see, and how its scores are made.
      positions: [B, T] of the queries; a layer with a window needs them.
      limit_new: the window limits the new keys, too, which then stand at the queries' positions (M = T). Else the mask
        alone says which of them a query sees.
      in_blocks: go through the cache in blocks, and only as far as it is filled. For many queries (a chunk of a
        prompt), whose scores over the whole cache would be large beside it.
    Returns:
      [B, T, N, H].
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    if spec.window is not None:
        if positions is None:
            raise ValueError("a layer with a window needs the positions of its queries")
        if limit_new:
            mask &= spec.sees(positions[:, :, None], positions[:, None])
    # Query heads that share a key-value head become more queries of it, [B, K, G * T, H]: a plain batched product.
    flat = jnp.moveaxis(q.reshape(batch, tokens, kv_heads, -1, head_dim), 1, 3)
    flat = flat.reshape(batch, kv_heads, -1, head_dim)

    with jax.named_scope("new_kv"):
        result = softmax_part(flat, k, v, mask, tokens, spec)
    # Without the barrier XLA concatenates new keys and cache into one matmul, which copies the cache.
    queries = Queries(jax.lax.optimization_barrier(flat), tokens, spec, positions)
    with jax.named_scope("cache"):
        if cache is not None:
            ways = pick(CACHED_LONG if in_blocks else CACHED, spec, q)
            ways = {platform: functools.partial(way, queries) for platform, way in ways.items()}
            result = by_platform(ways, result, cache)
    total, out = add_sinks(result, spec)[1:]
    out = (out / total).reshape(batch, kv_heads, -1, tokens, head_dim)
    return jnp.moveaxis(out, 3, 1).reshape(batch, tokens, heads, head_dim).astype(q.dtype)


def causal(
    q: jax.Array, k: jax.Array, v: jax.Array, text: Layout, spec: Spec = PLAIN, own: OwnKV | None = None
) -> jax.Array:
    """Causal attention inside each document, with a gradient in q, k, v and `own`.

    Args:
      q: [B, S, N, H]. k, v: [B, K, S, H].
      text: which keys a query sees, at least one.
      own: every position's own keys and values of later steps, which only it sees. Queries stand `own.steps` positions
        further on.
    Returns:
      [B, S, N, H].
    """
    queries = grouped(q, k.shape[1])
    part = causal_part(queries, k, v, text, spec, 0 if own is None else own.steps)
    return _finished(part, spec).astype(q.dtype) if own is None else _with_own(part, queries, own, spec)


@jax.named_scope("causal")
def causal_part(
    q: jax.Array, k: jax.Array, v: jax.Array, text: Layout, spec: Spec = PLAIN, ahead: int | jax.Array = 0
) -> Part:
    """Causal attention inside each document: a part of a softmax, to merge with others.

    In half precision on a CUDA GPU or a TPU by the backend's flash kernel; else in blocks of plain XLA, as are heads
    that are too narrow for a kernel. No scores or mask of S x S exist, forward or backward. The kernels know documents,
    not lengths: where `text` says of one document a row that its padding is not seen, padding sees padding before it.

    Args:
      q: [B, K, G, S, H]. k, v: [B, K, S, H]. text: which keys a query sees, at least one.
      ahead: how many positions after its key a query stands; a window reads it.
    Returns:
      As `softmax_part`, [B, K, G, S, 1], [B, K, G, S, 1] and [B, K, G, S, H].
    """
    if not any(pick(CAUSAL, spec, q)):  # plain XLA on every platform
        return in_blocks(q, k, v, text, spec, ahead)
    return by_backend(q, k, v, text, dataclasses.replace(spec, sinks=None))


@jax.custom_vjp
def by_backend(q: jax.Array, k: jax.Array, v: jax.Array, text: Layout, spec: Spec) -> Part:
    """`causal_part` by the flash kernel of the backend, where it has one. The weighted values come in q's dtype."""
    ways = {platform: way.part for platform, way in pick(CAUSAL, spec, q).items()}
    return by_platform(ways, q, k, v, text, spec)


def _forward(q, k, v, text, spec):
    return by_backend(q, k, v, text, spec), (q, k, v, text, spec)


def _backward(kept, of_part):
    q, *_, spec = kept
    ways = {platform: way.gradient for platform, way in pick(CAUSAL, spec, q).items()}
    return *by_platform(ways, *kept, of_part), None, None


by_backend.defvjp(_forward, _backward)


def _finished(part: Part, spec: Spec) -> jax.Array:
    return finished(add_sinks(part, spec))


@jax.checkpoint
def _with_own(part: Part, q: jax.Array, own: OwnKV, spec: Spec) -> jax.Array:
    """`part` merged with `own_part`: [B, S, N, H] in q's dtype. What is float32 is computed again for its gradient."""
    return _finished(merge_parts(part, own_part(q, own, spec)), spec).astype(q.dtype)
