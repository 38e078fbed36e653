"""Eagle3Draft: the EAGLE-3 head (arXiv 2503.01840, section 3).

The head maps a pair (see drafting.py) to a hidden state for the next position. Its logits draft the token after that
position, and the next drafting step reads it in place of a target feature.

EAGLE-3.1 is the same network with norms (`fc_norm` or `norm_before_fc`) before `fc`, and with `norm_output`. A head of
several layers has plain decoder layers after the first; layer i > 0 has the paths "layers.i.*".
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key

from eagle_jax.drafts.eagle.config import DraftConfig, tap_layers
from eagle_jax.drafts.eagle.drafting import EagleDraft
from eagle_jax.models.config import ConfigError, require_same
from eagle_jax.models.layers import MLP, Attend, AttendLayer, Attention, add_bias, normal, ones, rms_norm, zeros
from eagle_jax.models.llama import DecoderLayer
from eagle_jax.models.rope import Rotation, rope_angles
from eagle_jax.models.target import Target, TargetOutput
from eagle_jax.ops.linear import Weight, linear
from eagle_jax.ops.spec import PLAIN, Spec


class Eagle3Layer(nnx.Module):
    """A decoder layer whose attention reads the concatenated embedding and hidden state, twice the width."""

    def __init__(self, config: DraftConfig, key: Key[Array, ""], dtype: Any):
        keys = jax.random.split(key)
        self.config = config
        self.input_norm = ones((config.hidden_size,), dtype)
        self.hidden_norm = ones((config.hidden_size,), dtype)
        bias = config.attention_bias
        self.attention = Attention(
            config, 2 * config.hidden_size, keys[0], dtype, qkv_bias=bias or config.qkv_bias, o_bias=bias
        )
        self.post_attention_norm = ones((config.hidden_size,), dtype)
        self.mlp = MLP(config, keys[1], dtype)

    def __call__(
        self,
        embedding: Float[Array, "batch new hidden"],
        hidden: Float[Array, "batch new hidden"],
        rotation: Rotation,
        attend: Attend,
        spec: Spec = PLAIN,
    ) -> tuple[Float[Array, "batch new hidden"], Any]:
        """Returns the layer's output, and the second result of `attend`."""
        eps = self.config.rms_norm_eps
        normed = rms_norm(hidden, self.hidden_norm[...], eps)
        residual = normed if self.config.norm_before_residual else hidden
        x = jnp.concatenate([rms_norm(embedding, self.input_norm[...], eps), normed], axis=-1)
        mixed, kept = self.attention(x, rotation, attend, spec)
        x = residual + mixed
        return x + self.mlp(rms_norm(x, self.post_attention_norm[...], eps)), kept


class Eagle3Draft(EagleDraft, nnx.Module):
    """The head's network; drafting.py has how it drafts."""

    def __init__(self, config: DraftConfig, num_taps: int, key: Key[Array, ""], dtype: Any = jnp.float32):
        """Initialises random weights. `fc` reads `num_taps` target layers, 3 in every official head."""
        keys = jax.random.split(key, 4)
        d, width = config.hidden_size, config.target_hidden_size
        self.config = config
        self.fc_norm = nnx.List([ones((width,), dtype) for _ in range(num_taps)]) if config.fc_norm else None
        self.input_norm = ones((num_taps * width,), dtype) if config.norm_before_fc else None
        self.fc = Weight(normal(keys[0], (d, num_taps * width), dtype))
        self.fc_bias = zeros((d,), dtype) if config.fc_bias else None
        self.layer = Eagle3Layer(config, keys[1], dtype)
        # Keyed by the layer's index, which starts at 1: `layer` is layer 0.
        self.layers = nnx.Dict(
            {
                str(index): DecoderLayer(config, jax.random.fold_in(keys[1], index), dtype)
                for index in range(1, config.num_layers)
            }
        )
        self.norm = ones((d,), dtype)
        # None: the target's lm_head.
        self.lm_head = Weight(normal(keys[2], (config.draft_vocab_size, d), dtype)) if config.own_lm_head else None
        self.embed = nnx.Param(normal(keys[3], (config.vocab_size, d), dtype)) if config.own_embedding else None
        # Target id of every draft id; None if the vocabularies are the same.
        self.target_ids = (
            nnx.Variable(jnp.arange(config.draft_vocab_size, dtype=jnp.int32))
            if config.draft_vocab_size != config.vocab_size
            else None
        )

    @property
    def dtype(self) -> Any:
        return self.fc.dtype

    def taps(self, target: Target) -> tuple[int, ...]:
        """Returns the target layers whose inputs are the head's features."""
        return tap_layers(self.config, target.config.num_layers)

    def features(self, output: TargetOutput) -> Float[Array, "batch new features"]:
        """Returns the taps of a target pass, concatenated."""
        assert output.taps is not None
        return output.taps

    def check_fits(self, target: Target) -> None:
        """Raises ConfigError, naming both numbers, if the head's sizes do not fit the target."""
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
    def fuse(self, features: Float[Array, "batch new features"]) -> Float[Array, "batch new hidden"]:
        """Projects target features to the head's width. The head's hidden states skip this."""
        x, eps = features.astype(self.dtype), self.config.rms_norm_eps
        if self.fc_norm is not None:
            taps = jnp.split(x, len(self.fc_norm), axis=-1)
            normed = [rms_norm(tap, weight[...], eps) for tap, weight in zip(taps, self.fc_norm, strict=True)]
            x = jnp.concatenate(normed, axis=-1)
        if self.input_norm is not None:
            x = rms_norm(x, self.input_norm[...], eps)
        return add_bias(linear(x, self.fc), self.fc_bias)

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
        rotation = rope_angles(self.config.rope, self.config.head_dim, positions, prompt_lengths)
        specs = [self.config.attention_spec(index) for index in range(self.config.num_layers)]
        with jax.named_scope("layer"):
            x, of_layer = self.layer(embedding, hidden, rotation, functools.partial(attend, 0), specs[0])
        kept = [of_layer]
        for index in range(1, self.config.num_layers):
            with jax.named_scope(f"layers.{index}"):
                x, of_layer = self.layers[str(index)](x, rotation, functools.partial(attend, index), specs[index])
            kept.append(of_layer)
        return self._normed(x) if self.config.norm_output else x, kept

    def before_logits(self, hidden: Float[Array, "*axes hidden"]) -> Float[Array, "*axes hidden"]:
        """Applies the final norm, unless the hidden states have it already; `output_weight` multiplies the result."""
        return hidden if self.config.norm_output else self._normed(hidden)

    def _normed(self, hidden: Float[Array, "*axes hidden"]) -> Float[Array, "*axes hidden"]:
        return rms_norm(hidden, self.norm[...], self.config.rms_norm_eps)

    def output_weight(self, target: Target) -> Float[Array, "draft_vocab hidden"]:
        """Returns the head's lm_head if it has one, else the target's."""
        return target.output_weight() if self.lm_head is None else self.lm_head[...]

    def logits(self, target: Target, hidden: Float[Array, "*axes hidden"]) -> Float32[Array, "*axes draft_vocab"]:
        """Returns logits over the draft vocabulary."""
        x = self.before_logits(hidden)
        if self.lm_head is None:
            return target.logits(x.astype(target.dtype))
        with jax.named_scope("lm_head"):
            return linear(x, self.lm_head, jnp.float32)
