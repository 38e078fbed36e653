"""The parts of a decoder layer: pure functions, and the two modules that hold its weights.

Letters: B batch, T new tokens, M rows of new keys, S cache rows, D model width, F MLP width, N query heads,
K key-value heads, G = N / K, H head dim.

Weights keep PyTorch's order, output dimension first: o [D, N * H], gate [F, D], and q [N, H, D] with the heads
split out (on TPUs neither q in two dimensions nor o in three goes without a copy). Conversion is a reshape.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eagle_jax.models.config import LlamaConfig, RopeConfig

Model = TypeVar("Model")

# attend(q [B, T, N, H], k [B, K, T, H], v [B, K, T, H]) -> (attention's result [B, T, N, H], what the caller keeps).
# A layer does not know where older keys live; the caller's closure does. What it keeps (k and v, a cache that holds
# them, or nothing) the layer returns unchanged.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# The same for all layers of a model: attend(layer index, q, k, v).
AttendLayer = Callable[[int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

# Rows of a cache attended to at a time when going through it in blocks: for a chunk of a prompt, and on a CPU.
CACHE_BLOCK = 512
CPU_CACHE_BLOCK = 128
CPU_FEW_ROWS = 8  # rows of a product that a CPU goes through one by one
CPU_EIGEN_ROWS = 16  # rows that a CPU multiplies faster by Eigen than by YNNPACK, with a weight stored input first


class CacheLayer(NamedTuple):
    """One layer of a cache: k, v [B, K, S, H], of which the first `length` [B] rows are committed."""

    k: jax.Array
    v: jax.Array
    length: jax.Array


class Window(NamedTuple):
    """What of a text a query may see: its `first` positions, and those from `oldest` [B, T] on, one a query."""

    first: int
    oldest: jax.Array

    def sees(self, positions: jax.Array) -> jax.Array:
        """Of positions [B or 1, M], which each query sees: [B, T, M] bool."""
        return (positions < self.first)[:, None] | (positions[:, None] >= self.oldest[:, :, None])


def dot(equation: str, x: jax.Array, y: jax.Array, out_dtype: Any = None) -> jax.Array:
    """`einsum` in the operands' own precision: float32 stays float32 on GPUs and TPUs too."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=out_dtype or x.dtype)


class InputFirst(nnx.Param):
    """A weight [..., D] stored as [D, ...]: see `input_first`."""


# The last component of the path of every weight that `linear` multiplies with. Embeddings are read by rows, too.
PRODUCT_WEIGHTS = {"q", "k", "v", "o", "gate", "up", "down", "fc", "lm_head", "weight"}


def input_first(model: Model) -> Model:
    """The same model (or draft) for decoding on a CPU: its weights stored with their input dimension first.

    A CPU multiplies a few rows with such a weight as it lies, and rearranges any other one first. Results differ by
    rounding. Accelerators gain nothing. The copy is for decoding alone: convert, shard or train the model it came from.
    A target whose output matrix is its embedding gets an output matrix of its own, V * D numbers more, for lookups read
    the embedding by rows.
    """

    def turn(path, leaf):
        is_weight = isinstance(leaf, nnx.Param) and getattr(path[-1], "name", None) in PRODUCT_WEIGHTS
        return _turned(leaf) if is_weight and not isinstance(leaf, InputFirst) else leaf

    def untie(node):
        if not _is_tied(node):
            return node
        node = copy.copy(node)
        node.lm_head = nnx.data(_turned(node.embed))
        return node

    turned = jax.tree_util.tree_map_with_path(turn, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return jax.tree.map(untie, turned, is_leaf=_is_tied)


def _is_tied(node: Any) -> bool:
    return getattr(node, "output_is_embedding", False)


def _turned(weight: nnx.Param) -> InputFirst:
    value = weight[...]
    if isinstance(value, jax.core.Tracer):
        return InputFirst(jnp.moveaxis(value, -1, 0))
    # By NumPy: JAX would compile a program for every shape.
    return InputFirst(jnp.asarray(np.ascontiguousarray(np.moveaxis(np.asarray(value), -1, 0))))


def input_size(weight: nnx.Param) -> int:
    """D of a weight [..., D], however it is stored."""
    return weight.shape[0 if isinstance(weight, InputFirst) else -1]


def linear(x: jax.Array, weight: jax.Array | nnx.Param, out_dtype: Any = None) -> jax.Array:
    """x [..., D] times a weight [..., D]: [..., the weight's other dimensions].

    As a product of two matrices, whatever the dimensions: a CPU copies a weight that has more of them, at every
    product, and takes twice as long over the gradient of an x that has more. A few rows a CPU multiplies one by one,
    as in plain decoding, which takes less time: it would rearrange the weight for them, unless `input_first` did.
    """
    rows, stored = x.reshape(-1, x.shape[-1]), weight[...]
    if isinstance(weight, InputFirst):
        matrix = stored.reshape(len(stored), -1)
        if 1 < len(rows) <= CPU_EIGEN_ROWS and rows.dtype == jnp.float32:
            # XLA:CPU gives this transposed form to Eigen, and a product rows @ weight to YNNPACK.
            out = dot("dr,df->rf", jax.lax.optimization_barrier(rows.T), matrix, out_dtype)
        else:
            out = dot("rd,df->rf", rows, matrix, out_dtype)
        return out.reshape(*x.shape[:-1], *stored.shape[1:])
    matrix = stored.reshape(-1, stored.shape[-1])
    together = functools.partial(dot, "rd,fd->rf", out_dtype=out_dtype)

    def one_by_one(rows, matrix):
        return jax.lax.map(lambda row: together(row[None], matrix)[0], rows)

    if 1 < len(rows) <= CPU_FEW_ROWS:
        out = jax.lax.platform_dependent(rows, matrix, cpu=one_by_one, default=together)
    else:
        out = together(rows, matrix)
    return out.reshape(*x.shape[:-1], *stored.shape[:-1])


@jax.named_scope("norm")
def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, computed in float32, scaled in x's dtype (as the reference does)."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale).astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Inverse frequencies [H / 2] in float32, with linear or llama3 scaling applied.

    Dynamic scaling depends on the length of the text and is applied in `rope_angles`.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1.0) / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind != "llama3":
        return frequencies
    # Long wavelengths are divided by `factor`, short ones kept, those between interpolated.
    wavelength = 2 * np.pi / frequencies
    blend = (rope.original_length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * frequencies / rope.factor + blend * frequencies).astype(np.float32)


