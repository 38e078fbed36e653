"""The toy draft of docs/guides/draft.md: whatever followed a token last will follow it again."""

import dataclasses

import jax
import jax.numpy as jnp

from eagle_jax import Draft, Proposal
from eagle_jax.tree import merge_chains


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Successors(Draft):
    """Guesses a chain of `length` tokens from a table [B, V]: the latest successor of every token."""

    length: int = 4

    def depth(self, tree):
        return self.length

    def start(self, target, batch, rows):
        return jnp.zeros((batch, target.config.vocab_size), jnp.int32)

    def update(self, target, memory, committed):
        valid = jnp.arange(committed.tokens.shape[1])[None] < committed.count[:, None]
        tokens = jnp.where(valid, committed.tokens, memory.shape[1])  # the others fall out of the table
        return jax.vmap(lambda row, token, following: row.at[token].set(following, mode="drop"))(
            memory, tokens, committed.next_tokens
        )

    def propose(self, target, context, tree, noise=None):
        chain = [context.root[:, None]]
        for _ in range(self.length):
            chain.append(jnp.take_along_axis(context.memory, chain[-1], axis=1))
        chains = jnp.stack(chain[1:], axis=2)  # [B, 1, length]
        return Proposal(merge_chains(context.root, chains, jnp.ones(chains.shape, bool)))
