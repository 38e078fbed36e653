"""Losses of draft heads: EAGLE-3's training-time test (arXiv 2503.01840, section 3.2), EAGLE-1's regression.

Letters: B batch, S positions, k step, D width of the head, F width of its features, H width of the target,
V target vocabulary, Vd draft vocabulary.

Step 0 of the training-time test reads the target's own features, step k what the head made of them k times: what a
decoder's k-th drafting step reads. Row j of step k stands at position j + k and predicts the token at j + 2 + k.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from eagle_jax.models.eagle1 import Eagle1Draft
from eagle_jax.models.eagle3 import Eagle3Draft
from eagle_jax.models.layers import dot
from eagle_jax.models.llama import Llama, LlamaOutput
from eagle_jax.train.attention import causal_part, finished, grouped, own_part

Alignment = Literal["corrected", "official"]
CHUNK = 2048  # positions whose logits exist at a time


def eagle3_loss(
    draft: Eagle3Draft,
    target: Llama,
    tokens: jax.Array,
    lengths: jax.Array,
    loss_mask: jax.Array,
    steps: int = 7,
    alignment: Alignment = "corrected",
) -> tuple[jax.Array, jax.Array]:
    """The training-time test's cross-entropy at every step, against the target's own distribution. Runs the target.

    Memory does not grow with the steps but by their own keys and values, and no [B, S, V] logits exist: steps and
    chunks of the vocabulary loss are computed again for the gradient.

    Args:
      draft: differentiable in it; the target is held constant.
      tokens: [B, S] right-padded. lengths: [B].
      loss_mask: [B, S], 1 for the tokens to learn (an assistant's), 0 for the others.
      alignment: "corrected": row j of step k counts where token j + 2 + k, which it predicts, is to be learned, lies
        inside the row and is in the draft's vocabulary; the loss is the mean over those. "official": as the official
        trainer, for parity: weighed by loss_mask[j + k], mean over all B * S positions.
    Returns:
      losses and accuracies [steps] float32, unweighted. Accuracy: the share of positions to learn where the draft's
      likeliest token is the target's.
    """
    if alignment not in ("corrected", "official"):
        raise ValueError(f'alignment must be "corrected" or "official", got {alignment!r}')
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    batch, width = tokens.shape
    out = _target_pass(target, tokens, lengths, draft.taps(target))
    features, answers = draft.features(out), out.hidden
    head = target.embed if target.lm_head is None else target.lm_head
    ids = None if draft.target_ids is None else draft.target_ids[...]
    rows = jax.lax.stop_gradient(head[...] if ids is None else head[ids])  # [Vd, H]

    # Everything is read `steps + 1` places further on, at most; past the end there are zeros, as in the reference.
    room = steps + 1
    ahead_tokens, ahead_answers = _with_room(tokens, room), _with_room(answers, room)
    known = _with_room(_in_vocabulary(target, answers, ids), room, fill=True if ids is None else (ids == 0).any())
    ahead_mask = _with_room(loss_mask.astype(jnp.float32), room + 1)
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=width, axis=1)

    def weights_of(step):
        """Which rows count, and which of them the target's token is in the draft's vocabulary: [B, S] each."""
        if alignment == "official":
            inside = jnp.arange(width)[None] + step < width
            learned = cut(ahead_mask, step)
            return learned, learned * cut(known, step + 1) * inside
        inside = jnp.arange(width)[None] + step + 2 < lengths[:, None]
        learned = cut(ahead_mask, step + 2) * inside
        return learned, learned * cut(known, step + 1)

    @jax.checkpoint
    def measure(draft, hidden, step):
        learned, weight = weights_of(step)
        entropy, match = _cross_entropy(draft, target, hidden, cut(ahead_answers, step + 1), rows)
        total = batch * width if alignment == "official" else jnp.maximum(weight.sum(), 1)
        accuracy = (weight * match).sum() / (learned.sum() + 1e-6)
        return (weight * entropy).sum() / total, accuracy

    def run(draft, hidden, step, attend):
        positions = jnp.broadcast_to(jnp.arange(width) + step, (batch, width))
        tokens = cut(ahead_tokens, step + 1)
        return draft(target, hidden, tokens, positions, attend, prompt_lengths=lengths)

    def attend_first(q, k, v):
        return finished(causal_part(grouped(q, k.shape[1]), k, v, lengths)).astype(q.dtype), (k, v)

    @jax.checkpoint
    def first(draft):
        return run(draft, draft.fuse(features), 0, attend_first)

    hidden, (first_k, first_v) = first(draft)
    losses = [measure(draft, hidden, 0)]
    if steps == 1:
        return _stack(losses)
    own_shape = (*first_k.shape[:2], steps - 1, *first_k.shape[2:])

    @jax.checkpoint
    def further(carry, step):
        hidden, own_k, own_v = carry

        def attend(q, k, v):
            start = (0, 0, step - 1, 0, 0)
            keys = jax.lax.dynamic_update_slice(own_k, k[:, :, None], start)
            values = jax.lax.dynamic_update_slice(own_v, v[:, :, None], start)
            queries = grouped(q, k.shape[1])
            mixed = finished(causal_part(queries, first_k, first_v, lengths), own_part(queries, keys, values, step))
            return mixed.astype(q.dtype), (keys, values)

        hidden, (own_k, own_v) = run(draft, hidden, step, attend)
        return (hidden, own_k, own_v), measure(draft, hidden, step)

    carry = (hidden, jnp.zeros(own_shape, first_k.dtype), jnp.zeros(own_shape, first_v.dtype))
    _, (more_losses, more_accuracies) = jax.lax.scan(further, carry, jnp.arange(1, steps))
    loss, accuracy = losses[0]
    return jnp.append(loss, more_losses), jnp.append(accuracy, more_accuracies)


def eagle1_loss(
    draft: Eagle1Draft,
    target: Llama,
    tokens: jax.Array,
    lengths: jax.Array,
    loss_mask: jax.Array,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """EAGLE-1's feature regression and soft cross-entropy (arXiv 2401.15077, section 4.2). Runs the target.

    Args:
      As `eagle3_loss`. loss_mask of a row's last token does not count: there is no feature after it.
      key: adds the official uniform noise to the features, (u - 0.5) * 0.2 * 512 / length; None: none.
    Returns:
      The mean SmoothL1 between predicted and true features, and the mean cross-entropy of their distributions over the
      target's vocabulary; the official loss is the first + 0.1 times the second.
    """
    batch, width = tokens.shape
    out = _target_pass(target, tokens, lengths, ())
    inside = jnp.arange(width)[None] < lengths[:, None]
    features = jnp.where(inside[:, :, None], draft.features(out), 0)
    answers = _with_room(features, 1)[:, 1:]
    if key is not None:
        noise = jax.random.uniform(key, features.shape, jnp.float32, -0.5, 0.5) * 0.2 * 512
        features = features + (noise / lengths[:, None, None]).astype(features.dtype)

    def attend(q, k, v):
        return finished(causal_part(grouped(q, k.shape[1]), k, v, lengths)).astype(q.dtype), None

    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    following = _with_room(tokens, 1)[:, 1:]
    hidden, _ = draft(target, draft.fuse(features), following, positions, attend, prompt_lengths=lengths)
    weight = loss_mask * (jnp.arange(width)[None] < lengths[:, None] - 1)
    total = weight.sum() + 1e-5
    difference = jnp.abs(hidden.astype(jnp.float32) - answers.astype(jnp.float32))
    smooth = jnp.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean(axis=-1)
    head = target.embed if target.lm_head is None else target.lm_head
    entropy, _ = _cross_entropy(draft, target, hidden, answers, jax.lax.stop_gradient(head[...]))
    return (weight * smooth).sum() / total, (weight * entropy).sum() / total


def _target_pass(target: Llama, tokens: jax.Array, lengths: jax.Array, taps: tuple[int, ...]) -> LlamaOutput:
    """The target over whole rows, held constant. Padding sees the row, and is not seen."""
    batch, width = tokens.shape

    def attend(index, q, k, v):
        del index
        return finished(causal_part(grouped(q, k.shape[1]), k, v, lengths)).astype(q.dtype), None

    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    out = target.run(tokens, positions, attend, prompt_lengths=lengths, taps=taps)
    return jax.lax.stop_gradient(out)


def _in_vocabulary(target: Llama, hidden: jax.Array, ids: jax.Array | None) -> jax.Array:
    """[B, S]: 1 where the target's likeliest next token is in the draft's vocabulary."""
    if ids is None:
        return jnp.ones(hidden.shape[:2])
    table = jnp.zeros(target.config.vocab_size).at[ids].set(1)
    return _in_chunks(lambda hidden: table[jnp.argmax(target.logits(hidden), axis=-1)], hidden)


def _cross_entropy(
    draft: Eagle3Draft | Eagle1Draft, target: Llama, hidden: jax.Array, answers: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the draft's distribution against the target's, and whether both choose one token: [B, S] each.

    Args:
      hidden: [B, S, D], the head's. answers: [B, S, H], the target's hidden states for the same tokens.
      rows: [Vd, H] of the target's lm_head, for the draft's vocabulary.
    """

    def compare(hidden, answers):
        logits = jax.nn.log_softmax(draft.logits(target, hidden), axis=-1)
        wanted = jax.lax.stop_gradient(dot("td,vd->tv", answers, rows, jnp.float32))
        match = jnp.argmax(logits, axis=-1) == jnp.argmax(wanted, axis=-1)
        return -(jax.nn.softmax(wanted, axis=-1) * logits).sum(axis=-1), match

    return _in_chunks(compare, hidden, answers)


def _in_chunks(fn, *arrays: jax.Array):
    """fn of all positions of arrays [B, S, X], CHUNK at a time; a chunk is computed again for its gradient."""
    batch, width = arrays[0].shape[:2]
    chunk = min(CHUNK, batch * width)
    count = -(-batch * width // chunk)

    def split(values):
        flat = values.reshape(batch * width, -1)
        return jnp.pad(flat, [(0, count * chunk - batch * width), (0, 0)]).reshape(count, chunk, -1)

    results = jax.lax.map(jax.checkpoint(lambda parts: fn(*parts)), tuple(map(split, arrays)))
    return jax.tree.map(lambda values: values.reshape(-1)[: batch * width].reshape(batch, width), results)


def _with_room(values: jax.Array, room: int, fill: bool | jax.Array = False) -> jax.Array:
    """values [B, S, ...] with `room` more places, of zeros, or of ones if `fill`."""
    more = jnp.zeros((values.shape[0], room, *values.shape[2:]), values.dtype)
    return jnp.concatenate([values, jnp.where(fill, 1, more).astype(values.dtype)], axis=1)


def _stack(results):
    losses, accuracies = zip(*results, strict=True)
    return jnp.stack(losses), jnp.stack(accuracies)
