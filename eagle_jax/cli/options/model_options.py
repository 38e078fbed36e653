"""Options of models, shared by the commands: parsing, loading, and checks against the target's limits."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from eagle_jax.cli.options.tree_options import parse_tree
from eagle_jax.convert import CheckpointError, converted, eos, from_pretrained, load
from eagle_jax.convert.error import NotConvertedError
from eagle_jax.convert.hub import Hub
from eagle_jax.convert.match import PARAMETER_DTYPES
from eagle_jax.convert.read import folder_of
from eagle_jax.convert.tokenizing import tokenizer_of
from eagle_jax.drafts.dspark import DSpark, with_confidence
from eagle_jax.drafts.eagle.drafting import EagleDraft, with_window
from eagle_jax.drafts.lookup_first import LookupFirst
from eagle_jax.drafts.registry import WEIGHTLESS
from eagle_jax.models.llama import Llama
from eagle_jax.models.params import for_this_machine
from eagle_jax.models.target import Target
from eagle_jax.sharding import DATA, EXPERT, TENSOR, make_mesh
from eagle_jax.tree import PUBLISHED_TREES, TreeConfig


@dataclasses.dataclass(frozen=True)
class Models:
    """A target, its draft or None, and the folder of the target's small files (config.json, tokenizer.json)."""

    target: Llama
    draft: Any
    folder: Path

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        """The target's tokenizer; None if its folder has no tokenizer files. CheckpointError: for unusable ones."""
        return tokenizer_of(self.folder)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model, or --target and --draft, --dtype and --mesh."""
    group = parser.add_argument_group(
        "models", "a converted folder, or official checkpoints as they are; HF_TOKEN opens gated hub repositories"
    )
    group.add_argument("--model", metavar="DIR", help="a folder that `eagle-jax convert` wrote")
    group.add_argument(
        "--target", metavar="DIR_OR_ID", help="instead: the target, a Hugging Face folder or hub id, or a .gguf file"
    )
    group.add_argument(
        "--draft",
        metavar="DIR_OR_ID",
        help="with --target: its EAGLE head, Medusa heads, or draft model; also with --model: a draft without weights, "
        "one of " + ", ".join(WEIGHTLESS),
    )
    add_revisions(group)
    group.add_argument(
        "--dtype",
        choices=PARAMETER_DTYPES,
        help="dtype of both models (default: their own; on a CPU, without --mesh, float32)",
    )
    group.add_argument(
        "--mesh",
        type=parse_mesh,
        metavar="AXIS=N,...",
        help="shard over several devices, such as data=2,tensor=4: data splits the batch, tensor the matrix products, "
        "expert the experts of a layer",
    )


def add_revisions(parser: Any) -> None:
    """Adds --revision and --draft-revision, of hub ids, to a parser or a group of one."""
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the target's hub repository")
    parser.add_argument("--draft-revision", metavar="NAME", help="the same for the draft's repository")


@contextlib.contextmanager
def named_as_model(name: str) -> Iterator[None]:
    """Rewords errors of `load` for the folder of --model, so that they name the options that help."""
    try:
        yield
    except NotConvertedError as error:
        raise ValueError(
            f"--model {name}: not a converted folder; an official checkpoint is named by --target {name}, or converted "
            f"once: eagle-jax convert --target {name} --out DIR"
        ) from error
    except CheckpointError as error:
        if Path(name).exists():
            raise
        raise ValueError(f"--model {error}; a Hugging Face folder or hub id is named by --target") from error


def add_decoding_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Adds --tree, --draft-window, --confidence, --lookup, --max-new-tokens, what ends a text, and --raw."""
    default = TreeConfig()
    parser.add_argument(
        "--tree",
        type=parse_tree,
        metavar="TREE",
        help="the draft tree: depth (draft tokens on the longest path), children a node, and nodes in all with the "
        "root; or best:DEPTH,NODES, the likeliest prefixes; or expand:DEPTH,TOP_K,NODES, the children of the likeliest "
        "nodes; or a static one: chain:5, a published one "
        f"({', '.join(PUBLISHED_TREES)}), or a .json file with a list of paths (default: what `eagle-jax tune` found, "
        "else for EAGLE heads "
        f"{default.depth},{default.top_k},{default.num_nodes})",
    )
    parser.add_argument(
        "--stop-below",
        type=probability,
        metavar="P",
        help="adaptive drafting: grow a tree no deeper once its best path's draft probability is below this",
    )
    parser.add_argument(
        "--score-temperature",
        type=positive_number,
        metavar="T",
        help="divide the draft's logits by T for growing a tree: below 1 deeper, above 1 wider; changes no text",
    )
    parser.add_argument(
        "--draft-window",
        type=parse_window,
        metavar="FIRST,RECENT",
        help="let the draft see the text's FIRST positions and its RECENT ones only, such as 4,1024: for texts longer "
        "than those it was trained on; changes no text",
    )
    parser.add_argument(
        "--confidence",
        type=probability,
        metavar="P",
        help="of a DSpark head: draft nothing after a node whose confidence head finds acceptance less likely than P; "
        "changes no greedy text",
    )
    add_lookup(parser)
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=max_new_tokens,
        metavar="N",
        help="most new tokens of a text (default: %(default)s)",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="decode on after an end-of-text token")
    parser.add_argument(
        "--stop-token",
        type=int,
        action="append",
        default=[],
        metavar="ID",
        help="end after this token, too; repeatable",
    )
    parser.add_argument("--raw", action="store_true", help="take prompts as they are, without the chat template")


