"""Compiles the decoder for an absent H200: kernels a pass, copies and temporaries, by the real compiler.

    python -m bench.aot.gpu                     every row; some minutes on two cores
    python -m bench.aot.gpu --only cycle --json h200.json
    python -m bench.aot.gpu --only "8b plain" --layers 8    the same with fewer layers

A launch takes a microsecond or more, so the number of kernels bounds a pass's time from below, as its bytes do. Without
a GPU there is neither cuBLAS nor autotuning: products are Triton fusions here, and times cannot be inferred. Needs the
`aot` extra (see bench/aot/compilers.py).
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from bench import report
from bench.aot import compilers, hlo, programs
from bench.aot.programs import Program
from bench.shapes import ONE_PASS, ROUTED, SHAPES, Shape
from eagle_jax.sampling import SamplingConfig

MIB = 2**20
CAPACITY = 8192  # tokens a row may hold

SAMPLINGS = {
    "greedy": SamplingConfig(),
    "sampled": SamplingConfig(temperature=1.0),
    "coupled": SamplingConfig(temperature=1.0, coupled=True),
}


def plain(shape: Shape, sampling: SamplingConfig) -> Program:
    return programs.cycle(shape, CAPACITY, sampling=sampling, tree=None)


def cycle(shape: Shape, sampling: SamplingConfig) -> Program:
    """Returns a cycle with the default tree: 60 nodes, depth 8, top_k 10."""
    return programs.cycle(shape, CAPACITY, sampling=sampling)


def one_pass(kind: str, shape: Shape, sampling: SamplingConfig) -> Program:
    """Returns a cycle of a head that drafts all depths in one pass, with its default tree."""
    return programs.cycle(shape, CAPACITY, sampling=sampling, tree=ONE_PASS[kind].tree, head=kind)


PROGRAMS: dict[str, Callable[[Shape, SamplingConfig], Program]] = {
    "plain": plain,
    "cycle": cycle,
    **{kind: functools.partial(one_pass, kind) for kind in ONE_PASS},
}

# {"8b cycle greedy": (shape, program, sampling)}
ROWS = {
    f"{name} {program} {sampling}": (name, program, sampling)
    for name, program, samplings in (
        ("8b", "plain", ["greedy"]),
        ("8b", "cycle", [*SAMPLINGS]),
        ("qwen3-8b", "cycle", ["greedy"]),
        *((name, kind, ["greedy"]) for name in ("8b", "qwen3-8b") for kind in ONE_PASS),
        *((routed, program, ["greedy"]) for routed in ROUTED for program in ("plain", "cycle")),
    )
    for sampling in samplings
}


def measure(name: str, layers: int | None = None) -> dict[str, Any]:
    """Compiles a row: kernels (at most: with top-k, top-p and a penalty), copies, MiB, seconds.

    layers: of the target, in place of its own number.
    """
    model, which, sampling = ROWS[name]
    shape = (SHAPES | ROUTED)[model]
    shape = shape if layers is None else shape.with_layers(layers)
    program, device = PROGRAMS[which](shape, SAMPLINGS[sampling]), compilers.gpu_devices()[0]
    start = time.perf_counter()
    compiled = program.compile(device)
    seconds = time.perf_counter() - start
    return {
        "model": model,
        "layers": shape.target.num_layers,
        "pass": which,
        "sampling": sampling,
        "kernels": hlo.kernels(compilers.text(compiled), min),
        "at most": hlo.kernels(compilers.text(compiled)),
        "copies": len(program.copies(compiled, device)),
        "temporaries MiB": compilers.Memory.of(compiled).temporaries / MIB,
        "compile s": seconds,
    }


if __name__ == "__main__":
    sys.exit(report.main(__doc__, {name: functools.partial(measure, name) for name in ROWS}))
