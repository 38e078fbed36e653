"""TreePolicy: how a tree grows. The extension point for your own tree shapes.

The draft is a function argument, so a policy can be tested with a toy draft:

    draft_fn(carry, step) -> (logits [batch, width, draft_vocab], carry)

It scores the children of the nodes in `step`. `carry` is the draft's state, such as keys and values. If all nodes of a
step have the same children it may return them once, [batch, 1, draft_vocab].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from eagle_jax.tree.tree import NO_PARENT, Tree


class DraftStep(NamedTuple):
    """The `width` nodes that one drafting step expands.

    tokens: target token ids.
    parents: index of the parent among the previous step's nodes (0 at the first step).
    mask: which drafted nodes a node attends to: its ancestors and itself. The last axis holds the nodes of all steps in
      the order drafted, (depth - 1) * width entries: node j of step i is entry i * width + j.
    level: 0 for the children of the root; also the nodes' position, relative to theirs.
    """

    tokens: Int[Array, "batch width"]
    parents: Int[Array, "batch width"]
    mask: Bool[Array, "batch width drafted"]
    level: Int32[Array, ""] | int


DraftFn = Callable[[Any, DraftStep], tuple[Float[Array, "batch scored draft_vocab"], Any]]


class TreePolicy(Protocol):
    """Describes how a tree grows level by level: TreeConfig, StaticTree, or your own. Frozen and hashable."""

    @property
    def depth(self) -> int:
        """Draft tokens on the longest path, at least 1. The draft runs depth - 1 steps."""
        ...

    @property
    def num_nodes(self) -> int:
        """Nodes that the target verifies, the root included."""
        ...

    @property
    def width(self) -> int:
        """Nodes that a drafting step expands."""
        ...

    def grow(
        self,
        root: Int[Array, " batch"],
        logits: Float[Array, "batch draft_vocab"],
        carry: Any,
        draft_fn: DraftFn,
        target_ids: Int[Array, " draft_vocab"] | None = None,
    ) -> tuple[Tree, Any]:
        """Returns a tree of num_nodes nodes, and the carry after the last step.

        Args:
          root: target token ids.
          logits: the draft's logits for the children of the root.
          carry: passed to the first `draft_fn` call.
          target_ids: target id of every draft id; None if they are the same.
        """
        ...


NEVER = -1  # in `scored_at`: no drafting step scored the children of this node


class FixedTreePolicy(TreePolicy, Protocol):
    """A TreePolicy whose trees all have one shape, so that `DraftModel` can sample their nodes.

    Contract: parents and depths never depend on logits. The c children of a node hold the tokens of its c largest
    logits, in descending order. With Gumbel noise added these are c samples without replacement, of which
    `accept_drawn` accepts more.
    """

    @property
    def scored_at(self) -> tuple[int, ...] | None:
        """Returns for every node where its children were scored; None if the shape is not fixed after all.

        0 for the root, 1 + i * width + j for node j of drafting step i, and NEVER for a node that no step expanded. For
        a chain of depth D, which has one node a step: (0, 1, ..., D - 1, NEVER).
        """
        ...


def require_sizes(policy: TreePolicy, **least: int) -> None:
    """Raises ValueError, naming the field, unless each named size is an integer of at least its smallest value."""
    for name, smallest in least.items():
        value = getattr(policy, name)
        if type(value) is not int or value < smallest:
            wanted = "a positive integer" if smallest == 1 else f"an integer of at least {smallest}"
            raise ValueError(f"{type(policy).__name__}.{name} must be {wanted}, got {value!r}")


def log_probabilities(logits: Float[Array, "*nodes vocab"]) -> Float32[Array, "*nodes vocab"]:
    """Returns the log-softmax over the last axis in float32.

    NaN becomes -inf, so that a broken draft still yields a tree. Clamped at 0, which rounding can exceed.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.where(jnp.isnan(log_probs), -jnp.inf, jnp.minimum(log_probs, 0))


def best_children(
    logits: Float[Array, "batch scored draft_vocab"],
    scores: Float[Array, "batch width"],
    count: int,
    target_ids: Int[Array, " draft_vocab"] | None,
) -> tuple[Float[Array, "batch width {count}"], Int[Array, "batch width {count}"]]:
    """Returns cumulative log-probabilities and target tokens of the best `count` children of every node.

    Args:
      logits: of the nodes, or once for all of them (scored = 1).
      scores: the nodes' cumulative log-probabilities.
    """
    log_probs, ids = jax.lax.top_k(log_probabilities(logits), count)
    tokens = ids if target_ids is None else target_ids[ids]
    return scores[:, :, None] + log_probs, jnp.broadcast_to(tokens, (*scores.shape, count))


def step_mask(
    previous: Bool[Array, "batch width drafted"], parents: Int[Array, "batch width"], level: Int[Array, ""] | int
) -> Bool[Array, "batch width drafted"]:
    """Returns the mask of the next step: each node sees its parent's entries and itself."""
    k, rows = previous.shape[1:]
    itself = jax.nn.one_hot(level * k + jnp.arange(k, dtype=jnp.int32), rows, dtype=bool)
    return jnp.take_along_axis(previous, parents[:, :, None], axis=1) | itself[None]


def tree_of_candidates(
    root: Int[Array, " batch"],
    ids: Int[Array, "batch chosen"],
    scores: Float[Array, "batch chosen"],
    tokens: Int[Array, "batch chosen"],
    parent_ids: Int[Array, "batch chosen"],
    depths: Int[Array, "batch chosen"],
) -> Tree:
    """Makes a tree of chosen candidates, which become nodes 1, 2, ... in the given order.

    Args:
      ids: ascending numbers; a candidate's is higher than its parent's.
      parent_ids: the parents' numbers, all of them chosen; negative for children of the root.
    """
    # A parent's node is 1 + the number of chosen candidates with a lower id.
    lower = ids[:, None, :] < parent_ids[:, :, None]
    parents = jnp.where(parent_ids < 0, 0, 1 + lower.sum(-1, dtype=jnp.int32))

    def with_root(first, rest):
        return jnp.concatenate([jnp.broadcast_to(first, root.shape)[:, None], rest], axis=1)

    return Tree(
        tokens=with_root(root, tokens).astype(jnp.int32),
        parents=with_root(jnp.int32(NO_PARENT), parents.astype(jnp.int32)),
        depths=with_root(jnp.int32(0), depths.astype(jnp.int32)),
        scores=with_root(jnp.float32(0), scores),
    )
