"""Losses over a vocabulary for several steps, in chunks of positions, with a custom gradient.

Letters: B batch, S positions, C positions of a sequence in a chunk, K steps, D width of the hidden states that the
logits are computed from, H width of the target's hidden states, V entries of the vocabulary.

Logits, probabilities and their gradients exist for one chunk and one step at a time, so memory does not grow with K.
The teacher's probabilities are computed once per position: step k reads them k positions on. The gradient of the weight
is accumulated in float32, in one array for all steps.

In units of S V D multiply-adds, a training step needs K logits, K gradients of x and K of the weight, and one teacher
product. `weighted_loss` takes no more, because it knows the weights of the steps in the forward pass and computes the
gradients there. `vocabulary_losses` leaves the weights to the caller, and computes logits and teacher again backward.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from eagle_jax.models.cache import put
from eagle_jax.ops.linear import dot, linear
from eagle_jax.ops.spec import capped

CHUNK = 2048  # positions whose logits exist at a time, on a device
LK_DECAY = 3.0  # eta: how fast the mixture of "lk_adaptive" moves from KL to total variation
TokenLoss = Literal["cross_entropy", "lk", "lk_adaptive"]  # see `_divergence`


class Soft(NamedTuple):
    """A teacher's distributions softmax(hidden rows^T): hidden [B, S + K - 1, H], rows [V, H].

    softcap: of its logits, as in `capped`.
    """

    hidden: jax.Array
    rows: jax.Array
    softcap: float | jax.Array | None = None


class Labels(NamedTuple):
    """A teacher that knows the tokens: ids [B, S + K - 1]."""

    ids: jax.Array


class LossSums(NamedTuple):
    """Sums over positions, weighted by importance: [K] or scalars, float32.

    loss: the token loss. match: equality of the argmax. entropy: the teacher's; cross-entropy minus KL divergence.
    """

    loss: jax.Array
    match: jax.Array
    entropy: jax.Array


def vocabulary_loss(
    x: jax.Array,
    weight: jax.Array,
    teacher: Soft | Labels,
    importance: jax.Array,
    chunk: int = CHUNK,
    token_loss: TokenLoss = "cross_entropy",
    softcap: float | None = None,
) -> LossSums:
    """Computes the sums of one step, x [B, S, D] and importance [B, S]: scalars. See `vocabulary_losses`."""
    loss, sums = weighted_loss(
        x[None], weight, teacher, importance[None], jnp.ones(1, jnp.float32), chunk, token_loss, softcap
    )
    return LossSums(loss, sums.match[0], sums.entropy[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
@jax.named_scope("vocabulary_loss")
def vocabulary_losses(
    x: jax.Array,
    weight: jax.Array,
    teacher: Soft | Labels,
    importance: jax.Array,
    chunk: int = CHUNK,
    token_loss: TokenLoss = "cross_entropy",
    softcap: float | None = None,
) -> LossSums:
    """Sums the losses of softmax(x weight^T) against a teacher: [K]. `loss` is differentiable in x and weight.

    Args:
      x: [K, B, S, D]. Position s of x[k] is compared with the teacher's position s + k. weight: [V, D].
      importance: [K, B, S] float32, the weights of positions.
      chunk: positions of all sequences whose logits exist at a time.
      token_loss: the loss of a position, see `_divergence`.
      softcap: of the logits x weight^T, as in `capped`.
    """
    return _sums(x, weight, teacher, importance, chunk, token_loss, softcap)


def _losses_forward(x, weight, teacher, importance, chunk, token_loss, softcap):
    return _sums(x, weight, teacher, importance, chunk, token_loss, softcap), (x, weight, teacher, importance)


@jax.named_scope("vocabulary_loss")
def _losses_backward(chunk, token_loss, softcap, kept, of_sums):
    x, weight, teacher, importance = kept
    _, gradients = _sums_and_gradients(x, weight, teacher, importance, of_sums.loss, chunk, token_loss, softcap)
    return *gradients, None, None


vocabulary_losses.defvjp(_losses_forward, _losses_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
@jax.named_scope("vocabulary_loss")
def weighted_loss(
    x: jax.Array,
    weight: jax.Array,
    teacher: Soft | Labels,
    importance: jax.Array,
    step_weights: jax.Array,
    chunk: int = CHUNK,
    token_loss: TokenLoss = "cross_entropy",
    softcap: float | None = None,
) -> tuple[jax.Array, LossSums]:
    """Returns sum_k step_weights[k] * loss[k], differentiable in x and weight, and the sums, which have no gradient.

    Computes the gradients in the forward pass, where the logits are. Arguments as in `vocabulary_losses`.
    """
    sums = _sums(x, weight, teacher, importance, chunk, token_loss, softcap)
    return (step_weights * sums.loss).sum(), sums


@jax.named_scope("vocabulary_loss")
def _weighted_forward(x, weight, teacher, importance, step_weights, chunk, token_loss, softcap):
    sums, gradients = _sums_and_gradients(x, weight, teacher, importance, step_weights, chunk, token_loss, softcap)
    return ((step_weights * sums.loss).sum(), sums), gradients


def _weighted_backward(chunk, token_loss, softcap, gradients, of_output):
    del chunk, token_loss, softcap
    of_total = of_output[0]
    return *((of_total * gradient).astype(gradient.dtype) for gradient in gradients), None, None, None


weighted_loss.defvjp(_weighted_forward, _weighted_backward)


def _sums(x, weight, teacher, importance, chunk, token_loss, softcap):
    def add(sums, x, part):
        logits = capped(linear(part.x, weight, jnp.float32), softcap)
        return _added(sums, part, _divergence(logits, part.answers, token_loss)), x

    return _over_chunks(add, _zero_sums(x), x, len(weight), teacher, importance, chunk)[0]


def _sums_and_gradients(x, weight, teacher, importance, step_weights, chunk, token_loss, softcap):
    """Returns the sums, and the gradients of (step_weights * sums.loss).sum() with respect to x and weight."""

    def add(carry, x, part):
        sums, of_weight = carry
        logits = capped(linear(part.x, weight, jnp.float32), softcap)
        values = _divergence(logits, part.answers, token_loss)
        error = values.gradient * (part.importance * step_weights[part.step])[..., None]
        if softcap is not None:
            error *= 1 - jnp.square(logits / softcap)  # the derivative of `capped`
        error = error.astype(x.dtype).reshape(-1, error.shape[-1])
        # Barrier: a product that contracts the first axis of both takes XLA:CPU twice as long.
        columns = jax.lax.optimization_barrier(part.x.reshape(-1, x.shape[-1]).T)
        of_weight += dot("dr,rv->dv", columns, error, jnp.float32)
        of_rows = dot("rv,vd->rd", error, weight, jnp.float32).reshape(1, *part.x.shape).astype(x.dtype)
        # In place of x, which saves an array of its size: nothing reads this part again.
        return (_added(sums, part, values), of_weight), put(x, of_rows, (part.step, 0, part.start, 0))

    start = _zero_sums(x), jnp.zeros(weight.shape[::-1], jnp.float32)
    (sums, of_weight), of_x = _over_chunks(add, start, x, len(weight), teacher, importance, chunk)
    return sums, (of_x[:, :, : x.shape[2]], of_weight.T.astype(weight.dtype))


class _Answers(NamedTuple):
    """The teacher at the positions of a chunk: probabilities [B, C, V], argmax [B, C], entropies [B, C]."""

    wanted: jax.Array
    likeliest: jax.Array
    entropy: jax.Array


class _Part(NamedTuple):
    """A chunk of a step. start: its first position. x: [B, C, D]. importance: [B, C]."""

    step: jax.Array
    start: jax.Array
    x: jax.Array
    importance: jax.Array
    answers: _Answers


class _Divergence(NamedTuple):
    """Values of positions [B, C], and the gradient of `loss` with respect to the logits, [B, C, V]."""

    loss: jax.Array
    match: jax.Array
    entropy: jax.Array
    gradient: jax.Array


def _divergence(logits: jax.Array, answers: _Answers, token_loss: TokenLoss) -> _Divergence:
    """Computes the loss of a draft q = softmax(logits) against the teacher p, and its gradient.

    "cross_entropy": -sum_x p(x) log q(x).
    "lk": -log alpha, where alpha = sum_x min(p(x), q(x)) is the probability that sampling accepts a token drawn from q.
    "lk_adaptive": w KL(p, q) + (1 - w) (1 - alpha), where w = exp(-LK_DECAY alpha) at each position, held constant:
      KL while the draft is far from the teacher, then total variation, whose gradient vanishes far from it.
    """
    wanted = answers.wanted
    top = logits.max(axis=-1, keepdims=True)
    powers = jnp.exp(logits - top)
    total = powers.sum(axis=-1, keepdims=True)
    draft = powers / total
    match = _argmax(logits, top) == answers.likeliest
    cross = (top + jnp.log(total))[..., 0] - (wanted * logits).sum(axis=-1)
    if token_loss == "cross_entropy":
        return _Divergence(cross, match, answers.entropy, draft - wanted)
    # Not 0: where p and q share nothing, the loss is large and finite, and its gradient 0.
    accepted = jnp.maximum(jnp.minimum(wanted, draft).sum(axis=-1), jnp.finfo(jnp.float32).tiny)
    rises = draft * (draft < wanted)  # min(p, q) rises with q below p alone
    of_accepted = rises - draft * rises.sum(axis=-1, keepdims=True)
    if token_loss == "lk":
        return _Divergence(-jnp.log(accepted), match, answers.entropy, -of_accepted / accepted[..., None])
    share = jnp.exp(-LK_DECAY * accepted)
    loss = share * (cross - answers.entropy) + (1 - share) * (1 - accepted)
    share = share[..., None]
    return _Divergence(loss, match, answers.entropy, share * (draft - wanted) - (1 - share) * of_accepted)


def _over_chunks(add, carry, x, vocabulary, teacher, importance, chunk):
    """Returns carry and x after `carry, x = add(carry, x, part)` for all chunks and, within a chunk, all steps.

    Chunks divide the positions, not the batch: no sequence moves to another device.
    """
    steps, batch, width, _ = x.shape
    size, count = _chunk(batch, width, chunk)
    x, importance = (_padded(array, 2, size * count) for array in (x, importance))
    teacher = teacher._replace(**{teacher._fields[0]: _padded(teacher[0], 1, size * count + steps - 1)})

    def over_steps(index, carry):
        start = jnp.asarray(index, jnp.int32) * size
        answers = _answers(teacher, vocabulary, start, size + steps - 1)

        def one(step, carry):
            carry, x = carry
            step = jnp.asarray(step, jnp.int32)
            rows, weights = (_slice(array[step], start, size) for array in (x, importance))
            own = jax.tree.map(lambda array: _slice(array, step, size), answers)
            return add(carry, x, _Part(step, start, rows, weights, own))

        return one(0, carry) if steps == 1 else jax.lax.fori_loop(0, steps, one, carry)

    return jax.lax.fori_loop(0, count, over_steps, (carry, x))


def _answers(teacher: Soft | Labels, vocabulary: int, start: jax.Array, size: int) -> _Answers:
    """Computes the teacher's answers at `size` positions from `start` on."""
    given = _slice(teacher[0], start, size)
    if isinstance(teacher, Labels):
        wanted = jax.nn.one_hot(given, vocabulary, dtype=jnp.float32)
        return _Answers(wanted, given, jnp.zeros(given.shape, jnp.float32))
    logits = capped(linear(given, teacher.rows, jnp.float32), teacher.softcap)
    wanted = jax.nn.softmax(logits, axis=-1)
    entropy = -(wanted * jnp.log(jnp.where(wanted > 0, wanted, 1))).sum(axis=-1)
    return _Answers(wanted, _argmax(logits), entropy)


