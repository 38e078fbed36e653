"""Reads files of JSON values, for prompts and training data: one a line (JSON Lines), or one array of them.

A value that cannot be read does not end the file: its entry holds a `Fault`, and the caller stops or goes on.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_DEPTH = 100  # of nested lists and objects: what reads a value later is recursive
BYTE_ORDER_MARKS = {  # the longer ones first: a UTF-32 mark begins with a UTF-16 one
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
WHITE_SPACE = re.compile(r"[ \t\n\r]*")


class Fault(ValueError):
    """Describes what is wrong with one value. kind: a short name, to count by."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Entry(NamedTuple):
    """Holds a line or a value of a file.

    line: from 1, where it begins. value: a Fault in place of what cannot be read. number: in a JSON array, from 1.
    """

    path: str
    line: int
    value: Any
    number: int | None = None

    @property
    def where(self) -> str:
        """Names its place: "a.jsonl:3", or "a.json:1, entry 3" in an array."""
        return f"{self.path}:{self.line}" + (f", entry {self.number}" if self.number else "")


class DataError(ValueError):
    """Raised for an entry that cannot be used. The message begins "path:line: kind: "; these are attributes, too."""

    def __init__(self, entry: Entry, fault: Fault):
        super().__init__(f"{entry.where}: {fault.kind}: {fault}")
        self.path, self.line, self.kind = entry.path, entry.line, fault.kind


def read_lines(path: str | os.PathLike[str]) -> Iterator[Entry]:
    """Yields the lines of a text file that are not blank, without their line ends.

    Args:
      path: UTF-8, with or without a byte order mark, or UTF-16 or UTF-32 with one. A name in .gz is unpacked.
    Raises:
      OSError: if the file cannot be opened.
    """
    path = os.fspath(path)
    for number, line in _lines(path):
        if isinstance(line, Fault):
            yield Entry(path, number, line)
        elif line.strip():
            yield Entry(path, number, _unicode_fault(line) or line)


def read_values(path: str | os.PathLike[str]) -> Iterator[Entry]:
    """Yields the JSON values of a file: one a line, the elements of one array, or objects over several lines.

    Args:
      path: as of `read_lines`. JSON Lines are read as they are asked for, the other forms at once.
    Raises:
      OSError: if the file cannot be opened.
    """
    path = os.fspath(path)
    lines: Iterator[tuple[int, str | Fault]] = _lines(path)
    first = next(((number, line) for number, line in lines if isinstance(line, Fault) or line.strip()), None)
    if first is None:
        return
    if isinstance(first[1], str) and not _is_value(first[1]):
        rest = list(lines)
        whole = _whole(first[1], [line for _, line in rest])
        if whole is not None:
            yield from (Entry(path, first[0] + above, value, index) for above, value, index in whole)
            return
        lines = iter(rest)
    for number, line in itertools.chain([first], lines):
        if isinstance(line, Fault):
            yield Entry(path, number, line)
        elif line.strip():
            yield Entry(path, number, _line_value(line))


def _lines(path: str) -> Iterator[tuple[int, str | Fault]]:
    """Yields all lines with their numbers; bytes that are not UTF-8 become lone surrogates."""
    number = 0
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    wide = next((name for mark, name in BYTE_ORDER_MARKS.items() if line.startswith(mark)), None)
                    if wide is not None:
                        yield from _wide_lines(line + file.read(), wide)
                        return
                    line = line.removeprefix(codecs.BOM_UTF8)
                yield number, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            yield number + 1, Fault("damaged file", f"the rest cannot be unpacked ({error})")


def _wide_lines(content: bytes, encoding: str) -> Iterator[tuple[int, str | Fault]]:
    """Yields the lines of UTF-16 or UTF-32, which zero bytes keep from being split as bytes."""
    try:
        text = content.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        yield 1, Fault("damaged file", f"it begins as {encoding.upper()}, but byte {error.start + 1} cannot be decoded")
        return
    yield from enumerate((line.rstrip("\r") for line in text.split("\n")), start=1)


def _is_value(line: str) -> bool:
    """Returns whether a first line is certainly JSON Lines: a value ends in it, and it is no list."""
    return not line.lstrip().startswith("[") and _value(line, _skip(line, 0))[1] is not None


def _whole(first: str, rest: list[str | Fault]) -> Iterator[tuple[int, Any, int | None]] | None:
    """Returns values of an array, or of objects over several lines, as (lines before it, value, index in the array).

    Returns:
      None if the file is JSON Lines after all.
    """
    cut = next((line for line in rest if isinstance(line, Fault)), None)
    text = "\n".join([first, *(line for line in rest if isinstance(line, str))])  # a Fault is the last one
    if first.lstrip().startswith("["):
        more = any(isinstance(line, Fault) or line.strip() for line in rest)
        if more and not isinstance(_line_value(first), Fault):
            return None
        return _with_lines(text, _elements(text), cut)
    return None if _value(text, _skip(text, 0))[1] is None else _with_lines(text, _objects(text), cut)


