"""Static sizes: the width of padded prompts, the capacity of a sequence, the positions of its cache.

All are Python integers: a program is compiled for each plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Int

from eagle_jax.models.cache import ROW_TILE

# Scratch positions beyond the capacity: a commit writes depth + 1 positions, of which only the accepted ones count.
# Pass deeper trees to `prefill(tree=...)`, which sizes the scratch positions.
MIN_SCRATCH = 32

# Prompt tokens per pass: enough to keep a GPU's or TPU's matrix units busy, few enough that attention scores stay small
# compared with the cache.
PREFILL_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes of a batch.

    width: columns of the padded prompts.
    capacity: most tokens (prompt + new) of a sequence.
    asked: most new tokens that the caller asked for.
    """

    width: int
    capacity: int
    asked: int

    @property
    def max_new_tokens(self) -> int:
        """Most new tokens, at most the capacity."""
        return min(self.asked, self.capacity)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that leaves room for a new token."""
        return min(self.width, self.capacity - 1)

    @property
    def columns(self) -> int:
        """Columns of the buffer that holds prompts and new tokens."""
        return self.width + self.max_new_tokens

    def limits(self, lengths: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """Returns the lengths at which sequences with prompts of these lengths end."""
        return limits_of(lengths, self.asked, self.capacity)


def limits_of(
    lengths: Int[Array, "*batch"], asked: int | Int[ArrayLike, ""] | None, capacity: int
) -> Int[Array, "*batch"]:
    """Returns the lengths at which sequences end.

    Args:
      lengths: of their prompts.
      asked: most new tokens that the caller asked for; None or more than fit: as many as fit.
    """
    if asked is None:
        return jnp.full_like(lengths, capacity)
    most = min(int(asked), capacity) if isinstance(asked, int | np.integer) else jnp.minimum(asked, capacity)
    return jnp.minimum(lengths + most, capacity)


def plan(
    width: int,
    max_new_tokens: int,
    *,
    capacity: int | None = None,
    trained: int | None = None,
    longest: int = 0,
) -> Plan:
    """Plans the sizes of a batch.

    Args:
      width: columns of the padded prompts.
      capacity: most tokens of a sequence; default width + max_new_tokens.
      trained: the target's max_position_embeddings, if it limits the capacity.
      longest: tokens of the longest prompt, which must be shorter than `trained`.
    Raises:
      ValueError: if it is not.
    """
    capacity = width + max_new_tokens if capacity is None else capacity
    if trained is not None:
        if longest >= trained:
            raise ValueError(
                f"a prompt has {longest} tokens, this model takes at most {trained - 1} and one new token "
                f"(max_position_embeddings is {trained})"
            )
        capacity = min(capacity, trained)
    return Plan(width, capacity, max_new_tokens)


def padded_width(length: int, buckets: Sequence[int]) -> int:
    """Returns the smallest bucket that holds a prompt. Raises ValueError if none does."""
    width = min((bucket for bucket in buckets if bucket >= length), default=None)
    if width is None:
        raise ValueError(f"a prompt has {length} tokens, the widest bucket holds {max(buckets)}")
    return width


def scratch_positions(depth: int) -> int:
    """Returns the number of scratch positions for trees up to this depth."""
    return max(MIN_SCRATCH, depth + 1)


def cache_positions(capacity: int, depth: int) -> int:
    """Returns the positions of a cache: capacity and scratch, rounded up to whole tiles."""
    return -(-(capacity + scratch_positions(depth)) // ROW_TILE) * ROW_TILE


def ring_margin(depth: int) -> int:
    """Returns the most positions that one write holds: a chunk of a prompt, or a commit."""
    return max(PREFILL_CHUNK, scratch_positions(depth))
