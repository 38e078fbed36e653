"""A file of JSON lines that is written in parts, each of which outlasts a crash, and appears when it is whole."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from eagle_jax.files.atomic import new_file
from eagle_jax.files.lock import locked_file

START_ANEW = "to write it anew, give --overwrite"
EMPTY = hashlib.sha256().hexdigest()
KINDS = {"settings": dict, "inputs": int, "records": int, "bytes": int, "faults": dict}  # of what is noted


class Progress:
    """OUT.partial, open to add to, and OUT.progress.json.

    inputs: lines of input that are done. records: lines of output. faults: {what: lines of input},
      for the caller to count.

    Args:
      say: called if the file system has no locks.
    Raises:
      ValueError: if the file is there already, or was begun with other settings. Locked: if another process writes it.
    """

    def __init__(self, out: Path, settings: dict[str, Any], overwrite: bool, say: Callable[[str], None]):
        self.out, self.settings = out, settings
        self.partial, self.note = part_paths(out)
        check_place(out, overwrite)  # before its lock file is made
        with contextlib.ExitStack() as held:
            held.enter_context(locked_file(out, say))
            check_place(out, overwrite)  # again: another process may have finished it in the meantime
            self._open(overwrite)
            self.held = held.pop_all()

    def _open(self, overwrite: bool) -> None:
        """Opens what is there, or begins anew."""
        settings = self.settings
        known = None if overwrite or not self.note.is_file() else _read(self.note)
        if known is None:
            self.partial.unlink(missing_ok=True)
            known = {"settings": settings, "inputs": 0, "records": 0, "bytes": 0, "faults": {}, "sha256": EMPTY}
        theirs = known["settings"]
        changed = [name for name in {**settings, **theirs} if settings.get(name) != theirs.get(name)]
        if changed:
            raise ValueError(
                f"{self.partial} was begun with other settings or data ({', '.join(changed)}); go on with those, or "
                f"{START_ANEW}"
            )
        self.inputs, self.records, self.bytes = known["inputs"], known["records"], known["bytes"]
        self.faults: collections.Counter[str] = collections.Counter(known["faults"])
        self.partial.touch()
        self.digest = hashlib.sha256()
        with open(self.partial, "rb") as file:
            left = self.bytes
            while part := file.read(min(left, 1 << 20)):
                self.digest.update(part)
                left -= len(part)
        if left:
            raise ValueError(
                f"{self.partial} lost some of its {self.bytes} bytes, it has {self.bytes - left}; {START_ANEW}"
            )
        if known.get("sha256", self.sha256) != self.sha256:  # older versions noted none
            raise ValueError(f"{self.partial} is damaged (its checksum differs); {START_ANEW}")
        self.file = open(self.partial, "ab")  # noqa: SIM115 (this object is the context manager)
        self.file.truncate(self.bytes)  # what was added after the last note

    @property
    def sha256(self) -> str:
        """Of the lines that are done."""
        return self.digest.hexdigest()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()
        self.held.close()

    def add(self, records: Sequence[dict[str, Any]], inputs: int) -> None:
        """Adds the records of so many lines of input; they stay."""
        content = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
        self.file.write(content)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.digest.update(content)
        self.inputs += inputs
        self.records += len(records)
        self.bytes += len(content)
        names = ("settings", "inputs", "records", "bytes", "faults", "sha256")
        with new_file(self.note) as new, open(new, "w", encoding="utf-8") as file:
            json.dump({name: getattr(self, name) for name in names}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """The file appears under its name."""
        self.file.close()
        os.replace(self.partial, self.out)
        self.note.unlink(missing_ok=True)


def part_paths(out: Path) -> tuple[Path, Path]:
    """Of the unfinished lines, and of what they were made from."""
    return out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.progress.json")


def check_place(out: Path, overwrite: bool) -> None:
    """Refuses a file that is there, unless it is to be overwritten or already being so."""
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent} to write it to")
    partial, note = part_paths(out)
    if out.exists() and not overwrite and not (partial.exists() and note.exists()):
        raise ValueError(f"{out} is there already; {START_ANEW}, or choose another --out")
    if partial.exists() and not note.exists() and partial.stat().st_size and not overwrite:
        raise ValueError(f"{partial} is there, without {note.name}; {START_ANEW}")


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {START_ANEW}") from error
    if not isinstance(known, dict) or not all(isinstance(known.get(name), kind) for name, kind in KINDS.items()):
        raise ValueError(f"{path}: damaged, it does not say how far the work is; {START_ANEW}")
    return known
