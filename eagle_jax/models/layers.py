"""Parts of a decoder layer: RMSNorm as a pure function, attention and MLP as modules that hold weights.

Weights keep PyTorch's order, output dimension first, so conversion is a reshape. q, k and v are [heads, head_dim,
input]; o, [hidden, heads * head_dim], and the MLP's are matrices.
On TPUs, q in two dimensions or o in three would be copied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from eagle_jax.models.config import LlamaConfig
from eagle_jax.models.rope import Rotation, rotate
from eagle_jax.ops.linear import Weight, linear
from eagle_jax.ops.spec import PLAIN, Spec

# attend(q [batch, new, heads, head_dim], k and v [batch, kv_heads, new, head_dim], spec) -> (result, as q; any pytree).
# The caller's closure, which knows the cache and the mask; the layer adds its `Spec`. The pytree (k and v, a cache that
# holds them, or None) is returned by the layer unchanged.
Attend = Callable[..., tuple[jax.Array, Any]]
# The same for all layers of a model: attend(layer index, q, k, v, spec).
AttendLayer = Callable[..., tuple[jax.Array, Any]]


@jax.named_scope("norm")
def rms_norm(
    x: Float[Array, "*tokens hidden"], weight: Float[Array, " hidden"], eps: float, plus_one: bool = False
) -> Float[Array, "*tokens hidden"]:
    """Computes RMSNorm over the last axis in float32; multiplies by the weight in x's dtype, as the reference does.

    With `plus_one`, multiplies by 1 + weight, in float32 (Gemma).
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + weight.shape
    if plus_one:
        return (x32 * scale * (1 + weight.astype(jnp.float32)).reshape(shape)).astype(x.dtype)
    return (x32 * scale).astype(x.dtype) * weight.reshape(shape)


def normed(
    x: Float[Array, "*tokens hidden"], weight: nnx.Param | None, config: LlamaConfig
) -> Float[Array, "*tokens hidden"]:
    """Applies a norm of the config's kind; a layer without this norm has no weight, and x stays as it is."""
    return x if weight is None else rms_norm(x, weight[...], config.rms_norm_eps, config.norm_plus_one)


class Attention(nnx.Module):
    """Grouped-query attention: q, k, v and o projections. `input_size` is 2 * hidden in an EAGLE-3 head."""

    def __init__(
        self, config: LlamaConfig, input_size: int, key: jax.Array, dtype: Any, *, qkv_bias: bool, o_bias: bool
    ):
        n, k, h, d = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        keys = jax.random.split(key, 4)
        self.config = config
        self.q = Weight(normal(keys[0], (n, h, input_size), dtype))
        self.k = Weight(normal(keys[1], (k, h, input_size), dtype))
        self.v = Weight(normal(keys[2], (k, h, input_size), dtype))
        self.o = Weight(normal(keys[3], (d, n * h), dtype))
        self.q_bias = zeros((n, h), dtype) if qkv_bias else None
        self.k_bias = zeros((k, h), dtype) if qkv_bias else None
        self.v_bias = zeros((k, h), dtype) if qkv_bias else None
        self.o_bias = zeros((d,), dtype) if o_bias else None
        self.q_norm = norm_weight(config, h, dtype) if config.qk_norm else None
        self.k_norm = norm_weight(config, h, dtype) if config.qk_norm else None
        self.sinks = zeros((n,), dtype) if config.sinks else None

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "batch new input"], rotation: Rotation, attend: Attend, spec: Spec = PLAIN
    ) -> tuple[Float[Array, "batch new hidden"], Any]:
        """Attends by `attend`, which gets rotated q and k, and returns what it returned beside its result, too."""
        q = _project("q", x, self.q, self.q_bias)
        k = _project("k", x, self.k, self.k_bias)
        v = _project("v", x, self.v, self.v_bias)
        q, k = normed(q, self.q_norm, self.config), normed(k, self.k_norm, self.config)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        # Barrier: materialise k and v here; otherwise XLA keeps the (larger) projection inputs alive until the commit.
        k, v = jax.lax.optimization_barrier((jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
        if self.sinks is not None:
            spec = dataclasses.replace(spec, sinks=self.sinks[...])
        # A closure that takes no spec works for plain layers, and raises for all others rather than ignore theirs.
        mixed, kept = attend(q, k, v) if spec.plain else attend(q, k, v, spec)
        return _project("o", mixed.reshape(*mixed.shape[:2], -1), self.o, self.o_bias), kept

    @jax.named_scope("attention")
    def keys_and_values(
        self, x: Float[Array, "batch new input"], rotation: Rotation
    ) -> tuple[Float[Array, "batch kv_heads new head_dim"], Float[Array, "batch kv_heads new head_dim"]]:
        """Returns rotated keys, and values, of tokens that attend to nothing themselves."""
        k = rotate(normed(_project("k", x, self.k, self.k_bias), self.k_norm, self.config), *rotation)
        return jnp.swapaxes(k, 1, 2), jnp.swapaxes(_project("v", x, self.v, self.v_bias), 1, 2)


def _project(
    name: str, x: Float[Array, "batch new input"], weight: Weight, bias: nnx.Param | None
) -> Float[Array, "batch new ..."]:
    with jax.named_scope(name):
        return add_bias(linear(x, weight), bias)


# By their names in config.json.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """A gated MLP: down(activation(gate(x)) * up(x)). SwiGLU with silu, GeGLU with GELU."""

    def __init__(self, config: LlamaConfig, key: jax.Array, dtype: Any):
        d, f = config.hidden_size, config.intermediate_size
        keys = jax.random.split(key, 3)
        self.activation = config.activation
        self.gate = Weight(normal(keys[0], (f, d), dtype))
        self.up = Weight(normal(keys[1], (f, d), dtype))
        self.down = Weight(normal(keys[2], (d, f), dtype))
        self.gate_bias = zeros((f,), dtype) if config.mlp_bias else None
        self.up_bias = zeros((f,), dtype) if config.mlp_bias else None
        self.down_bias = zeros((d,), dtype) if config.mlp_bias else None

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "batch new hidden"]) -> Float[Array, "batch new hidden"]:
        gate = _project("gate", x, self.gate, self.gate_bias)
        up = _project("up", x, self.up, self.up_bias)
        return _project("down", ACTIVATIONS[self.activation](gate) * up, self.down, self.down_bias)


def add_bias(x: Float[Array, "batch new ..."], bias: nnx.Param | None) -> Float[Array, "batch new ..."]:
    """Adds a bias [...] to every token, unless it is None."""
    return x if bias is None else x + bias[None, None]


def normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draws from N(0, 0.02^2), Llama's initialisation."""
    return 0.02 * jax.random.normal(key, shape, dtype)


def zeros(shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))


def ones(shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, dtype))


def norm_weight(config: LlamaConfig, size: int, dtype: Any) -> nnx.Param:
    """Returns the weight of a norm that multiplies by 1."""
    return (zeros if config.norm_plus_one else ones)((size,), dtype)
