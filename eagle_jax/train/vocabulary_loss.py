"""Cross-entropy over a vocabulary, a chunk of positions at a time, with a gradient of its own.

Letters: B batch, S positions, C positions of a row in a chunk, D width of what the logits are made of, H width of the
target's hidden states, V entries of the vocabulary.

Logits, probabilities and their gradients exist for one chunk only. Going backward they are computed again, and the
gradient of the weight is added up in float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from eagle_jax.models.layers import dot, linear

CHUNK = 2048  # positions whose logits exist at a time, on a device


class Soft(NamedTuple):
    """A teacher's distributions, softmax(hidden rows^T): hidden [B, S, H], rows [V, H]."""

    hidden: jax.Array
    rows: jax.Array


class Labels(NamedTuple):
    """The right tokens: ids [B, S]."""

    ids: jax.Array


class LossSums(NamedTuple):
    """Sums over positions, each times its importance; scalars, float32.

    loss: cross-entropy. match: whether both have one likeliest token. entropy: the teacher's; cross-entropy is more
    than the KL divergence by it.
    """

    loss: jax.Array
    match: jax.Array
    entropy: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def vocabulary_loss(
    x: jax.Array, weight: jax.Array, teacher: Soft | Labels, importance: jax.Array, chunk: int = CHUNK
) -> LossSums:
    """Cross-entropy of softmax(x weight^T) against a teacher, summed. Differentiable in x and weight.

    Args:
      x: [B, S, D]. weight: [V, D].
      importance: [B, S] float32 of every position; those of 0 do not count.
      chunk: positions of all rows whose logits exist at a time.
    """

    def add(sums, part):
        x, teacher, importance = part
        logits = linear(x, weight, jnp.float32)
        wanted, likeliest = _wanted(teacher, logits)
        loss = jax.nn.logsumexp(logits, axis=-1) - (wanted * logits).sum(axis=-1)
        entropy = -(wanted * jnp.log(jnp.where(wanted > 0, wanted, 1))).sum(axis=-1)
        match = jnp.argmax(logits, axis=-1) == likeliest
        new = LossSums(*((importance * value).sum() for value in (loss, match, entropy)))
        return jax.tree.map(jnp.add, sums, new), None

    parts, same = _chunks(x, teacher, importance, chunk)
    return jax.lax.scan(lambda sums, part: add(sums, same(part)), LossSums(*[jnp.float32(0)] * 3), parts)[0]


def _forward(x, weight, teacher, importance, chunk):
    return vocabulary_loss(x, weight, teacher, importance, chunk), (x, weight, teacher, importance)


def _backward(chunk, kept, gradient):
    """d loss / d logits = importance * (softmax(logits) - wanted)."""
    x, weight, teacher, importance = kept

    def add(weight_gradient, part):
        x, teacher, importance = same(part)
        logits = linear(x, weight, jnp.float32)
        wanted, _ = _wanted(teacher, logits)
        error = (jax.nn.softmax(logits, axis=-1) - wanted) * (importance * gradient.loss)[..., None]
        error = error.astype(x.dtype)
        weight_gradient += dot("bcv,bcd->vd", error, x, jnp.float32)
        x_gradient = dot("rv,vd->rd", error.reshape(-1, error.shape[-1]), weight, jnp.float32)
        return weight_gradient, x_gradient.reshape(x.shape).astype(x.dtype)

    parts, same = _chunks(x, teacher, importance, chunk)
    weight_gradient, x_gradient = jax.lax.scan(add, jnp.zeros(weight.shape, jnp.float32), parts)
    batch, width, size = x.shape
    x_gradient = jnp.moveaxis(x_gradient, 0, 1).reshape(batch, -1, size)[:, :width]
    return x_gradient, weight_gradient.astype(weight.dtype), None, None


vocabulary_loss.defvjp(_forward, _backward)


def likeliest_tokens(hidden: jax.Array, weight: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """argmax of hidden weight^T, [B, S]: hidden [B, S, H], weight [V, H]."""
    batch, width = hidden.shape[:2]
    parts = _split(hidden, chunk)
    ids = jax.lax.map(lambda part: jnp.argmax(linear(part, weight, jnp.float32), axis=-1), parts)
    return jnp.moveaxis(ids, 0, 1).reshape(batch, -1)[:, :width]


def _wanted(teacher: Soft | Labels, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The teacher's probabilities [B, C, V] and likeliest tokens [B, C]."""
    if isinstance(teacher, Labels):
        return jax.nn.one_hot(teacher.ids, logits.shape[-1]), teacher.ids
    wanted = linear(teacher.hidden, teacher.rows, jnp.float32)
    return jax.nn.softmax(wanted, axis=-1), jnp.argmax(wanted, axis=-1)


def _chunks(x, teacher, importance, chunk):
    """Chunks of everything that has positions, and what makes (x, teacher, importance) of one."""
    if isinstance(teacher, Labels):
        return tuple(_split(values, chunk) for values in (x, teacher.ids, importance)), (
            lambda part: (part[0], Labels(part[1]), part[2])
        )
    return tuple(_split(values, chunk) for values in (x, teacher.hidden, importance)), (
        lambda part: (part[0], Soft(part[1], teacher.rows), part[2])
    )


def _split(values: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [chunks, B, C, ...]: a row stays where it is, whatever devices the batch is spread over."""
    batch, width = values.shape[:2]
    size = min(max(chunk // batch, 1), width)
    count = -(-width // size)
    padding = [(0, 0), (0, count * size - width)] + [(0, 0)] * (values.ndim - 2)
    return jnp.moveaxis(jnp.pad(values, padding).reshape(batch, count, size, *values.shape[2:]), 1, 0)
