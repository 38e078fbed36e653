"""The children of the best nodes: JetSpec's tree for drafts that score all depths in one pass (arXiv 2606.18394)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eagle_jax.tree.policy import DraftFn, DraftStep, best_children, require_sizes, step_mask
from eagle_jax.tree.tree import NO_PARENT, Tree

LOWEST = jnp.finfo(jnp.float32).min


@dataclasses.dataclass(frozen=True)
class BestExpansions:
    """A tree that expands its most probable node, again and again, until it has num_nodes nodes.

    The root is expanded first. An expansion adds the top_k best children of a node, the last one only as many as are
    left. Of equally probable nodes the one that was added first is expanded.

    BestPrefixes holds the more probable nodes. This tree keeps the siblings of its paths, probable or not.

    depth: draft tokens on the longest path.
    top_k: children of a node.
    num_nodes: nodes that the target verifies, the root included.

    Raises:
      ValueError: for impossible sizes; the message names the largest possible.
    """

    depth: int
    top_k: int
    num_nodes: int

    def __post_init__(self):
        require_sizes(self, depth=1, top_k=1, num_nodes=2)
        most = sum(self.top_k**level for level in range(self.depth + 1))
        if self.num_nodes > most:
            raise ValueError(
                f"BestExpansions.num_nodes = {self.num_nodes} is more than depth = {self.depth} and top_k = "
                f"{self.top_k} can draft: at most {most}, the root included"
            )
        if self.depth > self.expansions:
            raise ValueError(
                f"BestExpansions.depth = {self.depth} is deeper than {self.num_nodes} nodes with top_k = {self.top_k} "
                f"reach: at most {self.expansions}, a level for every {self.top_k} nodes beside the root"
            )

    @property
    def expansions(self) -> int:
        """Nodes that are expanded, the root included."""
        return -(-(self.num_nodes - 1) // self.top_k)

    @property
    def width(self) -> int:
        """Nodes that a drafting step expands: all expansions except the root's may be of one level."""
        return max(self.expansions - 1, 1)

    def grow(
        self,
        root: Int[Array, " batch"],
        logits: Float[Array, "batch draft_vocab"],
        carry: Any,
        draft_fn: DraftFn,
        target_ids: Int[Array, " draft_vocab"] | None = None,
    ) -> tuple[Tree, Any]:
        """Scores the children of each level's best nodes, and then expands one node after the other.

        The nodes of a level are expanded in the order of their scores, so only the best `width` of them can be.

        Args and Returns: as TreePolicy.grow.
        Raises:
          ValueError: if top_k exceeds the draft vocabulary.
        """
        batch, vocab = logits.shape
        levels = self.depth - 1
        if self.top_k > vocab:
            raise ValueError(f"BestExpansions.top_k = {self.top_k} exceeds the draft vocabulary of {vocab} tokens")

        def best(scores, tokens):  # of [batch, width, top_k] children -> scores, tokens and indices, [batch, width]
            scores, chosen = jax.lax.top_k(scores.reshape(batch, -1), self.width)
            return scores, jnp.take_along_axis(tokens.reshape(batch, -1), chosen, axis=1), chosen

        def expand(state, level):
            carry, mask, scores, tokens, chosen = state
            parents = jnp.where(level == 0, 0, chosen // self.top_k)
            mask = step_mask(mask, parents, level)
            logits, carry = draft_fn(carry, DraftStep(tokens, parents, mask, level))
            children = best_children(logits, scores, self.top_k, target_ids)
            return (carry, mask, *best(*children)), (*children, chosen)

        # A level has `width` nodes. That of the root has one, and others of probability 0, which are never expanded.
        alone = jnp.where(jnp.arange(self.width) == 0, 0, -jnp.inf).astype(jnp.float32)
        scores, tokens = best_children(
            logits[:, None], jnp.broadcast_to(alone, (batch, self.width)), self.top_k, target_ids
        )
        grown: Any = (scores[None], tokens[None])
        chosen = jnp.zeros((0, batch, self.width), jnp.int32)
        if levels:  # a scan of length 0 would still trace draft_fn
            mask = jnp.zeros((batch, self.width, levels * self.width), bool)
            state = (carry, mask, *best(scores, tokens))
            (carry, *_), (*more, chosen) = jax.lax.scan(expand, state, jnp.arange(levels, dtype=jnp.int32))
            grown = tuple(jnp.concatenate(pair) for pair in zip(grown, more, strict=True))
        scores, tokens = (jnp.moveaxis(x, 0, 1).reshape(batch, -1, self.top_k) for x in grown)
        return jax.vmap(self._expand_best)(root, scores, tokens, jnp.moveaxis(chosen, 0, 1)), carry

    def _expand_best(
        self,
        root: Int[Array, ""],
        scores: Float[Array, "parents top_k"],
        tokens: Int[Array, "parents top_k"],
        chosen: Int[Array, "levels width"],
    ) -> Tree:
        """Expands the best node of one sequence, `expansions` times.

        Args:
          scores, tokens: of the children of each level's nodes, `width` rows a level; the root has row 0.
          chosen: which children became the nodes of the next level.
        """
        k, size = self.top_k, 1 + self.expansions * self.top_k
        # next_row[r, c]: the row that holds the children of child c of row r. A node without a row is never expanded.
        first_rows = self.width * jnp.arange(len(chosen), dtype=jnp.int32)[:, None]
        ids, rows = (chosen + k * first_rows).reshape(-1), self.width + jnp.arange(chosen.size, dtype=jnp.int32)
        next_row = jnp.zeros(scores.size, jnp.int32).at[ids].set(rows).reshape(scores.shape)

        def turn(i, state):
            nodes, row, waiting = state
            best = jnp.argmax(waiting).astype(jnp.int32)  # the first of equals
            of_best, depth = row[best], nodes.depths[best] + 1
            children = Tree(tokens[of_best], jnp.full(k, best), jnp.full(k, depth), scores[of_best])
            # An impossible node still comes before those that do not wait.
            priority = jnp.where(depth < self.depth, jnp.maximum(children.scores, LOWEST), -jnp.inf)
            return jax.tree.map(
                lambda so_far, new: jax.lax.dynamic_update_slice(so_far, new, (1 + i * k,)),
                (nodes, row, waiting.at[best].set(-jnp.inf)),
                (children, next_row[of_best], priority),
            )

        zeros = jnp.zeros(size, jnp.int32)
        nodes = Tree(zeros.at[0].set(root), zeros.at[0].set(NO_PARENT), zeros, jnp.zeros(size, jnp.float32))
        waiting = jnp.full(size, -jnp.inf, jnp.float32).at[0].set(0)
        nodes, _, _ = jax.lax.fori_loop(0, self.expansions, turn, (nodes, zeros, waiting))
        return jax.tree.map(lambda values: values[: self.num_nodes], nodes)
