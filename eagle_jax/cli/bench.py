"""eagle-jax bench: plain against speculative decoding, side by side."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from eagle_jax.cli.models import add_decoding_arguments, add_model_arguments, positive
from eagle_jax.cli.sampling import add_sampling_arguments, random_key, sampling_config, with_logit_bias
from eagle_jax.sampling import RANGES

EXAMPLES = """\
examples:
  eagle-jax bench --model llama-8b/
  eagle-jax bench --model llama-8b/ --prompts question.jsonl --max-new-tokens 1024 --json result.json
  eagle-jax bench --model llama-8b/ --batch 8 --tree 4,4,16 --repeats 5
  eagle-jax bench --target t1_target/ --draft t1_eagle3/ --prompts token_ids.jsonl --tree 8,10,60

Without --prompts: a few built-in ones, or random tokens if the model has no tokenizer.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    add_model_arguments(parser)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="text, a prompt a line; or .jsonl, a line each: a string, or an object with prompt, text, turns (as in "
        "MT-bench, the first turn) or tokens (ids)",
    )
    add_decoding_arguments(parser, max_new_tokens=128)
    parser.add_argument("--repeats", type=positive, default=3, metavar="R", help="timed runs (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="prompts a call (default: %(default)s)")
    add_sampling_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table; returns 1 if a row ended in NaN or infinite logits."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

    from eagle_jax import convert
    from eagle_jax.cli import measure, models, prompts

    sampling = sampling_config(args)  # before the models are loaded, which may take long
    notes = Console(stderr=True, highlight=False)
    with notes.status("loading"):
        loaded = models.load_models(args)
        # Only text needs the tokenizer; a file of token ids does without.
        tokenizer = functools.cache(lambda: convert.tokenizer(loaded.folder))
    if loaded.draft is None:
        raise ValueError("there is no draft head here, so there is nothing to compare")

    def encode_text(text: str) -> list[int]:
        return prompts.encode(tokenizer(), text, args.raw)

    if args.prompts is None:
        token_lists, source = prompts.default_prompts(loaded.target.config.vocab_size, encode_text)
    else:
        found, source = prompts.read_prompts(args.prompts, encode_text), args.prompts
        token_lists = [prompt.tokens for prompt in found]
    calls = 2 * (args.repeats + 1) * -(-len(token_lists) // args.batch)
    columns = SpinnerColumn(), "measuring", MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task("measuring", total=calls)
        comparison = measure.compare(
            loaded.target,
            loaded.draft,
            token_lists,
            tree=args.tree,
            max_new_tokens=args.max_new_tokens,
            stop_tokens=models.stop_tokens(loaded, args),
            sampling=with_logit_bias(sampling, args, loaded.target.config.vocab_size),
            key=random_key(args),
            batch=args.batch,
            repeats=args.repeats,
            progress=lambda: bar.advance(task),
        )
    setting = measure.setting(loaded.target, args.tree)
    console = Console(highlight=False)
    console.print(measure.table(comparison, _title(args, setting, source)))
    if len(comparison.by_position) > 1:
        console.print(measure.position_table(comparison))
    console.print(measure.verdict(comparison), soft_wrap=True)
    if args.json is not None:
        report = _report(args, setting, source, comparison)
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if comparison.plain.failed + comparison.speculative.failed else 0


def _title(args: argparse.Namespace, setting: dict[str, Any], source: str) -> str:
    tree = setting["tree"]
    sampled = "greedy" if args.temperature == 0 else f"temperature {args.temperature:g}, seed {args.seed}"
    return (
        f"{source}, batch {args.batch}, at most {args.max_new_tokens} new tokens, {sampled}, {args.repeats} repeats\n"
        f"{setting['device']}, jax {setting['jax']}, {setting['dtype']}, tree: depth {tree['depth']}, "
        f"top_k {tree['top_k']}, {tree['num_nodes']} nodes; {setting['date']}"
    )


def _report(args: argparse.Namespace, setting: dict[str, Any], source: str, comparison: Any) -> dict[str, Any]:
    def figures(result: Any) -> dict[str, Any]:
        return {
            "new_tokens": result.new_tokens,
            "target_passes": result.cycles,
            "accepted": result.accepted,
            "tokens_a_pass": result.tokens_a_pass,
            "ms_a_pass": result.ms_a_pass,
            "tokens_a_second": result.rate,
            "seconds": result.seconds,
            "failed_rows": result.failed,
        }

    return {
        **setting,
        "model": args.model if args.model is not None else {"target": args.target, "draft": args.draft},
        "prompts": source,
        "rows": len(comparison.plain.tokens),
        "batch": args.batch,
        "repeats": args.repeats,
        "max_new_tokens": args.max_new_tokens,
        "draft_window": args.draft_window,
        "sampling": {name: getattr(args, name) for name in (*RANGES, "coupled", "seed")},
        "logit_bias": [f"{id}={value:g}" for id, value in args.logit_bias],
        "plain": figures(comparison.plain),
        "speculative": figures(comparison.speculative),
        "ratio": comparison.ratio,
        "identical_rows": comparison.identical,
        "differences": [vars(difference) for difference in comparison.differences or ()],
        "by_position": [{**vars(part), "tokens_a_pass": part.tokens_a_pass} for part in comparison.by_position],
    }
