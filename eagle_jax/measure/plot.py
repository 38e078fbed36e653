"""Draws pictures with matplotlib: a comparison of drafts, and a draft tree."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.files.atomic import new_file
from eagle_jax.measure.compare import Measured
from eagle_jax.measure.drawn import Drawn

FORMATS = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}  # and what each calls the program it is from
ACCEPTED, REJECTED, BONUS = "tab:green", "0.6", "tab:orange"
PARTS = {"draft": "tab:blue", "verify": "tab:orange", "rest": "0.6"}


def check(option: str, path: str) -> None:
    """Raises ValueError, naming the option, if no picture can be made for this path. Call it before the work."""
    if Path(path).suffix not in FORMATS:
        raise ValueError(f"{option} {path}: a picture's name ends in {', '.join(FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install 'eagle-jax[plot]'") from error


def save(figure: Any, path: str, creator: str) -> None:
    """Writes a matplotlib Figure atomically, in the format of the path's suffix.

    Args:
      creator: the program that made it, for the file's metadata.
    """
    kind = Path(path).suffix[1:]
    with new_file(Path(path)) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a token may hold characters that the font lacks
        figure.savefig(partial, format=kind, dpi=150, metadata={FORMATS[f".{kind}"]: creator})


def drafts(measured: Sequence[Measured], title: str) -> Any:
    """Draws four charts of `bench --drafts`: tokens and time a cycle, speed, acceptance by depth.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    names = [one.name for one in measured]
    places = np.arange(len(names))
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    (length, phases), (rate, depth) = figure.subplots(2, 2)
    length.bar(places, [one.result.tokens_a_pass for one in measured], color="tab:green")
    length.set_ylabel("tokens a cycle")
    bottom = np.zeros(len(names))
    for part, colour in PARTS.items():
        heights = np.array([getattr(one.phases, part) for one in measured])
        phases.bar(places, heights, bottom=bottom, color=colour, label=part)
        bottom += heights
    phases.set_ylabel("ms a cycle")
    phases.legend()
    rate.bar(places, [one.result.rate for one in measured], color="tab:purple")
    rate.set_ylabel("tokens a second")
    for place, one in zip(places, measured, strict=True):
        if one.ratio is not None:
            rate.annotate(f"{one.ratio:.2f}", (place, one.result.rate), ha="center", va="bottom")
    for axes in (length, phases, rate):
        axes.set_xticks(places, names, rotation=30, ha="right")
    for one in measured:
        shares = one.result.accepted_at
        if shares:
            depth.plot(np.arange(1, len(shares) + 1), shares, marker="o", label=one.name)
    depth.set_xlabel("draft token")
    depth.set_ylabel("share of cycles that accepted it")
    depth.set_ylim(0, 1.02)
    if depth.lines:
        depth.legend()
    return figure


def tree(drawn: Drawn, title: str) -> Any:
    """Draws a draft tree from the top down, as `Drawn` describes it.

    Returns:
      A matplotlib Figure.
    """
    from matplotlib.figure import Figure

    columns = _columns(drawn)
    depth = max(node.depth for node in drawn.nodes) + 1
    width = max(columns.values()) + 1
    figure = Figure(figsize=(max(6, 1.1 * width), max(3, 1.2 * (depth + 1))), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, parse_math=False)
    axes.set_axis_off()
    for node in drawn.nodes:
        if node.parent is not None:
            colour = ACCEPTED if node.accepted else REJECTED
            ends = [columns[node.parent], columns[node.index]], [-drawn.node(node.parent).depth, -node.depth]
            axes.plot(*ends, color=colour, linewidth=2.5 if node.accepted else 1, zorder=1)
    for node in drawn.nodes:
        label = node.text if node.probability is None else f"{node.text}\n{node.probability:.2g}"
        _box(axes, columns[node.index], -node.depth, label, ACCEPTED if node.accepted else REJECTED)
    last = drawn.node(drawn.last_accepted)
    place = columns[last.index]
    axes.plot([place, place], [-last.depth, -depth], color=BONUS, linestyle="dotted", zorder=0)
    _box(axes, place, -depth, "the text ends" if drawn.bonus is None else drawn.bonus, BONUS)
    axes.margins(0.08)
    return figure


def _box(axes: Any, x: float, y: float, label: str, colour: str) -> None:
    style = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": colour}
    axes.text(x, y, label, ha="center", va="center", fontsize=8, bbox=style, zorder=2, parse_math=False)


def _columns(drawn: Drawn) -> dict[int, float]:
    """Returns the column of every node: a leaf takes the next free one, an inner node the mean of its children's."""
    children: dict[int, list[int]] = {}
    for node in drawn.nodes:
        if node.parent is not None:
            children.setdefault(node.parent, []).append(node.index)
    columns: dict[int, float] = {}
    leaves = 0

    def place(index: int) -> float:
        nonlocal leaves
        below = [place(child) for child in children.get(index, ())]
        if not below:
            below, leaves = [float(leaves)], leaves + 1
        columns[index] = sum(below) / len(below)
        return columns[index]

    place(0)
    return columns
