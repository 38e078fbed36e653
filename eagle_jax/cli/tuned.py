"""Reads and writes tuned.json: the fastest trees that `eagle-jax tune` found, one per device, dtype and batch."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.drafts.registry import kind_of
from eagle_jax.files.atomic import write_json
from eagle_jax.measure import machine
from eagle_jax.tree import BestPrefixes, TreeConfig

NAME = "tuned.json"
KEY = ("device", "dtype", "batch")  # the fields that identify an entry


def folder_of(args: argparse.Namespace) -> Path | None:
    """Returns the folder of tuned.json: that of --model or of --draft; None for a draft named by hub id."""
    if args.model is not None:
        return Path(args.model)
    return Path(args.draft) if args.draft is not None and Path(args.draft).is_dir() else None


def read(folder: Path | None) -> list[dict[str, Any]]:
    """Reads the entries of a folder; none if it has no such file.

    Raises:
      ValueError: for a file that `eagle-jax tune` did not write.
    """
    path = None if folder is None else folder / NAME
    if path is None or not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:
            tree_of(entry)
            device, dtype, batch = (entry[name] for name in KEY)
            if not (isinstance(device, str) and isinstance(dtype, str) and type(batch) is int and batch > 0):
                raise TypeError(f"device {device!r}, dtype {dtype!r}, batch {batch!r}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a file of `eagle-jax tune` ({error!r}); delete it, or tune again") from error
    return entries


def tree_of(entry: dict[str, Any]) -> TreeConfig | BestPrefixes:
    """Returns the tree of an entry: a dynamic one, or the best of a block, which has no top_k."""
    sizes = entry["tree"]
    return TreeConfig(**sizes) if "top_k" in sizes else BestPrefixes(**sizes)


def find(draft: Any, folder: Path | None, batch: int) -> tuple[TreeConfig | BestPrefixes, str] | None:
    """Finds the tree tuned for this device, the draft's dtype and the nearest batch; returns it and its origin.

    None for a draft whose kind cannot be tuned.

    Args:
      folder: of tuned.json, see `folder_of`.
    """
    kind = kind_of(draft)
    if kind is None or not isinstance(kind.tree, TreeConfig | BestPrefixes):
        return None
    device, dtype = machine.device_name(), np.dtype(draft.dtype).name
    entries = [entry for entry in read(folder) if (entry["device"], entry["dtype"]) == (device, dtype)]
    if not entries:
        return None
    nearest = min(entries, key=lambda entry: (abs(math.log(entry["batch"] / batch)), entry["batch"]))
    return tree_of(nearest), f"tuned on this device for batch {nearest['batch']}"


def write(folder: Path, entry: dict[str, Any]) -> Path:
    """Adds an entry, or replaces that of the same device, dtype and batch."""
    others = [old for old in read(folder) if any(old[name] != entry[name] for name in KEY)]
    write_json(folder / NAME, [*others, entry])
    return folder / NAME
