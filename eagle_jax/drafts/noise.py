"""Gumbel noise on draft logits: the target's, for coupled sampling, or the draft's, to sample without replacement."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eagle_jax.sampling import SamplingConfig, warp


def coupled(
    logits: Float[Array, "batch width draft_vocab"],
    sampling: SamplingConfig | None,
    noise: Float[Array, "batch path vocab"] | None,
    depth: int | Int[Array, ""],
    target_ids: Int[Array, " draft_vocab"] | None = None,
) -> Float[Array, "batch width draft_vocab"]:
    """Adds the target's noise to draft logits if sampling is coupled (see `perturbed`).

    The target's penalties and bias are left out, as the draft need not match exactly.
    """
    if noise is None or sampling is None:
        return logits
    return perturbed(logits, warp(logits, sampling), sampling, noise, depth, target_ids)


def perturbed(
    logits: Float[Array, "batch width draft_vocab"],
    warped: Float[Array, "batch width draft_vocab"],
    sampling: SamplingConfig,
    noise: Float[Array, "batch path vocab"],
    depth: int | Int[Array, ""],
    target_ids: Int[Array, " draft_vocab"] | None = None,
) -> Float[Array, "batch width draft_vocab"]:
    """Returns `warped` plus the noise of this depth; `logits` in greedy sequences.

    Args:
      logits, warped: before and after `warp`.
      noise: for the token after each depth.
      depth: of the nodes.
      target_ids: target id of every draft id; None if they are the same.
    """
    now = jax.lax.dynamic_index_in_dim(noise, depth, axis=1)  # [batch, 1, vocab]
    now = now if target_ids is None else now[:, :, target_ids]
    sampled = (sampling.temperature > 0).reshape(-1, 1, 1)
    return jnp.where(sampled, warped + now, logits)