def add_lookup(parser: argparse.ArgumentParser) -> None:
    """Adds --lookup."""
    parser.add_argument(
        "--lookup",
        type=positive,
        nargs="?",
        const=LookupFirst.length,
        metavar="N",
        help="where the text's last two tokens occurred before, draft the N tokens that followed there (default: "
        "%(const)s), and ask the draft elsewhere; changes no greedy text",
    )


def parse_window(text: str) -> tuple[int, int]:
    """Parses a draft window such as "4,1024"; the type of an argparse option."""
    first, _, recent = text.partition(",")
    if not first.isdecimal() or not recent.isdecimal() or int(recent) < 1:
        raise argparse.ArgumentTypeError(
            f"a window is first,recent, 0 or more and 1 or more positions, such as 4,1024; got {text!r}"
        )
    return int(first), int(recent)


def parse_mesh(text: str) -> dict[str, int]:
    """Parses the devices of each mesh axis, such as "data=2,tensor=4"; the type of an argparse option."""
    axes = {}
    for part in text.split(","):
        name, _, count = part.partition("=")
        if name not in (DATA, TENSOR, EXPERT) or name in axes or not count.isdecimal() or int(count) < 1:
            raise argparse.ArgumentTypeError(
                f"a mesh is data=2,tensor=4, or some of data, tensor and expert; got {text!r}"
            )
        axes[name] = int(count)
    return axes


