"""The best prefixes: the tree for drafts that score all depths in one pass (DDTree, arXiv 2604.12989)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eagle_jax.tree.policy import DraftFn, DraftStep, log_probabilities, require_sizes, step_mask, tree_of_candidates
from eagle_jax.tree.tree import Tree


@dataclasses.dataclass(frozen=True)
class BestPrefixes:
    """A tree of the most probable prefixes: the num_nodes - 1 best by the sum of the draft's log-probabilities.

    Unlike TreeConfig it limits no level: the best prefixes may all lie on one, or all on one path. It keeps
    num_nodes - 1 nodes of every level. That is cheap where the draft scores a depth once for all nodes, as Medusa's
    heads do. A draft that runs a pass a level would run it over as many nodes.

    depth: draft tokens on the longest path.
    num_nodes: nodes that the target verifies, the root included.

    Raises:
      ValueError: for impossible sizes.
    """

    depth: int
    num_nodes: int

    def __post_init__(self):
        require_sizes(self, depth=1, num_nodes=2)

    @property
    def width(self) -> int:
        return self.num_nodes - 1

    def grow(
        self,
        root: Int[Array, " batch"],
        logits: Float[Array, "batch draft_vocab"],
        carry: Any,
        draft_fn: DraftFn,
        target_ids: Int[Array, " draft_vocab"] | None = None,
    ) -> tuple[Tree, Any]:
        """Keeps the best nodes of each level, and then the best of all.

        A child never scores above its parent, so no other node can be among the best of all. Of equal scores the
        shallower node is better, then the one with the better parent, then the one of lower rank.

        Args and Returns: as TreePolicy.grow.
        Raises:
          ValueError: if the root cannot have num_nodes - 1 children, as the draft's vocabulary is smaller.
        """
        batch, vocab = logits.shape
        count, levels = self.width, self.depth - 1
        if count > vocab:
            raise ValueError(
                f"BestPrefixes.num_nodes = {self.num_nodes} exceeds the draft vocabulary of {vocab} tokens"
            )

        def best(logits, scores):  # -> scores, tokens and parents of the best nodes of a level, [batch, count]
            log_probs, ids = jax.lax.top_k(log_probabilities(logits), count)
            beams, ranks = candidates(scores.shape[1], count, shared=logits.shape[1] == 1)
            rows = beams if logits.shape[1] > 1 else np.zeros_like(beams)
            chosen_scores, chosen = jax.lax.top_k(scores[:, beams] + log_probs[:, rows, ranks], count)
            tokens = jnp.take_along_axis(ids[:, rows, ranks], chosen, axis=1)
            return chosen_scores, tokens if target_ids is None else target_ids[tokens], jnp.asarray(beams)[chosen]

        def expand(state, level):
            carry, mask, scores, tokens, parents = state
            mask = step_mask(mask, parents, level)
            logits, carry = draft_fn(carry, DraftStep(tokens, parents, mask, level))
            of_level = best(logits, scores)
            return (carry, mask, *of_level), of_level

        first = best(logits[:, None], jnp.zeros((batch, 1), jnp.float32))
        grown = tuple(values[None] for values in first)
        if levels:  # a scan of length 0 would still trace draft_fn
            mask = jnp.zeros((batch, count, levels * count), bool)
            (carry, *_), more = jax.lax.scan(expand, (carry, mask, *first), jnp.arange(levels, dtype=jnp.int32))
            grown = tuple(jnp.concatenate(pair) for pair in zip(grown, more, strict=True))
        return self._select(root, *grown), carry

    def _select(
        self,
        root: Int[Array, " batch"],
        scores: Float[Array, "depth batch width"],
        tokens: Int[Array, "depth batch width"],
        parents: Int[Array, "depth batch width"],
    ) -> Tree:
        """Makes a tree of the best candidates. Node i of level l, whose depth is l + 1, has the id l * width + i."""

        def flat(levels):
            return jnp.moveaxis(levels, 0, 1).reshape(len(root), -1)

        best_scores, ids = jax.lax.top_k(flat(scores), self.width)
        ids, best_scores = jax.lax.sort((ids, best_scores), dimension=1, num_keys=1)
        level_before = self.width * (jnp.arange(self.depth, dtype=jnp.int32) - 1)
        parent_ids = jnp.maximum(parents + level_before[:, None, None], -1)  # -1: the root
        chosen_tokens, chosen_parents = (
            jnp.take_along_axis(flat(levels), ids, axis=1) for levels in (tokens, parent_ids)
        )
        return tree_of_candidates(root, ids, best_scores, chosen_tokens, chosen_parents, 1 + ids // self.width)


def candidates(beams: int, count: int, shared: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lists the candidates for the best `count` children of `beams` nodes, which are sorted: each one's node and rank.

    Args:
      shared: whether all nodes have the same children. Then child r of node i comes after (i + 1) * (r + 1) - 1 others,
        those of no higher node and rank, so that it is needed only if they are fewer than `count`.
    """
    nodes, ranks = np.divmod(np.arange(beams * count, dtype=np.int32), np.int32(count))
    needed = (nodes + 1) * (ranks + 1) <= count if shared else np.full(nodes.shape, True)
    return nodes[needed], ranks[needed]
