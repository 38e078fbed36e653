"""Routed experts: each token goes through the MLPs of its `top_k` experts, which a router chooses.

Shapes are static: `top_k` outputs a token, whichever experts they come from. A token's result depends on the token
alone. There is no gradient: heads learn from a target that is frozen. What multiplies depends on the platform:

- A CPU sorts the tokens by expert, and multiplies blocks that share one (`in_blocks`).
- A TPU has a grouped product, `jax.lax.ragged_dot`, which reads every used expert once (`by_ragged_dot`). On other
  platforms it computes every expert for every token, and copies the weights.
- A GPU reads the chosen experts of a few tokens in one fused kernel (`gathered`). More tokens choose nearly all
  experts, and it computes all of them (`every_expert`): up to a hundred tokens, reading the weights takes longer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int

from eagle_jax.ops.linear import dot
from eagle_jax.sharding import BATCH, EXPERT, TENSOR, fitting, mesh_of

CPU_FEW_ROWS = 16  # up to so many rows a CPU multiplies one at a time: a block would be nearly empty
CPU_BLOCK = 16  # rows of a block; larger ones are mostly padding until a prompt has thousands of tokens
GPU_ROWS = 128  # tokens that go through every expert at once; bounds the temporaries, experts * rows * intermediate

# activation(gate, up) -> what the down projection multiplies.
Activation = Callable[[jax.Array, jax.Array], jax.Array]
Chosen = Int[Array, "tokens top_k"]
Tokens = Float[Array, "tokens hidden"]
Outputs = Float[Array, "tokens top_k hidden"]


class Routing(NamedTuple):
    """The experts of every token, best first, and the weights that their outputs are summed with."""

    experts: Int[Array, "batch new top_k"]
    weights: Float32[Array, "batch new top_k"]


class ExpertWeights(NamedTuple):
    """The MLPs of all experts, output dimension first; biases or None."""

    gate: Float[Array, "experts intermediate hidden"]
    up: Float[Array, "experts intermediate hidden"]
    down: Float[Array, "experts hidden intermediate"]
    gate_bias: Float[Array, "experts intermediate"] | None = None
    up_bias: Float[Array, "experts intermediate"] | None = None
    down_bias: Float[Array, "experts hidden"] | None = None


def swiglu(
    gate: Float[Array, "*rows intermediate"], up: Float[Array, "*rows intermediate"]
) -> Float[Array, "*rows intermediate"]:
    """Multiplies up by silu(gate)."""
    return jax.nn.silu(gate) * up


def clamped_swiglu(
    alpha: float, limit: float, gate: Float[Array, "*rows intermediate"], up: Float[Array, "*rows intermediate"]
) -> Float[Array, "*rows intermediate"]:
    """Multiplies up + 1 by gate * sigmoid(alpha * gate), as gpt-oss; `limit` clamps both, gate from above only."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


@jax.named_scope("route")
def route(logits: Float32[Array, "batch new experts"], top_k: int, *, normalised: bool) -> Routing:
    """Chooses the `top_k` experts of the largest logits; the lowest index first among equal ones.

    Args:
      normalised: weights are a softmax over the chosen experts, and sum to 1. That is also a softmax over all experts,
        divided by the sum of the chosen. False: a softmax over all experts.
    """
    best, experts = jax.lax.top_k(logits, top_k)
    if normalised:
        return Routing(experts, jax.nn.softmax(best, axis=-1))
    return Routing(experts, jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), experts, axis=-1))


@jax.named_scope("experts")
def mix(
    x: Float[Array, "batch new hidden"], routing: Routing, weights: ExpertWeights, activation: Activation
) -> Float[Array, "batch new hidden"]:
    """Sums the outputs of each token's experts by the routing's weights, in float32.

    On a mesh every device computes its own experts (axis "expert") and its part of their intermediate size ("tensor").
    """
    mesh = mesh_of(weights)
    if mesh is None:
        return _sum(x, routing, weights, activation).astype(x.dtype)
    rows = PartitionSpec(fitting((BATCH,), x.shape[:1], mesh)[0])
    over = fitting((EXPERT, TENSOR), weights.gate.shape[:2], mesh)
    specs = (over, over, PartitionSpec(over[0], None, over[1]), over, over, PartitionSpec(over[0]))
    spec = ExpertWeights._make(None if w is None else each for each, w in zip(specs, weights, strict=True))

    def local(x, routing, weights):
        first = 0 if over[0] is None else jax.lax.axis_index(EXPERT) * len(weights.gate)
        if weights.down_bias is not None and over[1] is not None:  # one of the devices that share an expert adds it
            adds = jax.lax.axis_index(TENSOR) == 0
            weights = weights._replace(down_bias=jnp.where(adds, weights.down_bias, jnp.zeros_like(weights.down_bias)))
        total = _sum(x, Routing(routing.experts - first, routing.weights), weights, activation)
        axes = tuple(axis for axis in over if axis is not None)
        return jax.lax.psum(total, axes) if axes else total

    # check_vma: loops begin with zeros, which are the same on all devices, and end with sums, which are not.
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, spec), out_specs=rows, check_vma=False)
    return sharded(x, routing, weights).astype(x.dtype)


