"""What a comparison says, in tables and words: shared by `eagle-jax bench` and `eagle-jax demo`."""

from __future__ import annotations

from typing import Any

from eagle_jax.measure.compare import Comparison, Result

NOTES = (
    "Target passes: after the prompt's pass, summed over prompts. Tokens a pass: the mean accepted length, bonus token "
    "counted, without the first token, which comes from the prompt's pass. Ms a pass and tok/s: of whole calls, where "
    "the prompt's pass counts as one; medians, without compilation."
)


def table(comparison: Comparison, title: str | None = None) -> Any:
    """The rich table of a comparison."""
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
    """The rich table of how acceptance changes along the texts."""
    from rich.table import Table

    table = Table(title="speculative, by position in the text (prompt included)", title_justify="left")
    for name in ("positions", "tokens", "tokens a pass"):
        table.add_column(name, justify="right")
    for part in comparison.by_position:
        rate = "" if part.tokens_a_pass is None else f"{part.tokens_a_pass:.2f}"
        table.add_row(f"{part.start} to {part.end - 1}", str(part.tokens), rate)
    return table


def repeats_itself(plain: Result) -> str:
    """How much the plain texts repeat themselves, in words."""
    return f"Distinct 4-grams of the plain texts: {plain.distinct_4grams:.2f}; the fewer, the easier to draft."


def verdict(comparison: Comparison) -> str:
    """Whether the tokens were identical, in words."""
    if comparison.differences is None:
        text = "Two samples of a text differ by chance (with --coupled they would not)."
    else:
        text = f"Identical tokens: {comparison.identical} of {len(comparison.plain.tokens)} rows."
    if comparison.differences:
        text += f" First difference: {comparison.differences[0]}."
    text += f" {repeats_itself(comparison.plain)}"
    failed = comparison.plain.failed + comparison.speculative.failed
    return text + (f" {failed} rows ended in NaN or infinite logits!" if failed else "")
