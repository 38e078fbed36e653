"""Reads the .jsonl file that an earlier run over many prompts wrote, to resume it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from eagle_jax.cli.places import check_file
from eagle_jax.files.resumable import changed, read_headed

LONG = 200  # characters shown of a longer value
FINGERPRINT = re.compile('"[0-9a-f]{64}"')
COMMAND, ADVICE = "`generate --prompts`", "choose another --out"


def read_finished(path: str, settings: dict[str, Any], whole: bool = True) -> dict[tuple[int, int], int]:
    """Returns what an earlier run finished, {(index, sample): failed texts}; empty if there is no file.

    Args:
      settings: all that the texts depend on, as JSON has it.
      whole: False if these are only some of the settings; the others are then not compared.
    Raises:
      ValueError: if the file is another run's, is no output of this command, or cannot be written.
    """
    check_file("--out", path)
    before, records = read_headed(Path(path), COMMAND, ADVICE)
    if not records:
        return {}
    if not whole:
        before = {name: before.get(name) for name in settings}
    if different := changed(before, settings):
        told = (f"{name} {_short(before.get(name))}, now {_short(settings.get(name))}" for name in different)
        raise ValueError(f"{path} was written with other settings ({'; '.join(told)}); go on with those, or {ADVICE}")
    for number, record in enumerate(records, start=2):
        if not isinstance(record, dict) or type(record.get("index")) is not int:
            raise ValueError(f"{path}, line {number}: not an output line of {COMMAND}; {ADVICE}")
    keys = [(record["index"], record.get("sample", 0)) for record in records]
    failed = Counter(key for key, record in zip(keys, records, strict=True) if record.get("finish") == "failed")
    return {key: failed[key] for key, record in zip(keys, records, strict=True) if is_last(record)}


def is_last(record: dict[str, Any]) -> bool:
    """Returns whether a record is its conversation's last turn, which completes it."""
    return record.get("turn", 0) + 1 == record.get("turns", 1)


def _short(value: Any) -> str:
    """Formats a setting as JSON; cuts off fingerprints and long values."""
    text = json.dumps(value)
    most = 12 if FINGERPRINT.fullmatch(text) else LONG
    return text if len(text) <= most else text[:most] + "..."
