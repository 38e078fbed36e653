"""merge_chains: several guessed continuations as one tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from eagle_jax.tree.tree import NO_PARENT, Tree


def merge_chains(
    root: Int[Array, " batch"], chains: Int[Array, "batch chains length"], valid: Bool[Array, "batch chains length"]
) -> Tree:
    """Merges chains of tokens into a tree of 1 + chains * length nodes.

    Node 1 + g * length + i is token i of chain g. If a chain shares a prefix with an earlier chain, its own nodes stay
    as unused duplicates and its remaining tokens attach to the earlier chain's node:

        chains [a b c], [a d e]       nodes 1 a, 2 b, 3 c, 4 a, 5 d, 6 e     parents 0 1 2 0 1 5

    Every acceptance rule tries the first of equal siblings, so every chain can be accepted whole.

    Args:
      valid: which tokens are guesses. The others become nodes with a score of -inf.
    Returns:
      Tree with scores of 0 for guesses.
    """
    batch, count, length = chains.shape
    # [batch, chains, chains, length]: whether two chains share their first i + 1 tokens
    same = jnp.cumprod((chains[:, :, None] == chains[:, None, :]).astype(jnp.int32), axis=-1) > 0
    first = jax.lax.argmax(same, 2, jnp.int32)  # the earliest chain with the same first i + 1 tokens
    nodes = 1 + first * length + jnp.arange(length, dtype=jnp.int32)[None, None]
    parents = jnp.concatenate([jnp.zeros((batch, count, 1), nodes.dtype), nodes[:, :, :-1]], axis=2)
    depths = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (batch, count, length))

    def with_root(first, rest):
        rest = rest.reshape(batch, -1)
        return jnp.concatenate([jnp.broadcast_to(first, (batch,))[:, None].astype(rest.dtype), rest], axis=1)

    return Tree(
        tokens=with_root(root, chains.astype(jnp.int32)),
        parents=with_root(jnp.int32(NO_PARENT), parents.astype(jnp.int32)),
        depths=with_root(jnp.int32(0), depths.astype(jnp.int32)),
        scores=with_root(jnp.float32(0), jnp.where(valid, np.float32(0), -jnp.inf)),
    )
