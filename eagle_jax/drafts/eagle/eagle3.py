"""Eagle3Draft: the EAGLE-3 head (arXiv 2503.01840, section 3).

Letters: B batch, T new pairs, D head width, F = taps * target width, V target vocabulary, Vd draft vocabulary.

A *pair* is the feature of one position and the token that follows it. The head maps a pair to a hidden
state that stands for the next position: its logits draft the token after, and it is the feature of the next
drafting step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from eagle_jax.drafts.eagle.config import DraftConfig, tap_layers
from eagle_jax.drafts.eagle.drafting import EagleDraft
from eagle_jax.models.config import ConfigError, require_same
from eagle_jax.models.layers import MLP, Attend, Attention, normal, ones, rms_norm, rope_angles
from eagle_jax.models.target import Target, TargetOutput
from eagle_jax.ops.linear import Weight, linear
from eagle_jax.ops.spec import PLAIN, Spec


class Eagle3Layer(nnx.Module):
    """A decoder layer whose attention reads the embedding and the hidden state side by side (width 2 D)."""

    def __init__(self, config: DraftConfig, key: jax.Array, dtype: Any):
        keys = jax.random.split(key)
        self.config = config
        self.input_norm = ones((config.hidden_size,), dtype)
        self.hidden_norm = ones((config.hidden_size,), dtype)
        self.attention = Attention(
            config, 2 * config.hidden_size, keys[0], dtype, qkv_bias=config.attention_bias, o_bias=config.attention_bias
        )
        self.post_attention_norm = ones((config.hidden_size,), dtype)
        self.mlp = MLP(config, keys[1], dtype)

    def __call__(
        self,
        embedding: jax.Array,
        hidden: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        attend: Attend,
        spec: Spec = PLAIN,
    ) -> tuple[jax.Array, Any]:
        """embedding, hidden [B, T, D] -> ([B, T, D], what `attend` keeps)."""
        eps = self.config.rms_norm_eps
        normed = rms_norm(hidden, self.hidden_norm[...], eps)
        residual = normed if self.config.norm_before_residual else hidden
        x = jnp.concatenate([rms_norm(embedding, self.input_norm[...], eps), normed], axis=-1)
        mixed, kept = self.attention(x, rotation, attend, spec)
        x = residual + mixed
        return x + self.mlp(rms_norm(x, self.post_attention_norm[...], eps)), kept


class Eagle3Draft(EagleDraft, nnx.Module):
    """The head's weights and its functions; how it drafts is in drafting.py."""

    def __init__(self, config: DraftConfig, num_taps: int, key: jax.Array, dtype: Any = jnp.float32):
        """Random weights. `num_taps` target layers feed `fc` (3 in every official head)."""
        keys = jax.random.split(key, 4)
        d = config.hidden_size
        self.config = config
        self.fc = Weight(normal(keys[0], (d, num_taps * config.target_hidden_size), dtype))
        self.layer = Eagle3Layer(config, keys[1], dtype)
        self.norm = ones((d,), dtype)
        # None: the target's lm_head.
        self.lm_head = Weight(normal(keys[2], (config.draft_vocab_size, d), dtype)) if config.own_lm_head else None
        self.embed = nnx.Param(normal(keys[3], (config.vocab_size, d), dtype)) if config.own_embedding else None
        # Target id of every draft id; None where the two vocabularies are one.
        self.target_ids = (
            nnx.Variable(jnp.arange(config.draft_vocab_size, dtype=jnp.int32))
            if config.draft_vocab_size != config.vocab_size
            else None
        )

    @property
    def dtype(self) -> Any:
        return self.fc.dtype

    def taps(self, target: Target) -> tuple[int, ...]:
        """Target layers whose input is this head's feature."""
        return tap_layers(self.config, target.config.num_layers)

    def features(self, output: TargetOutput) -> jax.Array:
        """What this head reads of a target pass run with its `taps`: [B, T, F]."""
        assert output.taps is not None
        return output.taps

    def check_fits(self, target: Target) -> None:
        """Raises ConfigError, naming both numbers, if the head was not made for a target of this shape."""
        config, t = self.config, target.config
        taps = self.taps(target)

        require_same("vocab_size", config.vocab_size, t.vocab_size)
        require_same(
            "target_hidden_size" if config.own_embedding else "hidden_size", config.target_hidden_size, t.hidden_size
        )
        for borrowed, what in ((self.embed, "embedding"), (self.lm_head, "lm_head")):
            if borrowed is None:
                require_same(f"hidden_size (the draft has no {what} of its own)", config.hidden_size, t.hidden_size)
        require_same("width of the features that fc reads", self.fc.input_size, len(taps) * t.hidden_size)
        if max(taps) > t.num_layers:
            raise ConfigError(
                f"the draft does not fit the target: it taps layer {max(taps)}, the target has {t.num_layers} layers"
            )

    @jax.named_scope("fc")
    def fuse(self, features: jax.Array) -> jax.Array:
        """Target features [B, T, F] -> hidden [B, T, D]. Drafted hidden states skip this."""
        return linear(features.astype(self.dtype), self.fc)

    def __call__(
        self,
        target: Target,
        hidden: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        attend: Attend,
        *,
        prompt_lengths: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """One step over T pairs: hidden [B, T, D] with tokens [B, T] at positions [B, T].

        Returns:
          hidden [B, T, D] before the final norm, and what `attend` keeps.
        """
        with jax.named_scope("embed"):
            embedding = (target.embed if self.embed is None else self.embed)[tokens].astype(self.dtype)
        rotation = rope_angles(self.config.rope, self.config.head_dim, positions, prompt_lengths)
        with jax.named_scope("layer"):
            return self.layer(embedding, hidden, rotation, attend, self.config.attention_spec(0))

    def before_logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> what `output_weight` is multiplied with, [..., D]."""
        return rms_norm(hidden, self.norm[...], self.config.rms_norm_eps)

    def output_weight(self, target: Target) -> jax.Array:
        """[Vd, D]: the head's own lm_head, or the target's."""
        return target.output_weight() if self.lm_head is None else self.lm_head[...]

    def logits(self, target: Target, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits [..., Vd] over the draft vocabulary, float32."""
        x = self.before_logits(hidden)
        if self.lm_head is None:
            return target.logits(x.astype(target.dtype))
        with jax.named_scope("lm_head"):
            return linear(x, self.lm_head, jnp.float32)
