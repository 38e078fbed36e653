"""Resuming a run: checks which settings changed, and records the changes.

output/settings.yaml            the current settings
output/settings_history.jsonl   a line per change: time, last step before it, and {setting: [before, since]}
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import yaml

from eagle_jax.files.atomic import write_text
from eagle_jax.train.config import TrainSettings, read_settings

SETTINGS = "settings.yaml"
HISTORY = "settings_history.jsonl"
# Settings and sections that may change when a run resumes. The others define the loss, the data and its order.
# batch_tokens must not change: the position in the data is counted in batches.
MAY_CHANGE = {
    "output",
    "features",
    "steps",
    "epochs",
    "mesh",
    "accumulation",
    "optimizer",
    "dtype",
    "save_dtype",
    "save_format",
    "checkpoints",
    "evaluation",
    "log_every",
}
PATHS = {"target", "model", "start", "data.train", "data.held_out", "data.chat_template"}  # "m/" equals "m"
STAYS = {"optimizer.name"}  # another optimizer has another state
NOT_NOTED = {"output"}  # moving a run is no change


def begun(output: Path) -> bool:
    """Returns whether the folder holds a run."""
    return (output / SETTINGS).is_file()


def changes(output: Path, settings: TrainSettings) -> dict[str, tuple[Any, Any]]:
    """Returns {setting: (before, now)} for a run to resume; empty for a new run.

    Raises:
      ValueError: if a setting changed that must not.
    """
    if not begun(output):
        return {}
    # A setting that was added after the run began takes its default.
    before, now = (_flat(s.model_dump(mode="json")) for s in (read_settings(output / SETTINGS), settings))
    changed = {
        name: (before[name], now[name])
        for name in now
        if before[name] != now[name] and not (name in PATHS and _path(before[name]) == _path(now[name]))
    }
    refused = [name for name in changed if name.split(".")[0] not in MAY_CHANGE or name in STAYS]
    if refused:
        sections = sorted({name if name in STAYS else name.split(".")[0] for name in refused})
        what = ", ".join(f"{name} was {_word(changed[name][0])}, is {_word(changed[name][1])}" for name in refused)
        raise ValueError(
            f"{output} holds a run with other settings ({', '.join(sections)}): {what}; choose another output, or "
            "those settings"
        )
    return {name: pair for name, pair in changed.items() if name not in NOT_NOTED}


def note(output: Path, settings: TrainSettings, changed: dict[str, tuple[Any, Any]], step: int) -> None:
    """Writes the settings and, after a change, a line of the history. step: the last one under the old settings."""
    if changed:
        path = output / HISTORY
        earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
        line = {"time": datetime.datetime.now().isoformat(timespec="seconds"), "step": step, "changed": changed}
        write_text(path, earlier + json.dumps(line) + "\n")
    write_text(output / SETTINGS, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))


def in_words(changed: dict[str, tuple[Any, Any]]) -> str:
    """Formats changes for the log."""
    return ", ".join(f"{name} {_word(before)} -> {_word(now)}" for name, (before, now) in changed.items())


def _path(value: Any) -> Any:
    """Normalises a path, or a list of paths."""
    return list(map(_path, value)) if isinstance(value, list) else value and os.path.normpath(value)


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings: {"optimizer.learning_rate": ..., ...}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
