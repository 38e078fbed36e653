"""Checkpoints that are damaged, cut, half there or not finite are named and passed over; good ones come back whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eagle_jax.files import checksums
from eagle_jax.sharding import make_mesh
from eagle_jax.train.run import checkpoint
from eagle_jax.train.run.checkpoint import CheckpointError, Checkpoints, DoesNotFit, NotFinite
from eagle_jax.train.run.step import TrainState, initial_state

UPDATE = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
MESH = make_mesh({})


def state_of(step: int, update: optax.GradientTransformation = UPDATE) -> TrainState:
    masters = {"lm_head": jax.random.normal(jax.random.key(step), (16, 8)), "norm": jnp.full(8, step, jnp.float32)}
    return initial_state(masters, update, 0)._replace(step=jnp.int32(step))


def write(folder: Path, steps: dict[int, float | None], keep: int = 2) -> Path:
    """Saves {step: score}."""
    made = Checkpoints(folder, keep)
    for step, score in steps.items():
        made.save(state_of(step), {"at": step}, score)
    made.close()
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Checkpoints of the steps 1 and 2."""
    return write(tmp_path_factory.mktemp("two") / "checkpoints", {1: None, 2: None})


@pytest.fixture
def folder(two, tmp_path) -> Path:
    return shutil.copytree(two, tmp_path / "checkpoints")


def latest(folder: Path, update: optax.GradientTransformation = UPDATE) -> tuple[int | None, list[str]]:
    """The step that a run would go on from, whose numbers are compared, and what it says."""
    said: list[str] = []
    found = Checkpoints(folder, 2).restore_latest(jax.eval_shape(lambda: state_of(0, update)), MESH, said.append)
    if found is None:
        return None, said
    state, place = found
    step = int(state.step)
    expected = state_of(step, update)
    assert place == {"at": step} and jax.tree.structure(state) == jax.tree.structure(expected)
    assert (jax.random.key_data(state.key) == jax.random.key_data(expected.key)).all()
    for ours, theirs in zip(jax.tree.leaves(state[:3]), jax.tree.leaves(expected[:3]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    return step, said


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


WAYS: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("way", WAYS)
def test_damage_of_any_file_is_named_and_the_checkpoint_before_it_used(two, tmp_path, way):
    read = [path.relative_to(two) for item in ("state", "place", "metrics") for path in (two / "2" / item).rglob("*")]
    files = [path for path in read if (two / path).is_file()] + [Path("2") / checksums.NAME]
    assert len(files) > 10
    restored = set()
    for number, file in enumerate(files):
        folder = shutil.copytree(two, tmp_path / str(number))
        WAYS[way](folder / file)
        name = file.relative_to("2").as_posix()
        fault = checkpoint.damage(folder / "2")
        assert fault is not None and name in fault
        if file.parts[1] in restored:  # restoring takes long: one file of each item
            continue
        restored.add(file.parts[1])
        step, (line,) = latest(folder)
        assert step == 1 and line.startswith(f"checkpoint {folder / '2'}: ") and name in line and len(line) < 400
        assert (folder / "2.unusable").is_dir() and not (folder / "2").exists()


def test_a_disk_that_cannot_be_read_is_a_damage_too(folder, monkeypatch):
    of_file = checksums.of_file

    def fails(path: Path) -> str:
        if "2" in path.parts:
            raise OSError(5, "Input/output error", str(path))
        return of_file(path)

    monkeypatch.setattr(checksums, "of_file", fails)
    step, (line,) = latest(folder)
    assert step == 1 and line.startswith(f"checkpoint {folder / '2'}: cannot be read: OSError: [Errno 5] Input/output")


def test_folders_that_are_no_whole_checkpoints_are_passed_over(folder):
    (folder / "9").mkdir()
    shutil.copytree(folder / "2" / "state", folder / "8" / "state")  # as a copy that was stopped leaves them
    shutil.copytree(folder / "2", folder / "7", ignore=lambda *_: [checksums.NAME])
    (folder / "notes.txt").write_text("mine")
    (folder / "10").write_text("no folder")
    (folder / "2 (copy)").mkdir()
    (folder / "2" / "state" / "more").write_text("mine")
    step, said = latest(folder)
    assert step == 2 and [line.split(":")[0] for line in said] == [f"checkpoint {folder / name}" for name in "987"]
    assert all("not written or copied whole" in line for line in said)
    assert (folder / "notes.txt").read_text() == (folder / "2" / "state" / "more").read_text() == "mine"


def test_where_all_are_damaged_all_are_named_with_the_fix(folder):
    for step in "12":
        (folder / step / "place" / "metadata").unlink()
    with pytest.raises(CheckpointError, match=r"2: place/metadata is missing; .*1: place/metadata is .*remove .* anew"):
        latest(folder)
    assert {path.name for path in folder.iterdir()} == {"1", "2"}
    assert latest(folder / "none") == (None, [])


def without_checksums(step: Path) -> None:
    """A checkpoint as older versions wrote it."""
    (step / checksums.NAME).unlink()
    place = step / "place" / "metadata"
    place.write_text(json.dumps({"state": json.loads(place.read_text())["state"]}))


def test_checkpoints_without_checksums_are_read_too(folder, capfd):
    for step in "12":
        without_checksums(folder / step)
    assert latest(folder) == (2, [])
    for file in sorted((folder / "2" / "state").rglob("*")):
        if file.is_file() and file.parent.name == "d":
            WAYS["cut"](file)
    step, (line,) = latest(folder)
    assert step == 1 and str(folder / "2") in line and len(line.replace(str(folder), "")) < 300
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("where", ["masters", "optimizer"])
def test_numbers_that_are_not_finite_are_neither_saved_nor_gone_on_with(folder, monkeypatch, where):
    state = state_of(3)
    bad = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan) if leaf.dtype == "float32" else leaf, state)
    state = state._replace(**{where: getattr(bad, where)})
    checkpoints = Checkpoints(folder, 2)
    with pytest.raises(NotFinite, match="step 3"):
        checkpoints.save(state, {"at": 3}, 1.0)
    assert checkpoints.latest == 2
    with monkeypatch.context() as patch:  # an older version saved it
        patch.setattr(checkpoint, "is_finite", lambda state: True)
        checkpoints.save(state, {"at": 3}, 1.0)
        checkpoints.close()
    step, (line,) = latest(folder)
    assert step == 2 and f"{folder / '3'}: holds numbers that are not finite" in line


