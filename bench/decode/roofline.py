"""Compares decoding with the device's limit: bytes and FLOPs, ceilings, measured times, and their ratio.

    python -m bench.decode.roofline --shape 8b --json roofline.json
    python -m bench.decode.roofline --shape 70b --tensor 8 --batches 1 4 --contexts 1024
    python -m bench.decode.roofline --head dflash --tree best:15,64

A part's limit is the larger of its bytes at the speed of a copy and its FLOPs at that of a matrix product, divided by
the number of devices; work.py has the formulae. A cycle's limit is the sum of its parts', which run one after the
other. Its `rest` is what it takes beyond them: acceptance and bookkeeping. Weights are random, so acceptance cannot be
real: tokens a second are given for every mean accepted length tau (the bonus token counted), as tau tokens a cycle and
row, and with them the tau at which speculation begins to pay.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bench.decode.ceilings import Ceilings, measure_ceilings
from bench.decode.parts import filled_state, measure_parts
from bench.decode.work import Work, cycle_work, plain_work
from bench.options import parse_tree, positive
from bench.shapes import HEADS, ONE_PASS, SHAPES, Shape, abstract_pair, random_pair
from eagle_jax import Llama, Target, TreeConfig
from eagle_jax.files.atomic import write_json
from eagle_jax.measure.machine import describe_setting, setting
from eagle_jax.sharding import DATA, TENSOR, path_name, path_sharding
from eagle_jax.tree import TreePolicy
from eagle_jax.tree.named import describe_tree

PARTS = ("plain", "step", "propose", "verify", "commit", "extend", "cycle")


def main(arguments: list[str] | None = None) -> None:
    # Nearly all of a GPU's memory; JAX reads this at its first use of the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    args = _parser().parse_args(arguments)
    tree: Any = args.tree or HEADS[args.head].tree
    if args.head == "eagle3" and (not isinstance(tree, TreeConfig) or tree.depth < 2):
        raise SystemExit("--tree: a dynamic tree of depth 2 or more, such as 8,10,60")
    deepest = HEADS[args.head].tree.depth
    if args.head in ONE_PASS and tree.depth > deepest:
        raise SystemExit(f"--tree: a {args.head} head drafts {deepest} tokens at most, such as best:{deepest},16")
    shape, dtype = SHAPES[args.shape], jnp.dtype(args.dtype)
    ceilings = measure_ceilings(dtype, args.repeats)
    target, draft = make_pair(shape, dtype, args.tensor, args.head)
    report: dict[str, Any] = {
        **setting(target),
        "shape": args.shape,
        "devices": args.tensor,
        "head": args.head,
        "tree": dataclasses.asdict(tree),
        "repeats": args.repeats,
        "copy_bytes_per_second": ceilings.bytes_per_second,
        "product_flops_per_second": ceilings.flops_per_second,
        "rows": [],
        "skipped": [],
    }
    print(f"{args.shape} on {args.tensor} x {describe_setting(report)}; {args.head}, {describe_tree(tree)}")
    print(f"copy {ceilings.bytes_per_second / 1e9:.4g} GB/s, product {ceilings.flops_per_second / 1e12:.4g} TFLOP/s\n")
    print("| batch | context | part | GB | GFLOP | limit ms | ms | ratio |\n|" + "---|" * 8)
    for batch in args.batches:
        for context in args.contexts:
            found = _measured(shape, target, draft, batch, context, tree, ceilings, args.tensor, args.repeats)
            if isinstance(found, str):
                report["skipped"].append({"batch": batch, "context": context, "why": found})
                print(f"| {batch} | {context} | skipped: {found} |||||", flush=True)
            else:
                report["rows"].append(found)
                print("\n".join(part_lines(found)), flush=True)
            if args.json is not None:
                write_json(Path(args.json), report)
    print("\n" + "\n".join(rate_lines(report["rows"], tree.depth)))


def make_pair(shape: Shape, dtype: Any, devices: int, head: str) -> tuple[Llama, Any]:
    """Makes a pair with random weights, on one device or sharded over several by the library's rules."""
    made = jax.jit(random_pair, static_argnums=(0, 2, 3))
    if devices > 1:
        mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, devices), (DATA, TENSOR))

        def place(path, leaf):
            return path_sharding(path_name(path), leaf.shape, mesh)

        shardings = jax.tree_util.tree_map_with_path(place, abstract_pair(shape, dtype, head))
        made = jax.jit(random_pair, static_argnums=(0, 2, 3), out_shardings=shardings)
    return made(shape, jax.random.key(0), dtype, head)


