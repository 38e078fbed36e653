"""Converts official checkpoints to a folder that loads directly into shardings.

    out/manifest.json                        contents, sources and checksums
    out/target/config.json, tokenizer.json   copied, as other small files are; for GGUF made from its metadata
    out/target/parameters/<part>/            orbax items: embed, layers.0, ..., lm_head, rest
    out/draft/config.json, parameters/       the same for the draft, if there is one

The write is atomic: a new folder beside `out`, renamed when it is complete. previous.py handles a folder that was
there before.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.convert import converted
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.heads.choices import HeadChoices
from eagle_jax.convert.hub import Hub
from eagle_jax.convert.match import Match, match_pair
from eagle_jax.convert.previous import READING, SMALL, Previous
from eagle_jax.convert.read import CONFIG, Checkpoint
from eagle_jax.files.atomic import settle, write_json
from eagle_jax.models import params
from eagle_jax.version import __version__

Progress = Callable[[int, int], None]  # (bytes done, total): source files hashed and parameters written


def convert(
    target: str | Path,
    draft: str | Path | None,
    out: str | Path,
    *,
    dtype: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    revision: str | None = None,
    draft_revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    head: HeadChoices | None = None,
) -> Path:
    """Converts a target and its draft (or a target alone) to a folder for `load`.

    Args:
      target: a Hugging Face folder or hub id, or a GGUF file of Llama's architecture.
      draft: another, which holds an EAGLE head, Medusa heads, or a smaller model of the target's vocabulary.
      out: the folder to write, absent or empty. A folder that holds the same conversion is left as it is.
      dtype: "float32", "bfloat16" or "float16"; None keeps the target's own, for both models.
      overwrite: also write into a folder with other contents. Replaces only the files of a previous conversion, once
        the new ones are complete; all other files stay.
      progress: called now and then with the bytes done and the total.
      note: called with sentences about earlier files: which stay, and which are out of date.
      revision, draft_revision, token, local_files_only: of hub ids; see `from_pretrained`.
      head: settles what the config.json of an EAGLE head leaves open. The folder keeps what was taken.
    Returns:
      The absolute path of `out`.
    Raises:
      CheckpointError: a damaged or contradictory source, or an `out` that is taken.
      ConfigError: a config that is not implemented, or a draft that does not fit its target.
    """
    out, note = Path(out).resolve(), note or (lambda sentence: None)
    settle(out)
    previous = Previous.of(out)
    previous.check(target, draft, overwrite)
    hub, draft_hub = (Hub(wanted, token, local_files_only) for wanted in (revision, draft_revision))
    target_match, draft_match = match_pair(target, draft, dtype, hub, draft_hub, head)
    matches = {converted.TARGET: target_match} | ({} if draft_match is None else {converted.DRAFT: draft_match})
    if not previous.is_free and not overwrite:
        if not previous.holds(matches):
            raise previous.taken()
        note(f"{out} holds this conversion already, nothing was written")
        return out

    with previous.replaced() as partial:
        parameter_bytes = sum(_parameter_bytes(match) for match in matches.values())
        _check_room(partial, parameter_bytes)
        report = _Report(progress, parameter_bytes + sum(_source_bytes(match) for match in matches.values()))
        models = {role: _write_model(match, partial / role, report) for role, match in matches.items()}
        small = _write_small_files(target_match.checkpoint, partial / converted.TARGET)
        manifest = _manifest(np.dtype(target_match.model.dtype).name, models, small)
        # Written last: a folder without a manifest does not load.
        write_json(partial / converted.MANIFEST, manifest)
        remarks = previous.remarks(manifest)
    for sentence in remarks:
        note(sentence)
    return out


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(f"{folder.parent}: {needed / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free")


class _Report:
    """Sums the bytes done and reports them to `progress`."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.done, self.total = progress, 0, total

    def add(self, count: int) -> None:
        self.done += count
        if self.progress is not None:
            self.progress(self.done, self.total)


def _manifest(dtype: str, models: dict[str, Any], small: dict[str, str]) -> dict[str, Any]:
    return {
        "format": converted.FORMAT,
        "version": converted.VERSION,
        "package": __version__,
        "dtype": dtype,
        converted.DRAFT: None,
        **models,
        SMALL: small,
    }


def _parameter_bytes(match: Match) -> int:
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in params.flatten(match.model).values())


def _source_bytes(match: Match) -> int:
    return sum(file.stat().st_size for file in match.checkpoint.files)


def _write_small_files(checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """Writes the small files of a target; returns {path below the folder: sha256}."""
    sums = {}
    for path in checkpoint.small_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(checkpoint.read_small(path))
        sums[path] = converted.file_sha256(folder / path)
    return sums


def _write_model(match: Match, folder: Path, report: _Report) -> dict[str, Any]:
    """Writes one model below `folder`; returns its entry in the manifest."""
    folder.mkdir()
    (folder / CONFIG).write_bytes(match.checkpoint.read_small(CONFIG))
    files = {}
    for file in match.checkpoint.files:
        files[file.name] = converted.file_sha256(file)
        report.add(file.stat().st_size)
    entries = {}
    for part, paths in converted.parts_of(params.flatten(match.model)).items():
        part_folder = folder / converted.PARAMETERS / part
        arrays = {path: match.read(path) for path in paths}
        converted.save_part(part_folder, arrays)
        entries[part] = {
            "sha256": converted.folder_sha256(part_folder),
            "arrays": {path: converted.describe(array) for path, array in arrays.items()},
        }
        report.add(sum(array.nbytes for array in arrays.values()))
    reading = {} if match.reading is None else {READING: dataclasses.asdict(match.reading)}
    return {
        "kind": match.kind,
        **reading,
        "source": match.checkpoint.source,
        "files": files,
        "config_sha256": converted.file_sha256(folder / CONFIG),
        "own_embedding": getattr(match.model.config, "own_embedding", False),
        "own_lm_head": getattr(match.model.config, "own_lm_head", True),
        "parts": entries,
    }
