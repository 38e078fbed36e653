"""RoutedMLP: the MLP of a layer with experts, of which a router chooses some for each token."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from eagle_jax.models.config import ExpertsConfig, LlamaConfig
from eagle_jax.models.layers import add_bias, normal, zeros
from eagle_jax.ops.experts import Activation, ExpertWeights, clamped_swiglu, mix, route, swiglu
from eagle_jax.ops.linear import Weight, linear


class Experts(nnx.Module):
    """The weights of all experts of a layer, stacked."""

    def __init__(self, config: ExpertsConfig, hidden: int, key: jax.Array, dtype: Any):
        n, f = config.count, config.intermediate_size
        keys = jax.random.split(key, 3)
        self.gate = nnx.Param(normal(keys[0], (n, f, hidden), dtype))
        self.up = nnx.Param(normal(keys[1], (n, f, hidden), dtype))
        self.down = nnx.Param(normal(keys[2], (n, hidden, f), dtype))
        self.gate_bias = zeros((n, f), dtype) if config.bias else None
        self.up_bias = zeros((n, f), dtype) if config.bias else None
        self.down_bias = zeros((n, hidden), dtype) if config.bias else None

    def weights(self) -> ExpertWeights:
        return ExpertWeights._make(
            None if each is None else each[...] for each in (getattr(self, name) for name in ExpertWeights._fields)
        )


class RoutedMLP(nnx.Module):
    """Sums the outputs of the `top_k` experts that the router chooses for a token.

    The logits are float32 in any dtype: rounded ones would often be equal, and the first expert's.
    """

    def __init__(self, config: LlamaConfig, key: jax.Array, dtype: Any):
        assert config.experts is not None
        keys = jax.random.split(key)
        self.config = config.experts
        self.router = Weight(normal(keys[0], (self.config.count, config.hidden_size), dtype))
        self.router_bias = zeros((self.config.count,), dtype) if self.config.bias else None
        self.experts = Experts(self.config, config.hidden_size, keys[1], dtype)

    @property
    def activation(self) -> Activation:
        clamp = self.config.clamp
        return swiglu if clamp is None else functools.partial(clamped_swiglu, *clamp)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "batch new hidden"]) -> Float[Array, "batch new hidden"]:
        with jax.named_scope("router"):
            logits = add_bias(linear(x, self.router, jnp.float32), self.router_bias)
        routing = route(logits, self.config.top_k, normalised=self.config.normalised)
        return mix(x, routing, self.experts.weights(), self.activation)
