"""Lookahead decoding (Fu et al., arXiv 2402.02057): n-grams from Jacobi iteration, verified as they come up.

The window holds ngram - 1 levels of `window` guessed tokens. Level l's column c guesses the token c + l positions after
the root, given the levels before it. Every cycle runs the window through the target together with the guesses. The
target's argmax after the last level completes an n-gram in every column. The n-grams enter the pool, and the new tokens
become the last level. The guesses are the pool's n-grams that begin with the root.

The window is part of the tree. For ngram = 3 and window = 3, with the root x in column 0 of level 0:

    level 0    x - a - b         positions 0 1 2: each a child of the one to its left
    level 1    d   e   f         positions 1 2 3: each a child of the one above
    new        g   h   i         the target's argmax after d, e, f; the n-grams xdg, aeh, bfi

Therefore the tree's mask serves, and the window's paths are verified along with the guesses. (The paper verifies the
guesses only, and so accepts fewer tokens.)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from eagle_jax.drafts.protocol import Committed, Context, Draft, Proposal
from eagle_jax.models.target import Target
from eagle_jax.tree import Tree, TreePolicy, merge_chains
from eagle_jax.tree.accept import argmax

NONE = -1  # no token yet


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookaheadMemory:
    """pool: a ring buffer of n-grams, by the cycle that produced them. cycles: run so far."""

    window: Int32[Array, "batch ngram-1 window"]
    pool: Int32[Array, "batch remembered window ngram"]
    cycles: Int32[Array, " batch"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Lookahead(Draft):
    """Drafts n-grams that the target itself produced in earlier cycles; no weights.

    window: columns of guessed tokens.
    ngram: the n of the n-grams, at least 2.
    guesses: n-grams verified in a cycle, the latest first.
    remembered: cycles whose n-grams stay in the pool.

    The window starts with tokens of the prompt. A cycle runs (guesses + window) * (ngram - 1) nodes.
    """

    window: int = 15
    ngram: int = 5
    guesses: int = 15
    remembered: int = 256

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 2 if field.name == "ngram" else 1
            if type(value) is not int or value < least:
                raise ValueError(f"Lookahead.{field.name} must be an integer of at least {least}, got {value!r}")
        if self.guesses > self.remembered * self.window:
            raise ValueError(
                f"Lookahead.guesses = {self.guesses} is more than the pool holds, remembered * window = "
                f"{self.remembered * self.window}"
            )

    def depth(self, tree: TreePolicy) -> int:
        return max(self.ngram - 1, self.window + self.ngram - 3)

    def start(self, target: Target, batch: int, rows: int) -> LookaheadMemory:
        return LookaheadMemory(
            window=jnp.full((batch, self.ngram - 1, self.window), NONE, jnp.int32),
            pool=jnp.full((batch, self.remembered, self.window, self.ngram), NONE, jnp.int32),
            cycles=jnp.zeros(batch, jnp.int32),
        )

    def propose(
        self,
        target: Target,
        context: Context,
        tree: TreePolicy,
        noise: Float[Array, "batch path vocab"] | None = None,
    ) -> Proposal:
        memory: LookaheadMemory = context.memory
        batch, width = context.tokens.shape
        root = context.root
        guesses, valid = self._guesses(memory, root)
        merged = merge_chains(root, guesses, valid)

        places = (
            jnp.arange((self.ngram - 1) * self.window, dtype=jnp.int32)[None] % jnp.maximum(context.lengths, 1)[:, None]
        )
        beginning = jnp.take_along_axis(context.tokens, jnp.minimum(places, width - 1), axis=1)
        window = jnp.where(memory.window == NONE, beginning.reshape(memory.window.shape), memory.window)
        parents, depths = self._window_shape(merged.num_nodes)

        def each_row(values):
            return jnp.broadcast_to(jnp.array(values, jnp.int32), (batch, len(values)))

        return Proposal(
            Tree(
                tokens=jnp.concatenate([merged.tokens, window.reshape(batch, -1)[:, 1:]], axis=1),
                parents=jnp.concatenate([merged.parents, each_row(parents)], axis=1),
                depths=jnp.concatenate([merged.depths, each_row(depths)], axis=1),
                scores=jnp.pad(merged.scores, [(0, 0), (0, len(parents))]),
            )
        )

    def update(self, target: Target, memory: LookaheadMemory, committed: Committed) -> LookaheadMemory:
        nodes, logits = committed.tree, committed.logits
        if nodes is None or logits is None:  # a prompt: `propose` fills the window from it
            return memory
        batch, count = nodes.tokens.shape
        first = count - self.window * (self.ngram - 1)  # the window's nodes end the tree; entry 0 is set to the root
        window = nodes.tokens[:, first:].at[:, 0].set(nodes.tokens[:, 0])
        window = window.reshape(batch, self.ngram - 1, self.window)
        top = argmax(logits[:, -self.window :])
        if self.ngram == 2:  # the top level is level 0, whose column 0 is the root
            top = top.at[:, 0].set(argmax(logits[:, 0]))
        ngrams = jnp.concatenate([window, top[:, None]], axis=1).swapaxes(1, 2)  # [batch, window, ngram]
        pool = self._remember(memory, ngrams)
        alive = committed.count > 0
        higher = jnp.concatenate([window[:, 1:], top[:, None]], axis=1)
        return LookaheadMemory(
            window=jnp.where(alive[:, None, None], higher, memory.window),
            pool=jnp.where(alive[:, None, None, None], pool, memory.pool),
            cycles=memory.cycles + alive,
        )

    def _guesses(
        self, memory: LookaheadMemory, root: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch chains length"], Bool[Array, "batch chains length"]]:
        """Returns the continuations of the latest n-grams that begin with the root, and which of them exist."""
        batch = root.shape[0]
        # The entry that is overwritten next holds the oldest n-grams.
        age = (jnp.arange(self.remembered, dtype=jnp.int32)[None] - memory.cycles[:, None]) % self.remembered
        recency = age[:, :, None] * self.window + jnp.arange(self.window, dtype=jnp.int32)[None, None]
        recency = jnp.where(memory.pool[..., 0] == root[:, None, None], recency, NONE).reshape(batch, -1)
        latest, chosen = jax.lax.top_k(recency, self.guesses)
        pool = memory.pool.reshape(batch, -1, self.ngram)
        continuations = jnp.take_along_axis(pool, chosen[:, :, None], axis=1)[:, :, 1:]
        valid = jnp.broadcast_to((latest != NONE)[:, :, None], continuations.shape)
        return jnp.where(valid, continuations, root[:, None, None]), valid

    def _remember(
        self, memory: LookaheadMemory, ngrams: Int[Array, "batch window ngram"]
    ) -> Int[Array, "batch remembered window ngram"]:
        """Returns the pool with a cycle's n-grams as the latest; earlier copies of them are removed."""
        held = (memory.pool[:, :, :, None] == ngrams[:, None, None]).all(axis=-1).any(axis=-1)
        pool = jnp.where(held[..., None], NONE, memory.pool)
        same = (ngrams[:, :, None] == ngrams[:, None]).all(axis=-1)  # [batch, window, window]
        again = (same & ~jnp.tri(self.window, dtype=bool)[None]).any(axis=-1)  # repeated in a later column
        ngrams = jnp.where(again[..., None], NONE, ngrams)
        here = jnp.arange(self.remembered, dtype=jnp.int32)[None] == (memory.cycles % self.remembered)[:, None]
        return jnp.where(here[:, :, None, None], ngrams[:, None], pool)

    def _window_shape(self, first: int) -> tuple[list[int], list[int]]:
        """Returns parents and depths of the window's nodes without the root, level by level.

        first: index of the first of them in the tree.
        """

        def node(level: int, column: int) -> int:
            return 0 if level == column == 0 else first - 1 + level * self.window + column

        places = [(level, column) for level in range(self.ngram - 1) for column in range(self.window)][1:]
        parents = [node(level - 1, column) if level else node(0, column - 1) for level, column in places]
        return parents, [level + column for level, column in places]
