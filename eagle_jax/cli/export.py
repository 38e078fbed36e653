"""eagle-jax export: writes an EAGLE, DFlash or DSpark head for another engine or trainer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from eagle_jax.cli.options.model_options import add_revisions, named_as_model
from eagle_jax.convert.__main__ import add_head_arguments, head_choices
from eagle_jax.convert.block_engines import BLOCK_ENGINES
from eagle_jax.convert.engines import ENGINES
from eagle_jax.convert.match import PARAMETER_DTYPES

EXAMPLES = """\
examples:
  eagle-jax export --model llama-8b/ --out head-sglang/ --format sglang
  eagle-jax export --model llama-8b/ --out head-vllm/ --format vllm --dtype bfloat16
  eagle-jax export --list
  eagle-jax export --target vicuna/ --draft EAGLE-Vicuna/ --out head/ --format official

Only the head is written. The folder is read back and compared bit for bit; docs/export.md says how to load it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    group = parser.add_argument_group(
        "models", "a converted folder, or official checkpoints as they are; HF_TOKEN opens gated hub repositories"
    )
    group.add_argument("--model", metavar="DIR", help="a folder that `eagle-jax convert` wrote")
    group.add_argument("--target", metavar="DIR_OR_ID", help="instead: the target, a Hugging Face folder or hub id")
    group.add_argument("--draft", metavar="DIR_OR_ID", help="with --target: its head")
    add_revisions(group)
    add_head_arguments(parser)
    parser.add_argument(
        "--list", action=_List, nargs=0, help="list the frameworks, what each reads, and how a head gets there"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--format", required=True, choices=tuple(dict.fromkeys((*ENGINES, *BLOCK_ENGINES))), help="what is to load it"
    )
    parser.add_argument("--dtype", choices=PARAMETER_DTYPES, help="cast the weights (default: the head's own)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write into a folder that is not empty: replaces a previous export there, and no other files",
    )


class _List(argparse.Action):
    """Prints the table of frameworks and exits, as --help does: the options of an export are not needed."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        from rich.console import Console
        from rich.table import Table

        from eagle_jax.convert.frameworks import COLUMNS, rows

        table = Table(*COLUMNS)
        for row in rows():
            table.add_row(*row)
        console = Console(highlight=False)
        console.print(table)
        console.print("* not named by EAGLE's model card", markup=False)
        parser.exit()


def run(args: argparse.Namespace) -> int:
    """Writes the head and prints what is in the folder."""
    from rich.console import Console

    from eagle_jax.convert import export
    from eagle_jax.convert.exporting import check_place
    from eagle_jax.convert.loading import load_head

    if (args.model is None) == (args.target is None) or (args.target is None) != (args.draft is None):
        raise ValueError("name the models with either --model, or --target and --draft")
    out = Path(args.out).resolve()
    for source in (args.model, args.target, args.draft):
        if source is not None and Path(source).is_dir() and Path(source).resolve().is_relative_to(out):
            raise ValueError(f"--out {args.out}: is or contains the source {source}; choose another output folder")
    check_place(out, args.overwrite)
    if args.model is not None:
        with named_as_model(args.model):
            target, draft = load_head(args.model, format=args.format)
    else:
        revisions = {"revision": args.revision, "draft_revision": args.draft_revision}
        target, draft = load_head(args.target, args.draft, **revisions, head=head_choices(args), format=args.format)
    if draft is None:
        raise ValueError(f"{args.model}: this converted folder holds no draft")
    done = export(draft, target, args.out, format=args.format, dtype=args.dtype, overwrite=args.overwrite)
    console = Console(highlight=False)
    console.print(summary(done))
    for note in done.notes:
        console.print(f"note: {note}", markup=False)
    return 0


def summary(done: Any) -> Any:
    """Returns the rich table of an `Exported`."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    config = ", ".join(f"{name} {value}" for name, value in done.config.items())
    for name, value in (
        ("format", done.format),
        ("folder", str(done.folder)),
        ("files", f"{', '.join(done.files)} ({done.num_bytes:,} bytes)"),
        ("tensors", f"{len(done.shapes)}: {', '.join(done.shapes)}"),
        ("config", config),
        ("verified", "read back: every tensor and the config are the same, bit for bit"),
    ):
        table.add_row(Text(name, style="bold"), Text(value))
    return table
