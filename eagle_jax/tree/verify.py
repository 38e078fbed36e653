"""Acceptance: which drafted path the target agrees with.

Letters: B batch, N nodes, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from eagle_jax.tree.tree import Tree

PAD = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Acceptance:
    """What verification decided, a row of the batch each.

    path: [B, N] int32 node indices from the root down to the last accepted node, then PAD.
    length: [B] int32 accepted draft tokens (the root is not one).
    bonus: [B] int32, the token that the target itself puts after the last accepted node: the next root.
    """

    path: jax.Array
    length: jax.Array
    bonus: jax.Array


# accept_fn(tree, logits [B, N, V], keys [B]) -> Acceptance. `logits` are the target's, processed: their softmax is
# the distribution to keep. `keys` is None when decoding is greedy. A rule must be lossless: the accepted tokens and
# the bonus together must follow that distribution, whatever the tree holds.
AcceptFn = Callable[[Tree, jax.Array, jax.Array | None], Acceptance]


def accept_greedy(tree: Tree, logits: jax.Array) -> Acceptance:
    """Keeps the deepest node whose every step is its parent's argmax; the bonus is the argmax there.

    Of equally deep ones (only possible with duplicate siblings) the first.
    """
    choice = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # [B, N]
    parents = jnp.maximum(tree.parents, 0)
    agrees = jnp.take_along_axis(choice, parents, axis=1) == tree.tokens
    agrees = agrees.at[:, 0].set(True)
    ancestors = tree.ancestors()
    accepted = jnp.all(agrees[:, None, :] | ~ancestors, axis=-1)  # [B, N]
    end = jnp.argmax(jnp.where(accepted, tree.depths, -1), axis=1)
    return Acceptance(
        path=path_to(tree, ancestors, end),
        length=_at(tree.depths, end),
        bonus=_at(choice, end),
    )


def path_to(tree: Tree, ancestors: jax.Array, end: jax.Array) -> jax.Array:
    """The nodes from the root to `end` [B], padded with PAD: [B, N].

    In: parents [-1, 0, 0, 1, 3], end 4. Out: [0, 1, 3, 4, -1].
    """
    on_path = jnp.take_along_axis(ancestors, end[:, None, None], axis=1)  # [B, 1, N]
    nodes = jnp.arange(tree.num_nodes, dtype=jnp.int32)
    at_depth = on_path & (tree.depths[:, None, :] == nodes[None, :, None])  # [B, depth, N]
    return jnp.max(jnp.where(at_depth, nodes[None, None, :], PAD), axis=-1)


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
    """values [B, N] at index [B] -> [B]."""
    return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]
