"""Measures how often the first drafted token is the target's, over texts that the target wrote."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from eagle_jax.api import draft_forward, forward
from eagle_jax.drafts.eagle.drafting import EagleDraft
from eagle_jax.models.target import Target


@dataclasses.dataclass(frozen=True)
class FirstTokens:
    """Counts the positions at which the first drafted token is the target's."""

    accepted: int
    positions: int

    @property
    def rate(self) -> float:
        return self.accepted / max(self.positions, 1)

    def beats(self, other: FirstTokens) -> bool:
        """Returns whether the rate is above another one by more than two standard errors of their difference."""
        variances = (one.rate * (1 - one.rate) / max(one.positions, 1) for one in (self, other))
        return self.rate - other.rate > 2 * math.sqrt(sum(variances))


def first_tokens(
    target: Target,
    draft: EagleDraft,
    tokens: Int[Array, "batch text"],
    prompt_lengths: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
) -> FirstTokens:
    """Compares a head's most likely token with the target's at every position of its continuations.

    Args:
      tokens, lengths: prompts and their greedy continuations, as `Output` has them.
    """
    accepted, positions = _counts(target, draft, tokens, prompt_lengths, lengths)
    return FirstTokens(int(accepted), int(positions))


@jax.jit
def _counts(
    target: Target,
    draft: EagleDraft,
    tokens: Int[Array, "batch text"],
    prompt_lengths: Int[Array, " batch"],
    lengths: Int[Array, " batch"],
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    logits, features = forward(target, tokens, lengths, draft)
    _, drafted = draft_forward(draft, target, features, jnp.roll(tokens, -1, axis=1), lengths)
    ids = jnp.argmax(drafted, axis=-1)
    if draft.target_ids is not None:
        ids = draft.target_ids[...][ids]
    # The feature at i and the token at i + 1 draft the token at i + 2. The target's logits at i + 1 give that token.
    wanted = jnp.roll(jnp.argmax(logits, axis=-1), -1, axis=1)
    index = jnp.arange(tokens.shape[1])[None]
    counted = (index >= prompt_lengths[:, None] - 1) & (index < lengths[:, None] - 1)
    return (counted & (ids == wanted)).sum(), counted.sum()
