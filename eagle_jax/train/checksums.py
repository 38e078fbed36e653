"""Sizes and SHA-256 of a folder's files, in a file beside them, to detect damaged, truncated or missing files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from eagle_jax.convert.place import new_file
from eagle_jax.train import fingerprint

NAME = "checksums.json"


def write(folder: Path, files: Iterable[Path]) -> None:
    """Writes the checksums of files of a folder. Call it once they are complete."""
    sums = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": fingerprint.of_file(path)}
        for path in sorted(files)
    }
    noted = {"files": sums, "sha256": fingerprint.of_text(json.dumps(sums))}
    with new_file(folder / NAME) as partial:
        partial.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")


def fault(folder: Path) -> str | None:
    """Returns what is wrong with the first file that differs from its checksum; None if all match.

    Raises:
      FileNotFoundError: if the folder has no checksums.
    """
    try:
        noted = json.loads((folder / NAME).read_text(encoding="utf-8"))
        files = noted["files"]
        if noted["sha256"] != fingerprint.of_text(json.dumps(files)):
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
        if fingerprint.of_file(folder / name) != known["sha256"]:
            return f"{name} is damaged (its checksum differs)"
    return None
