"""Results: the .jsonl file that a run over many prompts writes, and that a later run goes on with."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any

from eagle_jax.cli.places import check_file

LONG = 200  # characters: what is longer is shown by its beginning
FINGERPRINT = re.compile('"[0-9a-f]{64}"')
BEGINNING = b'{"settings": {'  # of the first line


def read_finished(path: str, settings: dict[str, Any], whole: bool = True) -> set[tuple[int, int]]:
    """The (index, sample) of the rows that an earlier run finished; none if there is no file.

    Args:
      settings: all that the rows' texts depend on, as JSON has it.
      whole: False if these are only some of the settings; the others are then not compared.
    Raises:
      ValueError: if the file is another run's, is no output of this command, or cannot be written.
    """
    check_file("--out", path)
    content = Path(path).read_bytes() if Path(path).exists() else b""
    if content[: len(BEGINNING)] != BEGINNING[: len(content)]:
        raise ValueError(f"{path} is there already, and not from `generate --prompts`; choose another --out")
    header, *lines = content[: _whole(content)].splitlines() or [b'{"settings": {}}']
    if not lines:
        return set()
    before = _from_json(header, f"{path}, line 1")["settings"]
    names = {**settings, **before} if whole else settings
    changed = [
        f"{name} {_short(before.get(name))}, now {_short(settings.get(name))}"
        for name in names
        if before.get(name) != settings.get(name)
    ]
    if changed:
        raise ValueError(
            f"{path} was written with other settings ({'; '.join(changed)}); go on with those, or choose another --out"
        )
    finished = set()
    for number, line in enumerate(lines, start=2):
        row = _from_json(line, f"{path}, line {number}")
        if not isinstance(row, dict) or type(row.get("index")) is not int:
            raise ValueError(f"{path}, line {number}: not an output line of `generate --prompts`; choose another --out")
        if _is_last(row):
            finished.add((row["index"], row.get("sample", 0)))
    return finished


def _is_last(row: dict[str, Any]) -> bool:
    """Whether a row has its conversation's last turn, with which that is whole."""
    return row.get("turn", 0) + 1 == row.get("turns", 1)


def _short(value: Any) -> str:
    """A setting as JSON; a fingerprint, or what is very long, is cut off."""
    text = json.dumps(value)
    most = 12 if FINGERPRINT.fullmatch(text) else LONG
    return text if len(text) <= most else text[:most] + "..."


def _from_json(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); choose another --out") from error


def _whole(content: bytes) -> int:
    """The length of the content's whole lines: a crash may have torn the last one."""
    return content.rfind(b"\n") + 1


class Results:
    """The file, open to add rows; `read_finished` must have approved of it. A row once written outlasts a crash."""

    def __init__(self, path: str, settings: dict[str, Any]):
        self._file = open(path, "a+b")  # noqa: SIM115 (this object is the context manager)
        self._file.seek(0)
        content = self._file.read()
        whole = _whole(content)
        while content[:whole].count(b"\n") > 1:  # a crash may have torn a conversation between its turns, too
            last = content.rfind(b"\n", 0, whole - 1) + 1
            if _is_last(json.loads(content[last:whole])):
                break
            whole = last
        else:  # no row yet, so the settings may have changed
            whole = 0
        self._file.truncate(whole)
        if whole == 0:
            self.write({"settings": settings})

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, *rows: dict[str, Any]) -> None:
        """Adds lines, at once."""
        lines = (json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n" for row in rows)
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
