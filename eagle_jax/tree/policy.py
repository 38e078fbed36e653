"""TreePolicy: how a tree grows, the extension point for tree shapes of one's own.

The draft comes in as a function, so that toy drafts can test a policy:

    draft_fn(carry, step) -> (logits [batch, width, draft_vocab], carry)

It scores the children of the nodes in `step`. `carry` is the draft's own (its keys and values, say).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from eagle_jax.tree.tree import Tree


class DraftStep(NamedTuple):
    """The `width` nodes that one drafting step expands.

    tokens: target token ids.
    parents: which node of the previous step is the parent (0 at the first step).
    mask: True for the drafted nodes that a node may attend to: its ancestors and itself. The last axis holds the nodes
      of every step in the order drafted, (depth - 1) * width in all: node j of step i is entry i * width + j.
    level: 0 for the children of the root; these nodes stand `level` positions past the first.
    """

    tokens: Int[Array, "batch width"]
    parents: Int[Array, "batch width"]
    mask: Bool[Array, "batch width drafted"]
    level: Int32[Array, ""]


DraftFn = Callable[[Any, DraftStep], tuple[Float[Array, "batch width draft_vocab"], Any]]


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
        """The nodes that a drafting step expands."""
        ...

    def grow(
        self,
        root: Int[Array, " batch"],
        logits: Float[Array, "batch draft_vocab"],
        carry: Any,
        draft_fn: DraftFn,
        target_ids: Int[Array, " draft_vocab"] | None = None,
    ) -> tuple[Tree, Any]:
        """A tree of num_nodes nodes, and the carry after the last step.

        Args:
          root: target token ids.
          logits: the draft's logits for the children of the root.
          carry: handed to the first `draft_fn` call.
          target_ids: target id of every draft id; None where they are the same.
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
        """Where each node's children were scored, an entry a node; None: not fixed after all.

        0 for the root, 1 + i * width + j for slot j of drafting step i, and NEVER for a node that no step expanded. A
        chain of depth D, of one slot a step: (0, 1, ..., D - 1, NEVER).
        """
        ...


def log_probabilities(logits: Float[Array, "*nodes vocab"]) -> Float32[Array, "*nodes vocab"]:
    """Log-softmax over the last axis in float32; NaN becomes -inf, so that a broken draft still makes a tree.

    Never above 0: a likeliest token may come out there by rounding.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.where(jnp.isnan(log_probs), -jnp.inf, jnp.minimum(log_probs, 0))


def best_children(
    logits: Float[Array, "batch width draft_vocab"],
    scores: Float[Array, "batch width"],
    count: int,
    target_ids: Int[Array, " draft_vocab"] | None,
) -> tuple[Float[Array, "batch width {count}"], Int[Array, "batch width {count}"]]:
    """Cumulative log-probabilities and target tokens of the best children of nodes with these scores."""
    log_probs, ids = jax.lax.top_k(log_probabilities(logits), count)
    return scores[:, :, None] + log_probs, ids if target_ids is None else target_ids[ids]


def step_mask(
    previous: Bool[Array, "batch width drafted"], parents: Int[Array, "batch width"], level: Int[Array, ""] | int
) -> Bool[Array, "batch width drafted"]:
    """The mask of a step: each node sees what its parent saw, and itself."""
    k, rows = previous.shape[1:]
    own = jax.nn.one_hot(level * k + jnp.arange(k, dtype=jnp.int32), rows, dtype=bool)
    return jnp.take_along_axis(previous, parents[:, :, None], axis=1) | own[None]
