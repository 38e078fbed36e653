"""EAGLE heads as drafts: the part that EAGLE-1, 2 and 3 share. The networks are in eagle1.py and eagle3.py.

A *pair* is the target's feature at one position and the token that follows it. The memory holds the keys and values of
all pairs so far, and the head's hidden state at the last one, from which the next tree grows.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.noise import coupled
from eagle_jax.drafts.protocol import Committed, Context, Draft, Proposal
from eagle_jax.models.cache import KVCache, put
from eagle_jax.models.config import ConfigError
from eagle_jax.models.layers import AttendLayer
from eagle_jax.models.target import Target, TargetOutput
from eagle_jax.ops.arrays import take_one
from eagle_jax.ops.attention import attention
from eagle_jax.ops.spec import PLAIN
from eagle_jax.tree import DraftStep, TreePolicy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EagleMemory:
    """The cache of all pairs so far, and the head's hidden state at the last one; a P-EAGLE head's at every depth."""

    cache: KVCache
    hidden: Float[Array, "batch *depths hidden"]


class EagleDraft(Draft):
    """Drafts with a head of a few decoder layers.

    A subclass provides config, target_ids, dtype, taps, features, fuse, __call__ and logits.
    """

    config: DraftConfig
    target_ids: Any

    @property
    def dtype(self) -> Any:
        raise NotImplementedError

    def features(self, output: TargetOutput) -> Float[Array, "batch new features"]:
        """Returns the head's input features from a target pass that ran with its `taps`."""
        raise NotImplementedError

    def fuse(self, features: Float[Array, "batch new features"]) -> Float[Array, "batch new hidden"]:
        """Projects target features to the head's width. The head's hidden states skip this."""
        raise NotImplementedError

    def __call__(
        self,
        target: Target,
        hidden: Float[Array, "batch new hidden"],
        tokens: Int[Array, "batch new"],
        positions: Int[Array, "batch new"],
        attend: AttendLayer,
        *,
        prompt_lengths: Int[Array, " batch"] | Int[Array, "batch new"],
    ) -> tuple[Float[Array, "batch new hidden"], list[Any]]:
        """Runs the head over pairs of hidden states and tokens.

        Args:
          hidden: fused features, or hidden states of the previous drafting step.
          tokens: the token that follows each.
          attend: called for each layer in order, as in `Target.run`.
        Returns:
          The hidden states that the next drafting step reads, and a list of the second results of `attend`.
        """
        raise NotImplementedError

    def logits(self, target: Target, hidden: Float[Array, "*axes hidden"]) -> Float32[Array, "*axes draft_vocab"]:
        """Returns the draft logits."""
        raise NotImplementedError

    @property
    def reusable(self) -> bool:
        return not self.config.rope.by_length

    def start(self, target: Target, batch: int, rows: int) -> EagleMemory:
        cache = KVCache.zeros(self.config, batch, rows, self.dtype)
        return EagleMemory(cache, jnp.zeros((batch, self.config.hidden_size), self.dtype))

    def update(self, target: Target, memory: EagleMemory, committed: Committed) -> EagleMemory:
        """Runs the head over the newly committed pairs, with the target's features instead of drafted hidden states."""
        batch, width = committed.tokens.shape
        past = memory.cache.with_length(committed.start)
        positions = committed.start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        mask = jnp.broadcast_to(jnp.tri(width, dtype=bool), (batch, width, width))

        def attend(index, q, k, v, spec=PLAIN):
            # Write the new positions first, then attend below `start`. Reading first lets XLA schedule the write early
            # and copy the cache.
            layer = past.write_layer(index, k, v, committed.start)
            in_blocks = committed.tree is None and width > 1
            mixed = attention(q, k, v, mask, layer, spec=spec, positions=positions, in_blocks=in_blocks)
            return mixed, (layer.k, layer.v)

        fused, lengths = self.fuse(self.features(committed.output)), committed.prompt_lengths
        hidden, written = self(target, fused, committed.next_tokens, positions, attend, prompt_lengths=lengths)
        last = take_one(hidden, jnp.maximum(committed.count - 1, 0))
        length = committed.start + committed.count
        return EagleMemory(
            cache=KVCache(k=[k for k, _ in written], v=[v for _, v in written], length=length),
            hidden=jnp.where((committed.count > 0)[:, None], last, memory.hidden),
        )

    def propose(
        self,
        target: Target,
        context: Context,
        tree: TreePolicy,
        noise: Float[Array, "batch path vocab"] | None = None,
    ) -> Proposal:
        """Grows a tree from the head's last hidden state, one pass of the head per level (arXiv 2401.15077, 4.1)."""
        memory: EagleMemory = context.memory
        past = memory.cache
        root = context.root
        batch, k = root.shape[0], tree.width
        scratch_shape = (batch, self.config.num_kv_heads, (tree.depth - 1) * k, self.config.head_dim)
        scratch = jnp.zeros(scratch_shape, self.dtype)
        scratch_level = jnp.arange((tree.depth - 1) * k, dtype=jnp.int32) // k
        ids = None if self.target_ids is None else self.target_ids[...]
        noisy = functools.partial(coupled, sampling=context.sampling, noise=noise, target_ids=ids)

        def draft_fn(carry, step: DraftStep):
            hidden, drafted = carry  # hidden [batch, width, hidden]: outputs of the previous step's nodes
            positions = jnp.broadcast_to((past.length + step.level)[:, None], step.tokens.shape)

            def attend(index, q, k, v, spec=PLAIN):
                start = (0, 0, step.level * tree.width, 0)
                rows = put(drafted[index][0], k, start), put(drafted[index][1], v, start)
                # `with_window` limits cached pairs alone. A head's own window limits drafted ancestors, too.
                mask, window = step.mask, self.config.window_of(index)
                if window is not None and window < tree.depth - 1:
                    mask &= (scratch_level > step.level - window)[None, None]
                old = past.layer(index)
                return attention(q, *rows, mask, old, spec=spec, positions=positions, limit_new=False), rows

            hidden = jnp.take_along_axis(hidden, step.parents[:, :, None], axis=1)
            hidden, rows = self(target, hidden, step.tokens, positions, attend, prompt_lengths=context.prompt_lengths)
            return noisy(depth=step.level + 1, logits=self.logits(target, hidden)), (hidden, rows)

        first = jnp.broadcast_to(memory.hidden[:, None], (batch, k, memory.hidden.shape[-1]))
        logits = noisy(depth=0, logits=self.logits(target, memory.hidden[:, None]))[:, 0]
        drafted = [(scratch, scratch)] * self.config.num_layers
        grown, _ = tree.grow(root, logits, (first, drafted), draft_fn, ids)
        return Proposal(grown)


AnyEagle = TypeVar("AnyEagle", bound=EagleDraft)


def with_window(draft: AnyEagle, first: int, recent: int) -> AnyEagle:
    """Limits a draft's attention to a sliding window with sinks: the `first` and the `recent` positions of the text.

    Use it for texts longer than the head's training sequences, where acceptance drops. Sinks are described in arXiv
    2309.17453. Lossless, as is any change of a draft.

    Args:
      first: number of sinks, at least 0.
      recent: positions of the window, at least 1, which include the query's.
    """
    if type(first) is not int or type(recent) is not int or first < 0 or recent < 1:
        raise ConfigError(f"a window has first >= 0 and recent >= 1 positions, got first={first!r}, recent={recent!r}")
    limited = copy.copy(draft)
    limited.config = dataclasses.replace(draft.config, window=(first, recent))
    return limited
