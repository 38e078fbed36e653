"""python -m eagle_jax.convert --target DIR_OR_ID --draft DIR_OR_ID --out DIR [--dtype bfloat16] [--overwrite]"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from eagle_jax.convert.heads.choices import HeadChoices
from eagle_jax.convert.heads.reading import title_of
from eagle_jax.convert.match import PARAMETER_DTYPES
from eagle_jax.convert.previous import READING
from eagle_jax.convert.read import read_json
from eagle_jax.convert.write import convert
from eagle_jax.drafts.eagle.flat_config import TAPS


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
    parser.add_argument("--out", metavar="DIR", help="the folder to write")
    parser.add_argument("--dtype", choices=PARAMETER_DTYPES, help="dtype of the parameters (default: the target's own)")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write into a folder that is not empty: replaces a previous conversion there, and no other files",
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the target's hub repository")
    parser.add_argument("--draft-revision", metavar="NAME", help="the same for the draft's repository")
    add_head_arguments(parser)
    group = parser.add_argument_group("a measurement in place of a choice")
    group.add_argument(
        "--check-taps",
        action="store_true",
        help="measure the first and second drafted tokens under each reading of the head's layers and norms, and say "
        "which is right; with --out, convert by it",
    )
    group.add_argument("--prompts", metavar="FILE", help="prompts for --check-taps (default: built-in ones)")


def add_head_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that settle what a head's config.json leaves open."""
    group = parser.add_argument_group("heads", "what the config.json of an EAGLE, DFlash or DSpark head leaves open")
    group.add_argument(
        "--taps",
        metavar="inputs|outputs|LAYERS",
        help="what its ids of tapped layers name, or the layers whose input it reads: 2,16,29",
    )
    group.add_argument(
        "--norm-output",
        choices=("true", "false"),
        help="whether the next drafting step reads the hidden state after the final norm (EAGLE-3.1)",
    )
    group.add_argument(
        "--norm-before-residual",
        choices=("true", "false"),
        help="whether the residual is the normalised hidden state (some speculators heads)",
    )
    group.add_argument(
        "--token-map",
        metavar="FILE",
        help="a list of target ids, freq_32768.pt or JSON: an EAGLE-1 head drafts these tokens alone (FR-Spec)",
    )
    group.add_argument(
        "--num-depths",
        type=int,
        metavar="N",
        help="how many tokens a P-EAGLE head drafts in a pass: the depth that it was trained for",
    )
    group.add_argument(
        "--mask-token",
        type=int,
        metavar="ID",
        help="the token that stands for one to predict, of a head that drafts several in a pass",
    )
    group.add_argument(
        "--causal-windows",
        choices=("true", "false"),
        help="whether a token of a DFlash or DSpark block sees only those before it in layers with a window",
    )
    group.add_argument(
        "--from-root",
        choices=("true", "false"),
        help="whether such a block's output at the root predicts the token after it (sample_from_anchor)",
    )
    group.add_argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="NAME",
        help="an unknown field that does not change what the head computes",
    )


def head_choices(args: argparse.Namespace) -> HeadChoices:
    """Returns the choices of `add_head_arguments`."""
    taps = args.taps
    if taps is not None and taps not in ("inputs", "outputs"):
        layers = taps.split(",")
        if not all(layer.strip().isdecimal() for layer in layers):
            raise ValueError(f"--taps must be inputs, outputs, or layers such as 2,16,29, not {taps!r}")
        taps = tuple(int(layer) for layer in layers)
    flags = {
        name: None if getattr(args, name) is None else getattr(args, name) == "true"
        for name in ("norm_output", "norm_before_residual", "causal_windows", "from_root")
    }
    return HeadChoices(
        taps=taps,
        ignored=tuple(args.ignore_field),
        token_map=args.token_map,
        num_depths=args.num_depths,
        mask_token=args.mask_token,
        **flags,
    )


def run(args: argparse.Namespace) -> int:
    """Converts with a progress bar on stderr and a summary on stdout.

    Returns:
      The exit code: 0, 1 if a measurement does not tell, or 2 after an error, which is one line on stderr.
    """
    from eagle_jax.cli import check_taps

    try:
        head = head_choices(args)
        if args.check_taps:
            right = check_taps.check(args, head)
            if right is None or args.out is None:
                return 1 if right is None else 0
            head = right
        if args.out is None:
            raise ValueError("--out names the folder to write")
        return _convert(args, head)
    except (ValueError, OSError) as error:  # also CheckpointError and ConfigError
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _convert(args: argparse.Namespace, head: HeadChoices) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from eagle_jax.cli import progress

    columns = TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    told = contextlib.nullcontext() if console.is_terminal else progress.status(console, "converting")
    notes: list[str] = []
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
            head=head,
        )
    manifest = read_json(out / "manifest.json")
    print(f"Converted to {out} ({manifest['dtype']})")
    for role in ("target", "draft"):
        if manifest[role] is not None:
            kind, source, parts = (manifest[role][field] for field in ("kind", "source", "parts"))
            print(f"  {role}: {kind} from {source}, {len(parts)} parts")
            print_reading(manifest[role].get(READING))
    for note in notes:
        print(f"note: {note}")
    return 0


def print_reading(reading: Mapping[str, Any] | None) -> None:
    """Prints how the config.json of an EAGLE head was read, from its manifest."""
    if reading is not None:
        print(f"    as {title_of(reading['dialect'])} writes it")
        for name, reason in reading["reasons"].items():
            value = "" if name == TAPS else f" = {json.dumps(reading['fields'][name])}"
            print(f"    {'taps' if name == TAPS else name}{value}: {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (argparse itself exits with 2)."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_jax.convert", description="Convert a target model and its draft for eagle_jax."
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
