"""eagle-jax train regenerate: lets the target write the answers of a training set."""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from typing import Any

from eagle_jax.cli.options.model_options import (
    Models,
    add_lookup,
    add_model_arguments,
    draft_identity,
    load_models,
    parse_window,
    positive,
    probability,
)
from eagle_jax.cli.options.sampling_options import add_sampling_arguments, sampling_config, with_logit_bias
from eagle_jax.cli.options.tree_options import BATCH, GROWTH, choose_tree_for_many, parse_tree
from eagle_jax.convert import converted
from eagle_jax.convert.hub import Hub
from eagle_jax.convert.read import folder_of, read_json
from eagle_jax.models.architectures import config_of
from eagle_jax.models.config import LlamaConfig
from eagle_jax.sampling import SamplingConfig

EXAMPLES = """\
examples:
  eagle-jax train regenerate --target vicuna/ --data sharegpt.jsonl --out own.jsonl --batch 16
  eagle-jax train regenerate --model llama-8b/ --data chats.jsonl --out own.jsonl --temperature 0.7 --seed 1

Conversations get new answers, turn by turn; a prompt alone is a user's turn if there is a chat template. The target
continues texts and tokens after their first --prompt-tokens, and replaces the completion of a prompt. Every line has
the decoded tokens, which training reads, its source, and how it ended ("finish"). With a draft the same texts come
sooner. A run that was stopped (Ctrl-C keeps the lines that are done) goes on if the same command is started again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON Lines or one JSON array, also .gz: records of text, prompt (with or without completion), tokens, "
        "messages or conversations, as for training",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument("--overwrite", action="store_true", help="write it anew, if it is there or was begun")
    parser.add_argument(
        "--batch", type=positive, default=BATCH, metavar="B", help="texts at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=positive,
        default=32,
        metavar="N",
        help="of a text, or of tokens without a prompt, the first N are the prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="most new tokens of an answer (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        default=2048,
        metavar="N",
        help="most tokens of a text with its prompt, or of a conversation (default: %(default)s)",
    )
    parser.add_argument(
        "--on-error",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do with lines that cannot be used (default: refuse)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="use the first N lines only")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja, in place of the tokenizer's own")
    parser.add_argument("--tree", type=parse_tree, metavar="TREE", help="the draft tree, as for `eagle-jax generate`")
    parser.add_argument("--draft-window", type=parse_window, metavar="FIRST,RECENT", help="as for `eagle-jax generate`")
    parser.add_argument("--confidence", type=probability, metavar="P", help="as for `eagle-jax generate`")
    add_lookup(parser)
    parser.add_argument("--ignore-eos", action="store_true", help="decode on after an end-of-text token")
    parser.add_argument("--stop-token", type=int, action="append", default=[], metavar="ID", help="end after it, too")
    parser.set_defaults(**dict.fromkeys(GROWTH))
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the new training set; returns 1 if the model's numbers broke down in one of its texts."""
    from rich.console import Console

    from eagle_jax.cli import places, progress
    from eagle_jax.cli.options import model_options
    from eagle_jax.files.resumable import check_place
    from eagle_jax.serving import RunningBatch
    from eagle_jax.train.data.regenerate import Options, PromptSource, check_lines, regenerate
    from eagle_jax.train.data.rendering import read_template
    from eagle_jax.train.report import log

    # Check all input before the models are loaded, which may take long.
    sampling, out = sampling_config(args), Path(args.out)
    template = read_template(args.chat_template)
    places.check_file("--out", args.out)
    check_place(out, args.overwrite)
    for path in args.data:
        open(path, "rb").close()
    folder, config = target_of(args)
    length = min(args.max_length, config.max_position_embeddings)
    if args.prompt_tokens >= length:
        raise ValueError(f"--prompt-tokens {args.prompt_tokens} leave no room for more: a text has at most {length}")
    options = Options(
        max_length=length,
        max_new_tokens=args.max_new_tokens,
        prompt_tokens=args.prompt_tokens,
        on_error=args.on_error,
        limit=args.limit,
        chat_template=template,
        seed=args.seed,
    )
    biased = with_logit_bias(sampling, args, config.vocab_size)
    only_config: Any = types.SimpleNamespace(config=config)
    unloaded = model_options.Models(only_config, None, folder)
    stops = model_options.stop_tokens(unloaded, args)
    source = PromptSource(unloaded.tokenizer, config.vocab_size, stops)
    total = check_lines(args.data, source, options)
    log(f"{total:,} lines; loading the models")
    notes = Console(stderr=True, highlight=False)
    with progress.status(notes, "loading"):
        loaded = model_options.load_models(args)
    target, draft = loaded.target, loaded.draft
    choice = choose_tree_for_many(draft, args, sampling)
    tree = choice.tree
    batch = RunningBatch(
        target, draft, slots=args.batch, capacity=length, tree=tree, sampling=biased, stop_tokens=stops
    )
    log(f"compiling; {choice.words(draft)}")
    with progress.status(notes, "compiling"):
        batch.compile()
    settings = _settings(args, loaded, tree, sampling)
    failed = regenerate(args.data, out, batch, source, options, settings, log, args.overwrite, total)
    if failed:
        print(f"error: in {failed} texts the model's logits became NaN or infinite", file=sys.stderr)
    return 1 if failed else 0


def _settings(args: argparse.Namespace, loaded: Models, tree: Any, sampling: SamplingConfig) -> dict[str, Any]:
    """Returns what the answers depend on; a file begun with other settings is refused."""
    from eagle_jax.train import fingerprint

    drafted = [draft_identity(loaded.draft), fingerprint.of_config(tree), args.draft_window]
    if args.lookup is not None:  # files begun before the option go on
        drafted.append(args.lookup)
    return {
        "target": fingerprint.of_model(loaded.target),
        "draft": None if loaded.draft is None else drafted,
        "sampling": fingerprint.of_config(sampling),
        "logit_bias": [f"{id}={value:g}" for id, value in args.logit_bias],
    }


def target_of(args: argparse.Namespace) -> tuple[Path, LlamaConfig]:
    """Returns the folder of the target's small files, and its config, without loading weights."""
    if (args.model is None) == (args.target is None) or (args.model and not converted.is_conversion(Path(args.model))):
        load_models(args)  # says what is wrong
    if args.model is None:
        folder = folder_of(args.target, Hub(args.revision), weights=False)
    else:
        folder = Path(args.model) / converted.TARGET
    return folder, config_of(read_json(folder / "config.json"), str(folder / "config.json"))
