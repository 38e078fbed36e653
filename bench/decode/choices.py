"""Times choices for a GPU: weights joined or not, how attention reads a cache, and flags of XLA.

    python -m bench.decode.choices --json choices.json
    JAX_PLATFORMS=cpu python -m bench.decode.choices --shape tiny --dtype float32 --contexts 64 --capacities 128 \\
        --rows 1 4

Every line is a choice of a case: its time, and the ratio to the case's first line, which is what the library does.

    qkv, gate and up    products of some rows with weights that are apart, or joined into one
    attention           of a tree's nodes to a cache of more rows than are filled: all of its rows; the filled ones, in
                        blocks; and the fused kernel that `jax.nn.dot_product_attention` has for the device, without the
                        tree's own rows and the merging, so a bound on what one could win
    plain, cycle        a whole step under flags of XLA, each in a process of its own, by `bench.decode.roofline`

The weights and caches of several layers alternate, so that they are read from memory and not from an on-chip cache.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bench.options import positive
from bench.report import table
from bench.shapes import SHAPES
from eagle_jax import LlamaConfig
from eagle_jax.measure.timing import seconds_of
from eagle_jax.ops.attention import CacheLayer, attention
from eagle_jax.ops.linear import linear

CASES = ("flags", "products", "attention")
LAYERS = 8  # that alternate
FLAGS = {
    "as it is": "",
    "cuBLAS alone": "--xla_gpu_enable_triton_gemm=false",
    "Triton alone": "--xla_gpu_cublas_fallback=false",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "command buffers around loops": "--xla_gpu_enable_command_buffer="
    "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,COLLECTIVES,CONDITIONAL,WHILE,DYNAMIC_SLICE_FUSION",
}


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)

    def rows() -> Iterator[dict[str, Any]]:
        config, dtype = SHAPES[args.shape].target, jnp.dtype(args.dtype)
        if "flags" in args.cases:  # first: other processes need the device's memory, which this one takes later
            yield from flag_rows(args.shape, args.dtype, args.contexts, args.repeats)
        if "products" in args.cases:
            yield from product_rows(config, dtype, args.rows, args.repeats)
        if "attention" in args.cases:
            yield from attention_rows(config, dtype, max(args.rows), args.contexts, args.capacities, args.repeats)

    table(rows(), args.json)


def product_rows(config: LlamaConfig, dtype: Any, counts: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """Yields lines on products of `counts` rows with the weights of attention and of the MLP."""
    width, heads, kv = config.hidden_size, config.num_heads, config.num_kv_heads
    sizes = {
        "qkv": [heads * config.head_dim, kv * config.head_dim, kv * config.head_dim],
        "gate and up": [config.intermediate_size] * 2,
    }

    def apart(x: jax.Array, weights: list[jax.Array]) -> list[jax.Array]:
        return [linear(x, weight) for weight in weights]

    def joined(ends: list[int], x: jax.Array, weight: jax.Array) -> list[jax.Array]:
        return jnp.split(linear(x, weight), ends, axis=-1)

    for name, outputs in sizes.items():
        keys = jax.random.split(jax.random.key(0), LAYERS)
        layers = [jax.random.normal(key, (sum(outputs), width), dtype) for key in keys]
        ends = list(itertools.accumulate(outputs))[:-1]
        parts = [jnp.split(layer, ends) for layer in layers]
        for rows in counts:
            x = jnp.ones((rows, width), dtype)
            times = {
                "apart": _product_seconds(apart, parts, x, repeats),
                "joined": _product_seconds(functools.partial(joined, ends), layers, x, repeats),
            }
            yield from _lines(name, f"{rows} rows", times)


def _product_seconds(product: Callable[..., list[jax.Array]], layers: Any, x: jax.Array, repeats: int) -> float:
    """Times one layer's products and the sum of their values, which both choices share."""

    def part(layers, x, kept):
        for layer in layers:
            total = sum(out.astype(jnp.float32).sum(axis=-1, keepdims=True) for out in product(x, layer))
            x = x + (1e-6 * jnp.tanh(total)).astype(x.dtype)
        return x, kept

    return seconds_of(part, layers, x, (), repeats)[0] / LAYERS


