"""Cross-entropy over a vocabulary, a chunk of positions at a time, with a gradient of its own.

Letters: B batch, S positions, C positions of a row in a chunk, K losses of one batch (steps), D width of what the
logits are made of, H width of the target's hidden states, V entries of the vocabulary.

Logits, probabilities and their gradients exist for one chunk only. Going backward they are computed again, and the
gradient of the weight is added up in float32, in one array for all losses.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eagle_jax.models.cache import put
from eagle_jax.ops.linear import dot, linear

CHUNK = 2048  # positions whose logits exist at a time, on a device


class Soft(NamedTuple):
    """A teacher's distributions, softmax(hidden rows^T): hidden [B, S + K - 1, H], rows [V, H]."""

    hidden: jax.Array
    rows: jax.Array


class Labels(NamedTuple):
    """The right tokens: ids [B, S + K - 1]."""

    ids: jax.Array


class LossSums(NamedTuple):
    """Sums over positions, each times its importance; [K], or scalars; float32.

    loss: cross-entropy. match: whether both have one likeliest token. entropy: the teacher's; cross-entropy is more
    than the KL divergence by it.
    """

    loss: jax.Array
    match: jax.Array
    entropy: jax.Array


def vocabulary_loss(
    x: jax.Array, weight: jax.Array, teacher: Soft | Labels, importance: jax.Array, chunk: int = CHUNK
) -> LossSums:
    """`vocabulary_losses` of one x [B, S, D] and importance [B, S]: scalars."""
    sums = vocabulary_losses(x[None], weight, teacher, importance[None], chunk)
    return jax.tree.map(lambda value: value[0], sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
@jax.named_scope("vocabulary_loss")
def vocabulary_losses(
    x: jax.Array, weight: jax.Array, teacher: Soft | Labels, importance: jax.Array, chunk: int = CHUNK
) -> LossSums:
    """Cross-entropies of softmax(x weight^T) against a teacher, summed: [K]. Differentiable in x and weight.

    Args:
      x: [K, B, S, D]. Position s of x[k] is to agree with the teacher's position s + k. weight: [V, D].
      importance: [K, B, S] float32 of every position; those of 0 do not count.
      chunk: positions of all rows whose logits exist at a time.
    """
    count, part = _parts(x, teacher, importance, chunk)

    def add(index, sums):
        k, _, x, teacher, importance = part(index)
        logits = linear(x, weight, jnp.float32)
        wanted, likeliest = _wanted(teacher, logits)
        loss = jax.nn.logsumexp(logits, axis=-1) - (wanted * logits).sum(axis=-1)
        entropy = -(wanted * jnp.log(jnp.where(wanted > 0, wanted, 1))).sum(axis=-1)
        match = jax.lax.argmax(logits, logits.ndim - 1, jnp.int32) == likeliest
        new = LossSums(*((importance * value).sum() for value in (loss, match, entropy)))
        return jax.tree.map(lambda total, value: total.at[k].add(value), sums, new)

    return jax.lax.fori_loop(0, count, add, LossSums(*[jnp.zeros(len(x), jnp.float32)] * 3))


def _forward(x, weight, teacher, importance, chunk):
    return vocabulary_losses(x, weight, teacher, importance, chunk), (x, weight, teacher, importance)


@jax.named_scope("vocabulary_loss")
def _backward(chunk, kept, gradient):
    """d loss / d logits = importance * (softmax(logits) - wanted)."""
    x, weight, teacher, importance = kept
    count, part = _parts(x, teacher, importance, chunk)

    def add(index, gradients):
        weight_gradient, x_gradient = gradients
        k, start, x, teacher, importance = part(index)
        logits = linear(x, weight, jnp.float32)
        wanted, _ = _wanted(teacher, logits)
        error = (jax.nn.softmax(logits, axis=-1) - wanted) * (importance * gradient.loss[k])[..., None]
        error = error.astype(x.dtype)
        weight_gradient += dot("bcv,bcd->vd", error, x, jnp.float32)
        of_x = dot("rv,vd->rd", error.reshape(-1, error.shape[-1]), weight, jnp.float32)
        of_x = of_x.reshape(1, *x.shape).astype(x.dtype)
        return weight_gradient, put(x_gradient, of_x, (k, 0, start, 0))

    losses, batch, width, inputs = x.shape
    size, chunks = _chunk(batch, width, chunk)
    start = jnp.zeros(weight.shape, jnp.float32), jnp.zeros((losses, batch, size * chunks, inputs), x.dtype)
    weight_gradient, x_gradient = jax.lax.fori_loop(0, count, add, start)
    return x_gradient[:, :, :width], weight_gradient.astype(weight.dtype), None, None


vocabulary_losses.defvjp(_forward, _backward)


@jax.named_scope("likeliest_tokens")
def likeliest_tokens(hidden: jax.Array, weight: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """argmax of hidden weight^T, [B, S]: hidden [B, S, H], weight [V, H]."""
    batch, width = hidden.shape[:2]
    parts = _split(hidden, chunk)
    ids = jax.lax.map(lambda part: jax.lax.argmax(linear(part, weight, jnp.float32), part.ndim - 1, jnp.int32), parts)
    return jnp.moveaxis(ids, 0, 1).reshape(batch, -1)[:, :width]


def _wanted(teacher: Soft | Labels, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The teacher's probabilities [B, C, V] and likeliest tokens [B, C]."""
    if isinstance(teacher, Labels):
        return jax.nn.one_hot(teacher.ids, logits.shape[-1], dtype=jnp.float32), teacher.ids
    wanted = linear(teacher.hidden, teacher.rows, jnp.float32)
    return jax.nn.softmax(wanted, axis=-1), jax.lax.argmax(wanted, wanted.ndim - 1, jnp.int32)


def _chunk(batch: int, width: int, chunk: int) -> tuple[int, int]:
    """The positions of a row in a chunk, and the chunks of a row."""
    size = min(max(chunk // batch, 1), width)
    return size, -(-width // size)


def _parts(x, teacher, importance, chunk):
    """How many chunks there are, and what gives one by its number: k, its first position, and its own of everything.

    A row stays where it is, whatever devices the batch is spread over.
    """
    losses, batch, width, _ = x.shape
    size, count = _chunk(batch, width, chunk)
    x = _padded(x, 2, size * count)
    importance = _padded(importance, 2, size * count)
    teacher_rows = _padded(teacher[0], 1, size * count + losses - 1)

    def part(index):
        index, zero = jnp.asarray(index, jnp.int32), np.int32(0)  # also where 64-bit types are on
        k, start = index // count, index % count * size
        own = [
            jax.lax.dynamic_slice(
                array, (k, zero, start, *[zero] * (array.ndim - 3)), (1, batch, size, *array.shape[3:])
            )[0]
            for array in (x, importance)
        ]
        right = jax.lax.dynamic_slice_in_dim(teacher_rows, start + k, size, axis=1)
        return k, start, own[0], teacher._replace(**{teacher._fields[0]: right}), own[1]

    return losses * count, part


def _padded(array: jax.Array, axis: int, width: int) -> jax.Array:
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, width - array.shape[axis])
    return jnp.pad(array, padding)


def _split(values: jax.Array, chunk: int) -> jax.Array:
    """[B, S, H] -> [chunks, B, C, H]."""
    batch, width = values.shape[:2]
    size, count = _chunk(batch, width, chunk)
    return jnp.moveaxis(_padded(values, 1, size * count).reshape(batch, count, size, -1), 1, 0)
