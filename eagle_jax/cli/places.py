"""Checks paths for output before the work, and writes them atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eagle_jax.files import atomic
from eagle_jax.measure import plot

MARK = "written by eagle-jax"  # in every report and picture, so that a later run may replace it


def check_file(option: str, path: str) -> None:
    """Raises ValueError, naming the option, if this file cannot be written. Leaves it as it is."""
    place = Path(path)
    if not place.name or place.is_dir():
        raise ValueError(f"{option} {path}: is a folder; name a file in it")
    if place.exists() and not place.is_file():
        raise ValueError(f"{option} {path}: exists and is not a regular file; choose another")
    if not place.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {place.parent} to write it to; make it first")
    # Test by writing: permissions do not say whether the file system is read-only or full.
    probe = place.with_name(f".{place.name}")
    try:
        if place.exists():
            open(place, "ab").close()
        if not probe.exists():
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written ({error.strerror}); choose another") from error


def check_report(option: str, path: str) -> None:
    """Checks like `check_file`; also refuses an existing file that is neither empty nor marked with MARK."""
    check_file(option, path)
    place = Path(path)
    if place.is_file() and place.stat().st_size and MARK.encode() not in place.read_bytes():
        raise ValueError(f"{option} {path}: exists and was not {MARK}; choose another, or remove it")


def check_picture(option: str, path: str) -> None:
    """Checks like `check_report`; also refuses a format that pictures cannot have."""
    plot.check(option, path)
    check_report(option, path)


def write_json(path: str, report: dict[str, Any]) -> None:
    """Writes a report atomically."""
    atomic.write_json(Path(path), {"note": MARK, **report})
