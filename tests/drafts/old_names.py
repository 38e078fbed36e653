"""Drafts of users, written against the names of November 2026: never edited, because such drafts must go on working.

The first is that of docs/drafts.md as it stood then; the second reads what else of a state and a text drafts read then.
"""

import dataclasses

import jax
import jax.numpy as jnp

from eagle_jax import Draft, Proposal, Text
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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Repeated(Draft):
    """Guesses that the token before the last one comes again, or in sampled rows that the last one does."""

    def depth(self, tree):
        return 1

    def start(self, target, batch, rows):
        return jnp.zeros(batch, jnp.int32)  # [B] the token before the root

    def update(self, target, memory, text: Text):
        assert text.output.hidden.shape[:2] == text.tokens.shape and text.prompt_lengths.shape == text.start.shape
        assert (text.tree is None) == (text.logits is None)
        last = jnp.take_along_axis(text.tokens, jnp.maximum(text.count - 1, 0)[:, None], axis=1)[:, 0]
        return jnp.where(text.count > 0, last, memory)

    def propose(self, target, state, tree, noise=None):
        root = jnp.take_along_axis(state.tokens, jnp.maximum(state.lengths - 1, 0)[:, None], axis=1)[:, 0]
        new = state.lengths > state.prompt_lengths
        guess = jnp.where(new, state.draft, root)
        if state.sampling is not None:
            assert state.keys.shape == state.lengths.shape
            guess = jnp.where(state.sampling.temperature > 0, root, guess)
        return Proposal(tree=merge_chains(root, guess[:, None, None], jnp.ones((len(root), 1, 1), bool)), probs=None)
