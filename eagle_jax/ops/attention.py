"""The one door to attention: `attention` with a KV cache for decoding, `causal` with a gradient for training.

A layer's `Spec` says what its queries see and how its scores are made. A backend says which specs it supports, and
`pick` chooses among them. Plain XLA supports every spec.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eagle_jax.ops import flash
from eagle_jax.ops.cached import CacheLayer, Queries, add_blocks, add_whole
from eagle_jax.ops.causal import OwnKV, blocks_gradient, finished, grouped, in_blocks, own_part, rounded_blocks
from eagle_jax.ops.layout import Layout
from eagle_jax.ops.softmax import GroupedQueries, Keys, Part, add_sinks, merge_parts, softmax_part
from eagle_jax.ops.spec import PLAIN, Spec

# Positions of a cache in a block: for a chunk of a prompt, and on a CPU.
CACHE_BLOCK = 512
CPU_CACHE_BLOCK = 128


class Backend(NamedTuple):
    """A way to compute attention.

    compute: the implementation; each table below states its signature.
    platform: the platform that it runs on, "cpu", "cuda" or "tpu". None: all that no other backend claims.
    supports: (spec, q) -> whether it computes this spec for queries of q's dtype and head dim.
    """

    compute: Any
    platform: str | None = None
    supports: Callable[[Spec, Float[Array, ...]], bool] = lambda spec, q: True


# compute(queries, part of the new keys, cache) -> the two merged. On a CPU, blocks skip the arithmetic on unused
# positions. An accelerator is bound by memory and kernel launches, so one product is faster.
CACHED = (Backend(functools.partial(add_blocks, CPU_CACHE_BLOCK), "cpu"), Backend(add_whole))
# The same for a chunk of a prompt: scores of so many queries over the whole cache would be larger than the cache.
CACHED_LONG = (Backend(functools.partial(add_blocks, CACHE_BLOCK)),)


class Causal(NamedTuple):
    """A forward and a backward function: part(q, k, v, text, spec) and gradient(q, k, v, text, spec, of_part)."""

    part: Callable[..., Part]
    gradient: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def by_kernel(kernel: flash.Kernel) -> Causal:
    """Makes causal attention of a flash kernel."""
    return Causal(functools.partial(flash.flash_part, kernel), functools.partial(flash.gradient, kernel))


CAUSAL = (
    Backend(by_kernel(flash.triton), "cuda", flash.supports),
    Backend(by_kernel(flash.splash), "tpu", flash.supports),
    Backend(Causal(rounded_blocks, blocks_gradient)),
)


def pick(backends: Sequence[Backend], spec: Spec, q: Float[Array, ...]) -> dict[str | None, Any]:
    """Returns {platform: implementation} of the backends that support a spec; None stands for all other platforms."""
    return {backend.platform: backend.compute for backend in backends if backend.supports(spec, q)}


def by_platform(ways: dict[str | None, Callable[..., Any]], *args: Any) -> Any:
    """Calls the implementation for the platform that the program is compiled for; `ways` is from `pick`."""
    others = {platform: way for platform, way in ways.items() if platform is not None}
    return jax.lax.platform_dependent(*args, default=ways[None], **others) if others else ways[None](*args)


def attention(
    q: Float[Array, "batch new heads head_dim"],
    k: Float[Array, "batch kv_heads kv head_dim"],
    v: Float[Array, "batch kv_heads kv head_dim"],
    mask: Bool[Array, "batch new kv"],
    cache: CacheLayer | None = None,
    *,
    spec: Spec = PLAIN,
    positions: Int[Array, "batch new"] | None = None,
    limit_new: bool = True,
    in_blocks: bool = False,
) -> Float[Array, "batch new heads head_dim"]:
    """Attends to a KV cache and to new keys: one softmax, computed in two parts and merged.

    Args:
      k, v: new keys and values.
      mask: True where a query sees a new key. Every query must see at least one.
      cache: every query sees its positions below `length` that are inside the window.
      spec: the layer's window, sinks, softcap and scale.
      positions: of the queries; required if the spec has a window.
      limit_new: apply the window to the new keys, too, which are those of the queries' tokens. False: the mask alone
        says which new keys a query sees.
      in_blocks: go through the cache in blocks, up to its filled length. For a chunk of a prompt, whose scores over the
        whole cache would be larger than the cache.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    if spec.window is not None:
        if positions is None:
            raise ValueError("a layer with a window needs the positions of its queries")
        if limit_new:
            mask &= spec.sees(positions[:, :, None], positions[:, None])
    if cache is not None and cache.window is not None and (cache.window != spec.window or spec.first):
        raise ValueError(f"the cache of this layer is a ring for a window of {cache.window}; its attention has {spec}")
    # Query heads that share a key-value head become more queries of it: a plain batched matmul.
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
    q: Float[Array, "batch positions heads head_dim"],
    k: Keys,
    v: Keys,
    text: Layout,
    spec: Spec = PLAIN,
    own: OwnKV | None = None,
) -> Float[Array, "batch positions heads head_dim"]:
    """Attends causally inside each document, with a gradient in q, k, v and `own`.

    Args:
      text: where documents lie; a query must see at least one key.
      own: keys and values of later training steps. The queries then stand `own.steps` positions after k and v.
    """
    queries = grouped(q, k.shape[1])
    part = causal_part(queries, k, v, text, spec, 0 if own is None else own.steps)
    return _finished(part, spec).astype(q.dtype) if own is None else _with_own(part, queries, own, spec)


