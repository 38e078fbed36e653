"""Reading lines and JSON values: the forms that files come in, and what is wrong with a value by its place."""

from __future__ import annotations

import gzip
import json

import pytest

from eagle_jax.files.jsonl import DataError, Fault, read_lines, read_values

VALUES = [{"prompt": "caf\u00e9 \U0001f600"}, "text", 3]
LINES = "\n".join(map(json.dumps, VALUES)) + "\n"
RAW = "\n".join(json.dumps(value, ensure_ascii=False) for value in VALUES)
OBJECTS = [{"a": [1, {}]}, {}, {"b": "]}"}]


def found(tmp_path, content: str | bytes, name: str = "a.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_values(path))


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        RAW,
        LINES.replace("\n", "\r\n"),
        "\n \n" + LINES.replace("\n", "\n\n"),
        RAW.encode("utf-8-sig"),
        RAW.encode("utf-16"),
        b"\xfe\xff" + RAW.encode("utf-16-be"),
        RAW.replace("\n", "\r\n").encode("utf-32"),
        json.dumps(VALUES),
        json.dumps(VALUES, indent=1),
        "\n" + json.dumps(VALUES, indent=4, ensure_ascii=False) + "\n\n",
        json.dumps(VALUES, indent=1).encode("utf-16"),
        "[" + LINES.strip().replace("\n", ",\n") + "]",
    ],
)
def test_forms_of_a_file(tmp_path, content):
    assert [entry.value for entry in found(tmp_path, content)] == VALUES


def test_objects_over_several_lines(tmp_path):
    """As `jq` writes them; one object alone, too."""
    for count in (1, 3):
        entries = found(tmp_path, "\n".join(json.dumps(value, indent=2) for value in OBJECTS[:count]))
        assert [entry.value for entry in entries] == OBJECTS[:count]
    assert [entry.line for entry in entries] == [1, 7, 8]


def test_lists_a_line_are_no_array(tmp_path):
    assert [entry.value for entry in found(tmp_path, "[1, 2]\n[3]\n")] == [[1, 2], [3]]
    assert [entry.value for entry in found(tmp_path, "[1, 2]\n\n")] == [1, 2]
    assert found(tmp_path, "[]") == found(tmp_path, "") == found(tmp_path, " \n\n") == []


def test_more_than_a_value_a_line(tmp_path):
    entries = found(tmp_path, '{"a": 1},\n{"a": 2}\n{} {}\n')
    assert [isinstance(entry.value, Fault) for entry in entries] == [True, False, True]
    assert str(entries[0].value) == "more follows the value at column 9"


def test_places(tmp_path):
    path = tmp_path / "a.jsonl"
    assert [entry.where for entry in found(tmp_path, "1\n\n2")] == [f"{path}:1", f"{path}:3"]
    assert [entry.where for entry in found(tmp_path, "[1,\n\n2, 3]")] == [
        f"{path}:{place}" for place in ("1, entry 1", "3, entry 2", "3, entry 3")
    ]


BAD = [  # a value, and what is said of it; the ones beside it are read
    (b'"caf\xe9"', "not UTF-8", "byte 5 of the line is 0xe9"),
    (b'"x \\ud83d y"', "not UTF-8", "half of a surrogate pair"),
    (b'"x \\uDE00"', "not UTF-8", "half of a surrogate pair"),
    (b'"\xed\xa0\x80"', "not UTF-8", "byte 2 of the line is 0xed"),
    (b'{"a": NaN}', "invalid JSON", "NaN is no JSON; write null"),
    (b"[-Infinity]", "invalid JSON", "-Infinity is no JSON"),
    (b"[" * 101 + b"]" * 101, "invalid JSON", "nested too deeply"),
]
BROKEN = [  # what follows in an array is lost
    (b'{"a": 1', "invalid JSON", "Expecting"),
    (b"[" * 100_000, "invalid JSON", "nested too deeply"),
    (b"1" * 5000, "invalid JSON", "digits"),
    (b"{'a': 1}", "invalid JSON", "double quotes at column 2"),
    (b'"\x00"', "not UTF-8", "zero bytes"),
]


