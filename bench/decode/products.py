"""Times products of few rows with a weight, in several forms: the evidence for `ops.linear` on a CPU.

    python -m bench.decode.products                          # a weight of 512 x 192, 1 to 16 rows
    python -m bench.decode.products --weight 4096x4096 --rows 1 8 60 --dtype bfloat16

Each time is that of one product in a chain with 24 weights, so that weights are read from where a model reads them:
microseconds, the median of 9 calls. Forms, for rows [R, D] and a weight [F, D]:

    together      rows @ weight.T, one product
    one by one    a product a row (a loop)
    turned        (weight @ rows.T).T
    [in, out]     rows @ weight, from a weight that is stored as [D, F]
"""

from __future__ import annotations

import argparse
import datetime
import functools

import jax
import jax.numpy as jnp

from eagle_jax.measure.machine import device_name
from eagle_jax.measure.timing import median_seconds

WEIGHTS, TURNS = 12, 20


def together(rows: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("rd,fd->rf", rows, weight)


def one_by_one(rows: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.map(lambda row: jnp.einsum("d,fd->f", row, weight), rows)


def turned(rows: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(jnp.einsum("fd,rd->fr", weight, rows)).T  # else XLA folds the transpose back


def in_out(rows: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("rd,df->rf", rows, weight)


FORMS = {"together": together, "one by one": one_by_one, "turned": turned, "[in, out]": in_out}


def microseconds(form: str, rows: int, outputs: int, inputs: int, dtype: str) -> float:
    """Times one product: the mean over a pair of weights, [F, D] and [D, F]."""
    keys = jax.random.split(jax.random.key(0), WEIGHTS)
    weights = [
        (jax.random.normal(key, (outputs, inputs), dtype), jax.random.normal(key, (inputs, outputs), dtype))
        for key in keys
    ]
    if form == "[in, out]":
        weights = [(up.T, down.T) for up, down in weights]
    product = FORMS[form]

    @jax.jit
    def chain(x, weights):
        def turn(_, x):
            for up, down in weights:
                x = x + 1e-3 * jnp.tanh(product(product(x, up), down))
            return x

        return jax.lax.fori_loop(0, TURNS, turn, x)

    x = jnp.ones((rows, inputs), dtype)
    call = functools.partial(chain, x, weights)
    jax.block_until_ready(call())  # compiles
    return 1e6 * median_seconds(call, 9) / (TURNS * 2 * WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", default="512x192", help="outputs x inputs (default: %(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 10, 16])
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    outputs, inputs = map(int, args.weight.split("x"))
    print(
        f"{datetime.date.today()}, jax {jax.__version__}, {device_name()}, {args.dtype}, a weight of {args.weight}",
        "\n",
    )
    print("| rows |", " | ".join(FORMS), "|\n|---|" + "---|" * len(FORMS))
    for rows in args.rows:
        figures = (f"{microseconds(form, rows, outputs, inputs, args.dtype):.0f}" for form in FORMS)
        print(f"| {rows} |", " | ".join(figures), "|", flush=True)


if __name__ == "__main__":
    main()
