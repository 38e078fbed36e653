"""What compilers made of the decoder and of a training step, compared with what is written down in recorded.json.

    python -m tests.accelerators.record               a table; ends with 1 if a program has more of anything than then
    python -m tests.accelerators.record --only CPU
    python -m tests.accelerators.record --write       writes it down anew

H200, v5e and v5p: the programs of the tests in this folder, from .pytest_cache/compiled where those compiled them (else
half an hour on two cores). CPU: a cycle of the embedded pair and of the tests' parity pair, compiled for this machine
as the commands run it, with the default flags of XLA.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

import eagle_jax
from bench import report
from bench.aot import compilers, gpu, hlo, programs, tpu
from eagle_jax import SamplingConfig, TreeConfig
from eagle_jax.decode.cycle import step
from tests.accelerators.facts import ALL, FEW, MORE, ROOT, facts, shape

FILE = Path(__file__).parent / "recorded.json"
COUNTED = ("kernels", "copies", "temporaries")
SMALLEST_COPY = 2048  # elements, on a CPU, whose models are small

# {name: (target, head, tree)} under the root of the repository
CPU_PAIRS = {
    "embedded EAGLE-1": ("eagle_jax/pair/target", "eagle_jax/pair/head_eagle1", TreeConfig(3, 1, 4)),
    "embedded EAGLE-3": ("eagle_jax/pair/target", "eagle_jax/pair/head", TreeConfig(3, 1, 4)),
    "parity EAGLE-3": ("tests/golden/weights/t1_target", "tests/golden/weights/t1_eagle3_dv96", TreeConfig(8, 10, 60)),
}

Found = dict[str, int]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="the programs whose name holds this")
    parser.add_argument("--write", action="store_true", help="write the file anew")
    args = parser.parse_args()
    compilers.find_compilers()
    before = json.loads(FILE.read_text()) if FILE.exists() else {"versions": {}, "programs": {}}
    now = {
        "command": "python -m tests.accelerators.record --write",
        "date": datetime.date.today().isoformat(),
        "versions": report.versions(),
        "programs": dict(before["programs"]) if args.write else {},
    }
    print("| program |" + " | ".join(COUNTED) + " |\n" + "|---" * 4 + "|")
    more = False
    for name, measure in rows():
        if args.only in name:
            found, then = measure(), before["programs"].get(name, {})
            now["programs"][name] = found
            more |= any(found[what] > then.get(what, found[what]) for what in COUNTED)
            print(
                f"| {name} | " + " | ".join(_cell(then.get(what), found[what]) for what in COUNTED) + " |", flush=True
            )
    if args.write:
        FILE.write_text(json.dumps(now, indent=1) + "\n")
        return 0
    if before["versions"] != now["versions"]:
        print(f"\nNot the compilers of then: {before['versions']}, now {now['versions']}")
    return int(more)


def rows() -> Iterator[tuple[str, Callable[[], Found]]]:
    """Every program's name, and what compiles it."""
    for name, pair in CPU_PAIRS.items():
        yield f"CPU cycle, {name}", functools.partial(on_cpu, *pair)
    for name in ("embedded EAGLE-1", "parity EAGLE-3"):
        target, _, tree = CPU_PAIRS[name]
        yield f"CPU plain, {name.split()[0]}", functools.partial(on_cpu, target, None, tree)
    for layers in (FEW, MORE):
        for sampling, config in gpu.SAMPLINGS.items():
            cycle = functools.partial(programs.cycle, shape(layers), 8192, sampling=config)
            yield f"H200 cycle {sampling}, {layers} layers", functools.partial(compiled, cycle, h200)
        generate = functools.partial(programs.generate, shape(layers), 8192, 512)
        yield f"H200 generate greedy, {layers} layers", functools.partial(compiled, generate, h200)
    for layers, steps in ((FEW, 1), (FEW, 7), (MORE, 7)):
        train = functools.partial(programs.train_step, shape(layers), 4, 2048, steps)
        yield f"H200 train, {steps} steps, {layers} layers", functools.partial(compiled, train, h200)
    row = next(row for row in tpu.ROWS if (row.topology, row.program) == ("v5e:2x2", "cycle"))
    cycle = functools.partial(tpu.PROGRAMS["cycle"], shape(ALL), row.batch)
    yield f"v5e:2x2 cycle greedy, {ALL} layers", functools.partial(compiled, cycle, row.mesh)
    sampled = SamplingConfig(temperature=1.0)
    generate = functools.partial(programs.generate, shape(FEW), 8192, 512, sampling=sampled)
    yield f"v5p generate sampled, {FEW} layers", functools.partial(compiled, generate, v5p)


def h200() -> Any:
    return compilers.gpu_devices()[0]


def v5p() -> Any:
    return compilers.tpu_devices("v5p:2x2x1")[0]


def compiled(program: Callable[[], programs.Program], device: Callable[[], Any]) -> Found:
    found = facts(program(), device())
    return {"kernels": found.kernels, "copies": len(found.copies), "temporaries": found.temporaries}


def on_cpu(target_folder: str, head_folder: str | None, tree: TreeConfig) -> Found:
    """One row's cycle with its state donated and no prompt pending, float32, weights stored input first."""
    folders = [None if folder is None else ROOT / folder for folder in (target_folder, head_folder)]
    target, draft = map(eagle_jax.input_first, eagle_jax.from_pretrained(*folders, dtype=jnp.float32))
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 32), (1,)))
    state = jax.eval_shape(functools.partial(eagle_jax.prefill, max_new_tokens=96), target, draft, tokens, lengths)
    cycle = jax.jit(lambda *args: step(*args, tree=tree).state, donate_argnums=2)
    program = cycle.lower(target, draft, state).compile()
    text, memory = program.as_text(), compilers.Memory.of(program)
    copies = len(hlo.large_copies(text, SMALLEST_COPY))
    return {"kernels": hlo.kernels(text), "copies": copies, "temporaries": memory.temporaries}


def _cell(before: int | None, now: int) -> str:
    return str(now) if before in (None, now) else f"{before} -> {now}"


if __name__ == "__main__":
    sys.exit(main())
