"""Tree: a batch of draft trees.

Every sequence has one, all with the same number of nodes:

      0 root        tokens  [t0, t1, t2, t3, t4]
     / \\            parents [-1,  0,  0,  1,  3]
    1   2           depths  [ 0,  1,  1,  2,  3]
    |
    3               A parent precedes its children, so a pass from left to right visits ancestors first.
    |
    4
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, Int32

NO_PARENT = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """A draft tree for every sequence. Masks and positions are derived from `parents`, never stored.

    tokens: target token ids. Node 0 is the root, the last token that the target chose.
    parents: node indices, NO_PARENT for the root.
    depths: 0 for the root.
    scores: cumulative log-probabilities under the draft, 0 for the root.
    """

    tokens: Int32[Array, "batch nodes"]
    parents: Int32[Array, "batch nodes"]
    depths: Int32[Array, "batch nodes"]
    scores: Float32[Array, "batch nodes"]

    @classmethod
    def root(cls, tokens: Int[Array, " batch"]) -> Tree:
        """Returns a tree of the root alone: verifying it is plain decoding."""
        zeros = jnp.zeros((tokens.shape[0], 1), jnp.int32)
        return cls(tokens[:, None], zeros + NO_PARENT, zeros, zeros.astype(jnp.float32))

    @property
    def num_nodes(self) -> int:
        return self.tokens.shape[1]

    def ancestors(self) -> Bool[Array, "batch nodes nodes"]:
        """Returns the tree's attention mask: entry [i, j] is True if j is i or an ancestor of i.

        Repeated squaring: a matrix that covers 2^s generations, multiplied by itself, covers 2^(s + 1).
        """
        nodes = jnp.arange(self.num_nodes, dtype=jnp.int32)
        itself = nodes[:, None] == nodes[None, :]
        reach = (itself[None] | (self.parents[:, :, None] == nodes[None, None, :])).astype(jnp.float32)
        for _ in range((self.num_nodes - 1).bit_length()):
            reach = jnp.minimum(reach @ reach, 1.0)  # small integers, exact in any matmul precision
        return reach > 0
