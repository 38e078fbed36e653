"""Llama: the target model, a decoder whose parts its config chooses. architectures.py has the configs that are read."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from eagle_jax.models.config import LlamaConfig
from eagle_jax.models.layers import MLP, Attend, AttendLayer, Attention, normal, ones, rms_norm
from eagle_jax.models.rope import Rotation, rope_angles
from eagle_jax.models.target import TargetOutput, cached_pass
from eagle_jax.ops.linear import Weight, linear
from eagle_jax.ops.spec import PLAIN, Spec


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a residual. The layer of an EAGLE-1 head lacks the input norm."""

    def __init__(self, config: LlamaConfig, key: jax.Array, dtype: Any, *, index: int = 0, input_norm: bool = True):
        keys = jax.random.split(key)
        bias = config.attention_bias
        self.config = config
        self.input_norm = ones((config.hidden_size,), dtype) if input_norm else None
        self.attention = Attention(
            config, config.hidden_size, keys[0], dtype, qkv_bias=bias or config.qkv_bias, o_bias=bias
        )
        self.post_attention_norm = ones((config.hidden_size,), dtype)
        self.mlp = make_mlp(config, index, keys[1], dtype)

    def __call__(
        self, x: Float[Array, "batch new hidden"], rotation: Rotation, attend: Attend, spec: Spec = PLAIN
    ) -> tuple[Float[Array, "batch new hidden"], Any]:
        """Returns the layer's output, and what `attend` returned beside its result."""
        eps = self.config.rms_norm_eps
        normed = x if self.input_norm is None else rms_norm(x, self.input_norm[...], eps)
        mixed, kept = self.attention(normed, rotation, attend, spec)
        x = x + mixed
        return x + self.mlp(rms_norm(x, self.post_attention_norm[...], eps)), kept


def make_mlp(config: LlamaConfig, index: int, key: jax.Array, dtype: Any) -> MLP:
    """Builds the MLP of the layer `index`: the one place that chooses its kind by the config."""
    del index  # one kind in all layers
    return MLP(config, key, dtype)


class Llama(nnx.Module):
    """A decoder-only language model of Llama's family, as a stateless pytree of weights. Implements `Target`.

    A subclass with another `layer_class` is an architecture of its own; see `architectures.Architecture`.
    """

    layer_class = DecoderLayer

    def __init__(self, config: LlamaConfig, key: jax.Array, dtype: Any = jnp.float32):
        """Initialises random weights; `params.load` replaces them."""
        keys = jax.random.split(key, config.num_layers + 2)
        self.config = config
        self.embed = nnx.Param(normal(keys[0], (config.vocab_size, config.hidden_size), dtype))
        self.layers = nnx.List(
            [self.layer_class(config, layer_key, dtype, index=index) for index, layer_key in enumerate(keys[2:])]
        )
        self.norm = ones((config.hidden_size,), dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Weight(normal(keys[1], (config.vocab_size, config.hidden_size), dtype))
        )

    @property
    def dtype(self) -> Any:
        return self.embed.dtype

    @property
    def output_is_embedding(self) -> bool:
        return self.lm_head is None

    __call__ = cached_pass

    def run(
        self,
        tokens: Int[Array, "batch new"],
        positions: Int[Array, "batch new"],
        attend: AttendLayer,
        *,
        prompt_lengths: Int[Array, " batch"] | Int[Array, "batch new"],
        taps: tuple[int, ...] = (),
    ) -> tuple[TargetOutput, list[Any]]:
        """Runs a pass whose attention the caller computes; see `Target`."""
        with jax.named_scope("embed"):
            x = self.embed[tokens]
        rotation = rope_angles(self.config.rope, self.config.head_dim, positions, prompt_lengths)
        stream, kept = [x], []
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layers.{index}"):
                spec = self.config.attention_spec(index)
                x, of_layer = layer(x, rotation, functools.partial(attend, index), spec)
            stream.append(x)
            kept.append(of_layer)
        tapped = jnp.concatenate([stream[tap] for tap in taps], axis=-1) if taps else None
        return TargetOutput(rms_norm(x, self.norm[...], self.config.rms_norm_eps), tapped), kept

    def output_weight(self) -> Float[Array, "vocab hidden"]:
        """Returns lm_head, or the embedding if they are tied."""
        return (self.embed if self.lm_head is None else self.lm_head)[...]

    @jax.named_scope("lm_head")
    def logits(self, hidden: Float[Array, "*tokens hidden"]) -> Float32[Array, "*tokens vocab"]:
        """Multiplies hidden states after the final norm by the output weight."""
        return linear(hidden, self.embed if self.lm_head is None else self.lm_head, jnp.float32)
