"""What the commands share: options and loading of models, and the limits they set."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from eagle_jax.cli import prompts, tuned
from eagle_jax.convert import eos, from_pretrained, load, parts
from eagle_jax.convert.match import PARAMETER_DTYPES
from eagle_jax.convert.read import resolve
from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.eagle import EagleDraft, with_window
from eagle_jax.drafts.medusa import Medusa
from eagle_jax.models import params
from eagle_jax.models.layers import input_first
from eagle_jax.models.llama import Llama
from eagle_jax.models.params import DATA, TENSOR
from eagle_jax.tree import PUBLISHED_TREES, StaticTree, TreeConfig, TreePolicy
from eagle_jax.tree.named import tree_named

GROWTH = ("stop_below", "score_temperature")  # options of dynamic trees, by the names of TreeConfig
CHAIN = 5  # tokens that a draft model guesses, unless --tree says otherwise


@dataclasses.dataclass(frozen=True)
class Models:
    """A target, its draft or None, and the folder of the target's small files (config.json, tokenizer.json)."""

    target: Llama
    draft: Any
    folder: Path

    @functools.cached_property
    def tokenizer(self) -> Any | None:
        """The target's tokenizer; None if its folder has no tokenizer files. CheckpointError: for unusable ones."""
        return prompts.tokenizer_of(self.folder)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model, or --target and --draft, --dtype and --mesh."""
    group = parser.add_argument_group("models", "a converted folder, or official checkpoints as they are")
    group.add_argument("--model", metavar="DIR", help="a folder that `eagle-jax convert` wrote")
    group.add_argument("--target", metavar="DIR_OR_ID", help="instead: the target, a Hugging Face folder or hub id")
    group.add_argument("--draft", metavar="DIR_OR_ID", help="and its EAGLE head, Medusa heads, or draft model")
    group.add_argument("--dtype", choices=PARAMETER_DTYPES, help="dtype of both models (default: their own)")
    group.add_argument(
        "--mesh",
        type=parse_mesh,
        metavar="AXIS=N,...",
        help="spread them over several devices, such as data=2,tensor=4: texts over data, products over tensor",
    )


def add_decoding_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Adds --tree, --draft-window, --max-new-tokens, what ends a text, and --raw."""
    default = TreeConfig()
    parser.add_argument(
        "--tree",
        type=parse_tree,
        metavar="TREE",
        help="the draft tree: depth (draft tokens on the longest path), children a node, and nodes in all with the "
        f"root (default: {default.depth},{default.top_k},{default.num_nodes}); or a static one: chain:5, a published "
        f"one ({', '.join(PUBLISHED_TREES)}), or a .json file with a list of paths",
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
        "--max-new-tokens",
        type=positive,
        default=max_new_tokens,
        metavar="N",
        help="default: %(default)s",
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


def parse_tree(text: str) -> TreePolicy:
    """`tree_named` as an argparse type."""
    try:
        return tree_named(text)
    except (OSError, ValueError) as error:
        message = str(error) if text in str(error) else f"{text}: {error}"
        raise argparse.ArgumentTypeError(message) from error


def chosen_tree(draft: Any, args: argparse.Namespace) -> TreePolicy:
    """--tree with --stop-below and --score-temperature; by default what `eagle-jax tune` found, or `default_tree`."""
    tree = args.tree
    if tree is None:
        tree = (tuned.find(draft, args) if isinstance(draft, EagleDraft) else None) or default_tree(draft)
    changes = {name: getattr(args, name) for name in GROWTH if getattr(args, name) is not None}
    if changes and not isinstance(tree, TreeConfig):
        option = "--" + next(iter(changes)).replace("_", "-")
        raise ValueError(f"{option} is for dynamic trees such as --tree 8,10,60, not for a {describe_tree(tree)}")
    return dataclasses.replace(tree, **changes) if changes else tree


def default_tree(draft: Any) -> TreePolicy:
    """The published tree for Medusa heads, cut off where the heads end; a chain for a draft model; else dynamic."""
    if isinstance(draft, Medusa):
        paths = PUBLISHED_TREES["medusa-mc-sim-7b-63"].paths
        return StaticTree([path for path in paths if len(path) <= draft.config.num_heads])
    return StaticTree.chain(CHAIN) if isinstance(draft, DraftModel) else TreeConfig()


def describe_tree(tree: TreePolicy) -> str:
    """ "tree: depth 8, top_k 10, 60 nodes"."""
    if isinstance(tree, TreeConfig):
        more = f", stops below {tree.stop_below:g}" if tree.stop_below else ""
        more += f", score temperature {tree.score_temperature:g}" if tree.score_temperature != 1 else ""
        return f"tree: depth {tree.depth}, top_k {tree.top_k}, {tree.num_nodes} nodes{more}"
    if tree.num_nodes == tree.depth + 1:
        return f"chain of {tree.depth}"
    return f"static tree: depth {tree.depth}, {tree.num_nodes} nodes"


def parse_window(text: str) -> tuple[int, int]:
    """A draft window from "4,1024"; the type of an argparse option."""
    first, _, recent = text.partition(",")
    if not first.isdecimal() or not recent.isdecimal() or int(recent) < 1:
        raise argparse.ArgumentTypeError(
            f"a window is first,recent, 0 or more and 1 or more positions, such as 4,1024; got {text!r}"
        )
    return int(first), int(recent)


def parse_mesh(text: str) -> dict[str, int]:
    """Devices an axis from "data=2,tensor=4"; the type of an argparse option."""
    axes = {}
    for part in text.split(","):
        name, _, count = part.partition("=")
        if name not in (DATA, TENSOR) or name in axes or not count.isdecimal() or int(count) < 1:
            raise argparse.ArgumentTypeError(f"a mesh is data=2,tensor=4, data=2 or tensor=4; got {text!r}")
        axes[name] = int(count)
    return axes


def parse_buckets(text: str) -> tuple[int, ...]:
    """Widths from "64,256,1024"; the type of an argparse option."""
    if not all(width.isdecimal() and int(width) for width in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be positive integers, such as 64,256,1024; got {text!r}")
    return tuple(sorted(map(int, text.split(","))))


def probability(text: str) -> float:
    """A number from 0 to 1; the type of an argparse option."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a probability, 0 to 1, got {text!r}")
    return value


def positive_number(text: str) -> float:
    """A positive number; the type of an argparse option."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def positive(text: str) -> int:
    """A positive integer; the type of an argparse option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def load_models(args: argparse.Namespace) -> Models:
    """The models that --model, or --target and --draft, name, the draft with its --draft-window.

    Raises:
      ValueError: for options that do not go together; CheckpointError, ConfigError: as `load` and `from_pretrained`.
    """
    if (args.model is None) == (args.target is None):
        raise ValueError("name the models with either --model, or --target and --draft")
    mesh = None if args.mesh is None else params.make_mesh(args.mesh)
    if args.model is not None:
        if args.draft is not None:
            raise ValueError("--draft goes with --target; a converted folder holds its own draft")
        folder = Path(args.model) / parts.TARGET
        target, draft = load(args.model, dtype=args.dtype, mesh=mesh)
    else:
        target, draft = from_pretrained(args.target, args.draft, dtype=args.dtype, mesh=mesh)
        folder = resolve(args.target)
    if draft is not None and args.draft_window is not None:
        if not isinstance(draft, EagleDraft):
            raise ValueError(f"--draft-window is for EAGLE heads, this draft is of class {type(draft).__name__}")
        draft = with_window(draft, *args.draft_window)
    return Models(for_this_machine(target), for_this_machine(draft), folder)


def for_this_machine(model: Any) -> Any:
    """A model as it decodes fastest here: `input_first` on a CPU, unless it is sharded."""
    on_cpu = jax.default_backend() == "cpu"
    return input_first(model) if on_cpu and model is not None and params.mesh_of(model) is None else model


def chosen_draft(models: Models, args: argparse.Namespace) -> Any:
    """The draft to decode with: None with --baseline. Raises ValueError if there is none and none was asked for."""
    if models.draft is None and not args.baseline:
        raise ValueError("there is no draft head here; for plain decoding add --baseline")
    return None if args.baseline else models.draft


def stop_tokens(models: Models, args: argparse.Namespace) -> tuple[int, ...]:
    """The ids that end a text: the model's own unless --ignore-eos, and each --stop-token."""
    vocab = models.target.config.vocab_size
    for id in args.stop_token:
        if not 0 <= id < vocab:
            raise ValueError(f"--stop-token {id}: the vocabulary's ids are 0 to {vocab - 1}")
    return tuple(sorted({*args.stop_token, *(() if args.ignore_eos else eos_tokens(models))}))


def eos_tokens(models: Models) -> tuple[int, ...]:
    """The model's own ids that end a text: those of its configs, and its tokenizer's."""
    return eos.eos_tokens(models.folder, models.target.config.vocab_size, models.tokenizer)


def capacity(target: Llama, longest: int, width: int, max_new_tokens: int) -> int | None:
    """The `capacity` for prompts of at most `longest` tokens, padded to `width`: what the target was trained for.

    Raises:
      ValueError: if a prompt leaves no place for a new token.
    """
    limit = target.config.max_position_embeddings
    if longest >= limit:
        raise ValueError(
            f"a prompt has {longest} tokens, this model takes at most {limit - 1} and one new token "
            f"(max_position_embeddings is {limit})"
        )
    return limit if width + max_new_tokens > limit else None
