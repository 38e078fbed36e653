"""Writes the metrics of a run: JSON lines, TensorBoard, and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eagle_jax.files.atomic import new_file, write_text


class Metrics:
    """Appends {"step": ..., name: number or list} to metrics.jsonl, and the same numbers to tensorboard/.

    Only process 0 writes.
    """

    def __init__(self, folder: Path, step: int):
        """Drops the lines after `step`, the step that a killed run resumes from."""
        self.board = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [line for line in read(self.path) if line["step"] <= step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes numbers, and lists of numbers, which TensorBoard shows as name/0, name/1, ..."""
        if self.board is None:
            return
        plain = {name: np.asarray(value, np.float64).tolist() for name, value in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step} | plain) + "\n")
        for name, value in plain.items():
            many = enumerate(value) if isinstance(value, list) else ()
            for tag, number in [(f"{name}/{i}", v) for i, v in many] or [(name, value)]:
                self.board.add_scalar(tag, number, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics file; skips damaged lines, such as a truncated last one."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def plot(folder: Path) -> Path | None:
    """Plots loss and accepted length over the steps to plot.png; returns None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = read(folder / "metrics.jsonl")
    figure = Figure(figsize=(9, 5))
    axes = figure.add_subplot()
    for name, label in (("loss", "loss"), ("held_out_loss", "held-out loss")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    points = [(line["step"], line["tokens_a_cycle"]) for line in lines if "tokens_a_cycle" in line]
    if points:
        right = axes.twinx()
        right.plot(*zip(*points, strict=True), color="tab:green", marker="o", markersize=3, label="tokens a cycle")
        right.set_ylabel("accepted length (tokens a target pass)")
        right.legend(loc="upper right")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center")
    figure.tight_layout()
    path = folder / "plot.png"
    with new_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return path