def _argmax(logits: jax.Array, top: jax.Array | None = None) -> jax.Array:
    """Returns the first index of the maximum `top` [..., 1] over the last axis.

    Two reductions of one number vectorise; XLA:CPU reduces `argmax` element by element, which takes as long as four
    products with the vocabulary.
    """
    top = logits.max(axis=-1, keepdims=True) if top is None else top
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(logits == top, index, logits.shape[-1]).min(axis=-1)


def _zero_sums(x: jax.Array) -> LossSums:
    return LossSums(*[jnp.zeros(len(x), jnp.float32)] * 3)


def _added(sums: LossSums, part: _Part, values: _Divergence) -> LossSums:
    """Adds the values of a part, weighted by importance, to the sums of its step."""
    new = LossSums(*((part.importance * value).sum() for value in (values.loss, values.match, values.entropy)))
    return jax.tree.map(lambda total, value: total.at[part.step].add(value), sums, new)


def _slice(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Slices `size` positions of [B, S, ...] from `start` on."""
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)


@jax.named_scope("likeliest_tokens")
def likeliest_tokens(
    hidden: jax.Array, weight: jax.Array, chunk: int = CHUNK, softcap: float | None = None
) -> jax.Array:
    """Returns the argmax of hidden weight^T, capped by `softcap`, [B, S]: hidden [B, S, H], weight [V, H]."""
    batch, width = hidden.shape[:2]
    parts = _split(hidden, chunk)
    ids = jax.lax.map(lambda part: _argmax(capped(linear(part, weight, jnp.float32), softcap)), parts)
    return jnp.moveaxis(ids, 0, 1).reshape(batch, -1)[:, :width]


def _chunk(batch: int, width: int, chunk: int) -> tuple[int, int]:
    """Returns the positions of a sequence in a chunk, and the number of chunks."""
    size = min(max(chunk // batch, 1), width)
    return size, -(-width // size)


def _padded(array: jax.Array, axis: int, width: int) -> jax.Array:
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, width - array.shape[axis])
    return jnp.pad(array, padding)


def _split(values: jax.Array, chunk: int) -> jax.Array:
    """Splits [B, S, H] into chunks [chunks, B, C, H]."""
    batch, width = values.shape[:2]
    size, count = _chunk(batch, width, chunk)
    return jnp.moveaxis(_padded(values, 1, size * count).reshape(batch, count, size, -1), 1, 0)
