"""Measures wall-clock times: of calls, and of a part of decoding that runs many times in one program.

A part's time is the device's work alone: the host dispatches one program for many runs. The device still runs a loop,
as in `generate`; an iteration of it costs a GPU a few microseconds.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

MIN_SECONDS = 0.1  # of a program in `seconds_of`: amortises the dispatch
MAX_RUNS = 2000

Result = TypeVar("Result")

# part(fixed, small, kept) -> (result, kept). fixed: only read. small: only read, with a false dependency on the result
# of the previous run, so every product should depend on it. kept: updated in place.
Part = Callable[[Any, Any, Any], tuple[Any, Any]]


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Returns the seconds that a call and its arrays took, and its result."""
    began = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - began, result


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Returns the median seconds of `repeats` calls. Call it once before, so that it is compiled."""
    return statistics.median(timed(call)[0] for _ in range(repeats))


def seconds_of(part: Part, fixed: Any, small: Any, kept: Any, repeats: int) -> tuple[float, Any, Any]:
    """Times one run of a part: the median of `repeats` programs, without compilation.

    Args:
      kept: donated; continue with the returned one.
    Returns:
      Seconds, the last run's result, and `kept` after all runs.
    """
    program = jax.jit(functools.partial(repeat, part), donate_argnums=3)

    def run(runs: int, kept: Any) -> tuple[float, Any, Any]:
        seconds, (result, kept) = timed(lambda: program(runs, fixed, small, kept))
        return seconds, result, kept

    _, _, kept = run(1, kept)  # compiles
    one, result, kept = run(1, kept)
    runs = max(1, min(MAX_RUNS, round(MIN_SECONDS / one)))
    found = []
    for _ in range(repeats):
        seconds, result, kept = run(runs, kept)
        found.append(seconds / runs)
    return statistics.median(found), result, kept


def repeat(part: Part, runs: Any, fixed: Any, small: Any, kept: Any) -> tuple[Any, Any]:
    """Runs a part many times, one after the other, under the caller's jit.

    Returns:
      The result of the last run, and `kept` after all of them.
    """

    def body(_, carry):
        small, result, kept = carry
        # A false dependency of `small` on the previous result. Without it XLA hoists products of weights and unchanged
        # inputs out of the loop, and the part seems faster than it is. The loop carries `small`: on a CPU XLA hoists
        # after it has removed the barrier, too.
        small, _ = jax.lax.optimization_barrier((small, result))
        return small, *part(fixed, small, kept)

    shapes, _ = jax.eval_shape(part, fixed, small, kept)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    _, result, kept = jax.lax.fori_loop(0, runs, body, (small, nothing, kept))
    return result, kept