def _sum(
    x: Float[Array, "batch new hidden"], routing: Routing, weights: ExpertWeights, activation: Activation
) -> Float32[Array, "batch new hidden"]:
    """Does as `mix`, for the experts at hand: 0 to their number. Experts of another index add nothing."""
    count, top_k = len(weights.gate), routing.experts.shape[-1]
    chosen = routing.experts.reshape(-1, top_k)
    here = (chosen >= 0) & (chosen < count)
    chosen = jnp.where(here, chosen, count)
    outputs = _outputs(activation, x.reshape(-1, x.shape[-1]), chosen, weights)
    # Outputs of experts elsewhere are garbage, perhaps NaN, which a weight of 0 would not remove.
    outputs = jnp.where(here[..., None], outputs.astype(jnp.float32), 0.0)
    return (outputs * routing.weights.reshape(-1, top_k, 1)).sum(axis=1).reshape(x.shape)


def _outputs(activation: Activation, x: Tokens, chosen: Chosen, weights: ExpertWeights) -> Outputs:
    """Computes every choice's output in the platform's way. Under `vmap` there are more tokens."""

    @jax.custom_batching.custom_vmap
    def compute(x, chosen, weights):
        few = chosen.size <= len(weights.gate)  # static, as all sizes
        ways: dict[str, Callable[..., Outputs]] = {
            "cpu": functools.partial(in_blocks, 1 if chosen.size <= CPU_FEW_ROWS else CPU_BLOCK),
            "tpu": by_ragged_dot,
            "default": gathered if few else every_expert,
        }
        ways = {platform: functools.partial(way, activation) for platform, way in ways.items()}
        return jax.lax.platform_dependent(x, chosen, weights, **ways)

    @compute.def_vmap
    def more_tokens(size, batched, x, chosen, weights):
        if any(jax.tree.leaves(batched[2])):
            raise NotImplementedError("vmap over the weights of experts")
        x, chosen = (
            array if is_batched else jnp.broadcast_to(array, (size, *array.shape))
            for array, is_batched in zip((x, chosen), batched[:2], strict=True)
        )
        outputs = compute(x.reshape(-1, x.shape[-1]), chosen.reshape(-1, chosen.shape[-1]), weights)
        return outputs.reshape(size, -1, *outputs.shape[1:]), True

    return compute(x, chosen, weights)


