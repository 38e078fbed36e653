"""eagle-jax generate: the continuation of one prompt."""

from __future__ import annotations

import argparse
import functools
import itertools
import sys

from eagle_jax.cli.models import add_decoding_arguments, add_model_arguments

EXAMPLES = """\
examples:
  eagle-jax generate --model llama-8b/ --prompt "Why is the sky blue?"
  eagle-jax generate --model llama-8b/ --prompt - --max-new-tokens 512 < question.txt
  eagle-jax generate --model llama-8b/ --prompt "Why is the sky blue?" --baseline
  eagle-jax generate --target vicuna/ --draft EAGLE-Vicuna/ --prompt "USER: Hi ASSISTANT:" --raw --tree 5,8,32

The text goes to stdout, coloured on a terminal where the draft proposed it. A summary goes to stderr: its tok/s is
decoding alone, from the first token to the last; compilation and the prompt's pass are not in it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the prompt; - reads it from stdin")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--baseline", action="store_true", help="plain decoding, without the draft")
    add_decoding_arguments(parser, max_new_tokens=256)


def run(args: argparse.Namespace) -> int:
    """Streams the continuation; returns 1 if the model's numbers broke down on the way."""
    import jax
    from rich.console import Console

    from eagle_jax import SamplingConfig, convert, pad, stream
    from eagle_jax.cli import models, prompts, text

    notes = Console(stderr=True, highlight=False)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with notes.status("loading"):
        loaded = models.load_models(args)
        tokenizer = convert.tokenizer(loaded.folder)
    if loaded.draft is None and not args.baseline:
        raise ValueError("there is no draft head here; for plain decoding add --baseline")
    tokens, lengths = pad([prompts.encode(tokenizer, prompt, args.raw)])
    length, width = int(lengths[0]), tokens.shape[1]
    capacity = models.capacity(loaded.target, length, width, args.max_new_tokens)
    stops = models.stop_tokens(loaded)
    start = functools.partial(
        stream,
        loaded.target,
        None if args.baseline else loaded.draft,
        tokens,
        lengths,
        tree=args.tree,
        sampling=SamplingConfig(temperature=args.temperature),
        max_new_tokens=args.max_new_tokens,
        stop_tokens=stops,
        capacity=capacity,
        cycles_per_chunk=1,
    )
    with notes.status("compiling"):  # the first two chunks run every program once
        jax.block_until_ready(list(itertools.islice(start(), 2)))
    result = text.show(start(), tokenizer, Console(highlight=False))
    notes.print(result.summary, style="dim", soft_wrap=True)

    most = min(args.max_new_tokens, (capacity or width + args.max_new_tokens) - length)
    if len(result.tokens) < most and (not result.tokens or result.tokens[-1] not in stops):
        print("error: the model's logits became NaN or infinite, so the text ends early", file=sys.stderr)
        return 1
    return 0
