"""Tree: a batch of draft trees, and TreeConfig: their shape.

Letters: B batch, N nodes.

      0 root        tokens  [t0, t1, t2, t3, t4]
     / \\            parents [-1,  0,  0,  1,  3]
    1   2           depths  [ 0,  1,  1,  2,  3]
    |
    3               A parent precedes its children, so one pass from left to right sees every ancestor first.
    |
    4
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

NO_PARENT = -1


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """The static shape of a dynamic draft tree.

    depth: draft tokens on the longest path; one draft pass each.
    top_k: children proposed a node, and nodes expanded a level.
    num_nodes: nodes that the target verifies, the root included.

    The official `EaModel(total_token=T, depth=d, top_k=k)` is `TreeConfig(depth=d + 1, top_k=k, num_nodes=T)`.

    Raises:
      ValueError: for sizes that no tree can have; the message names the largest possible.
    """

    depth: int = 8
    top_k: int = 10
    num_nodes: int = 60

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"TreeConfig.{field.name} must be a positive integer, got {value!r}")
        if self.num_nodes < 2:
            raise ValueError(
                "TreeConfig.num_nodes counts the root, so 2 is the smallest tree; for plain decoding pass draft=None"
            )
        if self.num_nodes > 1 + self.num_candidates:
            raise ValueError(
                f"TreeConfig.num_nodes = {self.num_nodes} is more than depth = {self.depth} and top_k = {self.top_k} "
                f"can draft: at most {1 + self.num_candidates} (the root, top_k children, top_k ** 2 a further level)"
            )

    @property
    def num_candidates(self) -> int:
        """Drafted tokens, of which the best num_nodes - 1 are kept."""
        return self.top_k + (self.depth - 1) * self.top_k**2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """A draft tree a batch row. Masks and positions are derived from `parents`, never stored beside them.

    tokens: [B, N] int32 target token ids. Node 0 is the root, a token the target itself chose.
    parents: [B, N] int32 node indices, NO_PARENT for the root; a parent precedes its children.
    depths: [B, N] int32, 0 for the root.
    scores: [B, N] float32 cumulative log-probabilities under the draft, 0 for the root.
    """

    tokens: jax.Array
    parents: jax.Array
    depths: jax.Array
    scores: jax.Array

    @classmethod
    def root(cls, tokens: jax.Array) -> Tree:
        """A tree of the root alone, from tokens [B]: verifying it is plain decoding."""
        zeros = jnp.zeros((tokens.shape[0], 1), jnp.int32)
        return cls(tokens[:, None], zeros + NO_PARENT, zeros, zeros.astype(jnp.float32))

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[1]

    def ancestors(self) -> jax.Array:
        """[B, N, N] bool: node i's row marks i itself and its ancestors; the attention mask of the tree.

        By squaring: a matrix that knows 2^s generations, times itself, knows 2^(s + 1).
        """
        nodes = jnp.arange(self.num_nodes)
        itself = nodes[:, None] == nodes[None, :]
        reach = (itself[None] | (self.parents[:, :, None] == nodes[None, None, :])).astype(jnp.float32)
        for _ in range((self.num_nodes - 1).bit_length()):
            reach = jnp.minimum(reach @ reach, 1.0)  # small whole numbers: exact in any precision
        return reach > 0
