"""Dynamic draft trees: EAGLE-2's context-aware tree (arXiv 2406.16858, section 4)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from eagle_jax.tree.policy import DraftFn, DraftStep, best_children, require_sizes, step_mask, tree_of_candidates
from eagle_jax.tree.tree import Tree


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """The sizes of a dynamic draft tree. They are static; its shape depends on the draft's probabilities.

    depth: draft tokens on the longest path; one draft pass each.
    top_k: children proposed per node, and nodes expanded per level.
    num_nodes: nodes that the target verifies, the root included.
    stop_below: adaptive drafting. A sequence's tree stops growing once the cumulative draft probability of its best
      node falls below this. Every sequence stops independently. The remaining draft passes are skipped when all have
      stopped. 0: never.
    score_temperature: divides the draft's logits while the tree grows. Values below 1 sharpen the draft distribution,
      giving deeper, narrower trees; useful for under-confident heads. Does not affect the output.

    The official `EaModel(total_token=T, depth=d, top_k=k)` is `TreeConfig(depth=d + 1, top_k=k, num_nodes=T)`.

    Raises:
      ValueError: for impossible sizes; the message names the largest possible.
    """

    depth: int = 8
    top_k: int = 10
    num_nodes: int = 60
    stop_below: float = 0.0
    score_temperature: float = 1.0

    def __post_init__(self):
        require_sizes(self, depth=1, top_k=1, num_nodes=1)
        if self.num_nodes < 2:
            raise ValueError(
                "TreeConfig.num_nodes counts the root, so 2 is the smallest tree; for plain decoding pass draft=None"
            )
        if self.num_nodes > 1 + self.num_candidates:
            raise ValueError(
                f"TreeConfig.num_nodes = {self.num_nodes} is more than depth = {self.depth} and top_k = {self.top_k} "
                f"can draft: at most {1 + self.num_candidates} (the root, top_k children, top_k ** 2 a further level)"
            )
        if isinstance(self.stop_below, bool) or not isinstance(self.stop_below, int | float):
            raise ValueError(f"TreeConfig.stop_below must be a probability, 0 to 1, got {self.stop_below!r}")
        if not 0 <= self.stop_below <= 1:
            raise ValueError(f"TreeConfig.stop_below must be a probability, 0 to 1, got {self.stop_below!r}")
        if isinstance(self.score_temperature, bool) or not isinstance(self.score_temperature, int | float):
            raise ValueError(f"TreeConfig.score_temperature must be a positive number, got {self.score_temperature!r}")
        if not 0 < self.score_temperature < float("inf"):
            raise ValueError(f"TreeConfig.score_temperature must be a positive number, got {self.score_temperature!r}")

    @property
    def num_candidates(self) -> int:
        """Drafted tokens, of which the best num_nodes - 1 become nodes."""
        return self.top_k + (self.depth - 1) * self.top_k**2

    @property
    def width(self) -> int:
        return self.top_k

    def grow(
        self,
        root: Int[Array, " batch"],
        logits: Float[Array, "batch draft_vocab"],
        carry: Any,
        draft_fn: DraftFn,
        target_ids: Int[Array, " draft_vocab"] | None = None,
    ) -> tuple[Tree, Any]:
        """Grows a tree level by level and selects its best nodes.

        Each level proposes top_k children for each of its top_k nodes. The best top_k of them by cumulative
        log-probability are expanded at the next level. Of all candidates the best num_nodes - 1 are selected, in the
        order proposed; ties go to the lower index. A child follows its parent and never scores higher, so no node is
        selected without its parent.

        Args and Returns: as TreePolicy.grow.
        Raises:
          ValueError: if top_k exceeds the draft vocabulary.
        """
        batch, vocab = logits.shape
        k = self.top_k
        if k > vocab:
            raise ValueError(f"TreeConfig.top_k = {k} exceeds the draft vocabulary of {vocab} tokens")
        levels = self.depth - 1  # expansions after the root's

        def propose(logits, scores):  # -> scores and tokens of all nodes' children, [batch, nodes * k]
            logits = logits if self.score_temperature == 1 else logits / self.score_temperature
            scores, tokens = best_children(logits, scores, k, target_ids)
            return scores.reshape(batch, -1), tokens.reshape(batch, -1)

        def expand(state, level):
            carry, beam, tokens, scores, mask = state
            parents = jnp.where(level == 0, 0, beam // k)
            mask = step_mask(mask, parents, level)
            logits, carry = draft_fn(carry, DraftStep(tokens, parents, mask, level))
            all_scores, all_tokens = propose(logits, scores)
            scores, best = jax.lax.top_k(all_scores, k)
            tokens = jnp.take_along_axis(all_tokens, best, axis=1)
            return (carry, best, tokens, scores, mask), (all_scores, all_tokens, beam)

        scores, tokens = propose(logits[:, None], jnp.zeros((batch, 1), jnp.float32))
        if levels == 0:
            return _select(root, scores, tokens, jnp.zeros((0, batch, k), jnp.int32), self), carry
        first = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (batch, k))
        mask = jnp.zeros((batch, k, levels * k), bool)
        state: Any = (carry, first, tokens, scores, mask)
        # beams[i]: which candidates of the level before were expanded at level i. [levels, batch, k]
        if self.stop_below > 0:
            carry, (more_scores, more_tokens, beams) = _while_promising(expand, state, levels, self.stop_below)
        else:
            (carry, *_), (more_scores, more_tokens, beams) = jax.lax.scan(
                expand, state, jnp.arange(levels, dtype=jnp.int32)
            )

        all_scores = jnp.concatenate([scores, _flat(more_scores)], axis=1)  # in flat candidate order
        all_tokens = jnp.concatenate([tokens, _flat(more_tokens)], axis=1)
        return _select(root, all_scores, all_tokens, beams, self), carry


def _while_promising(expand, state, levels: int, threshold: float) -> tuple[Any, tuple[Array, ...]]:
    """Scans `expand` over the levels, and stops once no sequence has a node of at least this probability.

    Candidates of levels that a sequence did not grow score -inf. They are selected only where a tree has too few
    others, and after their parents, which have lower flat ids.
    """
    _, first, tokens, scores, _ = state
    batch, k = tokens.shape
    grown = (
        jnp.full((levels, batch, k * k), -jnp.inf, jnp.float32),
        jnp.zeros((levels, batch, k * k), tokens.dtype),
        jnp.zeros((levels, *first.shape), first.dtype),
    )

    def condition(loop):
        level, growing, _, _ = loop
        return (level < levels) & growing.any()

    def body(loop):
        level, growing, state, grown = loop
        state, (scores, tokens, beams) = expand(state, level)
        scores = jnp.where(growing[:, None], scores, -jnp.inf)
        # Zeros, so that a sequence's tree does not depend on whether others still grow.
        tokens, beams = (jnp.where(growing[:, None], values, 0) for values in (tokens, beams))
        growing &= _promising(state[3], threshold)
        new = tuple(
            jax.lax.dynamic_update_index_in_dim(all, one, level, axis=0)
            for all, one in zip(grown, (scores, tokens, beams), strict=True)
        )
        return level + 1, growing, state, new

    start = jnp.int32(0), _promising(scores, threshold), state, grown
    _, _, (carry, *_), grown = jax.lax.while_loop(condition, body, start)
    return carry, grown


def _promising(scores: Float[Array, "batch width"], threshold: float) -> Bool[Array, " batch"]:
    """Returns whether each sequence's best node, the first, reaches the threshold."""
    return scores[:, 0] >= jnp.log(jnp.float32(threshold))


