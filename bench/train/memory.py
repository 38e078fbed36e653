"""Measures the memory of an EAGLE-3 training step for Llama-3.1-8B, by steps of the training-time test.

    python -m bench.train.memory                      H200, 8192 tokens
    python -m bench.train.memory --device v5p --rows 2 --width 4096

The step is compiled by the real compiler of the device, which need not be there (extra `aot`; see
bench/aot/compilers.py), and what it says of its memory is printed: parameters and optimiser (of which the target is
16 GB), and temporaries. bfloat16 target and products, float32 masters, AdamW.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from bench.aot import compilers, programs
from bench.aot.compilers import Memory
from bench.shapes import SHAPES

DEVICES = {"h200": lambda: compilers.gpu_devices()[0], "v5p": lambda: compilers.tpu_devices("v5p:2x2x1")[0]}


def compiled_step(device: Any, steps: int, rows: int, width: int) -> jax.stages.Compiled:
    """Compiles a step of `rows` rows of `width` tokens for `device`."""
    return programs.train_step(SHAPES["8b"], rows, width, steps).compile(device)


def keys_and_values(steps: int, tokens: int) -> int:
    """Returns the bytes of the steps' keys and values, including the first step's."""
    config = SHAPES["8b"].head
    return steps * tokens * 2 * config.num_kv_heads * config.head_dim * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="h200")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 5, 7])
    args = parser.parse_args()
    compilers.find_compilers()
    tokens = args.rows * args.width
    print(f"{args.device}, Llama-3.1-8B, {args.rows} rows of {args.width} tokens, GB (1e9 bytes)")
    print("steps  arguments  temporaries   peak  own keys and values  growth beyond them")
    first = None
    for steps in args.steps:
        needed = Memory.of(compiled_step(DEVICES[args.device](), steps, args.rows, args.width))
        own = keys_and_values(steps, tokens)
        first = first or (needed.peak, own)
        growth = (needed.peak - first[0] - (own - first[1])) / first[0]
        cells = (needed.arguments / 1e9, needed.temporaries / 1e9, needed.peak / 1e9, own / 1e9)
        print("{:5d}  {:9.2f}  {:11.2f}  {:5.2f}  {:19.2f}  {:17.1%}".format(steps, *cells, growth), flush=True)


if __name__ == "__main__":
    main()