def row_of(seconds: dict[str, float], work: dict[str, Work], limits: dict[str, float], batch: int) -> dict[str, Any]:
    """Returns the figures of one batch and context.

    Args:
      seconds, work, limits: of every one of PARTS; limits in seconds.
    """
    parts = {
        name: {
            "bytes": work[name].bytes,
            "flops": work[name].flops,
            "limit_ms": 1000 * limits[name],
            "ms": 1000 * seconds[name],
            "ratio": seconds[name] / limits[name],
        }
        for name in PARTS
    }
    return {
        "parts": parts,
        "rest_ms": parts["cycle"]["ms"] - sum(parts[name]["ms"] for name in ("propose", "verify", "commit", "extend")),
        "plain_tokens_per_second": batch / seconds["plain"],
        "tokens_per_second_and_tau": batch / seconds["cycle"],
        "break_even_tau": seconds["cycle"] / seconds["plain"],
        "break_even_tau_at_the_limit": limits["cycle"] / limits["plain"],
    }


def part_lines(row: dict[str, Any]) -> Iterator[str]:
    """Formats the table's lines of a batch and context."""
    place = f"| {row['batch']} | {row['context']} |"
    for name, part in row["parts"].items():
        numbers = (part["bytes"] / 1e9, part["flops"] / 1e9, part["limit_ms"], part["ms"], part["ratio"])
        yield f"{place} {name} | " + " | ".join(f"{number:.4g}" for number in numbers) + " |"
    yield f"{place} rest | | | | {row['rest_ms']:.4g} | |"


def rate_lines(rows: list[dict[str, Any]], depth: int) -> Iterator[str]:
    """Formats the table of tokens a second by tau, 1 to depth + 1."""
    taus = range(1, depth + 2)
    yield "Tokens a second of the whole batch, plain and by tau; the tau that breaks even, measured and at the limits\n"
    yield "| batch | context | plain | break-even | at the limit | " + " | ".join(f"tau {tau}" for tau in taus) + " |"
    yield "|" + "---|" * (5 + len(taus))
    for row in rows:
        even = f"{row['break_even_tau']:.2f} | {row['break_even_tau_at_the_limit']:.2f}"
        rates = " | ".join(f"{tau * row['tokens_per_second_and_tau']:.4g}" for tau in taus)
        yield f"| {row['batch']} | {row['context']} | {row['plain_tokens_per_second']:.4g} | {even} | {rates} |"


def _measured(
    shape: Shape,
    target: Target,
    draft: Any,
    batch: int,
    context: int,
    tree: TreePolicy,
    ceilings: Ceilings,
    devices: int,
    repeats: int,
) -> dict[str, Any] | str:
    """Measures a row of the report; returns it, or why there is none."""
    state = jax.eval_shape(lambda *pair: filled_state(*pair, batch=batch, context=context, tree=tree), target, draft)
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((target, draft, state))) / devices
    available = _memory()
    if needed > available:
        return f"weights and caches are {needed / 1e9:.4g} GB a device, which has {available / 1e9:.4g}"
    try:
        state = filled_state(target, draft, batch=batch, context=context, tree=tree)
        seconds = measure_parts(target, draft, state, context, tree, repeats)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return "out of memory while it ran"
    itemsize = target.dtype.itemsize
    cycle = cycle_work(shape.target, draft.config, tree, batch, context, itemsize)
    plain = plain_work(shape.target, batch, context, itemsize)
    work = {"plain": plain, "step": cycle.step, **cycle.parts, "cycle": cycle.total}
    limits = {
        name: part.seconds(devices * ceilings.bytes_per_second, devices * ceilings.flops_per_second)
        for name, part in work.items()
    }
    limits["cycle"] = sum(limits[name] for name in cycle.parts)
    return {"batch": batch, "context": context, **row_of(seconds, work, limits, batch)}


def _memory() -> int:
    """Returns the bytes that JAX may use on a device; on a CPU those of the machine."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] if stats else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--batches", type=positive, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--contexts", type=positive, nargs="+", default=[1024, 4096, 8192, 32768])
    parser.add_argument("--head", choices=HEADS, default="eagle3", help="(default: %(default)s)")
    parser.add_argument("--tree", type=parse_tree, help="such as 8,10,60 or best:15,64 (default: the head's)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=positive, default=5, help="timed programs a part (default: %(default)s)")
    parser.add_argument("--tensor", type=positive, default=1, metavar="N", help="split the models over N devices")
    parser.add_argument("--json", metavar="FILE", help="write all of it there, too")
    return parser


if __name__ == "__main__":
    main()