def _with_lines(text: str, found: Iterator[tuple[int, Any, int | None]], cut: Fault | None) -> Iterator[Any]:
    """Converts offsets in the text to numbers of lines. cut: the Fault that ends the file early, if one does."""
    above = last = 0
    for place, value, index in found:
        above, last = above + text.count("\n", last, place), place
        yield above, value, index
    if cut is not None:
        yield above + text.count("\n", last), cut, None


def _elements(text: str) -> Iterator[tuple[int, Any, int | None]]:
    """Yields the elements of an array, as (place, value, index). What follows broken JSON cannot be found."""
    place = _skip(text, _skip(text, 0) + 1)
    if text[place : place + 1] != "]":
        for index in itertools.count(1):
            value, end = _value(text, place)
            yield place, value, index
            if end is None:
                return
            place = _skip(text, end)
            if text[place : place + 1] != ",":
                break
            place = _skip(text, place + 1)
    if text[place : place + 1] != "]":
        yield place, Fault("invalid JSON", "the array is not closed here; what follows is not read"), None
    elif (after := _skip(text, place + 1)) < len(text):
        yield after, Fault("invalid JSON", "text follows the end of the array"), None


def _objects(text: str) -> Iterator[tuple[int, Any, int | None]]:
    """Yields values that follow one another, as (place, value, None)."""
    place = _skip(text, 0)
    while place < len(text):
        value, end = _value(text, place)
        yield place, value, None
        if end is None:
            return
        place = _skip(text, end)


def _skip(text: str, place: int) -> int:
    """Returns the first place from `place` on that is not white space."""
    found = WHITE_SPACE.match(text, place)
    assert found is not None
    return found.end()


def _line_value(line: str) -> Any:
    """Returns the value of a line that holds nothing else, or a Fault."""
    value, end = _value(line, _skip(line, 0))
    if end is not None and line[_skip(line, end) :]:
        return Fault("invalid JSON", f"more follows the value at column {_skip(line, end) + 1}")
    return value


def _value(text: str, start: int) -> tuple[Any, int | None]:
    """Returns the JSON value that begins at `start`, or a Fault, and its end; None where that cannot be known."""
    constants: list[str] = []  # NaN and the infinities, which Python writes and JSON lacks
    try:
        value, end = json.JSONDecoder(parse_constant=constants.append).raw_decode(text, start)
    except json.JSONDecodeError as error:
        below = text.count("\n", start, error.pos)
        place = f"column {error.colno}" + (f" of its line {below + 1}" if below else "")
        return _unicode_fault(text, start, error.pos + 1) or Fault("invalid JSON", f"{error.msg} at {place}"), None
    except RecursionError:
        return Fault("invalid JSON", "lists or objects are nested too deeply"), None
    except ValueError as error:  # numbers that are too long
        return Fault("invalid JSON", str(error)), None
    if fault := _unicode_fault(text, start, end):
        return fault, end
    if constants:
        return Fault("invalid JSON", f"{constants[0]} is no JSON; write null or a number"), end
    if _too_deep(value):
        return Fault("invalid JSON", f"lists or objects are nested too deeply, more than {MAX_DEPTH} of them"), end
    if "\\ud" in text[start:end].lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return Fault("not UTF-8", "it has half of a surrogate pair (\\ud800 to \\udfff alone)"), end
    return value, end


def _unicode_fault(text: str, start: int = 0, end: int | None = None) -> Fault | None:
    """Returns a Fault for characters of text[start:end] that stand for no text: tokenizers fail on them."""
    part = text[start:end]
    try:
        part.encode("utf-8")
    except UnicodeEncodeError as error:
        place = start + error.start
        byte = ord(text[place]) - 0xDC00  # as "surrogateescape" writes it
        if not 0x80 <= byte <= 0xFF:
            return Fault("not UTF-8", "it has half of a surrogate pair; save as UTF-8")
        before = text[text.rfind("\n", 0, place) + 1 : place].encode("utf-8", "surrogateescape")
        return Fault("not UTF-8", f"byte {len(before) + 1} of the line is {byte:#04x}; save as UTF-8")
    if "\0" in part:
        return Fault("not UTF-8", "it holds zero bytes, as UTF-16 without a byte order mark does; save as UTF-8")
    return None


def _too_deep(value: Any) -> bool:
    """Returns whether lists and objects are nested more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [node for node in level if isinstance(node, dict | list)]
        if not level:
            return False
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    return True