def in_blocks(size: int, activation: Activation, x: Tokens, chosen: Chosen, weights: ExpertWeights) -> Outputs:
    """Sorts the tokens by expert, and multiplies blocks of `size` that share one; only as many as there are.

        chosen 2 0 2 2, size 2:    sorted 0 2 2 2    blocks [0 2] of expert 0, [2 2] and [2 .] of expert 2

    A block that has fewer rows of its expert runs into the next one's. The next block overwrites those.
    """
    order, sizes = by_expert(chosen, len(weights.gate))
    blocks = -(-sizes // size)
    end_blocks, first_rows = jnp.cumsum(blocks), jnp.cumsum(sizes) - sizes
    rows = jnp.pad(x[order // chosen.shape[1]], [(0, size), (0, 0)])

    def one(index, outputs):
        expert = jnp.sum(end_blocks <= index)
        start = first_rows[expert] + (index - end_blocks[expert] + blocks[expert]) * size
        block = jax.lax.dynamic_slice_in_dim(rows, start, size)
        out = _mlp(lambda x, w: dot("ri,oi->ro", x, w[expert]), lambda b: b[expert][None], activation, block, weights)
        return jax.lax.dynamic_update_slice_in_dim(outputs, out, start, axis=0)

    outputs = jax.lax.fori_loop(0, end_blocks[-1], one, jnp.zeros_like(rows))
    return _unsorted(outputs, order, chosen)


def by_ragged_dot(activation: Activation, x: Tokens, chosen: Chosen, weights: ExpertWeights) -> Outputs:
    """Sorts the tokens by expert, for the grouped product of TPUs."""
    order, sizes = by_expert(chosen, len(weights.gate))
    expert = jnp.minimum(chosen.reshape(-1)[order], len(weights.gate) - 1)
    # Contracts the last dimension of both; dimension 0 of the weights is the groups'.
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    def multiply(x, weight):
        return jax.lax.ragged_dot_general(x, weight, sizes, numbers, precision=precision)

    rows = x[order // chosen.shape[1]]
    return _unsorted(_mlp(multiply, lambda bias: bias[expert], activation, rows, weights), order, chosen)


def gathered(activation: Activation, x: Tokens, chosen: Chosen, weights: ExpertWeights) -> Outputs:
    """Multiplies each choice by its expert's weights, as a sum: XLA fuses the gather into it, and copies no weight."""
    expert = jnp.minimum(chosen.reshape(-1), len(weights.gate) - 1)

    def multiply(x, weight):
        products = x[:, None].astype(jnp.float32) * weight[expert].astype(jnp.float32)
        return products.sum(axis=-1).astype(x.dtype)

    rows = jnp.repeat(x, chosen.shape[1], axis=0)
    return _mlp(multiply, lambda bias: bias[expert], activation, rows, weights).reshape(*chosen.shape, -1)


def every_expert(activation: Activation, x: Tokens, chosen: Chosen, weights: ExpertWeights) -> Outputs:
    """Computes all experts for all tokens, GPU_ROWS at a time, and keeps the chosen outputs."""
    size = min(GPU_ROWS, len(x))
    missing = -len(x) % size
    padded = jnp.pad(x, [(0, missing), (0, 0)]).reshape(-1, size, x.shape[-1])
    expert = jnp.minimum(jnp.pad(chosen, [(0, missing), (0, 0)]), len(weights.gate) - 1)

    # Tokens last, as the products leave them: XLA copies what it has to transpose.
    def multiply(x, weight):  # x: tokens [in, rows] at first, then what each expert made of them [experts, in, rows]
        return dot("eoi,ir->eor" if x.ndim == 2 else "eoi,eir->eor", weight, x)

    def some(block):
        rows, expert = block
        out = _mlp(multiply, lambda bias: bias[:, :, None], activation, rows.T, weights)
        return out[expert, :, jnp.arange(size)[:, None]]

    outputs = jax.lax.map(some, (padded, expert.reshape(-1, size, chosen.shape[1])))
    return outputs.reshape(-1, chosen.shape[1], x.shape[-1])[: len(x)]


def by_expert(chosen: Chosen, count: int) -> tuple[Int[Array, " choices"], Int[Array, " experts"]]:
    """Returns the order that sorts choices by expert, and how many choices each of `count` experts has.

    Choices of no expert at hand (index `count`) come last and are not counted.
    """
    flat = chosen.reshape(-1)
    return jnp.argsort(flat, stable=True), jnp.sum(flat[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)


def _unsorted(outputs: Float[Array, "rows hidden"], order: Int[Array, " choices"], chosen: Chosen) -> Outputs:
    """Undoes the sorting of `by_expert`, which may have left rows of padding at the end."""
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
    return outputs[place].reshape(*chosen.shape, -1)


def _mlp(
    multiply: Callable[[jax.Array, jax.Array], jax.Array],
    bias_of: Callable[[jax.Array], jax.Array],
    activation: Activation,
    x: jax.Array,
    weights: ExpertWeights,
) -> jax.Array:
    """Computes the MLP of experts: down(activation(gate(x), up(x))).

    Args:
      multiply: (x, weights of all experts) -> the product with each row's expert.
      bias_of: biases of all experts -> each row's.
    """

    def project(x, weight, bias):
        out = multiply(x, weight)
        return out if bias is None else out + bias_of(bias)

    gate, up = project(x, weights.gate, weights.gate_bias), project(x, weights.up, weights.up_bias)
    return project(activation(gate, up), weights.down, weights.down_bias)
