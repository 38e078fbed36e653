"""Precomputed features: the target's hidden states of a run's rows, written once and reused by later runs.

    folder/manifest.json           fingerprints of model and data, and checksums of the files
    folder/train-2048-00000.npy    a shard of train or held_out, rows of one length: [positions, F + H or H]

A shard concatenates a few rows without padding, except the first padded position (see STORED_PADDING). A position holds
the F features that the head reads, then the target's last hidden state (H). For EAGLE-1 both are the same and stored
once; so a run of EAGLE-1 reads a folder of EAGLE-3, too. bfloat16 is stored as uint16, bit by bit.

Letters: N rows, S positions of a row, F width of the features, H width of the target.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from eagle_jax.files import checksums
from eagle_jax.files.atomic import new_file, sync, write_json
from eagle_jax.models.llama import Llama
from eagle_jax.models.target import Target
from eagle_jax.train import fingerprint
from eagle_jax.train.config import TrainSettings
from eagle_jax.train.data.dataset import Dataset
from eagle_jax.train.report import Say

SHARD_BYTES = 256 << 20
# The official alignment reads the answer one position after a document's last token.
STORED_PADDING = 1
MANIFEST = "manifest.json"
ENDS = "target without layers"  # key of the manifest, which folders of earlier versions lack
AGAIN = "run `eagle-jax train` with the same settings and --precompute"

Rows = Mapping[int, Sequence[Sequence[int]]]  # {row length: documents of each row}, see `assemble.rows_of`


class FeaturesError(ValueError):
    """Raised for features of another run, unfinished or damaged ones."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """The layout of a position. features: F, or 0 if the head reads the last hidden state. hidden: H."""

    dtype: str
    features: int
    hidden: int

    @property
    def width(self) -> int:
        return self.features + self.hidden

    @property
    def stored(self) -> np.dtype:
        """Returns the dtype of the files."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def real(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else self.stored


