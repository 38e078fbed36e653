"""Causal attention inside documents in blocks of plain XLA, and attention of later training steps to their own keys.

A later step of the training-time test queries the first step's keys causally. Of the later steps so far it queries the
keys at its own position only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from eagle_jax.ops.layout import Layout
from eagle_jax.ops.linear import dot
from eagle_jax.ops.softmax import GroupedQueries, Keys, Part, softmax_part
from eagle_jax.ops.spec import PLAIN, Spec

BLOCK = 512  # queries whose scores are materialised at a time


class OwnKV(NamedTuple):
    """Keys and values of later steps, the first `steps` of them valid. Only queries at their position see them.

    window: a query sees its own step and the `window` - 1 before it; None: all steps before it.
    """

    k: Float[Array, "batch positions kv_heads later head_dim"]
    v: Float[Array, "batch positions kv_heads later head_dim"]
    steps: Int[Array, ""]
    window: int | None = None


def in_blocks(
    q: GroupedQueries,
    k: Keys,
    v: Keys,
    text: Layout,
    spec: Spec = PLAIN,
    ahead: int | Int[Array, ""] = 0,
    block: int = BLOCK,
) -> Part:
    """Computes `attention.causal_part` for `block` queries at a time, and rematerialises a block for its gradient."""
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
        if spec.window is not None:
            # Padding sees what the last token sees: a softmax over no key would be NaN.
            at = jnp.minimum(rows, end[:, :, None] - 1) - first[:, :, None]
            seen &= spec.sees(at + ahead, keys - first[:, :, None])
        flat = queries.reshape(batch, kv_heads, groups * block, head_dim)
        return softmax_part(flat, k, v, seen, block, spec)

    starts = jnp.arange(count, dtype=jnp.int32) * block
    parts = jax.lax.map(part, (starts, blocks, _cut(text.first, block, 0), _cut(text.end, block, width)))

    def whole(values):  # [count, batch, kv_heads, groups * block, ...] -> [batch, kv_heads, groups, positions, ...]
        values = values.reshape(count, batch, kv_heads, groups, block, -1)
        return jnp.moveaxis(values, 0, 3).reshape(batch, kv_heads, groups, count * block, -1)[:, :, :, :width]

    return tuple(map(whole, parts))


def _cut(places: Int[Array, "batch positions"], block: int, fill: int) -> Int[Array, "blocks batch {block}"]:
    """Splits numbers of positions into those of each block's queries, padded with `fill`."""
    batch, width = places.shape
    count = -(-width // block)
    places = jnp.pad(places, [(0, 0), (0, count * block - width)], constant_values=fill)
    return jnp.moveaxis(places.reshape(batch, count, block), 1, 0)


def rounded_blocks(q: GroupedQueries, k: Keys, v: Keys, text: Layout, spec: Spec) -> Part:
    """Computes `in_blocks` with the weighted values rounded to q's dtype, as kernels return them."""
    top, total, out = in_blocks(q, k, v, text, spec)
    return top, total, out.astype(q.dtype)


def blocks_gradient(
    q: GroupedQueries, k: Keys, v: Keys, text: Layout, spec: Spec, of_part: Part
) -> tuple[GroupedQueries, Keys, Keys]:
    """Returns the gradients of `rounded_blocks` in q, k and v."""
    return jax.vjp(lambda q, k, v: rounded_blocks(q, k, v, text, spec), q, k, v)[1](of_part)


@jax.named_scope("own_keys")
def own_part(q: GroupedQueries, own: OwnKV, spec: Spec = PLAIN) -> Part:
    """Attends from queries to the keys of later steps at their own position; a part, as `in_blocks`.

    The window of `spec` hides none of them; `own.window` does. The decoder treats drafted ancestors alike.
    """
    k, v, steps, window = own
    q = jnp.moveaxis(q, 3, 1)
    scores = spec.scores(dot("bskgh,bskmh->bskgm", q, k, jnp.float32), q.shape[-1])
    later = jnp.arange(k.shape[3], dtype=jnp.int32)
    seen = later < steps
    if window is not None:
        seen &= later >= steps - window
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - top)
    out = dot("bskgm,bskmh->bskgh", weights.astype(v.dtype), v, jnp.float32)
    return tuple(jnp.moveaxis(x, 1, 3) for x in (top, weights.sum(axis=-1, keepdims=True), out))


def grouped(
    q: Float[Array, "batch positions heads head_dim"], kv_heads: int
) -> Float[Array, "batch {kv_heads} groups positions head_dim"]:
    """Groups query heads by their key-value head."""
    batch, width, _, head_dim = q.shape
    return jnp.moveaxis(q.reshape(batch, width, kv_heads, -1, head_dim), 1, 3)


def finished(part: Part) -> Float32[Array, "batch positions heads head_dim"]:
    """Normalises a part [batch, kv_heads, groups, positions, ...] and joins its heads."""
    _, total, out = part
    batch, _, _, width, head_dim = out.shape
    return jnp.moveaxis(out / total, 3, 1).reshape(batch, width, -1, head_dim)
