"""convert: official checkpoints -> a folder that loads straight into shardings.

    out/manifest.json                        what is here, its sources, and checksums
    out/target/config.json, tokenizer.json   as they came, and further small files of the target
    out/target/parameters/<part>/            orbax items: embed, layers.0, ..., lm_head, rest
    out/draft/config.json, parameters/       the same for the draft, if there is one

The folder is written beside its place and renamed into it when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.convert import parts
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.match import Match, match_pair
from eagle_jax.convert.place import new_folder
from eagle_jax.models import params
from eagle_jax.version import __version__

# Small files that are copied from the target's folder.
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all): source files hashed and parameters written


def convert(
    target: str | Path,
    draft: str | Path | None,
    out: str | Path,
    *,
    dtype: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Converts a target and its draft (or a target alone) to a folder for `load`.

    Args:
      target: a Hugging Face folder or hub id.
      draft: another, which holds an EAGLE head, Medusa heads, or a smaller model of the target's vocabulary.
      out: the folder to write. A previous conversion there is replaced once the new one is complete.
      dtype: "float32", "bfloat16" or "float16"; None keeps the target's own, for both models.
      overwrite: replace whatever else `out` holds, too.
      progress: called now and then with the bytes done and the bytes in all.
    Returns:
      The absolute path of `out`.
    Raises:
      CheckpointError: a damaged or contradictory source, or an `out` that is taken.
      ConfigError: a config that is not implemented, or a draft that does not fit its target.
    """
    out = Path(out).resolve()
    _check_place(out, overwrite, [Path(source).resolve() for source in (target, draft) if source is not None])
    target_match, draft_match = match_pair(target, draft, dtype)
    matches = {parts.TARGET: target_match} | ({} if draft_match is None else {parts.DRAFT: draft_match})

    with new_folder(out) as partial:
        parameter_bytes = sum(_parameter_bytes(match) for match in matches.values())
        _check_room(partial, parameter_bytes)
        report = _Report(progress, parameter_bytes + sum(_source_bytes(match) for match in matches.values()))
        manifest = {
            "format": parts.FORMAT,
            "version": parts.VERSION,
            "package": __version__,
            "dtype": np.dtype(target_match.model.dtype).name,
            parts.DRAFT: None,
            **{role: _write_model(match, partial / role, report) for role, match in matches.items()},
        }
        _copy_small_files(target_match.checkpoint.folder, partial / parts.TARGET)
        # Last: a folder without a manifest does not load.
        (partial / parts.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return out


def _check_place(out: Path, overwrite: bool, sources: list[Path]) -> None:
    for source in sources:
        if source.is_dir() and source.is_relative_to(out):
            raise CheckpointError(f"{out}: is or contains the source {source}; choose another output folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out}: is a file; choose another output folder")
    if any(out.iterdir()) and not overwrite and not parts.is_conversion(out):
        raise CheckpointError(
            f"{out}: is not empty and not a converted folder; choose another, or replace it with --overwrite"
        )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{folder.parent}: {needed / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free")


class _Report:
    """Adds up what is done for `progress`."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.done, self.total = progress, 0, total

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


def _parameter_bytes(match: Match) -> int:
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in params.flatten(match.model).values())


def _source_bytes(match: Match) -> int:
    return sum(file.stat().st_size for file in match.checkpoint.files)


def _write_model(match: Match, folder: Path, report: _Report) -> dict[str, Any]:
    """Writes one model below `folder`; returns its entry in the manifest."""
    folder.mkdir()
    shutil.copyfile(match.checkpoint.config_path, folder / "config.json")
    files = {}
    for file in match.checkpoint.files:
        files[file.name] = parts.file_sha256(file)
        report.add(file.stat().st_size)
    entries = {}
    for part, paths in parts.parts_of(params.flatten(match.model)).items():
        part_folder = folder / parts.PARAMETERS / part
        arrays = {path: match.read(path) for path in paths}
        parts.save_part(part_folder, arrays)
        entries[part] = {
            "sha256": parts.folder_sha256(part_folder),
            "arrays": {path: parts.describe(array) for path, array in arrays.items()},
        }
        report.add(sum(array.nbytes for array in arrays.values()))
    return {
        "kind": match.kind,
        "source": match.checkpoint.source,
        "files": files,
        "config_sha256": parts.file_sha256(folder / "config.json"),
        "own_embedding": getattr(match.model.config, "own_embedding", False),
        "own_lm_head": getattr(match.model.config, "own_lm_head", True),
        "parts": entries,
    }


def _copy_small_files(source: Path, folder: Path) -> None:
    for pattern in COPIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
