"""Noise on draft logits: for drafting by the target's own noise, and for drawing tokens at random.

Letters: B batch, T nodes, D tree depth, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from eagle_jax.sampling import SamplingConfig, warp


def perturbed(
    logits: jax.Array,
    sampling: SamplingConfig | None,
    noise: jax.Array | None,
    depth: int | jax.Array,
    target_ids: jax.Array | None = None,
) -> jax.Array:
    """Draft logits [B, T, Vd] processed as the target's will be, plus noise; greedy rows as they are.

    The target's penalties and bias are left out: the draft's guess need not be exact.

    Args:
      noise: [B, D + 1, V] of the tokens after nodes of each depth; None leaves the logits as they are.
      depth: of the nodes.
      target_ids: [Vd] target id of every draft id; None where they are the same.
    """
    if noise is None or sampling is None:
        return logits
    now = jax.lax.dynamic_index_in_dim(noise, depth, axis=1)  # [B, 1, V]
    now = now if target_ids is None else now[:, :, target_ids]
    sampled = (sampling.temperature > 0).reshape(-1, 1, 1)
    return jnp.where(sampled, warp(logits, sampling) + now, logits)