def test_the_latest_and_the_best_are_kept(tmp_path):
    folder = write(tmp_path / "c", {1: 0.5, 2: 0.75, 3: None, 4: float("nan"), 5: 0.25})
    checkpoints = Checkpoints(folder, 2)
    assert checkpoints.steps() == [2, 4, 5] and checkpoints.best == 2
    said: list[str] = []
    like = jax.eval_shape(lambda: state_of(0))
    best = checkpoints.restore_best(like, MESH, said.append)
    assert best is not None and int(best.step) == 2 and not said
    WAYS["missing"](folder / "2" / "state" / "_METADATA")
    best = checkpoints.restore_best(like, MESH, said.append)
    assert best is not None and int(best.step) == 5 and "2: state/_METADATA is missing" in said[0]
    shutil.rmtree(folder / "5"), shutil.rmtree(folder / "2")
    assert checkpoints.best is None and checkpoints.restore_best(like, MESH, said.append) is None


def test_a_run_that_passed_one_over_saves_the_same_step_again(folder):
    flip(folder / "2" / "state" / "manifest.ocdbt")
    assert latest(folder)[0] == 1
    write(folder, {2: None})
    assert latest(folder) == (2, [])


@pytest.mark.parametrize("clips", [0, 2])
def test_clipping_may_differ_from_the_checkpoint_s(folder, clips):
    update = optax.chain(*[optax.clip(1.0)] * clips, optax.adam(1e-3))
    assert latest(folder, update) == (2, [])


def test_a_whole_checkpoint_of_something_else_is_not_passed_over(folder):
    other = initial_state({"lm_head": jnp.zeros((4, 8))}, UPDATE, 0)
    with pytest.raises(DoesNotFit) as refused:
        Checkpoints(folder, 2).restore_latest(jax.eval_shape(lambda: other), MESH, print)
    assert str(folder / "2") in str(refused.value) and len(str(refused.value)) < 400
    assert (folder / "2").is_dir()


def test_what_a_killed_process_left_is_cleaned_up(folder):
    for left in ("3.orbax-checkpoint-tmp", ".1.removed"):
        (folder / left).mkdir()
    assert Checkpoints(folder, 2).steps() == [1, 2]
    assert {path.name for path in folder.iterdir()} == {"1", "2"}


def test_what_cannot_be_written_is_an_error_of_one_line(folder, monkeypatch):
    def full(folder: Path, files: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "write", full)
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(state_of(3), {"at": 3}, None)
    with pytest.raises(CheckpointError, match=rf"checkpoint {folder / '3'} could not be written: .*No space left"):
        checkpoints.close()
    assert latest(folder) == (2, [])
