"""Medusa: extra heads on the target's last hidden state (Cai et al., arXiv 2401.10774).

Head i predicts the token i + 2 positions after the hidden state it reads; the target's lm_head predicts the next one,
the root. So head 0 predicts the root's children and head 1 their children, independently of the tokens in between.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Key

from eagle_jax.drafts.by_depth import grow_by_depth
from eagle_jax.drafts.protocol import Committed, Context, Draft, Proposal
from eagle_jax.models.config import require_same
from eagle_jax.models.layers import normal, zeros
from eagle_jax.models.target import Target
from eagle_jax.ops.arrays import take_one
from eagle_jax.ops.linear import Weight, linear
from eagle_jax.tree import TreePolicy


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """The sizes of a set of heads. num_blocks: residual blocks before each head's lm_head (1 in published heads)."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_blocks: int = 1


class MedusaBlock(nnx.Module):
    """A residual block: x + silu(weight x + bias)."""

    def __init__(self, config: MedusaConfig, key: Key[Array, ""], dtype: Any):
        self.weight = Weight(normal(key, (config.hidden_size, config.hidden_size), dtype))
        self.bias = zeros((config.hidden_size,), dtype)

    def __call__(self, x: Float[Array, "batch hidden"]) -> Float[Array, "batch hidden"]:
        return x + jax.nn.silu(linear(x, self.weight) + self.bias[...][None])


class MedusaHead(nnx.Module):
    """Residual blocks and an lm_head."""

    def __init__(self, config: MedusaConfig, key: Key[Array, ""], dtype: Any):
        keys = jax.random.split(key, config.num_blocks + 1)
        self.blocks = nnx.List([MedusaBlock(config, block_key, dtype) for block_key in keys[1:]])
        self.lm_head = Weight(normal(keys[0], (config.vocab_size, config.hidden_size), dtype))

    @jax.named_scope("medusa_head")
    def __call__(self, hidden: Float[Array, "batch hidden"]) -> Float32[Array, "batch vocab"]:
        """Returns the head's logits."""
        for block in self.blocks:
            hidden = block(hidden)
        return linear(hidden, self.lm_head, jnp.float32)


class Medusa(Draft, nnx.Module):
    """Drafts with Medusa heads. The memory is the target's hidden state at the last position before the root.

    The tree is static (`PUBLISHED_TREES["medusa-..."]`, or any list of paths) or dynamic, with a level a head at most.
    """

    def __init__(self, config: MedusaConfig, key: Key[Array, ""], dtype: Any = jnp.float32):
        """Random weights."""
        self.config = config
        keys = jax.random.split(key, config.num_heads)
        self.heads = nnx.List([MedusaHead(config, head_key, dtype) for head_key in keys])

    @property
    def dtype(self) -> Any:
        return self.heads[0].lm_head.dtype

    def check_fits(self, target: Target) -> None:
        for field in ("vocab_size", "hidden_size"):
            require_same(field, getattr(self.config, field), getattr(target.config, field))

    def start(self, target: Target, batch: int, rows: int) -> Float[Array, "batch hidden"]:
        return jnp.zeros((batch, target.config.hidden_size), target.dtype)

    def update(
        self, target: Target, memory: Float[Array, "batch hidden"], committed: Committed
    ) -> Float[Array, "batch hidden"]:
        last = take_one(committed.output.hidden, jnp.maximum(committed.count - 1, 0))
        return jnp.where((committed.count > 0)[:, None], last, memory)

    def propose(
        self,
        target: Target,
        context: Context,
        tree: TreePolicy,
        noise: Float[Array, "batch path vocab"] | None = None,
    ) -> Proposal:
        """Grows a tree in which all nodes of one depth have the same candidates for children.

        Raises:
          ValueError: for a tree with more levels than there are heads.
        """
        if tree.depth > self.config.num_heads:
            raise ValueError(
                f"a tree of depth {tree.depth} needs as many Medusa heads, there are {self.config.num_heads}; choose "
                'another tree, such as PUBLISHED_TREES["medusa-mc-sim-7b-63"]'
            )
        hidden = context.memory.astype(self.dtype)
        logits = jnp.stack([head(hidden) for head in list(self.heads)[: tree.depth]], axis=1)
        return grow_by_depth(context, tree, logits, noise)
