"""Compiles the decoder and a training step for absent TPU slices, by libtpu on a CPU machine.

    python -m bench.aot.tpu                          every row; many minutes on two cores
    python -m bench.aot.tpu --only v5e --json v5e.json
    python -m bench.aot.tpu --list

A row is a program on a slice of chips: what it needs of each chip's memory, whether that fits, how many weights or
whole caches it copies in a cycle, and how long it compiled. Ends with 1 if a row does not fit or copies any. Parameters
lie by the rules of eagle_jax/sharding.py. Needs the `aot` extra: bench/aot/compilers.py.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from jax.sharding import AxisType, Mesh

from bench import report
from bench.aot import compilers, programs
from bench.aot.programs import Program
from bench.shapes import ONE_PASS, ROUTED, SHAPES, Shape
from eagle_jax.sharding import DATA, EXPERT, FSDP, TENSOR

GIB = 2**30
# Memory of a chip in bytes; the compiler reserves a little of it.
CHIP = {"v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}
CAPACITY, PROMPT = 8192, 512  # tokens a row of the decoder may hold, and of its prompt
TRAIN_WIDTH = 2304  # tokens a row of training: no activation has the size of a weight, by which copies are found


def one_pass(kind: str, shape: Shape, batch: int) -> Program:
    """Returns a cycle of a head that drafts all depths in one pass, with its default tree."""
    return programs.cycle(shape, CAPACITY, batch, tree=ONE_PASS[kind].tree, head=kind)


PROGRAMS: dict[str, Callable[[Shape, int], Program]] = {
    "prefill": lambda shape, batch: programs.prefill(shape, CAPACITY, PROMPT, batch),
    "cycle": lambda shape, batch: programs.cycle(shape, CAPACITY, batch),
    **{kind: functools.partial(one_pass, kind) for kind in ONE_PASS},
    "generate": lambda shape, batch: programs.generate(shape, CAPACITY, PROMPT, batch),
    "train": lambda shape, batch: programs.train_step(shape, batch, TRAIN_WIDTH),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A program on a slice.

    data, fsdp, tensor, expert: the mesh; data splits the `batch` rows, fsdp those of training, too.
    """

    topology: str
    shape: str
    program: str
    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    batch: int = 1

    @property
    def name(self) -> str:
        """Such as "v5e:2x2 8b cycle", or "v5e:2x2 8b cycle of 8"."""
        return f"{self.topology} {self.shape} {self.program}" + (f" of {self.batch}" if self.batch > 1 else "")

    @property
    def chip(self) -> str:
        return self.topology.split(":")[0]

    def mesh(self) -> Mesh:
        """Returns a mesh of the slice's chips with the axes of sharding.py."""
        axes = {DATA: self.data, FSDP: self.fsdp, TENSOR: self.tensor}
        axes |= {EXPERT: self.expert} if self.expert > 1 else {}
        chips = np.array(compilers.tpu_devices(self.topology)).reshape(*axes.values())
        return Mesh(chips, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


ROWS = [
    *(
        Row(topology, "8b", name, tensor=4)
        for topology in ("v5e:2x2", "v6e:2x2")
        for name in PROGRAMS
        if name != "train"
    ),
    *(Row(topology, "8b", "train", fsdp=4, batch=4) for topology in ("v5e:2x2", "v6e:2x2")),
    Row("v6e:2x2", "8b", "cycle", data=2, tensor=2, batch=8),
    *(Row("v6e:2x4", "70b", name, tensor=8) for name in ("prefill", "cycle")),
    Row("v5p:2x2x2", "70b", "train", fsdp=8, batch=8),
    *(Row("v5e:2x2", "qwen3-8b", name, tensor=4) for name in ("cycle", "generate")),
    *(Row("v5e:2x4", "gpt-oss-20b", name, tensor=8) for name in ("cycle", "generate")),
    *(Row("v5e:2x4", "qwen3-30b-a3b", name, expert=8) for name in ("cycle", "generate")),
]


def measure(row: Row, layers: int | None = None) -> dict[str, Any]:
    """Compiles a row: GiB a chip, copies, seconds. `layers`: of the target, in place of its own number."""
    shape = (SHAPES | ROUTED)[row.shape]
    shape = shape if layers is None else shape.with_layers(layers)
    program, mesh = PROGRAMS[row.program](shape, row.batch), row.mesh()
    start = time.perf_counter()
    compiled = program.compile(mesh)
    seconds = time.perf_counter() - start
    memory = compilers.Memory.of(compiled)
    return {
        "slice": row.topology,
        "model": row.shape,
        "program": row.program,
        "data": row.data,
        "fsdp": row.fsdp,
        "tensor": row.tensor,
        "expert": row.expert,
        "batch": row.batch,
        "arguments GiB": memory.arguments / GIB,
        "temporaries GiB": memory.temporaries / GIB,
        "total GiB": memory.peak / GIB,
        "chip GiB": CHIP[row.chip] / GIB,
        "fits": memory.peak < CHIP[row.chip],
        "copies": len(program.copies(compiled, mesh)),
        "compile s": seconds,
    }


if __name__ == "__main__":
    sys.exit(report.main(__doc__, {row.name: functools.partial(measure, row) for row in ROWS}))
