"""Formats measurements as tables, sentences and JSON, for `bench`, `bench --drafts` and `demo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from eagle_jax.measure.compare import Comparison, Result
from eagle_jax.measure.machine import describe_setting
from eagle_jax.measure.statistics import Range
from eagle_jax.sampling import RANGES

NOTES = (
    "Target passes: after the prompt's pass, summed over prompts. Tokens a pass: the mean accepted length, bonus token "
    "counted, without the first token, which comes from the prompt's pass. Ms a pass and tok/s: of whole calls, where "
    "the prompt's pass counts as one; medians, without compilation."
)


def title(args: argparse.Namespace, setting: dict[str, Any], source: str) -> str:
    """Formats what was measured, where and when, in two lines."""
    sampled = "greedy" if args.temperature == 0 else f"temperature {args.temperature:g}, seed {args.seed}"
    return (
        f"{source}, batch {args.batch}, at most {args.max_new_tokens} new tokens, {sampled}, {args.repeats} repeats\n"
        f"{describe_setting(setting)}"
    )


def table(comparison: Comparison, title: str | None = None) -> Any:
    """Returns the rich table of a comparison."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=NOTES, caption_justify="left")
    table.add_column("decoding", no_wrap=True)
    for name in ("tokens", "target passes", "tokens a pass", "ms a pass", "tok/s", "ratio"):
        table.add_column(name, justify="right")
    for name, result, ratio in (
        ("plain", comparison.plain, 1.0),
        ("speculative", comparison.speculative, comparison.ratio),
    ):
        figures = f"{result.tokens_a_pass:.2f}", f"{result.ms_a_pass:.2f}", f"{result.rate:.1f}", f"{ratio:.2f}"
        table.add_row(name, str(result.new_tokens), str(result.cycles), *figures)
    return table


def position_table(comparison: Comparison) -> Any:
    """Returns the rich table of acceptance by position in the texts."""
    from rich.table import Table

    table = Table(title="speculative, by position in the text (prompt included)", title_justify="left")
    for name in ("positions", "tokens", "tokens a pass"):
        table.add_column(name, justify="right")
    for part in comparison.by_position:
        rate = "" if part.tokens_a_pass is None else f"{part.tokens_a_pass:.2f}"
        table.add_row(f"{part.start} to {part.end - 1}", str(part.tokens), rate)
    return table


def repeats_itself(plain: Result) -> str:
    """Says how much the plain texts repeat themselves."""
    return f"Distinct 4-grams of the plain texts: {plain.distinct_4grams:.2f}; the fewer, the easier to draft."


def verdict(comparison: Comparison) -> str:
    """Says whether plain and speculative decoding gave the same tokens."""
    if comparison.differences is None:
        text = "Two samples of a text differ by chance (with --coupled they would not)."
    else:
        text = f"Identical tokens: {comparison.identical} of {len(comparison.plain.tokens)} rows."
    if comparison.differences:
        text += f" First difference: {comparison.differences[0]}."
    text += f" {repeats_itself(comparison.plain)}"
    failed = comparison.plain.failed + comparison.speculative.failed
    return text + (f" {failed} rows ended in NaN or infinite logits!" if failed else "")


def figures(result: Result) -> dict[str, Any]:
    """Returns a result as JSON values."""
    return {
        "new_tokens": result.new_tokens,
        "target_passes": result.cycles,
        "accepted": result.accepted,
        "distinct_4grams": result.distinct_4grams,
        "tokens_a_pass": result.tokens_a_pass,
        "ms_a_pass": result.ms_a_pass,
        "tokens_a_second": result.rate,
        "seconds": result.seconds,
        "failed_rows": result.failed,
    }


def asked_for(args: argparse.Namespace, source: str, rows: int) -> dict[str, Any]:
    """Returns the options of a measurement as JSON values."""
    return {
        "model": args.model if args.model is not None else {"target": args.target, "draft": args.draft},
        "prompts": source,
        "rows": rows,
        "batch": args.batch,
        "repeats": args.repeats,
        "max_new_tokens": args.max_new_tokens,
        "draft_window": args.draft_window,
        "confidence": args.confidence,
        "lookup": args.lookup,
        "sampling": {name: getattr(args, name) for name in (*RANGES, "coupled", "seed")},
        "logit_bias": [f"{id}={value:g}" for id, value in args.logit_bias],
    }


def positions(parts: Sequence[Range]) -> list[dict[str, Any]]:
    """Returns ranges of positions as JSON values."""
    return [{**vars(part), "tokens_a_pass": part.tokens_a_pass} for part in parts]


def report(args: argparse.Namespace, source: str, comparison: Comparison) -> dict[str, Any]:
    """Returns a comparison of plain and speculative decoding as JSON values."""
    return {
        **asked_for(args, source, len(comparison.plain.tokens)),
        "plain": figures(comparison.plain),
        "speculative": figures(comparison.speculative),
        "ratio": comparison.ratio,
        "identical_rows": comparison.identical,
        "differences": [vars(difference) for difference in comparison.differences or ()],
        "by_position": positions(comparison.by_position),
    }