def attention_rows(
    config: LlamaConfig, dtype: Any, tokens: int, contexts: Sequence[int], capacities: Sequence[int], repeats: int
) -> Iterator[dict[str, Any]]:
    """Yields lines on attention of `tokens` tokens to caches of `capacities` positions, `contexts` of them filled."""
    heads, kv, size = config.num_heads, config.num_kv_heads, config.head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    new_k, new_v = (jax.random.normal(key, (1, kv, tokens, size), dtype) for key in keys[:2])
    q = jax.random.normal(keys[2], (1, tokens, heads, size), dtype)
    mask = jnp.tril(jnp.ones((1, tokens, tokens), bool))

    def ours(blocks: bool, caches, q, kept):
        for cache in caches:
            q = attention(q, new_k, new_v, mask, CacheLayer(*cache), in_blocks=blocks)
        return q, kept

    def fused(caches, q, kept):
        for k, v, length in caches:
            q = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length, implementation=_kernel())
        return q, kept

    for capacity in capacities:
        made = [
            tuple(jax.random.normal(key, (1, kv, capacity, size), dtype) for key in jax.random.split(layer))
            for layer in jax.random.split(keys[3], LAYERS)
        ]
        turned = [tuple(jnp.swapaxes(array, 1, 2) for array in pair) for pair in made]  # as that function wants them
        for context in contexts:
            if context > capacity:
                continue
            length = jnp.full(1, context, jnp.int32)
            caches, for_fused = ([(*pair, length) for pair in pairs] for pairs in (made, turned))
            times = {
                "all rows": seconds_of(functools.partial(ours, False), caches, q, (), repeats)[0] / LAYERS,
                "filled rows, in blocks": seconds_of(functools.partial(ours, True), caches, q, (), repeats)[0] / LAYERS,
                f"fused kernel ({_kernel()})": seconds_of(fused, for_fused, q, (), repeats)[0] / LAYERS,
            }
            yield from _lines("attention", f"{tokens} nodes, {context} of {capacity} rows", times)


def flag_rows(shape: str, dtype: str, contexts: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """Yields lines on a plain step and a cycle under XLA's flags, at batch 1 and the first of `contexts`."""
    times: dict[str, dict[str, float]] = {"plain": {}, "cycle": {}}
    for choice, flags in FLAGS.items():
        found = _roofline(shape, dtype, contexts[0], repeats, flags)
        for part in times if found else ():
            times[part][choice] = found[part]["ms"] / 1000
    for part, choices in times.items():
        yield from _lines(part, f"context {contexts[0]}", choices)


def _roofline(shape: str, dtype: str, context: int, repeats: int, flags: str) -> dict[str, Any]:
    """Returns the parts that bench.decode.roofline measures under these flags; {} and a note to stderr if it fails."""
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "roofline.json"
        command = [sys.executable, "-m", "bench.decode.roofline", "--shape", shape, "--dtype", dtype, "--batches", "1"]
        command += ["--contexts", str(context), "--repeats", str(repeats), "--json", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{flags}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            return {}
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows[0]["parts"] if rows else {}


def _lines(case: str, about: str, seconds: dict[str, float]) -> Iterator[dict[str, Any]]:
    first = next(iter(seconds.values()), 0.0)
    for choice, value in seconds.items():
        yield {
            "case": case,
            "at": about,
            "choice": choice,
            "microseconds": round(1e6 * value, 2),
            "beside the first": round(value / first, 3),
        }


def _kernel() -> Literal["cudnn", "xla"]:
    """Returns the implementation of `jax.nn.dot_product_attention` for the device."""
    return "cudnn" if jax.default_backend() == "gpu" else "xla"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode.choices", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=positive, nargs="+", default=[1, 10, 60], help="of products; the most: nodes")
    parser.add_argument("--contexts", type=positive, nargs="+", default=[1024, 8192], help="rows of caches filled")
    parser.add_argument("--capacities", type=positive, nargs="+", default=[1024, 8192, 32768], help="rows of caches")
    parser.add_argument("--repeats", type=positive, default=5, help="timed programs a line (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="default: all")
    parser.add_argument("--json", metavar="FILE", help="write all of it there, too")
    return parser


if __name__ == "__main__":
    main()
