"""The steps of the training-time test after the first, in a loop with a custom gradient (rematerialisation).

Letters: B batch, S positions, D width of the head, K key-value heads, H head dim, N steps, M = N - 1 later steps.

A step reads the previous step's hidden states, the first step's keys and values, and its position's own keys and values
of earlier steps. Autodiff of a scan would save the array of own keys and values once per step. The residuals here are
the hidden states of all steps [N, B, S, D] and, for each layer, one array each of keys and values [B, S, K, M, H]. The
backward pass recomputes one step at a time from these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from eagle_jax.models.cache import put

StepKV = list[tuple[jax.Array, jax.Array]]  # the keys and values of one step in each layer, [B, K, S, H] each
OwnKV = list[tuple[jax.Array, jax.Array]]  # those of all later steps, [B, S, K, M, H] each


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def later_steps(
    one: Callable[..., tuple[jax.Array, OwnKV]],
    steps: int,
    floats: Any,
    constants: Any,
    hidden: jax.Array,
    first: StepKV,
) -> jax.Array:
    """Returns the hidden states of all steps, [N, B, S, D]. Differentiable in floats, hidden and first.

    Args:
      one: (floats, constants, hidden [B, S, D], first, own, step) -> (hidden, own with this step's). It reads `own`,
        [B, S, K, M, H] each, below index step - 1 only, and writes there.
      floats: the trained arrays. constants: the others.
      hidden: [B, S, D], the output of step 0. first: its keys and values, [B, K, S, H] each.
    """
    return _forward(one, steps, floats, constants, hidden, first)[0]


def _forward(one, steps, floats, constants, hidden, first):

    def room(values):
        batch, heads, width, head_dim = values.shape
        return jnp.zeros((batch, width, heads, steps - 1, head_dim), values.dtype)

    own = jax.tree.map(room, first)
    outputs = jnp.zeros((steps, *hidden.shape), hidden.dtype).at[0].set(hidden)

    def advance(step, carry):
        outputs, own = carry
        following, own = one(floats, constants, outputs[step - 1], first, own, step)
        return outputs.at[step].set(following), own

    outputs, own = jax.lax.fori_loop(1, steps, advance, (outputs, own))
    return outputs, (floats, constants, outputs, first, own)


def _backward(one, steps, kept, of_outputs):
    floats, constants, outputs, first, own = kept

    def back(carry, step):
        own, of_floats, of_hidden, of_first, of_own = carry

        def again(floats, hidden, first, own):
            return one(floats, constants, hidden, first, own, step)

        # `own` is a carry, although recomputing a step changes none of it, so that XLA writes into it without a copy.
        (_, own), pull = jax.vjp(again, floats, outputs[step - 1], first, own)
        more_floats, of_hidden, more_first, of_own = pull((of_hidden, of_own))
        of_floats, of_first = jax.tree.map(jnp.add, (of_floats, of_first), (more_floats, more_first))
        return (own, of_floats, of_hidden + of_outputs[step - 1], of_first, of_own), None

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    start = (own, zeros(floats), of_outputs[-1], zeros(first), zeros(own))
    (_, of_floats, of_hidden, of_first, _), _ = jax.lax.scan(
        back, start, jnp.arange(1, steps, dtype=jnp.int32), reverse=True
    )
    return of_floats, None, of_hidden, of_first


later_steps.defvjp(_forward, _backward)


def with_step(own: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
    """Writes a step's [B, K, S, H] into own [B, S, K, M, H] at index step - 1."""
    return put(own, jnp.moveaxis(new, 2, 1)[:, :, :, None], (0, 0, 0, step - 1, 0))
