"""Eagle1Draft: the EAGLE-1 and EAGLE-2 head (arXiv 2401.15077, section 4; 2406.16858 changes the tree only).

The feature is the target's hidden state after its final norm. The head predicts the next one, to which the target's
`lm_head` applies. drafting.py defines pairs.

Its config may add norms: of the embedding and the hidden state before `fc` (MiniCPM, Megatron), of the input of
attention, and of the output, which is then what `lm_head` and the next drafting step read (Megatron, NeMo).

FR-Spec (arXiv 2502.14856) drafts frequent tokens only: the head holds the target's `lm_head` rows of those.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key

from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.eagle.drafting import EagleDraft
from eagle_jax.models.config import require_same
from eagle_jax.models.layers import AttendLayer, add_bias, normal, normed, ones, zeros
from eagle_jax.models.llama import DecoderLayer
from eagle_jax.models.rope import rope_angles
from eagle_jax.models.target import Target, TargetOutput, logit_softcap
from eagle_jax.ops.linear import Weight, linear
from eagle_jax.ops.spec import capped


class Eagle1Draft(EagleDraft, nnx.Module):
    """The head's network; drafting.py has how it drafts."""

    def __init__(self, config: DraftConfig, key: Key[Array, ""], dtype: Any = jnp.float32):
        """Initialises random weights."""
        keys = jax.random.split(key, 3)
        d = config.hidden_size
        self.config = config
        self.embed = nnx.Param(normal(keys[0], (config.vocab_size, d), dtype)) if config.own_embedding else None
        self.embed_norm = ones((d,), dtype) if config.input_norms else None
        self.hidden_norm = ones((d,), dtype) if config.input_norms else None
        self.fc = Weight(normal(keys[1], (d, 2 * d), dtype))
        self.fc_bias = zeros((d,), dtype) if config.fc_bias else None
        self.layer = DecoderLayer(config, keys[2], dtype, input_norm=config.attention_norm)
        self.norm = ones((d,), dtype) if config.norm_output else None
        if config.draft_vocab_size not in (0, config.vocab_size):
            shape = (config.draft_vocab_size, d)
            self.lm_head = Weight(normal(jax.random.fold_in(key, len(keys)), shape, dtype))
            self.target_ids = nnx.Variable(jnp.arange(config.draft_vocab_size, dtype=jnp.int32))

    # The target's rows of frequent tokens, and their ids. None: draft ids are target ids.
    lm_head: Any = None
    target_ids: Any = None

    @property
    def dtype(self) -> Any:
        return self.fc.dtype

    def taps(self, target: Target) -> tuple[int, ...]:
        """Returns no layers, as the feature is the final hidden state."""
        return ()

    def features(self, output: TargetOutput) -> Float[Array, "batch new features"]:
        """Returns the hidden states of a target pass."""
        return output.hidden

    def check_fits(self, target: Target) -> None:
        """Raises ConfigError, naming both numbers, if the head's sizes do not fit the target."""
        for field in ("vocab_size", "hidden_size"):
            require_same(field, getattr(self.config, field), getattr(target.config, field))

    def fuse(self, features: Float[Array, "batch new hidden"]) -> Float[Array, "batch new hidden"]:
        """Casts the features: the target's hidden states have the head's width."""
        return features.astype(self.dtype)

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
        """Runs the head over pairs; see `EagleDraft`."""
        with jax.named_scope("embed"):
            embedding = (target.embed if self.embed is None else self.embed)[tokens].astype(self.dtype)
        with jax.named_scope("fc"):
            embedding = normed(embedding, self.embed_norm, self.config)
            hidden = normed(hidden, self.hidden_norm, self.config)
            x = linear(jnp.concatenate([embedding, hidden], axis=-1), self.fc)
            x = add_bias(x, self.fc_bias)
        rotation = rope_angles(self.config.rope, self.config.head_dim, positions, prompt_lengths)
        with jax.named_scope("layer"):
            x, kept = self.layer(x, rotation, functools.partial(attend, 0), self.config.attention_spec(0))
        return normed(x, self.norm, self.config), [kept]

    def before_logits(self, hidden: Float[Array, "*axes hidden"]) -> Float[Array, "*axes hidden"]:
        """Returns the hidden state unchanged: it predicts the target's, after its final norm."""
        return hidden

    def output_weight(self, target: Target) -> Float[Array, "draft_vocab hidden"]:
        """Returns the target's lm_head, or its rows of the frequent tokens."""
        return target.output_weight() if self.lm_head is None else self.lm_head[...]

    def logits(self, target: Target, hidden: Float[Array, "*axes hidden"]) -> Float32[Array, "*axes draft_vocab"]:
        """Applies the target's lm_head, or its rows of the frequent tokens; with the target's cap of logits."""
        if self.lm_head is None:
            return target.logits(hidden.astype(target.dtype))
        with jax.named_scope("lm_head"):
            return capped(linear(hidden, self.lm_head, jnp.float32), logit_softcap(target))
