"""eagle-jax bench --drafts: measures several drafts on the same prompts and target, in one run."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from eagle_jax.cli import places, progress, reports
from eagle_jax.cli.options.draft_options import Candidate, candidates
from eagle_jax.cli.options.model_options import Models
from eagle_jax.measure import machine
from eagle_jax.measure.compare import Measured, compare_several

NOTES = (
    "Tokens a cycle: the mean accepted length, bonus token counted, without each text's first token. Draft: growing "
    "the tree and learning what was accepted; verify: the target's pass; cycle: the whole; rest: what the whole takes "
    "beyond both, 0 where the parts, timed apart, take longer: each alone, greedy, on the first batch of prompts. "
    "tok/s and ratio: of whole calls with the prompt's pass; medians, without compilation. Same rows: equal to plain "
    "decoding token for token."
)
SHOWN_DEPTHS = 8


def run(
    args: argparse.Namespace,
    loaded: Models,
    embedded: bool,
    token_lists: Sequence[Sequence[int]],
    source: str,
    options: dict[str, Any],
    notes: Console,
) -> int:
    """Measures, prints, writes; returns 1 if a row ended in NaN or infinite logits."""
    from eagle_jax.measure import plot

    found = candidates(loaded, args.drafts, args, embedded)
    methods = {one.name: (one.draft, one.tree) for one in found}
    calls = len(found) * ((args.repeats + 1) * -(-len(token_lists) // args.batch) + 1)
    with progress.bar(notes, "measuring", calls) as advance:
        measured = compare_several(loaded.target, methods, token_lists, **options, progress=advance)
    setting = machine.setting(loaded.target)
    console = Console(highlight=False)
    proposes = [f"{one.name}: {one.words}" for one in found if one.words]
    console.print("\n".join([reports.title(args, setting, source), *proposes]), soft_wrap=True, markup=False)
    console.print(_table(measured))
    console.print(NOTES)
    for one in measured:
        if methods[one.name][0] is None:
            console.print(reports.repeats_itself(one.result))
    if any(one.result.accepted_at for one in measured):
        console.print("\nShare of cycles that accepted the 1st, 2nd, ... draft token:")
        console.print(_depth_table(measured))
    failed = sum(one.result.failed for one in measured)
    if failed:
        console.print(f"{failed} rows ended in NaN or infinite logits!")
    if args.json is not None:
        rows = len(measured[0].result.tokens)
        report = {**setting, **reports.asked_for(args, source, rows), "drafts": _reports(found, measured)}
        places.write_json(args.json, report)
    if args.plot is not None:
        figure = plot.drafts(measured, machine.describe_setting(setting))
        plot.save(figure, args.plot, places.MARK)
    return 1 if failed else 0


def _table(measured: Sequence[Measured]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("draft", no_wrap=True)
    parts = ("draft\nms", "verify\nms", "rest\nms", "cycle\nms")
    for name in ("cycles", "tokens\na cycle", *parts, "tok/s", "ratio", "same\nrows"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in measured:
        result, phases = one.result, one.phases
        table.add_row(
            one.name,
            str(result.cycles),
            f"{result.tokens_a_pass:.2f}",
            *(f"{ms:.2f}" for ms in (phases.draft, phases.verify, phases.rest, phases.cycle)),
            f"{result.rate:.1f}",
            "" if one.ratio is None else f"{one.ratio:.2f}",
            "" if one.identical is None else f"{one.identical}/{len(result.tokens)}",
        )
    return table


def _depth_table(measured: Sequence[Measured]) -> Table:
    """Returns the rich table of acceptance by draft token."""
    depths = min(SHOWN_DEPTHS, max(len(one.result.accepted_at) for one in measured))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("draft token", no_wrap=True)
    for depth in range(1, depths + 1):
        table.add_column(str(depth), justify="right")
    for one in measured:
        if one.result.accepted_at:
            table.add_row(one.name, *(f"{share:.2f}" for share in one.result.accepted_at[:depths]))
    return table


def _reports(found: Sequence[Candidate], measured: Sequence[Measured]) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "proposes": candidate.shape,
            **reports.figures(one.result),
            "accepted_at_depth": one.result.accepted_at,
            "ms_a_cycle": {**dataclasses.asdict(one.phases), "rest": one.phases.rest},
            "ratio": one.ratio,
            "identical_rows": one.identical,
            "differences": [vars(difference) for difference in one.differences or ()],
            "by_position": reports.positions(one.by_position),
        }
        for candidate, one in zip(found, measured, strict=True)
    ]
