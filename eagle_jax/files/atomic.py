"""Writes files and folders atomically: beside their place, and renamed into it when they are complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def new_folder(out: Path, keep: Callable[[Path], bool] = lambda path: False) -> Iterator[Path]:
    """Yields an empty folder beside `out` (absolute), which replaces it when the block ends; an error deletes it.

    Args:
      keep: which files of the old folder, by their paths below it, the new one takes over. A file of the same path in
        the new folder comes first.
    """
    settle(out)
    partial, old = _beside(out)
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.is_dir():
            _carry_over(out, partial, keep)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.rename(out, old)
        os.rename(partial, out)
    except BaseException:
        settle(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def added_to(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside `out`, whose entries move into `out` when the block ends; an error deletes it.

    Use it for a folder of the user's that holds nothing of these names. Folders move before files, so that a file (a
    manifest) can mark the whole as complete.
    """
    partial, _ = _beside(out)
    moved: list[str] = []
    try:
        partial.mkdir(parents=True)
        yield partial
        for entry in sorted(partial.iterdir(), key=lambda entry: entry.is_file()):
            os.rename(entry, out / entry.name)
            moved.append(entry.name)
    except BaseException:
        for name in moved:
            os.rename(out / name, partial / name)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def settle(out: Path) -> None:
    """Cleans up after a `new_folder` that was killed: removes its unfinished folder, and puts an old one back."""
    partial, old = _beside(out)
    shutil.rmtree(partial, ignore_errors=True)
    if old.is_dir() and not out.exists():
        os.rename(old, out)


def _beside(out: Path) -> tuple[Path, Path]:
    """Returns the paths of the new and the old folder during the replacement. Fixed: the next run finds them."""
    return out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")


def _carry_over(old: Path, new: Path, keep: Callable[[Path], bool]) -> None:
    """Hard-links files of one folder into another, so that `old` stays complete until it is replaced."""
    for path in files_below(old):
        place = new / path
        if keep(path) and not os.path.lexists(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(old / path, place, follow_symlinks=False)
            except OSError:  # a file system without links
                shutil.copy2(old / path, place, follow_symlinks=False)


def files_below(folder: Path) -> list[Path]:
    """Returns the paths of all files below a folder, relative to it, sorted. A link to a folder counts as a file."""
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [Path(root, name).relative_to(folder) for name in files + links]
    return sorted(found)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, which replaces it when the block ends; an error deletes it."""
    partial = path.with_name(f".partial.{path.name}")  # writers of pictures take the format from the suffix
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, atomically, and flushes it to the disk."""
    with new_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        sync(file)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON; see `write_text`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def sync(file: IO[Any]) -> None:
    """Flushes an open file to the disk, so that a power failure loses nothing of it."""
    file.flush()
    os.fsync(file.fileno())
