"""Checksums are part of stored files (manifests, features, checkpoints), so they stay the same."""

from __future__ import annotations

import json
from pathlib import Path

from eagle_jax.files import checksums


def test_checksums_are_those_of_earlier_versions(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.json").write_bytes(b"{}\n")
    (tmp_path / "b" / "c").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert checksums.of_file(tmp_path / "b" / "c") == checksums.of_text("") == empty
    assert checksums.of_folder(tmp_path) == "80f8bea7841e8f79de1dc371d1281a71caf5d3b9172078eab11985e296b57199"
    checksums.write(tmp_path, [tmp_path / "b" / "c"])
    sums = {"b/c": {"bytes": 0, "sha256": empty}}
    noted = (
        json.dumps(
            {"files": sums, "sha256": "546408e6da41211a44219b64e8632107755d7b4e3df644b54cabceafc79fc3ca"}, indent=1
        )
        + "\n"
    )
    assert (tmp_path / checksums.NAME).read_text() == noted
    assert checksums.fault(tmp_path) is None
    (tmp_path / "b" / "c").write_bytes(b"x")
    assert checksums.fault(tmp_path) == "b/c has 1 bytes, it was written with 0"
