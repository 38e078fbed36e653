"""Times an exact top-k and top-p threshold, by bisection (as eagle_jax does it) and by a sort.

    python -m bench.decode.threshold_cost [--nodes 60] [--repeats 20]

A row is one distribution: a cycle needs one for every node of its tree. Prints medians, and the ratio.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp

from eagle_jax import SamplingConfig
from eagle_jax.measure.timing import median_seconds
from eagle_jax.sampling import process


def by_sorting(logits: jax.Array, sampling: SamplingConfig) -> jax.Array:
    """Computes the same distribution with thresholds from a sorted vocabulary."""
    x = logits / sampling.temperature
    ordered = -jnp.sort(-x, axis=-1)
    rank = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    ordered = jnp.where(rank < sampling.top_k, ordered, -jnp.inf)
    p = jax.nn.softmax(ordered, axis=-1)
    kept = jnp.cumsum(p, axis=-1) - p < sampling.top_p
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(x >= least, x, -jnp.inf)


def median_ms(function, *arguments, repeats: int) -> float:
    jax.block_until_ready(function(*arguments))  # compiles
    return 1000 * median_seconds(lambda: function(*arguments), repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nodes", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    sampling = SamplingConfig(temperature=0.7, top_k=50, top_p=0.9)
    plain = SamplingConfig(temperature=0.7)
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {args.nodes} rows, medians of {args.repeats}, ms")
    print(f"{'vocabulary':>10} {'temperature':>12} {'bisection':>10} {'sort':>10} {'sort / bisection':>17}")
    for vocab in (256, 4096, 32000, 128256):
        logits = 3 * jax.random.normal(jax.random.key(0), (args.nodes, vocab))
        bisected, sorted_ = jax.jit(process)(logits, sampling), jax.jit(by_sorting)(logits, sampling)
        assert jnp.allclose(jax.nn.softmax(bisected), jax.nn.softmax(sorted_), atol=1e-6)
        none, ours, theirs = (
            median_ms(jax.jit(function), logits, config, repeats=args.repeats)
            for function, config in ((process, plain), (process, sampling), (by_sorting, sampling))
        )
        print(f"{vocab:>10} {none:>12.2f} {ours:>10.2f} {theirs:>10.2f} {theirs / ours:>17.1f}")


if __name__ == "__main__":
    main()