def _flat(levels: Shaped[Array, "levels batch children"]) -> Shaped[Array, "batch levels*children"]:
    """Concatenates the children of all levels, level by level."""
    return jnp.moveaxis(levels, 0, 1).reshape(levels.shape[1], -1)


def _select(
    root: Int[Array, " batch"],
    scores: Float[Array, "batch candidates"],
    tokens: Int[Array, "batch candidates"],
    beams: Int[Array, "levels batch width"],
    config: TreeConfig,
) -> Tree:
    """Makes a tree of the best num_nodes - 1 candidates."""
    batch, k = root.shape[0], config.top_k
    best_scores, flat = jax.lax.top_k(scores, config.num_nodes - 1)
    flat, best_scores = jax.lax.sort((flat, best_scores), dimension=1, num_keys=1)

    # Flat candidate ids for top_k = 2: [0 1 | 2 3  4 5 | 6 7  8 9 | ...], the root's two children, then two for each of
    # the two beams of every level. Block b = flat // k has one parent: the root for block 0, beam j of level i for
    # block 1 + i * k + j. That beam is candidate beams[i, j] of the level before, whose first flat id is starts[i].
    block_parents = jnp.moveaxis(beams, 0, 1) + _level_starts(config)[None, :, None]
    block_parents = jnp.pad(block_parents.reshape(batch, -1), [(0, 0), (1, 0)], constant_values=-1)
    parent_flat = jnp.take_along_axis(block_parents, flat // k, axis=1)
    depths = jnp.where(flat < k, 1, 2 + (flat - k) // k**2)
    chosen_tokens = jnp.take_along_axis(tokens, flat, axis=1)
    return tree_of_candidates(root, flat, best_scores, chosen_tokens, parent_flat, depths)


def _level_starts(config: TreeConfig) -> Int[Array, " levels"]:
    """Returns the first flat id of the level that the beams of expansion i were chosen from: [0, k, k + k^2, ...]."""
    k = config.top_k
    return jnp.array([0 if i == 0 else k + (i - 1) * k**2 for i in range(config.depth - 1)], jnp.int32)
