"""Runs measurements from the command line: prints rows of a Markdown table as they come, and writes JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.aot import compilers
from eagle_jax.files.atomic import write_json

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


def main(description: str | None, rows: Mapping[str, Callable[[int | None], dict[str, Any]]]) -> int:
    """Measures the rows that the command line asks for. rows: {name: measure(the target's layers, or None for all)}.

    Returns:
      An exit code: 1 if a program does not fit its device, or copies weights or caches.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--only", default="", help="the rows whose name holds this")
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")
    parser.add_argument("--layers", type=int, help="of the target, in place of its own number: fewer compile sooner")
    parser.add_argument("--json", help="write the table to this file too")
    args = parser.parse_args()
    chosen = [name for name in rows if args.only in name]
    if args.list:
        print(*chosen, sep="\n")
        return 0
    compilers.find_compilers()
    done = table((rows[name](args.layers) for name in chosen), args.json)
    return int(any(row.get("copies", 0) != 0 or not row.get("fits", True) for row in done))


def table(rows: Iterable[dict[str, Any]], path: str | None = None) -> list[dict[str, Any]]:
    """Prints the rows, which have the same columns, under the date and versions; writes all of it to `path`, too."""
    date, packages = datetime.date.today().isoformat(), versions()
    print(", ".join([date, *(f"{name} {version}" for name, version in packages.items())]), end="\n\n")
    done: list[dict[str, Any]] = []
    for row in rows:
        if not done:
            print("| " + " | ".join(row) + " |\n|" + "---|" * len(row))
        print("| " + " | ".join(_cell(value) for value in row.values()) + " |", flush=True)
        done.append(row)
        if path is not None:
            write_json(Path(path), {"date": date, "versions": packages, "rows": done})
    return done


def versions() -> dict[str, str]:
    """Returns {package: version} of the installed compilers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
