"""The toy draft of docs/drafts.md: whatever followed a token last will follow it again."""

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

    def update(self, target, memory, text):
        real = jnp.arange(text.tokens.shape[1])[None] < text.count[:, None]
        tokens = jnp.where(real, text.tokens, memory.shape[1])  # what is not real falls out of the table
        return jax.vmap(lambda row, token, following: row.at[token].set(following, mode="drop"))(
            memory, tokens, text.next_tokens
        )

    def propose(self, target, state, tree, noise=None):
        root = jnp.take_along_axis(state.tokens, jnp.maximum(state.lengths - 1, 0)[:, None], axis=1)
        chain = [root]
        for _ in range(self.length):
            chain.append(jnp.take_along_axis(state.draft, chain[-1], axis=1))
        chains = jnp.stack(chain[1:], axis=2)  # [B, 1, length]
        return Proposal(merge_chains(root[:, 0], chains, jnp.ones(chains.shape, bool)))
