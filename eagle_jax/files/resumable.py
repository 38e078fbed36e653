"""Writes JSON lines that survive a crash, and resumes after those that an earlier run wrote.

A file holds the settings that its lines were made with, and a run with other settings is refused. There are two forms:

    headed   OUT                 the settings in its first line, then records, to be read as soon as they are added
    staged   OUT.partial         the lines so far; renamed to OUT when it is complete
             OUT.progress.json   the settings, how much is done, and the checksum of the lines
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eagle_jax.files.atomic import sync, write_json
from eagle_jax.files.lock import locked_file

HEADER = b'{"settings": {'  # how a headed file begins
START_ANEW = "to write it anew, give --overwrite"
EMPTY = hashlib.sha256().hexdigest()
KINDS = {"settings": dict, "inputs": int, "records": int, "bytes": int, "faults": dict}  # fields of the note


class JsonLines:
    """Appends JSON lines to a file.

    Args:
      size: the bytes to keep. What follows them, which a crash may have torn, is cut off.
    """

    def __init__(self, path: Path, size: int):
        self.file = open(path, "ab")  # noqa: SIM115 (this object is the context manager)
        self.file.truncate(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()

    def append(self, *values: Mapping[str, Any]) -> bytes:
        """Adds lines and flushes them to the disk; returns their bytes."""
        # "replace": a text may hold half of a surrogate pair, which UTF-8 cannot write.
        lines = (json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for value in values)
        content = b"".join(lines)
        self.file.write(content)
        sync(self.file)
        return content


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns the names of settings that differ, or that one of both lacks."""
    return [name for name in {**now, **before} if before.get(name) != now.get(name)]


class HeadedLines(JsonLines):
    """Opens a headed file, or begins one. Hold `locked_file`, and check the file by `read_headed` before.

    Args:
      is_last: whether a record completes a group of records. An incomplete group at the end of the file is cut off.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], is_last: Callable[[Any], bool] = lambda record: True):
        content = path.read_bytes() if path.exists() else b""
        size = content.rfind(b"\n") + 1
        while start := content.rfind(b"\n", 0, max(size - 1, 0)) + 1:  # where the last record begins
            if is_last(json.loads(content[start:size])):
                break
            size = start
        else:
            size = 0  # there is no record, so the settings may have changed
        super().__init__(path, size)
        if size == 0:
            self.append({"settings": settings})


def read_headed(path: Path, made_by: str, advice: str) -> tuple[dict[str, Any], list[Any]]:
    """Reads the settings and the records of a headed file, without a last line that a crash tore.

    Args:
      made_by: the command that writes such files. advice: what the user can do about another file. Both for messages.
    Returns:
      Empty ones if there is no file, or no record yet.
    Raises:
      ValueError: if the file has another form, or a line is no JSON.
    """
    content = path.read_bytes() if path.exists() else b""
    if content[: len(HEADER)] != HEADER[: len(content)]:
        raise ValueError(f"{path} is there already, and not from {made_by}; {advice}")
    values = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); {advice}") from error
    return (values[0]["settings"], values[1:]) if values[1:] else ({}, [])


class StagedLines(JsonLines):
    """Opens or begins OUT.partial with OUT.progress.json, locked while it is open.

    inputs: how many inputs are done. records: how many lines. faults: {what: inputs}, for the caller to count.

    Args:
      say: called if the file system has no locks.
    Raises:
      ValueError: if the file is there already, was begun with other settings, or is damaged. Locked: if another process
        writes it.
    """

    def __init__(self, out: Path, settings: dict[str, Any], overwrite: bool, say: Callable[[str], None]):
        self.out, self.settings = out, settings
        self.partial, self.note = part_paths(out)
        check_place(out, overwrite)  # before its lock file is made
        with contextlib.ExitStack() as held:
            held.enter_context(locked_file(out, say))
            check_place(out, overwrite)  # again: another process may have finished it in the meantime
            known = None if overwrite or not self.note.is_file() else _read_note(self.note)
            if known is None:
                self.partial.unlink(missing_ok=True)
                known = {"settings": settings, "inputs": 0, "records": 0, "bytes": 0, "faults": {}, "sha256": EMPTY}
            if different := changed(known["settings"], settings):
                raise ValueError(
                    f"{self.partial} was begun with other settings or data ({', '.join(different)}); go on with those, "
                    f"or {START_ANEW}"
                )
            self.inputs, self.records, self.bytes = known["inputs"], known["records"], known["bytes"]
            self.faults: collections.Counter[str] = collections.Counter(known["faults"])
            self.digest = _digest(self.partial, self.bytes)
            if known.get("sha256", self.sha256) != self.sha256:  # older versions noted none
                raise ValueError(f"{self.partial} is damaged (its checksum differs); {START_ANEW}")
            super().__init__(self.partial, self.bytes)
            self.held = held.pop_all()

    @property
    def sha256(self) -> str:
        """The SHA-256 of the finished lines."""
        return self.digest.hexdigest()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self.held.close()

    def add(self, records: Sequence[Mapping[str, Any]], inputs: int) -> None:
        """Appends the records of `inputs` more inputs, and notes that these are done."""
        content = self.append(*records)
        self.digest.update(content)
        self.inputs += inputs
        self.records += len(records)
        self.bytes += len(content)
        write_json(self.note, {name: getattr(self, name) for name in (*KINDS, "sha256")})

    def finish(self) -> None:
        """Renames the complete file to OUT."""
        self.file.close()
        os.replace(self.partial, self.out)
        self.note.unlink(missing_ok=True)


def part_paths(out: Path) -> tuple[Path, Path]:
    """Returns the paths of the unfinished lines and of the note on them."""
    return out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.progress.json")


def check_place(out: Path, overwrite: bool) -> None:
    """Raises ValueError if `StagedLines` cannot write a file: one is there that is neither its own nor overwritten."""
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent} to write it to")
    partial, note = part_paths(out)
    if out.exists() and not overwrite and not (partial.exists() and note.exists()):
        raise ValueError(f"{out} is there already; {START_ANEW}, or choose another --out")
    if partial.exists() and not note.exists() and partial.stat().st_size and not overwrite:
        raise ValueError(f"{partial} is there, without {note.name}; {START_ANEW}")


def _digest(partial: Path, size: int) -> hashlib._Hash:
    """Returns the SHA-256 of a file's first bytes, to go on with. Raises ValueError if it is shorter."""
    digest, left = hashlib.sha256(), size
    partial.touch()
    with open(partial, "rb") as file:
        while part := file.read(min(left, 1 << 20)):
            digest.update(part)
            left -= len(part)
    if left:
        raise ValueError(f"{partial} lost some of its {size} bytes, it has {size - left}; {START_ANEW}")
    return digest


def _read_note(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {START_ANEW}") from error
    if not isinstance(known, dict) or not all(isinstance(known.get(name), kind) for name, kind in KINDS.items()):
        raise ValueError(f"{path}: damaged, it does not say how far the work is; {START_ANEW}")
    return known
