"""eagle-jax tune: finds the tree that decodes fastest on this machine, and saves it next to the model."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

from eagle_jax.cli.options.model_options import add_model_arguments, positive
from eagle_jax.cli.options.sampling_options import add_sampling_arguments, random_key, sampling_config

EXAMPLES = """\
examples:
  eagle-jax tune --model llama-8b/
  eagle-jax tune --model llama-8b/ --prompts question.jsonl --batch 8
  eagle-jax tune --target t1_target/ --draft t1_eagle3/ --dtype float32

It measures what a pass over 2 to 64 nodes and a drafted level cost on this machine, and how far the target follows
large trees on the prompts; from these it expects tokens a second of every depth, top_k, number of nodes and temperature
of the draft's scores, and measures the most promising. The fastest goes to tuned.json in the model's folder (the
draft's, with --draft), where other commands find it: they use it on the same device with the same dtype, unless --tree
names another. Of a head that drafts all depths in one pass (DFlash, DSpark, P-EAGLE) it chooses the depth, which is the
size of the block, and the number of nodes. If there are trees for several batches, a command takes the one nearest to
its batch. A command that samples many texts at a time takes the one nearest to batch 8, unless --coupled is given: the
text depends on the tree there, and must not depend on --batch. Only these heads and EAGLE heads can be tuned.
"""
NO_HEAD = "there is no EAGLE head here, nor one that drafts all depths in one pass: only their trees can be tuned"
CANDIDATES = 4  # trees whose decoding is measured at the end
CYCLES = 24  # observed of each prompt, with large trees


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
    add_model_arguments(parser)
    parser.add_argument("--prompts", metavar="FILE", help="sample prompts, as for bench (default: built-in ones)")
    parser.add_argument("--raw", action="store_true", help="take prompts as they are, without the chat template")
    parser.add_argument("--batch", type=positive, default=1, metavar="B", help="prompts a call (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="of the last measurement (default: 128)"
    )
    parser.add_argument("--repeats", type=positive, default=5, metavar="R", help="timed runs (default: %(default)s)")
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Tunes, prints expectations and measurements, and saves the fastest tree."""
    from rich.console import Console

    from eagle_jax.cli import progress, tuned
    from eagle_jax.cli.options import model_options
    from eagle_jax.drafts.eagle.drafting import EagleDraft
    from eagle_jax.measure import machine, samples, tuning, tuning_blocks
    from eagle_jax.tree.named import describe_tree

    sampling = sampling_config(args)
    notes, console = Console(stderr=True, highlight=False), Console(highlight=False)
    args.draft_window = args.confidence = args.lookup = None
    folder = _folder(args)
    with progress.status(notes, "loading"):
        loaded = model_options.load_models(args)
    blocks = tuning_blocks.in_one_pass(loaded.draft)
    if not blocks and not isinstance(loaded.draft, EagleDraft):
        raise ValueError(NO_HEAD)
    check = functools.partial(model_options.check_prompt, target=loaded.target)
    token_lists, source = samples.to_measure(args.prompts, loaded.folder, args.raw, check=check)
    options: dict[str, Any] = {
        "sampling": sampling,
        "key": random_key(args),
        "stop_tokens": model_options.eos_tokens(loaded),
    }

    setting = machine.setting(loaded.target)
    measure = _measure_blocks if blocks else _measure_parts
    seen, costs, expected = measure(loaded, token_lists, args, options, notes)
    expected = tuning.of_each_size(expected)[:CANDIDATES]
    console.print(_observations(seen, costs, f"{source}; {machine.describe_setting(setting)}"))
    results = _try_out(loaded, expected, token_lists, args, options, notes)
    console.print(_table(expected, results, costs, args.batch))

    fastest = max(expected, key=lambda one: results[_name(one.tree)].rate)
    plain, best = results["plain"].rate, results[_name(fastest.tree)].rate
    entry = {
        **setting,
        "batch": args.batch,
        "prompts": source,
        "tree": dataclasses.asdict(fastest.tree),
        "expected": {
            "tokens_a_pass": fastest.tokens,
            "ms_a_pass": fastest.ms,
            "tokens_a_second": args.batch * fastest.rate,
        },
        "measured": {"tokens_a_second": best, "plain_tokens_a_second": plain},
        "costs_ms": dataclasses.asdict(costs),
    }
    path = tuned.write(folder, entry)
    console.print(f"{describe_tree(fastest.tree)}: {best / plain:.2f} times plain decoding. Saved: {path}")
    if best < plain:
        console.print("Plain decoding is faster here: add --baseline to generate, or draft with a better head.")
    return 0


def _measure_parts(
    loaded: Any, token_lists: list[list[int]], args: argparse.Namespace, options: dict[str, Any], notes: Any
) -> tuple[dict[Any, Any], Any, list[Any]]:
    """Returns what the target accepted of large trees, by score temperature, the costs of parts, and expectations."""
    from eagle_jax.cli import progress
    from eagle_jax.measure import tuning

    target, draft, widths = loaded.target, loaded.draft, tuning.widths_for(loaded.draft)
    steps = tuning.measurements(tuning.NODES, widths) + len(tuning.TEMPERATURES)
    with progress.bar(notes, "measuring parts of a cycle", steps) as advance:
        seen = {}
        for temperature in tuning.TEMPERATURES:
            large = tuning.large_tree(widths, temperature)
            seen[temperature] = tuning.observe(target, draft, token_lists, CYCLES, large, **options)
            advance()
        state = _state(loaded, token_lists, args.batch, args.max_new_tokens, tuning.DEPTH)
        costs = tuning.measure_costs(target, draft, state, args.repeats, tuning.NODES, widths, progress=advance)
    return seen, costs, tuning.expectations(seen, costs)


def _measure_blocks(
    loaded: Any, token_lists: list[list[int]], args: argparse.Namespace, options: dict[str, Any], notes: Any
) -> tuple[dict[Any, Any], Any, list[Any]]:
    """Returns what the target accepted of each block's tree, by its depth, the costs of parts, and expectations."""
    from eagle_jax.cli import progress
    from eagle_jax.measure import tuning, tuning_blocks
    from eagle_jax.tree import BestPrefixes

    target, draft = loaded.target, loaded.draft
    depths, nodes = tuning_blocks.depths_for(draft), tuning_blocks.nodes_for(draft)
    steps = tuning_blocks.measurements(nodes, depths) + len(depths)
    with progress.bar(notes, "measuring parts of a cycle", steps) as advance:
        seen = {}
        for depth in depths:
            large = BestPrefixes(depth, nodes[-1])
            seen[depth] = tuning.observe(target, draft, token_lists, CYCLES, large, **options)
            advance()
        state = _state(loaded, token_lists, args.batch, args.max_new_tokens, depths[-1])
        costs = tuning_blocks.measure_costs(target, draft, state, args.repeats, nodes, depths, progress=advance)
    return seen, costs, tuning_blocks.expectations(seen, costs)


def _try_out(
    loaded: Any,
    expected: list[Any],
    token_lists: list[list[int]],
    args: argparse.Namespace,
    options: dict[str, Any],
    notes: Any,
) -> dict[str, Any]:
    """Decodes the prompts plain and with every expected tree; returns the results by `_name`, and "plain"."""
    from eagle_jax.cli import progress
    from eagle_jax.measure import compare

    methods = {"plain": (None, expected[0].tree)} | {_name(one.tree): (loaded.draft, one.tree) for one in expected}
    calls = len(methods) * (args.repeats + 1) * -(-len(token_lists) // args.batch)
    with progress.bar(notes, "measuring", calls) as advance:
        results, _ = compare.decode_in_turn(
            loaded.target,
            methods,
            token_lists,
            max_new_tokens=args.max_new_tokens,
            batch=args.batch,
            repeats=args.repeats,
            progress=advance,
            **options,
        )
    return results


def _folder(args: argparse.Namespace) -> Path:
    """Returns the folder of tuned.json; raises ValueError if it is not writable, or there is no EAGLE head."""
    from eagle_jax.cli import places, tuned
    from eagle_jax.drafts.registry import WEIGHTLESS

    if args.model is None and args.draft in (None, *WEIGHTLESS):
        raise ValueError(NO_HEAD)
    folder = tuned.folder_of(args)
    if folder is None:
        raise ValueError("convert the models first, or name a draft's folder: tuned.json needs a place to be saved")
    if folder.is_dir():  # else loading the models says what is wrong
        places.check_file("tune:", str(folder / tuned.NAME))
    tuned.read(folder)
    return folder


def _state(loaded: Any, token_lists: list[list[int]], batch: int, max_new_tokens: int, depth: int) -> Any:
    """Prefills a greedy state with the first prompts. Its capacity is that of the decoding to come."""
    import jax
    import jax.numpy as jnp

    from eagle_jax.decode.prefill import pad, prefill
    from eagle_jax.measure import phases

    rows = [token_lists[i % len(token_lists)] for i in range(batch)]
    tokens, lengths = pad(rows)
    room = max(max_new_tokens, phases.RUNS * (depth + 1))
    state = jax.jit(prefill, static_argnames="max_new_tokens")(
        loaded.target, loaded.draft, tokens, lengths, max_new_tokens=room
    )
    return dataclasses.replace(state, done=jnp.zeros_like(state.done))


def _name(tree: Any) -> str:
    from eagle_jax.tree import BestPrefixes

    if isinstance(tree, BestPrefixes):
        return f"best:{tree.depth},{tree.num_nodes}"
    return f"{tree.depth},{tree.top_k},{tree.num_nodes} at {tree.score_temperature:g}"


def _observations(seen: dict[Any, Any], costs: Any, title: str) -> Any:
    """Returns the rich table of costs and acceptance."""
    from rich.table import Table

    from eagle_jax.measure import tuning
    from eagle_jax.measure.tuning_blocks import BlockCosts

    table = Table(title=title, title_justify="left", show_header=False)
    join = functools.partial(str.join, "  ")
    table.add_row("a plain step, ms", f"{costs.plain:.2f}")
    table.add_row("verifying, ms by nodes", join(f"{nodes}: {ms:.2f}" for nodes, ms in costs.verify.items()))
    if isinstance(costs, BlockCosts):
        table.add_row("drafting, ms by depth", join(f"{depth}: {ms:.2f}" for depth, ms in costs.block.items()))
        table.add_row(
            "growing the deepest, ms by nodes", join(f"{nodes}: {ms:.2f}" for nodes, ms in costs.grow.items())
        )
        table.add_row("the rest, ms", f"{costs.rest:.2f}")
    else:
        table.add_row("a drafted level, ms by nodes", join(f"{nodes}: {ms:.2f}" for nodes, ms in costs.level.items()))
        table.add_row("drafting beside, and the rest, ms", f"{costs.draft:.2f}  {costs.rest:.2f}")
    what = "of a tree of depth" if isinstance(costs, BlockCosts) else "scores at"
    for key, cycles in seen.items():
        table.add_row(f"accepted by depth, {what} {key:g}", join(f"{rate:.2f}" for rate in tuning.by_depth(cycles)))
    ranks = join(f"{share:.2f}" for share in tuning.by_rank(next(iter(seen.values()))))
    table.add_row("of these the first, second ... child", ranks)
    return table


def _table(expected: list[Any], results: dict[str, Any], costs: Any, batch: int) -> Any:
    """Returns the rich table of trees, expected against measured."""
    from rich.table import Table

    caption = "Expected: of a cycle alone, without the prompt's pass. Measured: of whole calls, medians."
    table = Table(caption=caption, caption_justify="left")
    for name in ("tree, scores at", "expected: tokens a cycle", "ms", "tok/s", "measured: tokens a cycle", "tok/s"):
        table.add_column(name, justify="right")
    plain = results["plain"]
    table.add_row(
        "plain", "1.00", f"{costs.plain:.2f}", f"{1000 * batch / costs.plain:.1f}", "1.00", f"{plain.rate:.1f}"
    )
    for one in expected:
        result = results[_name(one.tree)]
        hoped = f"{one.tokens:.2f}", f"{one.ms:.2f}", f"{one.rate * batch:.1f}"
        table.add_row(_name(one.tree), *hoped, f"{result.tokens_a_pass:.2f}", f"{result.rate:.1f}")
    return table
