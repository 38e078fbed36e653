"""Lines that a killed run left, in both forms: gone on with, also those of older versions, and never if damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagle_jax.files.lock import Locked
from eagle_jax.files.resumable import HeadedLines, StagedLines, read_headed

RECORDS = [{"text": "one"}, {"text": "twö"}]
# As earlier versions wrote them.
LINES = '{"text": "one"}\n{"text": "twö"}\n'.encode()
NOTE = """{
 "settings": {
  "a": 1
 },
 "inputs": 3,
 "records": 2,
 "bytes": 33,
 "faults": {
  "left out, too long": 1
 },
 "sha256": "d1d1cbad73d06c6a02b3812fceb591134b8609e23608e8f83a8a48ab55867249"
}"""
HEADED = '{"settings": {"seed": 7, "stop": ["é"]}}\n{"index": 0, "text": "é"}\n{"index": 2, "text": null}\n'.encode()


@pytest.fixture
def begun(tmp_path) -> Path:
    """An output of which a part is written."""
    out = tmp_path / "out.jsonl"
    with StagedLines(out, {"a": 1}, False, print) as progress:
        progress.add(RECORDS, 3)
        with pytest.raises(Locked, match=r"out\.jsonl: another run"):
            StagedLines(out, {"a": 1}, False, print)
    return out


def go_on(out: Path) -> list[dict[str, str]]:
    with StagedLines(out, {"a": 1}, False, print) as progress:
        assert progress.inputs == 3 and progress.records == 2
        progress.add([{"text": "three"}], 1)
        progress.finish()
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("older", [False, True], ids=["", "without a checksum"])
def test_it_goes_on_after_what_was_noted(begun, older):
    partial, note = (begun.with_name(f"{begun.name}.{name}") for name in ("partial", "progress.json"))
    with open(partial, "ab") as file:
        file.write(b'{"text": "not no')
    if older:
        note.write_text(
            json.dumps({name: value for name, value in json.loads(note.read_text()).items() if name != "sha256"})
        )
    assert go_on(begun) == [*RECORDS, {"text": "three"}]


@pytest.mark.parametrize("noted", ["[]", "{}", '{"settings": {}, "inputs": "3"}'])
def test_damage_is_named_with_the_fix(begun, noted):
    partial, note = (begun.with_name(f"{begun.name}.{name}") for name in ("partial", "progress.json"))
    content = partial.read_bytes()
    partial.write_bytes(content.replace(b"one", b"ome"))
    with pytest.raises(ValueError, match=r"out\.jsonl\.partial is damaged.*--overwrite"):
        go_on(begun)
    partial.write_bytes(content)
    note.write_text(noted)
    with pytest.raises(ValueError, match=r"progress\.json: damaged.*--overwrite"):
        go_on(begun)
    assert partial.read_bytes() == content


def test_a_file_staged_by_an_earlier_version_is_gone_on_with(tmp_path):
    out = tmp_path / "out.jsonl"
    partial, note = (tmp_path / f"out.jsonl.{name}" for name in ("partial", "progress.json"))
    partial.write_bytes(LINES)
    note.write_text(NOTE)
    with StagedLines(out, {"a": 1}, False, print) as staged:
        assert (staged.inputs, staged.records, staged.faults) == (3, 2, {"left out, too long": 1})
        staged.add([], 0)
        assert partial.read_bytes() == LINES and note.read_text().strip() == NOTE
    assert go_on(out) == [*RECORDS, {"text": "three"}] and out.read_bytes().startswith(LINES)


def test_a_headed_file_of_an_earlier_version_is_gone_on_with(tmp_path):
    path, settings = tmp_path / "out.jsonl", {"seed": 7, "stop": ["é"]}
    path.write_bytes(HEADED + b'{"index": 3, "te')
    assert read_headed(path, "", "") == (settings, [{"index": 0, "text": "é"}, {"index": 2, "text": None}])
    with HeadedLines(path, settings) as headed:
        headed.append({"index": 1}, {"text": "\ud83d"})
    assert path.read_bytes() == HEADED + b'{"index": 1}\n{"text": "?"}\n'
    path.unlink()
    with HeadedLines(path, settings) as headed:
        headed.append(*map(json.loads, HEADED.splitlines()[1:]))
    assert path.read_bytes() == HEADED


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1}', r"out\.jsonl is there already, and not from `it`; choose another"),
        (HEADED + b"{\n", r"out\.jsonl, line 4: not JSON \(.*\); choose another"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content, says):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_headed(path, "`it`", "choose another")
