"""A training step of an EAGLE-3 head by this package and by plain eager PyTorch: CPU and wall seconds, and the losses.

    python -m bench.train.against_torch                       the embedded pair, 7 steps, 4 sequences of 256 tokens
    python -m bench.train.against_torch --steps 3 --repeats 9

Both make the same step in float32: the target's pass, the training-time test with the official loss, its gradient,
clipping, AdamW. They run in turn in one process that is pinned to one core, so each has one thread. Medians of the
repeats. The losses of both are compared: they must be equal up to rounding, or the times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import eagle_jax
from bench.options import positive
from bench.train.eager_torch import BETAS, CLIP, DECAY, EPSILON, RATE, Eager
from eagle_jax.measure.samples import embedded_pair
from eagle_jax.train.loss.objective import Eagle3Objective
from eagle_jax.train.run import step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=positive, default=7, help="of the training-time test")
    parser.add_argument("--rows", type=positive, default=4)
    parser.add_argument("--width", type=positive, default=256)
    parser.add_argument("--repeats", type=positive, default=15)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX counts the cores
    pair = embedded_pair()
    target, draft = eagle_jax.from_pretrained(pair / "target", pair / "head", dtype=jnp.float32)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, target.config.vocab_size, (args.rows, args.width)).astype(np.int32)
    runs: dict[str, Callable[[], float]] = {
        "eagle_jax": ours(target, draft, tokens, args.steps),
        "PyTorch": Eager(target, draft, tokens, args.steps),
    }
    losses = {name: [run() for _ in range(2)] for name, run in runs.items()}  # the first call compiles or warms up
    np.testing.assert_allclose(losses["eagle_jax"], losses["PyTorch"], rtol=1e-4)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            began = time.process_time(), time.perf_counter()
            run()
            seconds[name].append((time.process_time() - began[0], time.perf_counter() - began[1]))
    medians = {name: np.median(times, axis=0) for name, times in seconds.items()}
    print(f"{args.steps} steps, {args.rows} x {args.width} tokens, losses {losses['eagle_jax'][0]:.5f}, equal")
    for name, (cpu, wall) in medians.items():
        print(f"{name:10} {cpu * 1e3:8.1f} ms CPU  {wall * 1e3:8.1f} ms wall")
    cpu, wall = medians["PyTorch"] / medians["eagle_jax"]
    print(f"eagle_jax is {cpu:.2f} times as fast in CPU time, {wall:.2f} in wall time")


def ours(target: Any, draft: Any, tokens: np.ndarray, steps: int) -> Callable[[], float]:
    """Returns a function that takes a step of `train_step` and returns its loss."""
    masters, frozen = step.split(draft, step.FROZEN)
    update = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(RATE, *BETAS, EPSILON, weight_decay=0.0))
    objective = Eagle3Objective(tuple(DECAY**k for k in range(steps)), alignment="official")
    batch = {
        "tokens": jnp.asarray(tokens),
        "loss_mask": jnp.ones(tokens.shape, jnp.int32),
        "lengths": jnp.full(len(tokens), tokens.shape[1], jnp.int32),
    }
    states = [step.initial_state(jax.tree.map(jnp.copy, masters), update, 0)]

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state, frozen, target, batch):
        return step.train_step(state, draft, frozen, target, batch, objective=objective, update=update)

    def run() -> float:
        state, metrics = advance(states.pop(), frozen, target, batch)
        states.append(jax.block_until_ready(state))
        return float(metrics["loss"])

    return run


if __name__ == "__main__":
    main()
