"""eagle-jax generate: continues one prompt, or all prompts of a file."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys

from eagle_jax.cli import progress, text
from eagle_jax.cli.options.model_options import add_decoding_arguments, add_model_arguments, parse_buckets, positive
from eagle_jax.cli.options.sampling_options import (
    add_sampling_arguments,
    model_asks,
    random_key,
    sampling_config,
    with_logit_bias,
)
from eagle_jax.cli.options.tree_options import BATCH, choose_tree
from eagle_jax.decode.plan import plan
from eagle_jax.decode.prefill import BUCKETS, pad
from eagle_jax.files.prompts import OBJECT, check_text
from eagle_jax.sampling import SamplingConfig

EXAMPLES = """\
examples:
  eagle-jax generate --model llama-8b/ --prompt "Why is the sky blue?"
  eagle-jax generate --model llama-8b/ --prompt - --max-new-tokens 512 < question.txt
  eagle-jax generate --model llama-8b/ --prompt "Why is the sky blue?" --baseline
  eagle-jax generate --model llama-8b/ --prompt "Name a colour." --temperature 0.8 --top-p 0.95 --num-samples 3
  eagle-jax generate --target vicuna/ --draft EAGLE-Vicuna/ --prompt "USER: Hi ASSISTANT:" --raw --stop USER:
  eagle-jax generate --model llama-8b/ --draft prompt-lookup --prompt - < code_to_change.txt
  eagle-jax generate --model llama-8b/ --prompts question.jsonl --out answers.jsonl --batch 16

The text goes to stdout, coloured on a terminal where the draft proposed it. A summary goes to stderr: its tok/s is
decoding alone, from the first token to the last; compilation and the prompt's pass are not in it.

With --prompts and --out: a line of settings, then a JSON line a text as it ends, in any order. Its "finish" says why it
ended: stop (a stop token or string), length (--max-new-tokens), context (the model's is full) or failed. A prompt that
cannot be used fails, with an "error"; the others go on, and the exit code is 1. A prompt of several turns gets a line
for each, with its number as "turn". A run that was stopped (Ctrl-C, too) goes on where it was if the same command is
started again. A text depends on its prompt, the settings and the seed alone, not on --batch.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    add_model_arguments(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the prompt; - reads it from stdin")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help="text, a prompt a line; or JSON Lines (.jsonl) or an array (.json) of strings, or of objects with "
        f'{OBJECT}; their "id" or "question_id" is kept. All also .gz',
    )
    many = parser.add_argument_group("with --prompts")
    many.add_argument("--out", metavar="FILE", help="the .jsonl file for the texts; one that is there is continued")
    many.add_argument(
        "--batch", type=positive, default=BATCH, metavar="B", help="texts at a time (default: %(default)s)"
    )
    many.add_argument(
        "--buckets",
        type=parse_buckets,
        default=BUCKETS,
        metavar="W,W,...",
        help="widths to pad prompts to; a program each (default: powers of two)",
    )
    parser.add_argument("--baseline", action="store_true", help="plain decoding, without the draft")
    add_decoding_arguments(parser, max_new_tokens=256)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--num-samples", type=positive, default=1, metavar="N", help="texts a prompt (default: 1)")
    parser.add_argument(
        "--log-probs", action="store_true", help="add log-probabilities to --out; with --prompt, show their mean"
    )
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Shows or writes the continuations; returns 1 if the model's numbers broke down on the way."""
    from eagle_jax.cli import batch

    sampling = sampling_config(args)  # before the models are loaded, which may take long
    args.stop = text.stop_strings(args)
    if (args.prompts is None) != (args.out is None):
        raise ValueError("--prompts and --out go together: the texts of many prompts go to a file")
    return _show(args, sampling) if args.prompts is None else batch.run(args, sampling)


def _show(args: argparse.Namespace, sampling: SamplingConfig) -> int:
    """Streams the texts of one prompt."""
    import jax
    from rich.console import Console

    from eagle_jax.api import stream
    from eagle_jax.cli.options import model_options
    from eagle_jax.files import prompts

    text.lenient(sys.stdout)
    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    prompt = _stdin() if args.prompt == "-" else check_text("--prompt", args.prompt)
    with progress.status(notes, "loading"):
        loaded = model_options.load_models(args)
        tokenizer = loaded.tokenizer
    draft = model_options.chosen_draft(loaded, args)
    choice = choose_tree(draft, args)
    tokens, lengths = pad([prompts.encode(tokenizer, prompt, args.raw)])
    trained = loaded.target.config.max_position_embeddings
    sizes = plan(tokens.shape[1], args.max_new_tokens, trained=trained, longest=int(lengths[0]))
    ends = text.Ends(args.stop, model_options.stop_tokens(loaded, args), args.max_new_tokens)
    start = functools.partial(
        stream,
        loaded.target,
        draft,
        tokens,
        lengths,
        tree=choice.tree,
        sampling=with_logit_bias(sampling, args, loaded.target.config.vocab_size),
        max_new_tokens=sizes.max_new_tokens,
        stop_tokens=ends.tokens,
        capacity=sizes.capacity,
        log_probs=args.log_probs,
        cycles_per_chunk=1,
    )
    key = jax.random.fold_in(random_key(args), 0)  # the key of the first sequence of `eagle_jax.generate`
    keys = [key] if args.num_samples == 1 else [jax.random.fold_in(key, sample) for sample in range(args.num_samples)]
    for line in filter(None, (choice.words(draft), model_asks(args))):
        notes.print(line, style="dim", soft_wrap=True)
    with progress.status(notes, "compiling"):  # the first two chunks run every program once
        jax.block_until_ready(list(itertools.islice(start(keys[0][None]), 2)))
    failed = False
    for number, key in enumerate(keys, start=1):
        if len(keys) > 1:
            notes.rule(f"sample {number}", style="dim")
        result = text.show(start(key[None]), tokenizer, console, ends)
        notes.print(result.summary, style="dim", soft_wrap=True)
        if result.failed:
            print("error: the model's logits became NaN or infinite, so the text ends early", file=sys.stderr)
        failed |= result.failed
    return 1 if failed else 0


def _stdin() -> str:
    """Reads all of stdin, in UTF-8 or the locale's encoding."""
    if sys.stdin is None:
        raise ValueError("--prompt -: stdin is closed")
    try:
        return check_text("--prompt -, stdin", sys.stdin.read())
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt -, stdin: byte {error.start + 1} is not {error.encoding}; send UTF-8") from error
