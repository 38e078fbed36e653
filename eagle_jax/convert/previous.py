"""Inspects an output folder before a conversion: tells a previous conversion's files from the user's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.convert import converted
from eagle_jax.convert.dialects import build
from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.match import Match
from eagle_jax.convert.read import CONFIG, read_json
from eagle_jax.convert.small_files import small_files
from eagle_jax.files import checksums
from eagle_jax.files.atomic import added_to, files_below, new_folder
from eagle_jax.models.config import ConfigError

READING = "reading"  # key of a model's entry: how the config.json of an EAGLE head was read
SMALL = "small_files"  # key of a manifest: {path below target/: sha256} of the small files
TUNED = "tuned.json"  # written into a converted folder by `eagle-jax tune`
ROLES = (converted.TARGET, converted.DRAFT)


@dataclasses.dataclass(frozen=True)
class Previous:
    """Describes an output folder before a conversion. manifest: that of the conversion in it, or None."""

    out: Path
    manifest: Mapping[str, Any] | None

    @classmethod
    def of(cls, out: Path) -> Previous:
        """Inspects a folder, which may be absent."""
        return cls(out, read_json(out / converted.MANIFEST) if converted.is_conversion(out) else None)

    @property
    def is_free(self) -> bool:
        """Returns whether the folder is absent or empty."""
        return not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir()))

    @functools.cached_property
    def copied(self) -> Mapping[str, str]:
        """Returns {path below target/: sha256} of the small files that the previous conversion copied."""
        listed = (self.manifest or {}).get(SMALL)
        if isinstance(listed, Mapping):
            return listed
        folder = self.out / converted.TARGET  # manifests of older versions do not list them
        return {path: converted.file_sha256(folder / path) for path in small_files(folder)}

    def check(self, target: str | Path, draft: str | Path | None, overwrite: bool) -> None:
        """Checks, before any work, that a conversion may write to the folder.

        Raises:
          CheckpointError: for an `out` that is a file, is or contains a source, or has other contents. With
            `overwrite`: for one that is no converted folder and has files where a conversion writes.
        """
        sources = {converted.TARGET: target} | ({} if draft is None else {converted.DRAFT: draft})
        for source in sources.values():
            if Path(source).exists() and Path(source).resolve().is_relative_to(self.out):
                raise CheckpointError(
                    f"{self.out}: is or contains the source {Path(source).resolve()}; choose another output folder"
                )
        if self.is_free:
            return
        if not self.out.is_dir():
            raise CheckpointError(f"{self.out}: is a file; choose another output folder")
        if not overwrite:
            if self.manifest is None or not self._may_hold(sources):
                raise self.taken()
        elif self.manifest is None:
            in_the_way = [name for name in (converted.MANIFEST, *ROLES) if (self.out / name).exists()]
            if in_the_way:
                raise CheckpointError(
                    f"{self.out}: holds {' and '.join(in_the_way)}, which no conversion wrote but this "
                    "one would replace; choose another output folder, or move that away"
                )

    def taken(self) -> CheckpointError:
        """Returns the error that the folder has other contents."""
        users = self.users()
        stays = f", which keeps {some(users)}" if users else ""
        if self.manifest is None:
            return CheckpointError(
                f"{self.out}: is not empty and not a converted folder; choose another, or write into it with "
                f"--overwrite (overwrite=True){stays}"
            )
        sources = [f"{role} {self._entry(role).get('source')}" for role in ROLES if self._entry(role)]
        return CheckpointError(
            f"{self.out}: holds another conversion ({', '.join(sources)}); choose another folder, or replace it with "
            f"--overwrite (overwrite=True){stays}"
        )

    def holds(self, matches: Mapping[str, Match]) -> bool:
        """Returns whether the folder equals a conversion of these matches, undamaged."""
        assert self.manifest is not None
        dtype = np.dtype(matches[converted.TARGET].model.dtype).name
        if self.manifest.get("version") != converted.VERSION or self.manifest.get("dtype") != dtype:
            return False
        roles = {role for role in ROLES if self._entry(role)}
        try:
            return roles == matches.keys() and all(self._holds_model(role, match) for role, match in matches.items())
        except (CheckpointError, KeyError, TypeError):  # a missing file or manifest entry
            return False

    def is_users(self, path: Path) -> bool:
        """Returns whether a file, by its path below the folder, is the user's: no conversion wrote or left it so."""
        if self.manifest is None:
            return True
        role, *rest = path.parts
        if not rest:
            return role != converted.MANIFEST
        if role not in ROLES:
            return True
        if rest[0] in ("config.json", converted.PARAMETERS):
            return False
        copied = self.copied.get("/".join(rest)) if role == converted.TARGET else None
        return copied is None or converted.file_sha256(self.out / path) != copied

    def replaced(self) -> AbstractContextManager[Path]:
        """Opens a folder for a new conversion, which replaces the previous one when the block ends."""
        if self.manifest is None and not self.is_free:
            return added_to(self.out)
        return new_folder(self.out, keep=self.is_users)

    def users(self) -> list[str]:
        """Returns the paths of the user's files below the folder."""
        paths = [path for path in files_below(self.out) if self.is_users(path)]
        return [path.as_posix() for path in sorted(paths, key=lambda path: (len(path.parts), path))]

    def remarks(self, manifest: Mapping[str, Any]) -> list[str]:
        """Returns sentences for the user about files that were there before the new conversion of this manifest."""
        if self.is_free:
            return []
        written = {f"{converted.TARGET}/{path}" for path in manifest[SMALL]}
        kept: list[str] = []
        replaced: list[str] = []
        for path in self.users():
            (replaced if path in written else kept).append(path)
        found = [f"kept in {self.out}: {some(kept)}"] if kept else []
        if TUNED in kept and any(_weights(self.manifest, role) != _weights(manifest, role) for role in ROLES):
            found.append(f"{TUNED} was made with other weights: run `eagle-jax tune` again, or delete it")
        if replaced:
            found.append(f"replaced, though changed after the previous conversion: {some(replaced)}")
        return found

    def _entry(self, role: str) -> Mapping[str, Any]:
        """Returns the manifest's entry of one model; empty if it is missing or damaged."""
        entry = (self.manifest or {}).get(role)
        return entry if isinstance(entry, Mapping) else {}

    def _may_hold(self, sources: Mapping[str, str | Path]) -> bool:
        """Returns whether the folder may hold a conversion of these sources; hub ids are not downloaded to find out."""
        if {role for role in ROLES if self._entry(role)} != sources.keys():
            return False
        ids = {role: source for role, source in sources.items() if not Path(source).exists()}
        return all(self._entry(role).get("source") == str(source) for role, source in ids.items())

    def _holds_model(self, role: str, match: Match) -> bool:
        entry, folder, source = self._entry(role), self.out / role, match.checkpoint
        files, stored, config = entry.get("files"), entry.get("parts"), entry.get("config_sha256")
        if not isinstance(files, Mapping) or not isinstance(stored, Mapping):
            return False
        small = {path: checksums.of_bytes(source.read_small(path)) for path in source.small_files()}
        return (
            entry.get("kind") == match.kind
            and _same_reading(entry, match)
            and files.keys() == {file.name for file in source.files}
            and checksums.of_bytes(source.read_small(CONFIG)) == config == converted.file_sha256(folder / CONFIG)
            and (role != converted.TARGET or self.copied == small)
            and all(converted.file_sha256(file) == files[file.name] for file in source.files)
            and all(
                converted.folder_sha256(folder / converted.PARAMETERS / part) == stored[part]["sha256"]
                for part in stored
            )
        )


def _same_reading(entry: Mapping[str, Any], match: Match) -> bool:
    """Returns whether a previous conversion read the config.json of an EAGLE head as this match does."""
    if match.reading is None or entry.get(READING) is not None:
        return entry.get(READING) == (None if match.reading is None else dataclasses.asdict(match.reading))
    # Older versions kept no reading: they read a config.json in one way.
    held = [path for path, held in (("embed", "own_embedding"), ("lm_head", "own_lm_head")) if entry.get(held, True)]
    held += ["fc_bias"] if any("fc_bias" in part["arrays"] for part in entry["parts"].values()) else []
    config = match.checkpoint.config
    try:
        return build(match.kind, config, str(match.checkpoint.config_path), match.model.dtype, held=held).config == (
            match.model.config
        )
    except ConfigError:
        return False


def _weights(manifest: Mapping[str, Any] | None, role: str) -> Any:
    """Returns what identifies the weights of a conversion: checksums of the source files, and the dtype."""
    files = ((manifest or {}).get(role) or {}).get("files")
    return files, (manifest or {}).get("dtype")


def some(names: list[str]) -> str:
    """Lists the first few names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
