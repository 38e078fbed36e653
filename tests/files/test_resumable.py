"""A file that is written in parts: what was damaged meanwhile is not built upon, and one process writes at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eagle_jax.files.lock import Locked
from eagle_jax.files.resumable import Progress

RECORDS = [{"text": "one"}, {"text": "twö"}]


@pytest.fixture
def begun(tmp_path) -> Path:
    """An output of which a part is written."""
    out = tmp_path / "out.jsonl"
    with Progress(out, {"a": 1}, False, print) as progress:
        progress.add(RECORDS, 3)
        with pytest.raises(Locked, match=r"out\.jsonl: another run"):
            Progress(out, {"a": 1}, False, print)
    return out


def go_on(out: Path) -> list[dict[str, str]]:
    with Progress(out, {"a": 1}, False, print) as progress:
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
