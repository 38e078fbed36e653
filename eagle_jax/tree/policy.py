"""TreePolicy: how a tree grows, the extension point for tree shapes of one's own.

Letters: B batch, k = width, V draft vocabulary, M = (depth - 1) * k scratch rows.

The draft comes in as a function, so that toy drafts can test a policy:

    draft_fn(carry, step) -> (logits [B, k, V], carry)

It scores the children of the k nodes in `step`. `carry` is the draft's own (its keys and values, say).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from eagle_jax.tree.tree import Tree


class DraftStep(NamedTuple):
    """The k nodes that one drafting step expands.

    tokens: [B, k] target token ids.
    parents: [B, k] which node of the previous step is the parent (0 at the first step).
    mask: [B, k, M]: the nodes of every step in the order drafted (node j of step i is row i * k + j), True for
      those a node may attend to: its ancestors and itself.
    level: [] int32, 0 for the children of the root; these nodes stand `level` positions past the first.
    """

    tokens: jax.Array
    parents: jax.Array
    mask: jax.Array
    level: jax.Array


DraftFn = Callable[[Any, DraftStep], tuple[jax.Array, Any]]


class TreePolicy(Protocol):
    """A frozen, hashable description of a tree that grows level by level: TreeConfig, StaticTree, or your own."""

    @property
    def depth(self) -> int:
        """Draft tokens on the longest path: 1 or more. The draft runs depth - 1 steps."""
        ...

    @property
    def num_nodes(self) -> int:
        """Nodes that the target verifies, the root included."""
        ...

    @property
    def width(self) -> int:
        """k, the nodes that a drafting step expands."""
        ...

    def grow(
        self, root: jax.Array, logits: jax.Array, carry: Any, draft_fn: DraftFn, target_ids: jax.Array | None = None
    ) -> tuple[Tree, Any]:
        """A tree of num_nodes nodes, and the carry after the last step.

        Args:
          root: [B] target token ids.
          logits: [B, V], the draft's logits for the children of the root.
          carry: handed to the first `draft_fn` call.
          target_ids: [V] target id of every draft id; None where they are the same.
        """
        ...


NEVER = -1  # in `scored_at`: no drafting step scored the children of this node


class FixedTreePolicy(TreePolicy, Protocol):
    """A TreePolicy whose trees all have one shape, and which says so: `DraftModel` may then draw their nodes at random.

    Contract: parents and depths never depend on logits. The c children of a node hold the tokens of the c largest
    logits that were passed for it, in descending order. Under Gumbel noise these are c samples without replacement, of
    which more are accepted (see `accept_drawn`).
    """

    @property
    def scored_at(self) -> tuple[int, ...] | None:
        """[N], where each node's children were scored; None: not fixed after all.

        0 for the root, 1 + i * k + j for slot j of drafting step i, and NEVER for a node that no step expanded. A chain
        of depth D, of one slot a step: (0, 1, ..., D - 1, NEVER).
        """
        ...


def log_probabilities(logits: jax.Array) -> jax.Array:
    """Log-softmax over the last axis in float32; NaN becomes -inf, so that a broken draft still makes a tree.

    Never above 0: a likeliest token may come out there by rounding.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.where(jnp.isnan(log_probs), -jnp.inf, jnp.minimum(log_probs, 0))


def best_children(
    logits: jax.Array, scores: jax.Array, count: int, target_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Cumulative log-probabilities and target tokens [B, W, count] of the best children of W nodes.

    Args:
      logits: [B, W, V]. scores: [B, W], the nodes' own.
    """
    log_probs, ids = jax.lax.top_k(log_probabilities(logits), count)
    return scores[:, :, None] + log_probs, ids if target_ids is None else target_ids[ids]


def step_mask(previous: jax.Array, parents: jax.Array, level: jax.Array) -> jax.Array:
    """The mask [B, k, M] of a step: each node sees what its parent saw, and itself."""
    k, rows = previous.shape[1:]
    own = jax.nn.one_hot(level * k + jnp.arange(k, dtype=jnp.int32), rows, dtype=bool)
    return jnp.take_along_axis(previous, parents[:, :, None], axis=1) | own[None]
