"""How a part of decoding is timed: many times in one program, each run waiting for the one before.

What is measured is the device's work. The host starts a program once for many runs; a loop on the device remains, as in
`generate`, whose turn costs a GPU a few microseconds.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MIN_SECONDS = 0.1  # that a program of many runs takes: then starting it counts little
MAX_RUNS = 2000

# part(fixed, small, kept) -> (result, kept). fixed: only read. small: read, too, and made to wait for the result of the
# run before, so keep it small. kept: what the part updates in place.
Part = Callable[[Any, Any, Any], tuple[Any, Any]]


def seconds_of(part: Part, fixed: Any, small: Any, kept: Any, repeats: int) -> tuple[float, Any, Any]:
    """Seconds of one run: the median of `repeats` programs, without compilation.

    Args:
      kept: donated; the caller goes on with what is returned.
    Returns:
      Seconds, the last run's result, and `kept` after all runs.
    """
    program = jax.jit(functools.partial(_run, part), donate_argnums=3)

    def timed(runs: int, kept: Any) -> tuple[float, Any, Any]:
        began = time.perf_counter()
        result, kept = jax.block_until_ready(program(runs, fixed, small, kept))
        return time.perf_counter() - began, result, kept

    _, _, kept = timed(1, kept)  # compiles
    one, result, kept = timed(1, kept)
    runs = max(1, min(MAX_RUNS, round(MIN_SECONDS / one)))
    found = []
    for _ in range(repeats):
        seconds, result, kept = timed(runs, kept)
        found.append(seconds / runs)
    return statistics.median(found), result, kept


def _run(part: Part, runs: jax.Array, fixed: Any, small: Any, kept: Any) -> tuple[Any, Any]:
    """The results of the last run, and `kept` after all of them."""

    def body(_, carry):
        result, kept = carry
        return part(fixed, _after(small, result), kept)

    shapes, _ = jax.eval_shape(part, fixed, small, kept)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, runs, body, (nothing, kept))


def _after(small: Any, result: Any) -> Any:
    """`small` unchanged, but not known before `result` is: else a compiler moves what it feeds out of the loop."""
    leaves = jax.tree.leaves(result)
    if not leaves:
        return small
    never = jnp.ravel(leaves[0])[-1].astype(jnp.float32) > 1e30  # no token id and no hidden state is
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), small)
