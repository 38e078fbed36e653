"""Tokenised documents in memory-mapped files, and their packing into sequences (rows) of a batch.

    folder/tokens.npy     int32 [T]      all documents, concatenated
    folder/mask.npy       uint8 [T]      1 for the tokens to learn
    folder/offsets.npy    int64 [N + 1]  where each document starts
    folder/about.json                    checksums of files and settings that it was made from
    folder/checksums.json                see checksums.py; older versions wrote none

Letters: N documents, T tokens in all, S positions of a row.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eagle_jax.files import checksums
from eagle_jax.files.atomic import new_folder, write_json

ANEW = "remove this folder: its documents are made anew from the data files"
OPEN_ROWS = 64  # rows that packing considers for the next document


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Concatenated documents: tokens [T], mask [T], offsets [N + 1]."""

    tokens: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns tokens and mask of a document."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[part], self.mask[part]

    def row(self, documents: Sequence[int], width: int) -> dict[str, np.ndarray]:
        """Concatenates documents into a row of `width` positions, right-padded."""
        row = {name: np.zeros(width, np.int32) for name in ("tokens", "loss_mask", "documents")}
        start = 0
        for number, index in enumerate(documents):
            tokens, mask = self.document(index)
            end = start + len(tokens)
            row["tokens"][start:end], row["loss_mask"][start:end], row["documents"][start:end] = tokens, mask, number
            start = end
        row["documents"][start:] = len(documents)
        return row | {"lengths": np.array(start, np.int32)}


class NothingToLearn(ValueError):
    """Raised if there is no document to train on."""


def write(folder: Path, records: Iterable[Any], about: dict[str, Any]) -> Dataset:
    """Writes the `tokens` and `loss_mask` of records to a folder, atomically."""
    lengths = [0]
    with new_folder(folder.resolve()) as place:
        with open(place / "tokens", "wb") as tokens, open(place / "mask", "wb") as mask:
            for record in records:
                tokens.write(np.asarray(record.tokens, np.int32).tobytes())
                mask.write(np.asarray(record.loss_mask, np.uint8).tobytes())
                lengths.append(len(record.tokens))
        if len(lengths) == 1:
            raise NothingToLearn("there is no document to learn from")
        for name, dtype in (("tokens", np.int32), ("mask", np.uint8)):
            np.save(place / f"{name}.npy", np.memmap(place / name, dtype, "r"))
            os.remove(place / name)
        np.save(place / "offsets.npy", np.cumsum(np.array(lengths, np.int64)))
        write_json(place / "about.json", about)
        checksums.write(place, list(place.iterdir()))
    return read(folder)


def read(folder: Path) -> Dataset:
    """Opens a folder of `write`, memory-mapped.

    Raises:
      ValueError: naming a damaged file.
    """
    try:
        fault = checksums.fault(folder) if jax.process_index() == 0 else None  # one process verifies for all
    except FileNotFoundError:
        fault = None
    try:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "mask", "offsets")]
    except (OSError, ValueError, EOFError) as error:
        fault = fault or str(error)
    if fault is not None:
        raise ValueError(f"{folder}: {fault}; {ANEW}")
    return Dataset(*arrays)


def about(folder: Path) -> dict[str, Any] | None:
    """Returns the about.json of a folder; None if it does not exist.

    Raises:
      ValueError: naming the file, if it is damaged.
    """
    path = folder / "about.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {ANEW}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: damaged; {ANEW}")
    return found


def pack(lengths: Sequence[int] | np.ndarray, width: int, seed: int = 0) -> list[list[int]]:
    """Packs whole documents into rows by best fit among OPEN_ROWS open rows; returns the documents of each row.

    Args:
      lengths: [N], at most `width` each.
      seed: of the order in which documents are placed.
    """
    rows: list[list[int]] = []
    room: list[int] = []  # free positions of the open rows, which are rows[-len(room):]; the oldest is closed first
    for index in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        length = int(lengths[index])
        best = min((place for place in range(len(room)) if room[place] >= length), key=room.__getitem__, default=None)
        if best is None:
            rows.append([])
            room.append(width)
            if len(room) > OPEN_ROWS:
                del room[0]
            best = len(room) - 1
        rows[len(rows) - len(room) + best].append(index)
        room[best] -= length
    return rows


def in_buckets(lengths: Sequence[int] | np.ndarray, buckets: Sequence[int]) -> dict[int, list[list[int]]]:
    """Puts each document into a row of the shortest bucket that fits: {row length: documents of each row}."""
    which = np.searchsorted(np.asarray(buckets), np.asarray(lengths))
    rows = {bucket: np.flatnonzero(which == i)[:, None].tolist() for i, bucket in enumerate(buckets)}
    return {bucket: chosen for bucket, chosen in rows.items() if chosen}
