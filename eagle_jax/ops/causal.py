"""Attention of training: causal inside each document, and in later steps each row's own keys.

Letters: B batch, S positions, N query heads, K key-value heads, G = N / K, H head dim, M later steps, Q queries of a
block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from eagle_jax.ops import flash
from eagle_jax.ops.attention import merge_parts, softmax_part
from eagle_jax.ops.layout import Layout
from eagle_jax.ops.linear import dot

BLOCK = 512  # queries whose scores exist at a time


@jax.named_scope("causal")
def causal_part(q: jax.Array, k: jax.Array, v: jax.Array, text: Layout) -> tuple[jax.Array, ...]:
    """Causal attention inside each document: a part of a softmax, to merge with others.

    In half precision on a CUDA GPU or a TPU by the backend's flash kernel; else in blocks of plain XLA, as are heads
    that are too narrow for a kernel. No scores or mask of S x S exist, forward or backward. The kernels know documents,
    not lengths: where `text` says of one document a row that its padding is not seen, padding sees padding before it.

    Args:
      q: [B, K, G, S, H]. k, v: [B, K, S, H]. text: which keys a query sees, at least one.
    Returns:
      As `softmax_part`, [B, K, G, S, 1], [B, K, G, S, 1] and [B, K, G, S, H].
    """
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] >= flash.NARROWEST
    return by_backend(q, k, v, text) if fits else in_blocks(q, k, v, text)


@jax.custom_vjp
def by_backend(q: jax.Array, k: jax.Array, v: jax.Array, text: Layout) -> tuple[jax.Array, ...]:
    """`causal_part` by the flash kernel of the backend, where it has one. The weighted values come in q's dtype."""

    def by(kernel):
        return lambda q, k, v, text: flash.flash_part(kernel, q, k, v, text.first)

    return jax.lax.platform_dependent(q, k, v, text, cuda=by(flash.triton), tpu=by(flash.splash), default=_rounded)


def _rounded(q, k, v, text):
    top, total, out = in_blocks(q, k, v, text)
    return top, total, out.astype(q.dtype)


def _forward(q, k, v, text):
    return by_backend(q, k, v, text), (q, k, v, text)


def _backward(kept, of_part):
    def by(kernel):
        return lambda q, k, v, text, of_part: flash.gradient(kernel, q, k, v, text.first, of_part)

    def of_blocks(q, k, v, text, of_part):
        return jax.vjp(lambda q, k, v: _rounded(q, k, v, text), q, k, v)[1](of_part)

    kernels = {"cuda": by(flash.triton), "tpu": by(flash.splash)}
    return *jax.lax.platform_dependent(*kept, of_part, **kernels, default=of_blocks), None


by_backend.defvjp(_forward, _backward)


def in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, text: Layout, block: int = BLOCK) -> tuple[jax.Array, ...]:
    """`causal_part` for `block` queries at a time; a block's scores are computed again for its gradient."""
    batch, kv_heads, groups, width, head_dim = q.shape
    block = min(block, width)
    count = -(-width // block)
    more = count * block - width
    padded = jnp.pad(q, [(0, 0)] * 3 + [(0, more), (0, 0)])
    blocks = jnp.moveaxis(padded.reshape(batch, kv_heads, groups, count, block, head_dim), 3, 0)

    @jax.checkpoint
    def part(of_block):
        start, queries, first, end = of_block
        rows, keys = (
            start + jnp.arange(block, dtype=jnp.int32)[None, :, None],
            jnp.arange(width, dtype=jnp.int32)[None, None],
        )
        seen = (keys <= rows) & (keys >= first[:, :, None]) & (keys < end[:, :, None])
        flat = queries.reshape(batch, kv_heads, groups * block, head_dim)
        return softmax_part(flat, k, v, seen, block)

    starts = jnp.arange(count, dtype=jnp.int32) * block
    parts = jax.lax.map(part, (starts, blocks, _cut(text.first, block, 0), _cut(text.end, block, width)))

    def whole(values):  # [count, B, K, G * Q, X] -> [B, K, G, S, X]
        values = values.reshape(count, batch, kv_heads, groups, block, -1)
        return jnp.moveaxis(values, 0, 3).reshape(batch, kv_heads, groups, count * block, -1)[:, :, :, :width]

    return tuple(map(whole, parts))


def _cut(places: jax.Array, block: int, fill: int) -> jax.Array:
    """A number for every position as one for the queries of each block: [B, S] -> [blocks, B, Q]."""
    batch, width = places.shape
    count = -(-width // block)
    places = jnp.pad(places, [(0, 0), (0, count * block - width)], constant_values=fill)
    return jnp.moveaxis(places.reshape(batch, count, block), 1, 0)


def causal(q: jax.Array, k: jax.Array, v: jax.Array, text: Layout) -> jax.Array:
    """Causal attention inside each document: q [B, S, N, H], k, v [B, K, S, H] -> [B, S, N, H]."""
    return finished(causal_part(grouped(q, k.shape[1]), k, v, text)).astype(q.dtype)


@jax.checkpoint
def with_own(part: tuple[jax.Array, ...], q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array) -> jax.Array:
    """`part` merged with `own_part`: [B, S, N, H] in q's dtype. What is float32 is computed again for its gradient."""
    return finished(part, own_part(q, k, v, count)).astype(q.dtype)


@jax.named_scope("own_keys")
def own_part(q: jax.Array, k: jax.Array, v: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
    """Attention of every row to its own keys of the first `count` later steps; as `causal_part`.

    Args:
      q: [B, K, G, S, H]. k, v: [B, S, K, M, H].
    """
    q = jnp.moveaxis(q, 3, 1)
    scores = dot("bskgh,bskmh->bskgm", q, k, jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.arange(k.shape[3], dtype=jnp.int32) < count, scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - top)
    out = dot("bskgm,bskmh->bskgh", weights.astype(v.dtype), v, jnp.float32)
    return tuple(jnp.moveaxis(x, 1, 3) for x in (top, weights.sum(axis=-1, keepdims=True), out))


def grouped(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, S, N, H] -> [B, K, G, S, H]."""
    batch, width, _, head_dim = q.shape
    return jnp.moveaxis(q.reshape(batch, width, kv_heads, -1, head_dim), 1, 3)


def finished(part: tuple[jax.Array, ...], *more: tuple[jax.Array, ...]) -> jax.Array:
    """Parts of one softmax [B, K, G, S, ...] as its result [B, S, N, H], float32."""
    for other in more:
        part = merge_parts(part, other)
    _, total, out = part
    batch, _, _, width, head_dim = out.shape
    return jnp.moveaxis(out / total, 3, 1).reshape(batch, width, -1, head_dim)
