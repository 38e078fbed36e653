"""tuned.json: the trees that `eagle-jax tune` found fastest, beside the model; one for each device, dtype and batch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.cli import machine
from eagle_jax.convert.place import new_file
from eagle_jax.tree import TreeConfig

NAME = "tuned.json"
KEY = ("device", "dtype", "batch")  # what an entry holds for


def folder_of(args: argparse.Namespace) -> Path | None:
    """Where the models' tuned.json is: the folder of --model, or that of --draft; None for a draft by its hub id."""
    if args.model is not None:
        return Path(args.model)
    return Path(args.draft) if args.draft is not None and Path(args.draft).is_dir() else None


def read(folder: Path | None) -> list[dict[str, Any]]:
    """The entries of a folder; none if it has no such file.

    Raises:
      ValueError: for a file that `eagle-jax tune` did not write.
    """
    path = None if folder is None else folder / NAME
    if path is None or not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:
            TreeConfig(**entry["tree"])
            [entry[name] for name in KEY]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a file of `eagle-jax tune` ({error!r}); delete it, or tune again") from error
    return entries


def find(draft: Any, args: argparse.Namespace) -> TreeConfig | None:
    """The tree tuned for this draft on this device, with its dtype and the command's batch, if there is one."""
    key = {"device": machine.device_name(), "dtype": np.dtype(draft.dtype).name, "batch": getattr(args, "batch", 1)}
    for entry in read(folder_of(args)):
        if all(entry[name] == key[name] for name in KEY):
            return TreeConfig(**entry["tree"])
    return None


def write(folder: Path, entry: dict[str, Any]) -> Path:
    """Puts an entry beside those of other devices, dtypes and batches, in place of an older one of the same."""
    others = [old for old in read(folder) if any(old[name] != entry[name] for name in KEY)]
    with new_file(folder / NAME) as partial:
        partial.write_text(json.dumps([*others, entry], indent=1) + "\n", encoding="utf-8")
    return folder / NAME
