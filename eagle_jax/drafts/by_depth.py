"""Trees for drafts that score every depth in one pass: all nodes of a depth have the same candidates for children."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Float32

from eagle_jax.drafts.noise import coupled
from eagle_jax.drafts.protocol import Context, Proposal
from eagle_jax.tree import DraftStep, TreePolicy


def grow_by_depth(
    context: Context,
    tree: TreePolicy,
    logits: Float32[Array, "batch depth vocab"],
    noise: Float[Array, "batch path vocab"] | None = None,
) -> Proposal:
    """Grows a tree under the root.

    Args:
      logits: logits[:, d] score the tokens at depth d + 1; as many depths as the tree has.
      noise: as in `Draft.propose`.
    """

    def after(depth):  # -> [batch, 1, vocab], the logits after nodes of this depth
        of_level = jax.lax.dynamic_index_in_dim(logits, depth, axis=1)
        return coupled(of_level, context.sampling, noise, depth)

    def draft_fn(carry, step: DraftStep):
        return after(step.level + 1), carry  # once for all nodes of the level

    grown, _ = tree.grow(context.root, after(0)[:, 0], (), draft_fn)
    return Proposal(grown)
