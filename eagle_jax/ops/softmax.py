"""Online softmax in parts: attention to some of the keys, unnormalised, and how two parts are merged.

Letters: B batch, T new tokens, S keys, N query heads, K key-value heads, G = N / K, H head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from eagle_jax.ops.linear import dot
from eagle_jax.ops.spec import PLAIN, Spec

# (largest score [..., 1], sum of exponentials [..., 1], weighted sum of values [..., H]), unnormalised.
Part = tuple[jax.Array, ...]


def softmax_part(
    q: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array, tokens: int, spec: Spec = PLAIN
) -> Part:
    """Computes attention of q [B, K, G * T, H] to keys and values [B, K, S, H], before normalisation.

    Args:
      seen: [B, T, S], True where a query sees a key; a window must be in it.
      spec: its softcap and scale are applied here; its sinks by `add_sinks`, once for all parts.
    Returns:
      The largest score and the sum of exponentials [B, K, G * T, 1], and the weighted values [B, K, G * T, H]; float32.
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
    """Merges a part [B, K, G * T, ...] or [B, K, G, T, ...] with the sinks, if the spec has any."""
    if spec.sinks is None:
        return part
    batch, kv_heads = part[0].shape[:2]
    logits = spec.sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
    by_head = tuple(x.reshape(batch, kv_heads, logits.shape[2], -1, x.shape[-1]) for x in part)
    merged = merge_parts(by_head, (logits, jnp.ones_like(logits), jnp.zeros_like(logits)))
    return tuple(new.reshape(old.shape) for new, old in zip(merged, part, strict=True))