@jax.named_scope("rope")
def rope_angles(
    rope: RopeConfig, head_dim: int, positions: jax.Array, prompt_lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, H / 2], float32, of the rotation at each position.

    Args:
      positions: [B, T].
      prompt_lengths: [B], or [B, T] in rows of several documents; read by dynamic scaling only. A prompt is rotated
        as one text of its own length, and every later token as the text that ends with it: what step-by-step
        decoding computes, so that a pass over a tree and single steps agree.
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
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding of x [B, T, heads, H]: the first half of H pairs with the second. In float32.

    [a, b] -> [a cos - b sin, b cos + a sin]. The halves change places by a reversal, which fuses into the products;
    a concatenation does not on a CPU.
    """
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    signed_sin = jnp.stack([-sin, sin], axis=-2)
    rotated = halves * cos[..., None, :] + jnp.flip(halves, axis=-2) * signed_sin
    return rotated.reshape(x.shape).astype(x.dtype)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    cache: CacheLayer | None = None,
    *,
    window: Window | None = None,
    in_blocks: bool = False,
) -> jax.Array:
    """Softmax attention over the rows of a cache and over new rows: one softmax, computed in parts and merged.

    Args:
      q: [B, T, N, H].
      k, v: [B, K, M, H] new rows.
      mask: [B, T, M], True where a query sees a new row. Every query must see at least one.
      cache: every query sees its rows below `length`; row i is position i.
      window: limits what a query sees of the cache.
      in_blocks: go through the cache in blocks, and only as far as it is filled. For many queries (a chunk of a
        prompt), whose scores over the whole cache would be large beside it.
    Returns:
      [B, T, N, H].
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    # Query heads that share a key-value head become more queries of it, [B, K, G * T, H]: a plain batched product.
    grouped = jnp.moveaxis(q.reshape(batch, tokens, kv_heads, -1, head_dim), 1, 3)
    grouped = grouped.reshape(batch, kv_heads, -1, head_dim)

    def part(keys, values, seen):  # seen [B, T or 1, rows]
        return softmax_part(grouped, keys, values, seen, tokens)

    with jax.named_scope("new_kv"):
        result = part(k, v, mask)
    # XLA would merge the two products of the queries into one, with a copy of the cache behind the new rows.
    grouped = jax.lax.optimization_barrier(grouped)

    def visible(rows, seen):  # positions [1, M], and which of them are to be seen at all [B, M] -> [B, T or 1, M]
        return seen[:, None] if window is None else seen[:, None] & window.sees(rows)

    def add_whole(result, cache):
        rows = jnp.arange(cache.k.shape[2], dtype=jnp.int32)[None]
        return merge_parts(result, part(cache.k, cache.v, visible(rows, rows < cache.length[:, None])))

    def add_blocks(result, cache, rows):
        rows = min(rows, cache.k.shape[2])

        def add_block(index, result):
            start = jnp.minimum(index * rows, cache.k.shape[2] - rows)  # the last block may overlap the one before
            block_k = jax.lax.dynamic_slice_in_dim(cache.k, start, rows, axis=2)
            block_v = jax.lax.dynamic_slice_in_dim(cache.v, start, rows, axis=2)
            row = start + jnp.arange(rows, dtype=jnp.int32)[None]
            seen = (row >= index * rows) & (row < cache.length[:, None])
            return merge_parts(result, part(block_k, block_v, visible(row, seen)))

        return jax.lax.fori_loop(0, -(-jnp.max(cache.length) // rows), add_block, result)

    with jax.named_scope("cache"):
        if cache is not None and in_blocks:
            result = add_blocks(result, cache, CACHE_BLOCK)
        elif cache is not None:
            # A CPU saves the arithmetic on unused rows; accelerators, bound by bytes and launches, want one product.
            in_cpu_blocks = functools.partial(add_blocks, rows=CPU_CACHE_BLOCK)
            result = jax.lax.platform_dependent(result, cache, cpu=in_cpu_blocks, default=add_whole)
    total, out = result[1:]
    out = (out / total).reshape(batch, kv_heads, -1, tokens, head_dim)
    return jnp.moveaxis(out, 3, 1).reshape(batch, tokens, heads, head_dim).astype(q.dtype)


def softmax_part(q, keys, values, seen, tokens):
    """Attention of q [B, K, G * T, H] over some of the rows, before normalisation.

    Returns:
      The largest score and the sum of exponentials [B, K, G * T, 1], and the weighted values [B, K, G * T, H]; float32.
    """
    batch, kv_heads, queries, head_dim = q.shape
    scores = dot("bkqh,bksh->bkqs", q, keys, jnp.float32) * head_dim**-0.5
    scores = scores.reshape(batch, kv_heads, -1, tokens, keys.shape[2])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf).reshape(batch, kv_heads, queries, keys.shape[2])
    # A part of which a query sees nothing has no largest score; any finite number serves.
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - top)
    out = dot("bkqs,bksh->bkqh", weights.astype(values.dtype), values, jnp.float32)
    return top, weights.sum(axis=-1, keepdims=True), out


