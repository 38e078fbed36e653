"""Defines the format of a converted folder: names, writes, checks and restores its parts.

A part is an orbax item with a flat {path: array} dictionary. There is one for each layer and Medusa head, for the
embedding and the lm_head, and one for the rest.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.read import read_json
from eagle_jax.files import checksums

MANIFEST = "manifest.json"
FORMAT, VERSION = "eagle_jax converted model", 1
TARGET, DRAFT, PARAMETERS = "target", "draft", "parameters"  # folders

CHUNK_BYTES = 32 << 20  # size of a stored file; bounds the buffer of a write or a read


class _Frozen(np.ndarray):
    """Keeps orbax from copying an array before it writes. Nothing may change the array meanwhile."""

    def __deepcopy__(self, memo: dict[int, Any] | None) -> _Frozen:
        return self


def is_conversion(folder: Path) -> bool:
    """Returns whether a folder has the manifest of a converted folder, of any version."""
    try:
        return read_json(folder / MANIFEST).get("format") == FORMAT
    except CheckpointError:
        return False


def part_of(path: str) -> str:
    """Returns the part of a path: "layers.3.attention.q" -> "layers.3", "embed", "lm_head"; all others -> "rest"."""
    layer = re.match(r"(layers|heads)\.\d+", path)
    if layer:
        return layer[0]
    return path if path in ("embed", "lm_head") else "rest"


def parts_of(leaves: Mapping[str, Any]) -> dict[str, list[str]]:
    """Groups paths by part, in the order of `leaves`."""
    parts: dict[str, list[str]] = {}
    for path in leaves:
        parts.setdefault(part_of(path), []).append(path)
    return parts


def describe(array: Any) -> dict[str, Any]:
    """Returns the shape and dtype of an array as a manifest states them."""
    return {"shape": list(array.shape), "dtype": np.dtype(array.dtype).name}


def save_part(folder: Path, arrays: Mapping[str, np.ndarray], chunk_bytes: int = CHUNK_BYTES) -> None:
    """Writes a part in chunks, without orbax's OCDBT, which would buffer the whole part twice.

    Args:
      chunk_bytes: size of a stored file; bounds the buffer of a write or a read.
    """
    import orbax.checkpoint as ocp

    state = {path: array.view(_Frozen) for path, array in arrays.items()}
    chunked = {path: ocp.SaveArgs(chunk_byte_size=chunk_bytes) for path in arrays}
    with _quiet_orbax(), ocp.StandardCheckpointer(use_ocdbt=False) as checkpointer:
        checkpointer.save(folder.absolute(), state, save_args=chunked)
        checkpointer.wait_until_finished()


def restore_part(folder: Path, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a part into arrays with the shapes, dtypes and shardings of `abstract`."""
    import orbax.checkpoint as ocp

    with _quiet_orbax(), ocp.StandardCheckpointer(use_ocdbt=False) as checkpointer:
        return checkpointer.restore(folder.absolute(), dict(abstract))


def folder_sha256(folder: Path) -> str:
    """Returns `checksums.of_folder`. Raises CheckpointError for a file that cannot be read."""
    return checksums.of_folder(folder, of_file=file_sha256)


def file_sha256(path: Path) -> str:
    """Returns `checksums.of_file`. Raises CheckpointError if the file cannot be read."""
    try:
        return checksums.of_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Drops orbax's log line, one for each part, that there are no OCDBT files to merge."""

    def relevant(record: logging.LogRecord) -> bool:
        return "Skipping merge of OCDBT" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(relevant)
    try:
        yield
    finally:
        logger.removeFilter(relevant)