def parse_buckets(text: str) -> tuple[int, ...]:
    """Parses widths such as "64,256,1024"; the type of an argparse option."""
    if not all(width.isdecimal() and int(width) for width in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be positive integers, such as 64,256,1024; got {text!r}")
    return tuple(sorted(map(int, text.split(","))))


def probability(text: str) -> float:
    """Parses a number from 0 to 1; the type of an argparse option."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a probability, 0 to 1, got {text!r}")
    return value


def positive_number(text: str) -> float:
    """Parses a positive number; the type of an argparse option."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def positive(text: str) -> int:
    """Parses a positive integer; the type of an argparse option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def load_models(args: argparse.Namespace) -> Models:
    """Loads the models of --model, or of --target and --draft, the draft as --draft-window, --confidence, --lookup ask.

    Raises:
      ValueError: for options that do not go together; CheckpointError, ConfigError: as `load` and `from_pretrained`.
    """
    if (args.model is None) == (args.target is None):
        raise ValueError("name the models with either --model, or --target and --draft")
    mesh = None if args.mesh is None else make_mesh(args.mesh)
    weightless = WEIGHTLESS.get(args.draft)
    if args.model is not None:
        if args.draft is not None and weightless is None:
            raise ValueError(
                "--draft goes with --target: a converted folder holds its own draft, in place of which --draft takes "
                f"one without weights: {', '.join(WEIGHTLESS)}"
            )
        if args.revision is not None or args.draft_revision is not None:
            raise ValueError("--revision and --draft-revision go with hub ids: --target and --draft")
        folder = Path(args.model) / converted.TARGET
        with named_as_model(args.model):
            target, draft = load(args.model, dtype=args.dtype, mesh=mesh)
    else:
        source = args.draft if weightless is None else None
        revisions = {"revision": args.revision, "draft_revision": args.draft_revision}
        target, draft = from_pretrained(args.target, source, dtype=args.dtype, mesh=mesh, **revisions)
        folder = folder_of(args.target, Hub(args.revision))
    if weightless is not None:
        draft = weightless.draft(**weightless.settings)
    if draft is not None:
        check_head_options(draft, args)
        draft = with_head_options(draft, args)
    if args.lookup is not None:
        if weightless is not None or draft is None:
            raise ValueError(
                "--lookup goes with a draft that has weights, which it asks where the text holds nothing to copy; "
                "copies alone: --draft prompt-lookup"
            )
        draft = LookupFirst(draft, length=args.lookup)
    if jax.default_backend() == "cpu" and mesh is None:
        target, draft = _in_float32(target, draft, args.dtype)
    return Models(for_this_machine(target), for_this_machine(draft), folder)


def _in_float32(target: Llama, draft: Any, asked: str | None) -> tuple[Llama, Any]:
    """Casts 16-bit models to float32 and says so, unless --dtype asked for 16 bits.

    XLA:CPU converts 16-bit weights in every product, or multiplies them element by element.
    """
    own = jnp.dtype(target.dtype).name
    if own == "float32":
        return target, draft
    if asked is not None:
        print(f"note: {own}, as asked: on a CPU it is slower than --dtype float32", file=sys.stderr)
        return target, draft
    print(f"note: decoding in float32: {own} is slower on a CPU (--dtype {own} keeps it)", file=sys.stderr)

    def widen(x):
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen, target), jax.tree.map(widen, draft)


def chosen_draft(models: Models, args: argparse.Namespace) -> Any:
    """Returns the draft; None with --baseline. Raises ValueError if there is no draft without --baseline."""
    if models.draft is None and not args.baseline:
        raise ValueError(
            "there is no draft here; for plain decoding add --baseline, or name a draft without weights: --draft "
            + ", ".join(WEIGHTLESS)
        )
    return None if args.baseline else models.draft


def check_head_options(draft: Any, args: argparse.Namespace) -> None:
    """Raises ValueError for --draft-window or --confidence with a draft that has no such thing."""
    if args.draft_window is not None and not isinstance(draft, EagleDraft):
        raise ValueError(f"--draft-window is for EAGLE heads, this draft is a {type(draft).__name__}")
    if args.confidence is not None and not isinstance(draft, DSpark):
        raise ValueError(f"--confidence is for DSpark heads, this draft is a {type(draft).__name__}")


def with_head_options(draft: Any, args: argparse.Namespace) -> Any:
    """Returns the draft as --draft-window or --confidence asks, whichever is for its kind."""
    if args.draft_window is not None and isinstance(draft, EagleDraft):
        draft = with_window(draft, *args.draft_window)
    if args.confidence is not None and isinstance(draft, DSpark):
        draft = with_confidence(draft, args.confidence)
    return draft


def draft_identity(draft: Any) -> str | None:
    """Returns a fingerprint of a draft's weights, or of its settings if it has none; resumed runs compare it."""
    from eagle_jax.train import fingerprint

    if draft is None:
        return None
    return fingerprint.of_model(draft) if jax.tree.leaves(draft) else fingerprint.of_config(draft)


def stop_tokens(models: Models, args: argparse.Namespace) -> tuple[int, ...]:
    """Returns the ids that end a text: the model's unless --ignore-eos, and each --stop-token."""
    vocab = models.target.config.vocab_size
    for id in args.stop_token:
        if not 0 <= id < vocab:
            raise ValueError(f"--stop-token {id}: the vocabulary's ids are 0 to {vocab - 1}")
    return tuple(sorted({*args.stop_token, *(() if args.ignore_eos else eos_tokens(models))}))


def eos_tokens(models: Models) -> tuple[int, ...]:
    """Returns the end-of-text ids of the model's configs and of its tokenizer."""
    return eos.eos_tokens(models.folder, models.target.config.vocab_size, models.tokenizer)


def check_prompt(tokens: Sequence[int], target: Target) -> None:
    """Raises ValueError for the token ids of a prompt that cannot be decoded."""
    limit, vocab, length = target.config.max_position_embeddings, target.config.vocab_size, len(tokens)
    if length == 0:
        raise ValueError("the prompt is empty: it needs at least one token")
    if length >= limit:
        raise ValueError(
            f"the prompt has {length} tokens, this model takes at most {limit - 1} and one new token "
            f"(max_position_embeddings is {limit})"
        )
    for token in tokens:
        if not 0 <= token < vocab:
            raise ValueError(f"token {token} is outside the vocabulary, 0 to {vocab - 1}")
