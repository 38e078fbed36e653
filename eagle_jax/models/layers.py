"""Parts of a decoder layer: RMSNorm and RoPE as pure functions, attention and MLP as modules that hold weights.

Weights keep PyTorch's order, output dimension first, so conversion is a reshape. q, k and v are [heads, head_dim,
input]; o, [hidden, heads * head_dim], and the MLP's are matrices.
On TPUs, q in two dimensions or o in three would be copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Key

from eagle_jax.models.config import LlamaConfig, RopeConfig
from eagle_jax.ops.linear import Weight, linear
from eagle_jax.ops.spec import PLAIN, Spec

# attend(q [batch, new, heads, head_dim], k and v [batch, kv_heads, new, head_dim], spec) -> (result, as q; any pytree).
# The caller's closure, which knows the cache and the mask; the layer adds its `Spec`. The pytree (k and v, a cache that
# holds them, or None) is returned by the layer unchanged.
Attend = Callable[..., tuple[jax.Array, Any]]
# The same for all layers of a model: attend(layer index, q, k, v, spec).
AttendLayer = Callable[..., tuple[jax.Array, Any]]
Rotation = tuple[Float32[Array, "batch new 1 half"], Float32[Array, "batch new 1 half"]]  # cos, sin; half of head_dim


@jax.named_scope("norm")
def rms_norm(
    x: Float[Array, "*tokens hidden"], weight: Float[Array, " hidden"], eps: float
) -> Float[Array, "*tokens hidden"]:
    """Computes RMSNorm over the last axis in float32; multiplies by the weight in x's dtype, as the reference does."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Float32[np.ndarray, " half"]:
    """Returns inverse frequencies, with linear or llama3 scaling applied.

    Dynamic scaling depends on the text's length, so `rope_angles` applies it.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1.0) / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind != "llama3":
        return frequencies
    # Long wavelengths are divided by `factor`, short ones unchanged, those between interpolated.
    wavelength = 2 * np.pi / frequencies
    blend = (rope.original_length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequencies / rope.factor + blend * frequencies).astype(np.float32)


@jax.named_scope("rope")
def rope_angles(
    rope: RopeConfig,
    head_dim: int,
    positions: Int[Array, "batch new"],
    prompt_lengths: Int[Array, " batch"] | Int[Array, "batch new"],
) -> Rotation:
    """Returns cos and sin of the rotation at each position.

    Args:
      prompt_lengths: of each sequence, or of each token for packed documents. Read by dynamic scaling only, which
        depends on the text's length. For a prompt's tokens that is the prompt's length; for a later token, its
        position + 1. Step-by-step decoding computes the same, so a pass over a tree agrees with single steps.
    """
    frequencies = jnp.asarray(rope_frequencies(rope, head_dim))
    positions = positions[:, :, None, None]
    if rope.kind == "dynamic":
        own_lengths = prompt_lengths.reshape(len(prompt_lengths), -1, 1, 1)
        text_length = jnp.maximum(positions + 1, own_lengths).astype(jnp.float32)
        text_length = jnp.maximum(text_length, rope.original_length)
        stretch = rope.factor * text_length / rope.original_length - (rope.factor - 1)
        base = rope.theta * stretch ** (head_dim / (head_dim - 2))
        exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
        frequencies = 1.0 / base ** exponent[None, None, None, :]
    else:
        frequencies = frequencies[None, None, None, :]
    angles = positions.astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


@jax.named_scope("rope")
def rotate(
    x: Float[Array, "batch new heads head_dim"],
    cos: Float32[Array, "batch new 1 half"],
    sin: Float32[Array, "batch new 1 half"],
) -> Float[Array, "batch new heads head_dim"]:
    """Applies rotary embedding in float32; the first half of head_dim pairs with the second.

    [a, b] -> [a cos - b sin, b cos + a sin]. Swaps the halves by a reversal, which XLA:CPU fuses into the products; it
    would not fuse a concatenation.
    """
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    signed_sin = jnp.stack([-sin, sin], axis=-2)
    rotated = halves * cos[..., None, :] + jnp.flip(halves, axis=-2) * signed_sin
    return rotated.reshape(x.shape).astype(x.dtype)


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
        self.q_norm = ones((h,), dtype) if config.qk_norm else None
        self.k_norm = ones((h,), dtype) if config.qk_norm else None

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "batch new input"], rotation: Rotation, attend: Attend, spec: Spec = PLAIN
    ) -> tuple[Float[Array, "batch new hidden"], Any]:
        """Attends by `attend`, which gets rotated q and k, and returns what it returned beside its result, too."""
        q = _project("q", x, self.q, self.q_bias)
        k = _project("k", x, self.k, self.k_bias)
        v = _project("v", x, self.v, self.v_bias)
        q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        # Barrier: materialise k and v here; otherwise XLA keeps the (larger) projection inputs alive until the commit.
        k, v = jax.lax.optimization_barrier((jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
        # A closure that takes no spec works for plain layers, and raises for all others rather than ignore theirs.
        mixed, kept = attend(q, k, v) if spec.plain else attend(q, k, v, spec)
        return _project("o", mixed.reshape(*mixed.shape[:2], -1), self.o, self.o_bias), kept

    def _normed(
        self, heads: Float[Array, "batch new heads head_dim"], weight: nnx.Param | None
    ) -> Float[Array, "batch new heads head_dim"]:
        """Normalises every head, unless the weight is None."""
        return heads if weight is None else rms_norm(heads, weight[...], self.config.rms_norm_eps)


def _project(
    name: str, x: Float[Array, "batch new input"], weight: Weight, bias: nnx.Param | None
) -> Float[Array, "batch new ..."]:
    with jax.named_scope(name):
        return add_bias(linear(x, weight), bias)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, key: jax.Array, dtype: Any):
        d, f = config.hidden_size, config.intermediate_size
        keys = jax.random.split(key, 3)
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
        return _project("down", jax.nn.silu(gate) * up, self.down, self.down_bias)


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
