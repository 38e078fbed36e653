"""Attention of few queries over a block of keys on a CPU, in both orders of the product (`layers.scores_of`).

    python -m bench.scores                        # 128 keys of 64 numbers, as a CPU goes through a cache
    python -m bench.scores --keys 2048 --queries 3 180

Each time is of the scores and the sum of values by them, in a chain over 12 blocks of keys in turn: microseconds, the
median of 9 calls. The sum costs the same in both.

    queries first    queries @ keys.T
    keys first       (keys @ queries.T).T
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from eagle_jax.cli.machine import device_name
from eagle_jax.models import layers

BLOCKS, TURNS = 12, 20
FORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "queries first": layers.queries_first,
    "keys first": layers.keys_first,
}


def microseconds(form: str, queries: int, keys: int, head_dim: int) -> float:
    """Of one block."""
    blocks = [jax.random.normal(key, (1, 1, keys, head_dim)) for key in jax.random.split(jax.random.key(0), BLOCKS)]
    scores_of = FORMS[form]

    @jax.jit
    def chain(q, blocks):
        def turn(_, q):
            for block in blocks:
                q = q + 1e-3 * jnp.einsum("bkqs,bksh->bkqh", jnp.tanh(scores_of(q, block)), block)
            return q

        return jax.lax.fori_loop(0, TURNS, turn, q)

    q = jnp.ones((1, 1, queries, head_dim))
    jax.block_until_ready(chain(q, blocks))
    seconds = []
    for _ in range(9):
        began = time.perf_counter()
        jax.block_until_ready(chain(q, blocks))
        seconds.append(time.perf_counter() - began)
    return 1e6 * statistics.median(seconds) / (TURNS * BLOCKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, nargs="+", default=[3, 12, 24, 48, 96, 192])
    parser.add_argument("--keys", type=int, default=128)
    parser.add_argument("--head-dim", type=int, default=64)
    args = parser.parse_args()
    print(f"{datetime.date.today()}, jax {jax.__version__}, {device_name()}, float32, {args.keys} keys\n")
    print("| queries |", " | ".join(FORMS), "|\n|---|" + "---|" * len(FORMS))
    for queries in args.queries:
        figures = (f"{microseconds(form, queries, args.keys, args.head_dim):.0f}" for form in FORMS)
        print(f"| {queries} |", " | ".join(figures), "|", flush=True)


if __name__ == "__main__":
    main()
