"""The command: exit codes, one line of error, no traceback."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from eagle_jax.cli import progress
from eagle_jax.convert import load, to_official
from eagle_jax.convert.__main__ import main
from tests.convert import folders
from tests.convert.folders import CONFIG, HEAD_CONFIG, assert_same, read_arrays


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    target = folders.write_safetensors(tmp_path / "target", CONFIG, folders.llama_arrays())
    return target, folders.write_bin(tmp_path / "head", HEAD_CONFIG, folders.eagle3_arrays())


def test_converts_and_says_where(sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    options = ["--target", str(sources[0]), "--draft", str(sources[1]), "--out", str(out)]
    assert main([*options, "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert str(out) in printed and "bfloat16" in printed and "eagle3" in printed
    assert [str(model.dtype) for model in load(out)] == ["bfloat16", "bfloat16"]
    assert main(options) == 2  # of another dtype
    assert "holds another conversion" in capsys.readouterr().err
    (out / "notes.txt").write_text("mine")
    assert main([*options, "--overwrite"]) == 0
    assert f"note: kept in {out}: notes.txt" in capsys.readouterr().out
    assert_same(to_official(load(out)[0]), read_arrays(sources[0]))
    assert main(options) == 0
    assert f"note: {out} holds this conversion already" in capsys.readouterr().out


def test_tells_that_it_goes_on_without_a_terminal(sources: tuple[Path, Path], tmp_path: Path, capsys, monkeypatch):
    def status(console, doing):
        return contextlib.nullcontext(console.print(f"{doing}, 0:10"))

    monkeypatch.setattr(progress, "status", status)
    assert main(["--target", str(sources[0]), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == "converting, 0:10\n"


def test_says_what_a_draft_is(sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    heads = folders.write_medusa(tmp_path / "heads", folders.medusa_arrays())
    for draft, kind, count in ((heads, "medusa", 3), (sources[0], "llama", 5)):
        out = str(tmp_path / f"out-{kind}")
        assert main(["--target", str(sources[0]), "--draft", str(draft), "--out", out]) == 0
        assert f"draft: {kind} from {draft}, {count} parts" in capsys.readouterr().out


def test_errors_are_one_line(sources: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("text")
    options = ["--target", str(sources[0]), "--out", str(out)]
    assert main(options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {out}: is not empty")
    assert main([*options, "--overwrite"]) == 0
    assert (out / "file").read_text() == "text"


def test_a_draft_that_does_not_fit(sources: tuple[Path, Path], golden: Path, tmp_path: Path, capsys):
    draft = golden / "weights" / "t2_eagle1_bias"
    assert main(["--target", str(sources[0]), "--draft", str(draft), "--out", str(tmp_path / "out")]) == 2
    assert "vocab_size is 199 in the draft, 16 in the target" in capsys.readouterr().err


def test_unusable_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["--target", "a", "--out", "b", "--dtype", "int8"])
    assert exit_info.value.code == 2 and "--dtype" in capsys.readouterr().err


def test_as_a_command(sources: tuple[Path, Path], tmp_path: Path):
    (sources[0] / "model.safetensors").write_bytes(b"\0" * 20)
    command = [sys.executable, "-W", "error", "-m", "eagle_jax.convert"]
    options = ["--target", str(sources[0]), "--out", str(tmp_path / "out")]
    damaged = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert damaged.returncode == 2 and "Traceback" not in damaged.stderr
    assert damaged.stderr.startswith(f"error: {sources[0] / 'model.safetensors'}: ")
