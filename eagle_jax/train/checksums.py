"""Sizes and SHA-256 of a folder's files, in a file beside them: to notice what was damaged, cut, or copied in part."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from eagle_jax.convert.place import new_file
from eagle_jax.train import fingerprint

NAME = "checksums.json"


def write(folder: Path, files: Iterable[Path]) -> None:
    """Notes files of a folder, to be called once they are whole."""
    sums = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": fingerprint.of_file(path)}
        for path in sorted(files)
    }
    noted = {"files": sums, "sha256": fingerprint.of_text(json.dumps(sums))}
    with new_file(folder / NAME) as partial:
        partial.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")


def fault(folder: Path) -> str | None:
    """The first file that is not as it was noted, and in what way; None if all are.

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
