"""python -m eagle_jax.convert --target DIR_OR_ID --draft DIR_OR_ID --out DIR [--dtype bfloat16] [--overwrite]"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.match import PARAMETER_DTYPES
from eagle_jax.convert.read import read_json
from eagle_jax.convert.write import convert
from eagle_jax.models.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a conversion to a parser."""
    parser.add_argument(
        "--target",
        required=True,
        metavar="DIR_OR_ID",
        help="the target model: a folder, a hub id (HF_TOKEN opens gated ones), or a .gguf file",
    )
    parser.add_argument(
        "--draft",
        metavar="DIR_OR_ID",
        help="its draft: an EAGLE head, Medusa heads, or a smaller model; without one, only the target",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--dtype", choices=PARAMETER_DTYPES, help="dtype of the parameters (default: the target's own)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write into a folder that is not empty: replaces a previous conversion there, and no other files",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the target's hub repository")
    parser.add_argument("--draft-revision", metavar="NAME", help="the same for the draft's repository")


def run(args: argparse.Namespace) -> int:
    """Converts with a progress bar on stderr and a summary on stdout.

    Returns:
      The exit code: 0, or 2 after an error, which is one line on stderr.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from eagle_jax.cli import progress

    columns = TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    told = contextlib.nullcontext() if console.is_terminal else progress.status(console, "converting")
    notes: list[str] = []
    try:
        with told, Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("converting", total=None)
            out = convert(
                args.target,
                args.draft,
                args.out,
                dtype=args.dtype,
                overwrite=args.overwrite,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                note=notes.append,
                revision=args.revision,
                draft_revision=args.draft_revision,
            )
    except (CheckpointError, ConfigError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    manifest = read_json(out / "manifest.json")
    print(f"Converted to {out} ({manifest['dtype']})")
    for role in ("target", "draft"):
        if manifest[role] is not None:
            kind, source, parts = (manifest[role][field] for field in ("kind", "source", "parts"))
            print(f"  {role}: {kind} from {source}, {len(parts)} parts")
    for note in notes:
        print(f"note: {note}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (argparse itself exits with 2)."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_jax.convert", description="Convert a target model and its draft for eagle_jax."
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
