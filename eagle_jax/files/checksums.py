"""Computes SHA-256 checksums; stores a folder's in checksums.json, to detect damaged, truncated or missing files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from eagle_jax.files.atomic import write_json

NAME = "checksums.json"


def of_file(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_folder(folder: Path, of_file: Callable[[Path], str] = of_file) -> str:
    """Returns a SHA-256 of the names and bytes of all files below a folder."""
    total = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        total.update(f"{file.relative_to(folder).as_posix()} {of_file(file)}\n".encode())
    return total.hexdigest()


def of_bytes(data: bytes) -> str:
    """Returns the SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def of_text(text: str) -> str:
    """Returns the SHA-256 of a text in UTF-8."""
    return of_bytes(text.encode())


def write(folder: Path, files: Iterable[Path]) -> None:
    """Writes the checksums of files of a folder. Call it once they are complete."""
    sums = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": of_file(path)}
        for path in sorted(files)
    }
    write_json(folder / NAME, {"files": sums, "sha256": of_text(json.dumps(sums))})


def fault(folder: Path) -> str | None:
    """Returns what is wrong with the first file that differs from its checksum; None if all match.

    Raises:
      FileNotFoundError: if the folder has no checksums.
    """
    try:
        noted = json.loads((folder / NAME).read_text(encoding="utf-8"))
        files = noted["files"]
        if noted["sha256"] != of_text(json.dumps(files)):
            return f"{NAME} is damaged"
    except (ValueError, KeyError, TypeError):
        return f"{NAME} is damaged"
    for name, known in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != known["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, it was written with {known['bytes']}"
    for name, known in files.items():
        if of_file(folder / name) != known["sha256"]:
            return f"{name} is damaged (its checksum differs)"
    return None
