"""All that a machine with a GPU can tell, in one command: parity tests, roofline, choices to make, transformers.

    python -m bench.decode.on_gpu --out results/                        at most 33 minutes
    python -m bench.decode.on_gpu --out results/ --steps tests roofline
    python -m bench.decode.on_gpu --out results/ --target DIR --draft DIR      real models against transformers

Runs from a bare checkout with JAX for CUDA, flax, PyTorch and transformers. Every step is a process of its own with a
limit in seconds, since one that hangs should cost no more; what it printed until then stays. Writes STEP.txt, and
STEP.json where the step has one.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Step:
    """module: and its options. limit: seconds. json: whether it can write its figures."""

    module: str
    limit: int
    json: bool = True


STEPS = {
    "tests": Step("pytest -m gpu -v --durations 10", 360, json=False),
    "roofline": Step(
        "bench.decode.roofline --shape 8b --batches 1 4 16 32 --contexts 1024 8192 32768 --repeats 3", 540
    ),
    **{
        f"roofline_{head}": Step(
            f"bench.decode.roofline --shape 8b --head {head} --batches 1 8 --contexts 1024 --repeats 3", 120
        )
        for head in ("dflash", "dspark", "peagle")
    },
    "choices": Step("bench.decode.choices --cases products attention --repeats 3", 120),
    "flags": Step("bench.decode.choices --cases flags --repeats 3", 420),
    "against_transformers": Step("bench.decode.against_transformers", 180),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the steps; returns 1 if one failed or ran into its limit."""
    args = _parser().parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    models = [
        text
        for name in ("target", "draft", "official_eagle")
        if (value := getattr(args, name)) is not None
        for text in (f"--{name.replace('_', '-')}", value)
    ]
    ended = {}
    for name in args.steps:
        more = models if name == "against_transformers" else []
        began = time.perf_counter()
        ended[name] = run(name, STEPS[name], more, args.out)
        print(f"{name}: {ended[name]} after {time.perf_counter() - began:.0f} s; {args.out / name}.txt", flush=True)
    return int(any(how != "done" for how in ended.values()))


def run(name: str, step: Step, more: list[str], out: Path) -> str:
    """Runs a step, its output into the folder; how it ended, in words."""
    command = [sys.executable, "-m", *step.module.split(), *more]
    if step.json:
        command += ["--json", str((out / f"{name}.json").resolve())]
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONUNBUFFERED": "1"}
    with open(out / f"{name}.txt", "w", encoding="utf-8") as text:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=text, stderr=subprocess.STDOUT, timeout=step.limit
            ).returncode
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {step.limit} s"
    return "done" if code == 0 else f"failed with status {code}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode.on_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder for tables and JSON")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    for name in ("--target", "--draft", "--official-eagle"):
        parser.add_argument(name, metavar="PATH", help="for bench.decode.against_transformers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
