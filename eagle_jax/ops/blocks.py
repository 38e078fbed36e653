"""Attention of blocks of tokens to the text before them and to themselves: how one-pass drafters are trained."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eagle_jax.ops.causal import finished, grouped
from eagle_jax.ops.layout import Layout
from eagle_jax.ops.softmax import Keys, add_sinks, merge_parts, softmax_part
from eagle_jax.ops.spec import PLAIN, Spec

BLOCK = 512  # queries whose scores are materialised at a time


def block_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch kv_heads queries head_dim"],
    v: Float[Array, "batch kv_heads queries head_dim"],
    context: tuple[Keys, Keys],
    anchors: Int[Array, "batch blocks"],
    text: Layout,
    spec: Spec = PLAIN,
    causal: bool = False,
    limit_own: bool = False,
) -> Float[Array, "batch queries heads head_dim"]:
    """Attends from every block to its own tokens, and to the positions of its document before its anchor.

    Blocks lie one after the other along the axis `queries`. Rematerialises the scores for the gradient.

    Args:
      context: keys and values of all positions of the text.
      anchors: the position in the sequence of each block's first token.
      causal: whether a token of a block sees only those before it.
      limit_own: whether a window limits the block's own tokens, too, and not the context alone.
    """
    batch, count = anchors.shape
    size, kv_heads = q.shape[1] // count, k.shape[1]
    together = max(1, min(BLOCK // size, count))
    parts = -(-count // together)
    whole = functools.partial(_split, parts=parts, blocks=together, size=size)
    first, positions = (jnp.take_along_axis(place, anchors, axis=1) for place in (text.first, text.positions))
    places = tuple(_split(place, parts, together, 1) for place in (anchors, first, positions))
    width = context[0].shape[2]
    within = jnp.tri(size, dtype=bool) if causal else jnp.ones((size, size), bool)

    def alone(x):  # [batch, blocks * size, heads, head_dim] -> a block a sequence
        return x.reshape(-1, size, *x.shape[2:])

    @jax.checkpoint
    def attend(of_part):
        queries, keys, values, (anchor, start, position) = of_part
        index = jnp.arange(width, dtype=jnp.int32)[None, None]
        anchor, start, position = (jnp.repeat(x, size, axis=1)[:, :, None] for x in (anchor, start, position))
        seen = (index >= start) & (index < anchor)
        of_queries = position + jnp.tile(jnp.arange(size, dtype=jnp.int32), together)[None, :, None]
        if spec.window is not None:
            seen &= spec.sees(of_queries, index - start)
        flat = grouped(queries, kv_heads).reshape(batch, kv_heads, -1, queries.shape[-1])
        before = softmax_part(flat, *context, seen, together * size, spec)
        own = grouped(alone(queries), kv_heads)
        own_k, own_v = (jnp.swapaxes(alone(x), 1, 2) for x in (keys, values))
        mask = jnp.broadcast_to(within[None], (len(own), size, size))
        if spec.window is not None and limit_own:
            at = of_queries.reshape(len(own), size)
            mask &= spec.sees(at[:, :, None], at[:, None])
        inside = softmax_part(own.reshape(len(own), kv_heads, -1, own.shape[-1]), own_k, own_v, mask, size, spec)
        before = tuple(_alone(x, together, size) for x in before)
        result = add_sinks(merge_parts(before, inside), spec)
        result = tuple(x.reshape(len(own), kv_heads, -1, size, x.shape[-1]) for x in result)
        return finished(result).reshape(queries.shape).astype(q.dtype)

    keys, values = (whole(jnp.swapaxes(x, 1, 2)) for x in (k, v))
    mixed = jax.lax.map(attend, (whole(q), keys, values, places))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, -1, *q.shape[2:])[:, : q.shape[1]]


def _split(x: jax.Array, parts: int, blocks: int, size: int) -> jax.Array:
    """Splits [batch, blocks in all * size, ...] into [parts, batch, blocks * size, ...], padded with zeros."""
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, parts * blocks * size - x.shape[1])
    padded = jnp.pad(x, padding).reshape(x.shape[0], parts, blocks * size, *x.shape[2:])
    return jnp.moveaxis(padded, 1, 0)


def _alone(x: jax.Array, blocks: int, size: int) -> jax.Array:
    """Makes a block a sequence: [batch, kv_heads, groups * blocks * size, n] to [batch * blocks, kv_heads, ..., n]."""
    batch, kv_heads = x.shape[:2]
    x = x.reshape(batch, kv_heads, -1, blocks, size, x.shape[-1])
    return jnp.moveaxis(x, 3, 1).reshape(batch * blocks, kv_heads, -1, x.shape[-1])