@dataclasses.dataclass(frozen=True)
class Group:
    """The rows of one length. starts: [N + 1], offsets of the rows' positions. shard_rows: rows of a shard."""

    split: str
    length: int
    starts: np.ndarray
    shard_rows: int

    def shard_of(self, row: int) -> int:
        return row // self.shard_rows

    def shards(self) -> range:
        return range(-(-(len(self.starts) - 1) // self.shard_rows))

    def rows(self, shard: int) -> range:
        """Returns the rows of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, len(self.starts) - 1))

    def positions(self, shard: int) -> int:
        """Returns the number of positions in a shard."""
        rows = self.rows(shard)
        return int(self.starts[rows.stop] - self.starts[rows.start])

    @property
    def title(self) -> str:
        return f"{self.split}-{self.length}"

    def name(self, shard: int) -> str:
        return f"{self.title}-{shard:05d}.npy"


def contents_of(settings: TrainSettings, head: Any, target: Target) -> Contents:
    """Returns the layout of the features that this run's head reads."""
    hidden = target.config.hidden_size
    return Contents(settings.dtype, len(head.taps(target)) * hidden, hidden)


def groups_of(
    settings: TrainSettings,
    splits: Mapping[str, tuple[Dataset, Rows]],
    contents: Contents,
    shard_bytes: int = SHARD_BYTES,
) -> list[Group]:
    """Divides the rows of each split and length into shards of about `shard_bytes`."""
    groups = []
    for split, (data, rows) in splits.items():
        lengths = data.lengths
        for length, own in sorted(rows.items()):
            stored = [min(int(lengths[list(row)].sum()) + STORED_PADDING, length) for row in own]
            starts = np.concatenate([[0], np.cumsum(stored, dtype=np.int64)])
            together = pass_rows(settings, length)  # rows computed at once must go to one shard
            fitting = shard_bytes // (length * contents.width * contents.stored.itemsize)
            groups.append(Group(split, length, starts, max(1, fitting // together) * together))
    return groups


def pass_rows(settings: TrainSettings, length: int) -> int:
    """Returns the micro-batch size, with which training runs the target, too."""
    return settings.rows(length) // settings.accumulation


def stored(settings: TrainSettings, head: Any, target: Llama, splits: Mapping[str, tuple[Dataset, Rows]]) -> Features:
    """Opens settings.features, and checks that it holds this run's features. The target may lack its layers."""
    contents = contents_of(settings, head, target)
    made, groups = made_from(settings, head, target, splits, contents), groups_of(settings, splits, contents)
    return Features(Path(str(settings.features)), made, contents, groups)


def made_from(
    settings: TrainSettings,
    head: Any,
    target: Llama,
    splits: Mapping[str, tuple[Dataset, Rows]],
    contents: Contents,
) -> dict[str, Any]:
    """Returns everything that the features depend on, as JSON values; without the layers that the target lacks."""
    made: dict[str, Any] = {
        "taps": list(head.taps(target)),
        "dtype": contents.dtype,
        "width": contents.width,
        ENDS: fingerprint.of_model(target.without_layers()),
        "alignment": "official" if settings.loss.alignment == "official" else "corrected",
    }
    if target.layers:
        made["target"] = fingerprint.of_model(target)
    for split, (data, rows) in splits.items():
        digest = hashlib.sha256()
        for array in (data.tokens, data.offsets):
            for start in range(0, len(array), 1 << 24):  # memory-mapped arrays may exceed memory
                digest.update(array[start : start + (1 << 24)].tobytes())
        digest.update(json.dumps(sorted((length, list(map(list, own))) for length, own in rows.items())).encode())
        made[f"{split} rows"] = digest.hexdigest()
    return made


def write(
    folder: Path,
    made: dict[str, Any],
    contents: Contents,
    groups: Sequence[Group],
    compute: Callable[[Group, range], np.ndarray],
    say: Say,
) -> None:
    """Writes the missing shards.

    Args:
      made: from `made_from`.
      compute: returns the positions of some rows of a group, [positions, F + H or H].
    Raises:
      FeaturesError: if the folder holds features of another run.
      OSError: if the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(folder) or {"made_from": {}, "shard_rows": {}, "shards": {}}
    _check_same(folder, manifest["made_from"], made)
    groups = _as_written(groups, manifest)
    manifest["made_from"] |= made
    manifest["shard_rows"] |= {group.title: group.shard_rows for group in groups}
    known = manifest["shards"]
    missing = [
        (group, shard)
        for group in groups
        for shard in group.shards()
        if not _is_whole(folder / group.name(shard), known.get(group.name(shard)))
    ]
    position = contents.width * contents.stored.itemsize
    needed = sum(group.positions(shard) for group, shard in missing) * position
    total = sum(len(group.shards()) for group in groups)
    say(f"features: {total} shards, {total - len(missing)} there already; {needed / 1e9:,.2f} GB to write to {folder}")
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{folder}: the features take {needed / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB left")
    for group, shard in missing:
        name = group.name(shard)
        array = compute(group, group.rows(shard))
        assert (array.shape, array.dtype) == ((group.positions(shard), contents.width), contents.real)
        with new_file(folder / name) as partial:
            with open(partial, "wb") as file:
                np.save(file, array.view(contents.stored))
                sync(file)
            known[name] = {"bytes": partial.stat().st_size, "sha256": checksums.of_file(partial)}
        write_json(folder / MANIFEST, manifest)
        say(f"written: {folder / name}, rows {group.rows(shard).stop} of {len(group.starts) - 1}")


class Features:
    """Reads a folder of `write`. The checksum of a shard is verified at its first use.

    Raises:
      FeaturesError: if the folder is missing, incomplete, or of another run.
    """

    def __init__(self, folder: Path, made: dict[str, Any], contents: Contents, groups: Sequence[Group]):
        self.folder, self.contents = folder, contents
        manifest = _manifest(folder)
        if manifest is None:
            raise FeaturesError(f"{folder}: there are no features ({MANIFEST}); {AGAIN} {folder}")
        theirs = manifest["made_from"]
        # Every kind of head stores the last hidden state, which is all that a head without taps reads.
        wider = contents.features == 0 and theirs.get("width", 0) > contents.width
        of_kind = {"taps", "width"} if wider else set()
        _check_same(folder, theirs, {name: value for name, value in made.items() if name not in of_kind})
        self.first_number = theirs["width"] - contents.width if wider else 0
        groups = _as_written(groups, manifest)
        self.groups = {(group.split, group.length): group for group in groups}
        self.known = manifest["shards"]
        for group in groups:
            for name in map(group.name, group.shards()):
                if not _is_whole(folder / name, self.known.get(name)):
                    raise FeaturesError(f"{folder / name}: this shard of the features is missing or cut; {self._fix()}")
        self.verified: set[str] = set()

    def _fix(self) -> str:
        return f"{AGAIN} {self.folder}, which writes what is missing"

    def batch(self, split: str, length: int, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns features [rows, S, F] and answers [rows, S, H] of rows of one length; padding is zero."""
        contents, group = self.contents, self.groups[split, length]
        made = np.zeros((len(rows), length, contents.width), contents.real)
        for place, row in enumerate(map(int, rows)):
            shard = group.shard_of(row)
            first = group.starts[group.rows(shard).start]
            part = self._shard(group.name(shard))[group.starts[row] - first : group.starts[row + 1] - first]
            part = np.ascontiguousarray(part[:, self.first_number :])
            made[place, : len(part)] = part.view(contents.real)
        answers = made[..., contents.features :]
        return {"features": made[..., : contents.features] if contents.features else answers, "answers": answers}

    def _shard(self, name: str) -> np.ndarray:
        """Memory-maps a shard for one use: keeping all open could exceed the limit on open files."""
        path = self.folder / name
        if name not in self.verified:
            if checksums.of_file(path) != self.known[name].get("sha256"):
                raise FeaturesError(f"{path}: this shard of the features is damaged; remove it and {self._fix()}")
            self.verified.add(name)
        return np.load(path, mmap_mode="r")


def know_ends(folder: Path) -> bool:
    """Returns whether the features of a folder fit a target by the weights outside of its layers.

    Raises:
      FeaturesError: if the manifest is damaged.
    """
    return ENDS in (_manifest(folder) or {"made_from": {}})["made_from"]


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FeaturesError(f"{path}: not JSON ({error}); remove the folder and {AGAIN} {folder}") from error
    parts = [manifest.get(name) for name in ("made_from", "shard_rows", "shards")] if isinstance(manifest, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise FeaturesError(f"{path}: damaged, parts of it are missing; remove the folder and {AGAIN} {folder}")
    return manifest


def _check_same(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuses features that were computed from other inputs. A split that the folder lacks is allowed to differ."""
    different = [name for name in ours if name in theirs and theirs[name] != ours[name]]
    if different:
        raise FeaturesError(
            f"{folder} holds features of another run ({', '.join(different)} differ): they fit one target, one choice "
            f"of taps, one data set and one way of filling rows; {AGAIN} ANOTHER_FOLDER, or remove this one first"
        )


def _as_written(groups: Sequence[Group], manifest: dict[str, Any]) -> list[Group]:
    """Returns the groups with the shard sizes of the manifest, which another batch size may have determined."""
    rows = manifest["shard_rows"]
    return [dataclasses.replace(group, shard_rows=rows.get(group.title, group.shard_rows)) for group in groups]


def _is_whole(path: Path, known: dict[str, Any] | None) -> bool:
    return isinstance(known, dict) and path.is_file() and path.stat().st_size == known.get("bytes")
