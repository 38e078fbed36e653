"""The steps of the training-time test after the first, one after the other, with a reverse pass of their own.

Letters: B batch, S positions, D width of the head, K key-value heads, H head dim, M later steps.

A step reads the hidden states that the one before made, the first step's keys and values, and every row's own keys and
values of the steps before. Autodiff of a scan would keep the own keys and values of all steps once for every step;
kept here are each step's input [B, S, D] and one array of keys and of values [B, K, M, S, H]: a step is computed again
when its gradient is due.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Rows = tuple[jax.Array, jax.Array]  # keys and values


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def later_steps(
    one: Callable[..., tuple[jax.Array, Rows, Any]],
    steps: int,
    floats: Any,
    constants: Any,
    hidden: jax.Array,
    first: Rows,
) -> Any:
    """The sums of steps 1 to steps - 1, [steps - 1] each. Differentiable in floats, hidden and first.

    Args:
      one: (floats, constants, hidden [B, S, D], first, own, step) -> (hidden, the step's keys and values, its sums). It
        reads of `own`, [B, K, M, S, H] each, the places below step - 1 only.
      floats: what is trained. constants: what is not.
      hidden: [B, S, D], that step 0 made. first: its keys and values, [B, K, S, H] each.
    """
    return _forward(one, steps, floats, constants, hidden, first)[0]


def _forward(one, steps, floats, constants, hidden, first):
    own = tuple(jnp.zeros((*rows.shape[:2], steps - 1, *rows.shape[2:]), rows.dtype) for rows in first)

    def advance(carry, step):
        hidden, own = carry
        following, new, sums = one(floats, constants, hidden, first, own, step)
        return (following, jax.tree.map(lambda o, n: with_step(o, n, step), own, new)), (hidden, sums)

    (_, own), (inputs, sums) = jax.lax.scan(advance, (hidden, own), jnp.arange(1, steps))
    return sums, (floats, constants, inputs, first, own)


def _backward(one, steps, kept, gradient):
    floats, constants, inputs, first, own = kept

    def back(carry, step_input_and_gradient):
        of_floats, of_hidden, of_first, of_own = carry
        step, hidden, of_sums = step_input_and_gradient

        def again(floats, hidden, first, own):
            return one(floats, constants, hidden, first, own, step)

        _, pull = jax.vjp(again, floats, hidden, first, own)
        of_new = jax.tree.map(lambda o: jax.lax.dynamic_index_in_dim(o, step - 1, axis=2, keepdims=False), of_own)
        more_floats, of_hidden, more_first, more_own = pull((of_hidden, of_new, of_sums))
        add = functools.partial(jax.tree.map, jnp.add)
        return (add(of_floats, more_floats), of_hidden, add(of_first, more_first), add(of_own, more_own)), None

    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    start = (zeros(floats), jnp.zeros_like(inputs[0]), zeros(first), zeros(own))
    carry, _ = jax.lax.scan(back, start, (jnp.arange(1, steps), inputs, gradient), reverse=True)
    of_floats, of_hidden, of_first, _ = carry
    return of_floats, None, of_hidden, of_first


later_steps.defvjp(_forward, _backward)


def with_step(own: jax.Array, new: jax.Array, step: jax.Array) -> jax.Array:
    """own [B, K, M, S, H] with a step's [B, K, S, H] in its place."""
    return jax.lax.dynamic_update_slice(own, new[:, :, None], (0, 0, step - 1, 0, 0))
