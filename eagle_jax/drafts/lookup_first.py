"""LookupFirst: copies from the text where its last tokens occurred before, and asks another draft elsewhere.

A head knows what usually follows, prompt lookup (Saxena, "Prompt Lookup Decoding", 2023) what followed here. Answers
that repeat code, names or their question are copied for longer than a head guesses right.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eagle_jax.drafts.prompt_lookup import longest_matches
from eagle_jax.drafts.protocol import Committed, Context, Draft, Proposal
from eagle_jax.models.target import Target
from eagle_jax.tree import Tree, TreePolicy, merge_chains


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookupFirst(Draft):
    """Drafts a copy where the last `least` tokens occurred before; elsewhere what `otherwise` proposes.

    Each sequence of a batch decides for itself.

    otherwise: an EAGLE head, or another draft.
    length: tokens copied. A tree of fewer nodes grows by unused ones, which the target verifies, too; best is one token
      less than the tree has nodes.
    ngram: the longest suffix of the text to match. Longer matches are preferred, then later ones.
    least: the shortest suffix that counts as a match.

    Raises:
      ValueError: unless length is positive and 1 <= least <= ngram.
    """

    otherwise: Draft
    length: int = dataclasses.field(default=7, metadata={"static": True})
    ngram: int = dataclasses.field(default=3, metadata={"static": True})
    least: int = dataclasses.field(default=2, metadata={"static": True})

    def __post_init__(self):
        for name in ("length", "ngram", "least"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"LookupFirst.{name} must be a positive integer, got {value!r}")
        if self.least > self.ngram:
            raise ValueError(f"LookupFirst.least must be at most ngram, {self.ngram}, got {self.least}")

    @property
    def reusable(self) -> bool:
        return self.otherwise.reusable

    def check_fits(self, target: Target) -> None:
        self.otherwise.check_fits(target)

    def depth(self, tree: TreePolicy) -> int:
        return max(self.length, self.otherwise.depth(tree))

    def taps(self, target: Target) -> tuple[int, ...]:
        return self.otherwise.taps(target)

    def start(self, target: Target, batch: int, rows: int) -> Any:
        return self.otherwise.start(target, batch, rows)

    def update(self, target: Target, memory: Any, committed: Committed) -> Any:
        return self.otherwise.update(target, memory, committed)

    def propose(
        self,
        target: Target,
        context: Context,
        tree: TreePolicy,
        noise: Float[Array, "batch path vocab"] | None = None,
    ) -> Proposal:
        copies, matched = longest_matches(context, self.length, self.ngram, 1)
        found = matched[:, 0] >= self.least
        chain = merge_chains(context.root, copies, jnp.ones(copies.shape, bool))
        grown, probs = self.otherwise.propose(target, context, tree, noise)
        nodes = max(chain.tokens.shape[1], grown.tokens.shape[1])
        chain, grown = _padded(chain, nodes, 0), _padded(grown, nodes, grown.tokens.shape[1] - 1)
        if probs is not None:  # zeros: not drawn
            probs = jnp.pad(probs, [(0, 0), (0, nodes - probs.shape[1]), (0, 0)])
            probs = jnp.where(found[:, None, None], 0, probs)
        return Proposal(jax.tree.map(lambda x, y: jnp.where(found[:, None], x, y), chain, grown), probs)


def without_lookup(draft: Any) -> Any:
    """Returns the draft that a `LookupFirst` asks elsewhere; any other as it is."""
    return draft.otherwise if isinstance(draft, LookupFirst) else draft


def _padded(tree: Tree, nodes: int, parent: int) -> Tree:
    """Adds nodes without a guess, which repeat the root.

    Args:
      parent: of these nodes. The last node of a drawn tree has no draft distribution, of which they would be guesses.
    """
    more = nodes - tree.tokens.shape[1]

    def pad(x: Int[Array, "batch nodes"] | Float[Array, "batch nodes"], value: Any):
        added = jnp.broadcast_to(jnp.asarray(value, x.dtype), (x.shape[0], more))
        return jnp.concatenate([x, added], axis=1)

    return Tree(
        tokens=pad(tree.tokens, tree.tokens[:, :1]),
        parents=pad(tree.parents, parent),
        depths=pad(tree.depths, tree.depths[:, parent : parent + 1] + 1),
        scores=pad(tree.scores, -jnp.inf),
    )
