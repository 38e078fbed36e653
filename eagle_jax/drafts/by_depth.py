"""Trees for drafts that score every depth in one pass: all nodes of a depth have the same candidates for children."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Float32, Int

from eagle_jax.drafts.noise import coupled
from eagle_jax.drafts.protocol import Context, Proposal
from eagle_jax.tree import DraftStep, TreePolicy


def grow_by_depth(
    context: Context,
    tree: TreePolicy,
    logits: Float32[Array, "batch depth draft_vocab"],
    noise: Float[Array, "batch path vocab"] | None = None,
    target_ids: Int[Array, " draft_vocab"] | None = None,
) -> Proposal:
    """Grows a tree under the root.

    Args:
      logits: logits[:, d] score the tokens at depth d + 1; as many depths as the tree has.
      noise: as in `Draft.propose`.
      target_ids: target id of every draft id; None if they are the same.
    """

    def after(depth):  # -> [batch, 1, draft_vocab], the logits after nodes of this depth
        of_level = jax.lax.dynamic_index_in_dim(logits, depth, axis=1)
        return coupled(of_level, context.sampling, noise, depth, target_ids)

    def draft_fn(carry, step: DraftStep):
        return after(step.level + 1), carry  # once for all nodes of the level

    grown, _ = tree.grow(context.root, after(0)[:, 0], (), draft_fn, target_ids)
    return Proposal(grown)