def merge_parts(a, b):
    """Two parts of one softmax as one."""
    top = jnp.maximum(a[0], b[0])
    scale_a, scale_b = jnp.exp(a[0] - top), jnp.exp(b[0] - top)
    return top, a[1] * scale_a + b[1] * scale_b, a[2] * scale_a + b[2] * scale_b


class Attention(nnx.Module):
    """Projections of grouped-query attention; `input_size` is 2 D in an EAGLE-3 head."""

    def __init__(
        self, config: LlamaConfig, input_size: int, key: jax.Array, dtype: Any, *, qkv_bias: bool, o_bias: bool
    ):
        n, k, h, d = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
        keys = jax.random.split(key, 4)
        self.config = config
        self.q = normal(keys[0], (n, h, input_size), dtype)
        self.k = normal(keys[1], (k, h, input_size), dtype)
        self.v = normal(keys[2], (k, h, input_size), dtype)
        self.o = normal(keys[3], (d, n * h), dtype)
        self.q_bias = zeros((n, h), dtype) if qkv_bias else None
        self.k_bias = zeros((k, h), dtype) if qkv_bias else None
        self.v_bias = zeros((k, h), dtype) if qkv_bias else None
        self.o_bias = zeros((d,), dtype) if o_bias else None

    @jax.named_scope("attention")
    def __call__(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[jax.Array, Any]:
        """x [B, T, input_size] -> ([B, T, D], what `attend` keeps). Keys are rotated before `attend` sees them."""
        q = _project("q", x, self.q, self.q_bias)
        k = _project("k", x, self.k, self.k_bias)
        v = _project("v", x, self.v, self.v_bias)
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        # What is kept until the commit is k and v themselves, not the larger partial sums they are made of.
        k, v = jax.lax.optimization_barrier((jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)))
        mixed, kept = attend(q, k, v)
        return _project("o", mixed.reshape(*mixed.shape[:2], -1), self.o, self.o_bias), kept


def _project(name: str, x: jax.Array, weight: nnx.Param, bias: nnx.Param | None) -> jax.Array:
    with jax.named_scope(name):
        return add_bias(linear(x, weight), bias)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, key: jax.Array, dtype: Any):
        d, f = config.hidden_size, config.intermediate_size
        keys = jax.random.split(key, 3)
        self.gate = normal(keys[0], (f, d), dtype)
        self.up = normal(keys[1], (f, d), dtype)
        self.down = normal(keys[2], (d, f), dtype)
        self.gate_bias = zeros((f,), dtype) if config.mlp_bias else None
        self.up_bias = zeros((f,), dtype) if config.mlp_bias else None
        self.down_bias = zeros((d,), dtype) if config.mlp_bias else None

    @jax.named_scope("mlp")
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = _project("gate", x, self.gate, self.gate_bias)
        up = _project("up", x, self.up, self.up_bias)
        return _project("down", jax.nn.silu(gate) * up, self.down, self.down_bias)


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """x [B, T, ...] plus a bias [...], if there is one."""
    return x if bias is None else x + bias[None, None]


def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    """A weight drawn from N(0, 0.02^2), Llama's initialisation."""
    return nnx.Param(0.02 * jax.random.normal(key, shape, dtype))


def zeros(shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, dtype))


def ones(shape: tuple[int, ...], dtype: Any) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, dtype))