@pytest.mark.parametrize(("value", "kind", "says"), BAD + BROKEN)
def test_faults(tmp_path, value, kind, says):
    before, bad, after = found(tmp_path, b'"first"\n' + value + b'\n"last"')
    assert (before.value, after.value, bad.line, after.line) == ("first", "last", 2, 3)
    assert isinstance(bad.value, Fault) and bad.value.kind == kind and says in str(bad.value)
    error = DataError(bad, bad.value)
    assert str(error).startswith(f"{tmp_path / 'a.jsonl'}:2: {kind}: ")
    assert (error.path, error.line, error.kind) == (str(tmp_path / "a.jsonl"), 2, kind)


@pytest.mark.parametrize(("value", "kind", "says"), BAD + BROKEN)
def test_faults_in_an_array(tmp_path, value, kind, says):
    entries = found(tmp_path, b'["first",\n' + value + b',\n"last"]')
    assert entries[0].value == "first"
    assert isinstance(entries[1].value, Fault) and entries[1].value.kind == kind and entries[1].line == 2
    assert says in str(entries[1].value).replace("column 2 of its line 1", "column 2")
    if (value, kind, says) in BAD:
        assert entries[2].value == "last" and len(entries) == 3


@pytest.mark.parametrize(
    ("content", "good", "line", "says"),
    [
        ('["a",\n"b"', 2, 2, "not closed here"),
        ('["a",\n"b', 1, 2, "Unterminated string"),
        ('["a"\n"b"]', 1, 2, "not closed here"),
        ('["a",\n]', 1, 2, "Expecting value"),
        ('["a",\n"b"]\n{}', 2, 3, "text follows the end of the array"),
        ('{"a":\n1}\n{"b":\n}', 1, 3, "column 1 of its line 2"),
    ],
)
def test_an_array_that_breaks_off_gives_what_stands_before(tmp_path, content, good, line, says):
    *values, fault = found(tmp_path, content)
    assert len(values) == good and not any(isinstance(entry.value, Fault) for entry in values)
    assert fault.line == line and says in str(fault.value)


@pytest.mark.parametrize("whole", [False, True])
def test_packed_files(tmp_path, whole):
    values = [{"n": number, "text": str(number) * (number % 50)} for number in range(3000)]
    content = json.dumps(values, indent=0) if whole else "\n".join(map(json.dumps, values))
    packed = gzip.compress(content.encode())
    assert [entry.value for entry in found(tmp_path, packed, "a.jsonl.gz")] == values
    *read, damaged = found(tmp_path, packed[: len(packed) // 2], "a.jsonl.gz")
    good = [entry.value for entry in read if not isinstance(entry.value, Fault)]
    assert 0 < len(good) < 3000 and good == values[: len(good)]
    assert damaged.value.kind == "damaged file" and "cannot be unpacked" in str(damaged.value)


def test_lines_of_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\n  two \u00e9\n".encode("utf-8-sig") + b"caf\xe9\nlast")
    entries = list(read_lines(path))
    assert [entry.value for entry in entries if isinstance(entry.value, str)] == ["one", "  two \u00e9", "last"]
    assert entries[2].line == 4 and "byte 4 of the line is 0xe9" in str(entries[2].value)
    path.write_bytes("one\ntwo\n".encode("utf-16"))
    assert [entry.value for entry in read_lines(path)] == ["one", "two"]
    with pytest.raises(FileNotFoundError):
        list(read_lines(tmp_path / "none"))


def test_wide_characters_that_break_off(tmp_path):
    (entry,) = found(tmp_path, RAW.encode("utf-16")[:-1])
    assert entry.value.kind == "damaged file" and "UTF-16" in str(entry.value)
    (bad, good) = found(tmp_path, b'\xff\xfe"\x00\x00\xd8"\x00\n\x00' + b"1\x00")
    assert bad.value.kind == "not UTF-8" and good.value == 1