@jax.named_scope("causal")
def causal_part(
    q: GroupedQueries, k: Keys, v: Keys, text: Layout, spec: Spec = PLAIN, ahead: int | Int[Array, ""] = 0
) -> Part:
    """Attends causally inside each document, and returns a part of a softmax to merge with others.

    Flash kernels compute it in half precision on a CUDA GPU or a TPU, if they support the spec. Else it runs in blocks
    of plain XLA. No S x S scores or mask are materialised, forward or backward. Kernels take segment ids, not lengths:
    with one document a sequence, padding sees the padding before it, so outputs at padding mean nothing.

    Args:
      text: where documents lie; a query must see at least one key.
      ahead: how many positions after k and v the queries stand; a window reads it.
    Returns:
      [batch, kv_heads, groups, positions, ...].
    """
    if not any(pick(CAUSAL, spec, q)):  # plain XLA on every platform
        return in_blocks(q, k, v, text, spec, ahead)
    return by_backend(q, k, v, text, dataclasses.replace(spec, sinks=None))


@jax.custom_vjp
def by_backend(q: GroupedQueries, k: Keys, v: Keys, text: Layout, spec: Spec) -> Part:
    """Computes `causal_part` by the platform's flash kernel, or in blocks; the weighted values are in q's dtype.

    The gradient is a custom one, because the kernels have none through the log-sum-exp.
    """
    ways = {platform: way.part for platform, way in pick(CAUSAL, spec, q).items()}
    return by_platform(ways, q, k, v, text, spec)


def _forward(q, k, v, text, spec):
    return by_backend(q, k, v, text, spec), (q, k, v, text, spec)


def _backward(kept, of_part):
    q, *_, spec = kept
    ways = {platform: way.gradient for platform, way in pick(CAUSAL, spec, q).items()}
    return *by_platform(ways, *kept, of_part), None, None


by_backend.defvjp(_forward, _backward)


def _finished(part: Part, spec: Spec) -> Float[Array, "batch positions heads head_dim"]:
    return finished(add_sinks(part, spec))


@jax.checkpoint
def _with_own(part: Part, q: GroupedQueries, own: OwnKV, spec: Spec) -> Float[Array, "batch positions heads head_dim"]:
    """Merges `part` with `own_part`, in q's dtype. Float32 values are rematerialised for the gradient."""
    return _finished(merge_parts(part, own_part(q, own, spec)), spec).astype(q.dtype)
