"""PEagle: an EAGLE-3 head that drafts several tokens in one pass (P-EAGLE, arXiv 2602.01469).

An EAGLE-3 head needs the hidden state of one drafting step for the next. This head reads a learned feature,
`mask_hidden`, and the embedding of a mask token in their place. All depths are then rows of one causal pass:

    pair                    drafts the token after
    (taps at t - 1, root)   the root, which is at t
    (mask_hidden, mask)     the token at t + 1
    (mask_hidden, mask)     the token at t + 2, ...

The pass is that of `update`, which runs over the newly committed pairs anyway. So the head's weights are read once a
cycle, whatever the depth. The keys and values of the mask rows are not cached.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from eagle_jax.drafts.by_depth import grow_by_depth
from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.eagle.drafting import EagleMemory
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.drafts.eagle.flat_config import flat_config
from eagle_jax.drafts.protocol import Committed, Context, Proposal
from eagle_jax.models.cache import KVCache
from eagle_jax.models.fields import ConfigError, flag, require_equal, size
from eagle_jax.models.layers import normal
from eagle_jax.models.target import Target
from eagle_jax.ops.arrays import take_one
from eagle_jax.ops.attention import attention
from eagle_jax.ops.spec import PLAIN
from eagle_jax.tree import TreePolicy


@dataclasses.dataclass(frozen=True)
class PEagleConfig(DraftConfig):
    """The sizes of a P-EAGLE head: those of an EAGLE-3 head, and of the rows that stand for unknown tokens.

    mask_token_id: the token whose embedding they read.
    num_depths: tokens that a pass drafts, the depth that the head was trained for. A smaller number will do, too.
    """

    _: dataclasses.KW_ONLY
    mask_token_id: int = 0
    num_depths: int = 8

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], where: str = "config.json", own_embedding: bool = False, **own: Any
    ) -> PEagleConfig:
        """Reads a head's config dictionary, as DraftConfig.from_hf does.

        Raises:
          ConfigError: also for a missing mask token or number of depths.
        """
        fields = vars(DraftConfig.from_hf(hf, where, own_embedding, **{**own, "kind": "peagle"}))
        flat = flat_config(hf, where, "peagle")
        if not flag(flat, "parallel_drafting", where, default=True):
            raise ConfigError(f"{where}: parallel_drafting = False, but the head has a tensor mask_hidden")
        mask = flat.get("mask_token_id")
        if type(mask) is not int or not 0 <= mask < fields["vocab_size"]:
            raise ConfigError(
                f"{where}: mask_token_id (pard_token, ptd_token_id) must be a token id below {fields['vocab_size']}, "
                f"got {mask!r}; take it from the configuration of the head's training"
            )
        stated = {"num_depths": flat.get("num_depths"), **speculative_tokens(hf)}
        depths = require_equal({name: value for name, value in stated.items() if value is not None}, where)
        return cls(**fields, mask_token_id=mask, num_depths=size("num_depths", depths, where))


def speculative_tokens(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {field: the number of tokens of a proposal method}, as speculators states the depths of the training."""
    settings = hf.get("speculators_config")
    methods = settings.get("proposal_methods") if isinstance(settings, Mapping) else None
    return {
        f"proposal_methods[{i}].speculative_tokens": method.get("speculative_tokens")
        for i, method in enumerate(methods if isinstance(methods, list) else ())
        if isinstance(method, Mapping)
    }


class PEagle(Eagle3Draft):
    """Drafts `num_depths` tokens in one pass, and grows a tree from their logits.

    The memory holds the cache of all pairs so far, and a hidden state for every depth.
    """

    config: PEagleConfig

    def __init__(self, config: PEagleConfig, num_taps: int, key: Key[Array, ""], dtype: Any = jnp.float32):
        """Initialises random weights."""
        super().__init__(config, num_taps, key, dtype)
        shape = (1, 1, num_taps * config.target_hidden_size)
        self.mask_hidden = nnx.Param(normal(jax.random.fold_in(key, 0), shape, dtype))

    def start(self, target: Target, batch: int, rows: int) -> EagleMemory:
        cache = KVCache.zeros(self.config, batch, rows, self.dtype)
        return EagleMemory(cache, jnp.zeros((batch, self.config.num_depths, self.config.hidden_size), self.dtype))

    def update(self, target: Target, memory: EagleMemory, committed: Committed) -> EagleMemory:
        """Runs the head over the newly committed pairs, and over a mask row for every depth after the first."""
        (batch, width), masks = committed.tokens.shape, self.config.num_depths - 1
        past = memory.cache.with_length(committed.start)
        real = jnp.arange(width, dtype=jnp.int32)[None] < committed.count[:, None]
        seen = jnp.concatenate([real, jnp.ones((batch, masks), bool)], axis=1)
        mask = jnp.tri(width + masks, dtype=bool)[None] & (seen[:, None] | jnp.eye(width + masks, dtype=bool)[None])
        ahead = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
        ahead_of_masks = committed.count[:, None] + jnp.arange(masks, dtype=jnp.int32)[None]
        positions = committed.start[:, None] + jnp.concatenate([ahead, ahead_of_masks], axis=1)

        def attend(index, q, k, v, spec=PLAIN):
            # Write, then attend: see EagleDraft.update.
            layer = past.write_layer(index, k[:, :, :width], v[:, :, :width], committed.start)
            in_blocks = committed.tree is None and width > 1
            mixed = attention(q, k, v, mask, layer, spec=spec, positions=positions, in_blocks=in_blocks)
            return mixed, (layer.k, layer.v)

        features = self.features(committed.output).astype(self.dtype)
        unknown = jnp.broadcast_to(self.mask_hidden[...], (batch, masks, features.shape[-1]))
        fused = self.fuse(jnp.concatenate([features, unknown], axis=1))
        mask_tokens = jnp.full((batch, masks), self.config.mask_token_id, committed.next_tokens.dtype)
        tokens = jnp.concatenate([committed.next_tokens, mask_tokens], axis=1)
        hidden, written = self(target, fused, tokens, positions, attend, prompt_lengths=committed.prompt_lengths)
        last = take_one(hidden, jnp.maximum(committed.count - 1, 0))
        drafts = jnp.concatenate([last[:, None], hidden[:, width:]], axis=1)
        return EagleMemory(
            cache=KVCache([k for k, _ in written], [v for _, v in written], committed.start + committed.count),
            hidden=jnp.where((committed.count > 0)[:, None, None], drafts, memory.hidden),
        )

    def propose(
        self,
        target: Target,
        context: Context,
        tree: TreePolicy,
        noise: Float[Array, "batch path vocab"] | None = None,
    ) -> Proposal:
        """Grows a tree in which all nodes of one depth have the same candidates for children.

        Raises:
          ValueError: for a tree deeper than `num_depths`.
        """
        if tree.depth > self.config.num_depths:
            raise ValueError(
                f"a tree of depth {tree.depth} is deeper than the {self.config.num_depths} tokens that this head "
                f"drafts in a pass: choose a tree of depth {self.config.num_depths} or less"
            )
        logits = self.logits(target, context.memory.hidden[:, : tree.depth])
        ids = None if self.target_ids is None else self.target_ids[...]
        return grow_by_depth(context, tree, logits, noise, ids)
