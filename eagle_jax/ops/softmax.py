"""Online softmax in parts: attention to some of the keys, unnormalised, and how two parts are merged.

Query heads that share a key-value head are more queries of it. The axis `queries` holds the query heads of a key-value
head, and for each of them the new tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from eagle_jax.ops.linear import dot
from eagle_jax.ops.spec import PLAIN, Spec

# (largest score [..., 1], sum of exponentials [..., 1], weighted sum of values [..., head_dim]).
Part = tuple[jax.Array, ...]

# Queries by key-value head, and the keys or values that they attend to.
GroupedQueries = Float[Array, "batch kv_heads groups positions head_dim"]
Keys = Float[Array, "batch kv_heads positions head_dim"]


def softmax_part(
    q: Float[Array, "batch kv_heads queries head_dim"],
    keys: Float[Array, "batch kv_heads kv head_dim"],
    values: Float[Array, "batch kv_heads kv head_dim"],
    seen: Bool[Array, "batch new kv"] | Bool[Array, "batch 1 kv"],
    tokens: int,
    spec: Spec = PLAIN,
) -> Part:
    """Computes attention to some of the keys, before normalisation.

    Args:
      seen: True where a query sees a key; a window must be in it.
      spec: its softcap and scale are applied here; its sinks by `add_sinks`, once for all parts.
    Returns:
      [batch, kv_heads, queries, ...], float32.
    """
    batch, kv_heads, queries, head_dim = q.shape
    scores = spec.scores(dot("bkqh,bksh->bkqs", q, keys, jnp.float32), head_dim)
    scores = scores.reshape(batch, kv_heads, -1, tokens, keys.shape[2])
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf).reshape(batch, kv_heads, queries, keys.shape[2])
    # If all keys are masked the maximum is -inf; clamp it so that exp gives 0, not NaN.
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - top)
    out = dot("bkqs,bksh->bkqh", weights.astype(values.dtype), values, jnp.float32)
    return top, weights.sum(axis=-1, keepdims=True), out


def merge_parts(a: Part, b: Part) -> Part:
    """Merges two parts of one softmax."""
    top = jnp.maximum(a[0], b[0])
    scale_a, scale_b = jnp.exp(a[0] - top), jnp.exp(b[0] - top)
    return top, a[1] * scale_a + b[1] * scale_b, a[2] * scale_a + b[2] * scale_b


def add_sinks(part: Part, spec: Spec) -> Part:
    """Merges a part [batch, kv_heads, queries, ...] with the sinks, if the spec has any.

    The queries of a part may also be two axes, query heads and positions.
    """
    if spec.sinks is None:
        return part
    batch, kv_heads = part[0].shape[:2]
    logits = spec.sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
    by_head = tuple(x.reshape(batch, kv_heads, logits.shape[2], -1, x.shape[-1]) for x in part)
    merged = merge_parts(by_head, (logits, jnp.ones_like(logits), jnp.zeros_like(logits)))
    return tuple(new.reshape(old.shape) for new, old in zip(merged, part, strict=True))
