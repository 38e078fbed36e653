"""Noise on draft logits: for drafting by the target's own noise, and for drawing tokens at random.

Letters: B batch, T nodes, D tree depth, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from eagle_jax.sampling import SamplingConfig, warp


def coupled(
    logits: jax.Array,
    sampling: SamplingConfig | None,
    noise: jax.Array | None,
    depth: int | jax.Array,
    target_ids: jax.Array | None = None,
) -> jax.Array:
    """Draft logits [B, T, Vd] by the target's noise, if it is shared: `perturbed`; else as they are.

    The target's penalties and bias are left out: the draft's guess need not be exact.
    """
    if noise is None or sampling is None:
        return logits
    return perturbed(logits, warp(logits, sampling), sampling, noise, depth, target_ids)


def perturbed(
    logits: jax.Array,
    warped: jax.Array,
    sampling: SamplingConfig,
    noise: jax.Array,
    depth: int | jax.Array,
    target_ids: jax.Array | None = None,
) -> jax.Array:
    """Processed draft logits plus noise; greedy rows' logits as they are.

    Args:
      logits, warped: [B, T, Vd], before and after `warp`.
      noise: [B, D + 1, V] of the tokens after nodes of each depth.
      depth: of the nodes.
      target_ids: [Vd] target id of every draft id; None where they are the same.
    """
    now = jax.lax.dynamic_index_in_dim(noise, depth, axis=1)  # [B, 1, V]
    now = now if target_ids is None else now[:, :, target_ids]
    sampled = (sampling.temperature > 0).reshape(-1, 1, 1)
    return jnp.where(sampled, warped + now, logits)
