"""Llama: the target model, a decoder whose parts its config chooses. architectures.py has the configs that are read."""

from __future__ import annotations

import copy
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from eagle_jax.models.config import LlamaConfig
from eagle_jax.models.experts import RoutedMLP
from eagle_jax.models.layers import MLP, Attend, AttendLayer, Attention, norm_weight, normal, normed
from eagle_jax.models.rope import Rotation, rope_angles
from eagle_jax.models.target import TargetOutput, cached_pass
from eagle_jax.ops.linear import Weight, linear
from eagle_jax.ops.spec import PLAIN, Spec, capped


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP, each with a residual. The layer of an EAGLE-1 head lacks the input norm.

    post_attention_norm: of the MLP's input; the name is Llama's.
    """

    def __init__(self, config: LlamaConfig, key: jax.Array, dtype: Any, *, index: int = 0, input_norm: bool = True):
        keys = jax.random.split(key)
        bias = config.attention_bias
        self.config = config
        self.input_norm = norm_weight(config, config.hidden_size, dtype) if input_norm else None
        self.attention = Attention(
            config, config.hidden_size, keys[0], dtype, qkv_bias=bias or config.qkv_bias, o_bias=bias
        )
        self.attention_output_norm = norm_weight(config, config.hidden_size, dtype) if config.output_norms else None
        self.post_attention_norm = norm_weight(config, config.hidden_size, dtype)
        self.mlp = make_mlp(config, index, keys[1], dtype)
        self.mlp_output_norm = norm_weight(config, config.hidden_size, dtype) if config.output_norms else None

    def __call__(
        self, x: Float[Array, "batch new hidden"], rotation: Rotation, attend: Attend, spec: Spec = PLAIN
    ) -> tuple[Float[Array, "batch new hidden"], Any]:
        """Returns the layer's output, and what `attend` returned beside its result."""
        config = self.config
        mixed, kept = self.attention(normed(x, self.input_norm, config), rotation, attend, spec)
        x = x + normed(mixed, self.attention_output_norm, config)
        mixed = self.mlp(normed(x, self.post_attention_norm, config))
        return x + normed(mixed, self.mlp_output_norm, config), kept


def make_mlp(config: LlamaConfig, index: int, key: jax.Array, dtype: Any) -> MLP | RoutedMLP:
    """Builds the MLP of the layer `index`: the one place that chooses its kind by the config."""
    return RoutedMLP(config, key, dtype) if config.is_routed(index) else MLP(config, key, dtype)


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
        self.norm = norm_weight(config, config.hidden_size, dtype)
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

    def without_layers(self) -> Self:
        """Returns a copy without decoder layers, of a real or an abstract model. `run` refuses it.

        The embedding, the final norm and the output matrix remain: a head's loss reads only these of a target whose
        hidden states come from a file.
        """
        ends = copy.copy(self)
        ends.layers = nnx.List([])
        return ends

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
        config = self.config
        if len(self.layers) != config.num_layers:
            raise ValueError(f"this model has {len(self.layers)} of its {config.num_layers} layers; load it whole")
        with jax.named_scope("embed"):
            x = self.embedded(tokens)
        ropes = dict.fromkeys(map(config.rope_of, range(config.num_layers)))
        rotations = {rope: rope_angles(rope, config.head_dim, positions, prompt_lengths) for rope in ropes}
        stream, kept = [x], []
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layers.{index}"):
                rotation, spec = rotations[config.rope_of(index)], config.attention_spec(index)
                x, of_layer = layer(x, rotation, functools.partial(attend, index), spec)
            stream.append(x)
            kept.append(of_layer)
        tapped = jnp.concatenate([stream[tap] for tap in taps], axis=-1) if taps else None
        return TargetOutput(normed(x, self.norm, config), tapped), kept

    def embedded(self, tokens: Int[Array, "batch new"]) -> Float[Array, "batch new hidden"]:
        """Returns the input of the first layer."""
        x, scale = self.embed[tokens], self.config.embedding_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)

    def output_weight(self) -> Float[Array, "vocab hidden"]:
        """Returns lm_head, or the embedding if they are tied."""
        return (self.embed if self.lm_head is None else self.lm_head)[...]

    @jax.named_scope("lm_head")
    def logits(self, hidden: Float[Array, "*tokens hidden"]) -> Float32[Array, "*tokens vocab"]:
        """Multiplies hidden states after the final norm by the output weight, and applies the cap of logits."""
        products = linear(hidden, self.embed if self.lm_head is None else self.lm_head, jnp.float32)
        return capped(products, self.config.logit_softcap)
