"""Files and folders appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eagle_jax.files.atomic import added_to, new_file, new_folder, write_json


def test_interrupted_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The old folder comes back; of what was added to a folder of the user's, nothing stays."""
    out, rename = tmp_path / "out", os.rename
    out.mkdir()
    (out / "mine").write_text("mine")

    def interrupted(source: Path, place: Path) -> None:
        if Path(source).name in (".out.partial", "manifest"):
            raise KeyboardInterrupt
        rename(source, place)

    monkeypatch.setattr(os, "rename", interrupted)
    for replaced in (new_folder, added_to):
        with pytest.raises(KeyboardInterrupt), replaced(out) as partial:
            (partial / "model").mkdir()
            (partial / "manifest").write_text("all is there")
        assert list(tmp_path.iterdir()) == [out] and list(out.iterdir()) == [out / "mine"]


def test_a_new_file_is_not_written_over_a_hidden_one(tmp_path: Path):
    (tmp_path / ".report.json").write_text("mine")
    with new_file(tmp_path / "report.json") as partial:
        partial.write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        ".report.json": "mine",
        "report.json": "new",
    }


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.json"
    write_json(path, {"a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n "a": "\\u00e9"\n}\n'

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"b": 1})
    assert list(tmp_path.iterdir()) == [path] and "u00e9" in path.read_text()
