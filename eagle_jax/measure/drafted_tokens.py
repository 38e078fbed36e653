"""Measures how often a head's first and second drafted tokens are the target's, over texts that the target wrote."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from eagle_jax.api import forward
from eagle_jax.drafts.eagle.drafting import EagleDraft
from eagle_jax.models.target import Target
from eagle_jax.ops.attention import attention
from eagle_jax.ops.spec import PLAIN


@dataclasses.dataclass(frozen=True)
class Share:
    """Counts the positions at which a drafted token is the target's."""

    accepted: int
    positions: int

    @property
    def rate(self) -> float:
        return self.accepted / max(self.positions, 1)

    def beats(self, other: Share) -> bool:
        """Returns whether the rate is above another one by more than two standard errors of their difference."""
        variances = (one.rate * (1 - one.rate) / max(one.positions, 1) for one in (self, other))
        return self.rate - other.rate > 2 * math.sqrt(sum(variances))


def best_of(rates: Sequence[tuple[Share, ...]]) -> int | None:
    """Returns the index of the best rates: by the first token, and by the second one among those that it leaves equal.

    Returns:
      None if the best one does not beat every other.
    """
    left = list(range(len(rates)))
    for drafted in range(len(rates[0])):
        best = max(left, key=lambda index: rates[index][drafted].rate)
        left = [index for index in left if index == best or not rates[best][drafted].beats(rates[index][drafted])]
    return left[0] if len(left) == 1 else None


def drafted_tokens(
    target: Target,
    draft: EagleDraft,
    tokens: Int[Array, "batch text"],
    prompt_lengths: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
) -> tuple[Share, Share]:
    """Compares a head's two most likely next tokens with the target's, at every position of its continuations.

    The second step reads the text's own token, whether the first step drafted it or not.

    Args:
      tokens, lengths: prompts and their greedy continuations, as `Output` has them.
    """
    matches = drafted_matches(target, draft, tokens, lengths)
    index = jnp.arange(tokens.shape[1])[None]
    inside = [(index >= prompt_lengths[:, None] - 1) & (index < lengths[:, None] - step) for step in (1, 2)]
    first, second = (
        Share(int((match & counted).sum()), int(counted.sum())) for match, counted in zip(matches, inside, strict=True)
    )
    return first, second


@jax.jit
def drafted_matches(
    target: Target, draft: EagleDraft, tokens: Int[Array, "batch text"], lengths: Int[Array, " batch"]
) -> tuple[Bool[Array, "batch text"], Bool[Array, "batch text"]]:
    """Returns where the first and the second drafted token are the target's.

    The feature at i and the token at i + 1 draft the token at i + 2, and the hidden state of that draft the next one:

        position   first step: feature, token   second step: hidden state, token   drafts
        i          i, i + 1                                                        i + 2
        i + 1                                   i, i + 2                           i + 3
    """
    batch, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
    mask = jnp.broadcast_to(jnp.tri(width, dtype=bool), (batch, width, width))
    logits, features = forward(target, tokens, lengths, draft)
    # The target's logits at i + 1 give the token at i + 2.
    wanted = jnp.argmax(logits, axis=-1)

    def first(index, q, k, v, spec=PLAIN):
        del index
        return attention(q, k, v, mask, spec=spec, positions=positions), (k, v)

    following = (jnp.roll(tokens, -step, axis=1) for step in (1, 2))
    hidden, kept = draft(target, draft.fuse(features), next(following), positions, first, prompt_lengths=lengths)

    def second(index, q, k, v, spec=PLAIN):
        """Sees the pairs of the first step up to its own position, and its own pair."""
        seen = mask if spec.window is None else mask & spec.sees(positions[:, :, None] + 1, positions[:, None])
        own = jnp.broadcast_to(jnp.eye(width, dtype=bool), mask.shape)
        k, v = (jnp.concatenate([old, new], axis=2) for old, new in zip(kept[index], (k, v), strict=True))
        both = jnp.concatenate([seen, own], axis=-1)
        return attention(q, k, v, both, spec=spec, positions=positions + 1, limit_new=False), None

    later, _ = draft(target, hidden, next(following), positions + 1, second, prompt_lengths=lengths)
    matches = []
    for step, state in enumerate((hidden, later), 1):
        ids = jnp.argmax(draft.logits(target, state), axis=-1)
        ids = ids if draft.target_ids is None else draft.target_ids[...][ids]
        matches.append(ids == jnp.roll(wanted, -step, axis=1))
    return matches[0], matches[1]
