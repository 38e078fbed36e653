"""Checkpoints of a run, by orbax: state, place in the data, score; written in the background, atomically.

    folder/STEP/state/, place/, metrics/   what orbax writes
    folder/STEP/checksums.json             size and SHA-256 of each of those files, written last
    folder/STEP.unusable                   a damaged checkpoint that a run went on without

A folder gets the name STEP when all of it is there. Checkpoints of older versions have no checksums.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

from eagle_jax.files import checksums
from eagle_jax.train.report import Say
from eagle_jax.train.run import processes
from eagle_jax.train.run.step import TrainState, state_shardings

NOT_EVALUATED = -1e30  # the score of a checkpoint that was not evaluated
OURS = (
    "state",
    "place",
    "metrics",
)  # the items that are read; orbax changes its own metadata beside them after the checksums


class CheckpointError(ValueError):
    """A checkpoint that is damaged, holds numbers that are not finite, or could not be written."""


class DoesNotFit(ValueError):
    """Raised for an undamaged checkpoint that this run cannot read."""


class NotFinite(ValueError):
    """A state with NaN or infinite numbers, which is not saved."""


class _Handler(ocp.CompositeCheckpointHandler):
    """Writes the checksums once everything else is written, before the folder gets its name."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = Path(directory)
        checksums.write(folder, (path for item in OURS for path in (folder / item).rglob("*") if path.is_file()))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """The arguments of `_Handler`."""


class Checkpoints:
    """A folder of checkpoints: the latest `keep`, and the best by its evaluation.

    All processes call every method alike; the first one writes, deletes and compares checksums.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder.resolve(), keep
        if processes.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in (*self.folder.glob("*.orbax-checkpoint-tmp*"), *self.folder.glob(".*.removed")):
                shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
        json_file = ocp.JsonCheckpointHandler
        handler = _Handler(state=ocp.StandardCheckpointHandler(), place=json_file(), metrics=json_file("metrics"))
        self.writer = ocp.AsyncCheckpointer(handler)
        self.writing: int | None = None
        self.reader = ocp.StandardCheckpointHandler()

    def save(self, state: TrainState, place: dict[str, Any], score: float | None) -> None:
        """Starts to write; `state` may be donated afterwards. Does nothing if its step is saved already.

        Args:
          score: higher is better; None, or a number that is not finite: not evaluated.
        Raises:
          NotFinite: if the state is not finite; nothing is written. CheckpointError: if the last save failed.
        """
        step = int(state.step)
        self.wait()
        check_finite(state)
        if processes.of_the_first(step in self.steps()):
            return
        self._delete_old()
        known = score is not None and math.isfinite(score)
        items = _Items(
            state=ocp.args.StandardSave(_plain(state)),
            place=ocp.args.JsonSave({"state": json.dumps(place), "checksums": True}),
            metrics=ocp.args.JsonSave({"score": score if known else NOT_EVALUATED}),
        )
        self.writing = step
        self.writer.save(self.folder / str(step), args=items)

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
          CheckpointError: if that failed.
        """
        try:
            self.writer.wait_until_finished()
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self.folder / str(self.writing)} could not be written: {_short(error)}"
            ) from error

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, damaged or not, ascending."""
        return sorted(int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())

    @property
    def latest(self) -> int | None:
        self.wait()
        return max(self.steps(), default=None)

    @property
    def best(self) -> int | None:
        """The step with the highest score; None where nothing was evaluated."""
        return next(iter(self._by_score()), None)

    def _by_score(self) -> list[int]:
        """Returns the evaluated steps by descending score; among equals the latest first."""
        self.wait()
        scores = {step: _score(self.folder / str(step)) for step in self.steps()}
        evaluated = [step for step, score in scores.items() if score > NOT_EVALUATED]
        return sorted(evaluated, key=lambda step: (scores[step], step), reverse=True)

    def restore(self, step: int, like: TrainState, mesh: Any) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, straight into its shardings on `mesh`, and the place in the data.

        Args:
          like: an abstract state; gradient clipping, which has no state, may differ from the checkpoint's.
        Raises:
          CheckpointError: naming the checkpoint and its file, if that is damaged or not finite.
          DoesNotFit: if it is whole, but of another shape than `like`, or too large.
        """
        path = self.folder / str(step)
        self._refuse(path, damage(path) if processes.is_first() else None)
        place, state, fault = {}, like, None
        with _without_leftovers():
            try:
                place = json.loads(_read_json(path / "place/metadata")["state"])
                state = self._restored(path / "state", like, mesh)
            except Exception as error:
                fault = f"cannot be read: {_short(error)}"
        self._refuse(path, fault, DoesNotFit if (path / checksums.NAME).is_file() else CheckpointError)
        self._refuse(path, None if is_finite(state) else "holds numbers that are not finite (NaN or infinite)")
        return state, place

    def _refuse(self, path: Path, fault: str | None, kind: type[ValueError] = CheckpointError) -> None:
        """Raises an error in all processes if one of them found a fault."""
        if processes.any_of(fault is not None):
            raise kind(f"checkpoint {path}: {fault or 'another process cannot use it'}")

    def _restored(self, path: Path, like: TrainState, mesh: Any) -> TrainState:
        saved = like
        count = len(self.reader.metadata(path).tree["optimizer"]) if isinstance(like.optimizer, tuple) else 0
        if count and count != len(like.optimizer):  # chained with other clipping
            saved = like._replace(optimizer=(*[optax.EmptyState()] * (count - 1), like.optimizer[-1]))
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            _plain(saved),
            _plain(state_shardings(saved, mesh)),
        )
        state = TrainState(**self.reader.restore(path, args=ocp.args.StandardRestore(abstract)))
        if saved is not like:
            state = state._replace(optimizer=(*like.optimizer[:-1], state.optimizer[-1]))
        return state._replace(key=jax.random.wrap_key_data(state.key))

    def restore_latest(self, like: TrainState, mesh: Any, say: Say) -> tuple[TrainState, dict[str, Any]] | None:
        """Restores the latest usable checkpoint; None if there is none at all.

        Reports damaged ones that it skips, and renames them to STEP.unusable: the run can save those steps again.

        Raises:
          CheckpointError: if there are only unusable ones.
        """
        self.wait()
        steps, faults = self.steps()[::-1], {}
        for step in steps:
            try:
                found = self.restore(step, like, mesh)
            except CheckpointError as error:
                faults[step] = error
                continue
            for bad, fault in faults.items():
                say(f"{fault}; it is now {self._set_aside(bad)}, and step {step} the last usable checkpoint")
            return found
        if faults:
            raise CheckpointError(
                f"none of the checkpoints can be used ({'; '.join(map(str, faults.values()))}); bring one of them back "
                f"from a copy, or remove {self.folder} to begin anew"
            )
        return None

    def restore_best(self, like: TrainState, mesh: Any, say: Say) -> TrainState | None:
        """The usable state with the highest score; None where nothing was evaluated."""
        for step in self._by_score():
            try:
                return self.restore(step, like, mesh)[0]
            except CheckpointError as error:
                say(f"{error}; the best of the others is taken")
        return None

    def _set_aside(self, step: int) -> Path:
        path = self.folder / f"{step}.unusable"
        if processes.is_first():
            shutil.rmtree(path, ignore_errors=True)
            os.rename(self.folder / str(step), path)
        return path

    def _delete_old(self) -> None:
        if not processes.is_first():
            return
        kept = {*self.steps()[-self.keep :], *self._by_score()[:1]}
        for step in set(self.steps()) - kept:
            removed = self.folder / f".{step}.removed"  # renamed first, as a folder with a number must be complete
            os.rename(self.folder / str(step), removed)
            shutil.rmtree(removed, ignore_errors=True)

    def close(self) -> None:
        """Waits until everything is written."""
        try:
            self.wait()
            self._delete_old()
        finally:
            self.writer.close()


def damage(path: Path) -> str | None:
    """The first fault of a checkpoint's files; None if there is none, or no checksums of an older version."""
    try:
        return checksums.fault(path)
    except FileNotFoundError:
        return None if _is_older(path) else f"it was not written or copied whole ({checksums.NAME} is missing)"
    except OSError as error:  # of a disk that cannot be read there
        return f"cannot be read: {_short(error)}"


def check_finite(state: TrainState) -> None:
    """Refuses a state with NaN or infinite numbers.

    Raises:
      NotFinite: naming its step.
    """
    if not is_finite(state):
        raise NotFinite(f"parameters or optimizer state are NaN or infinite after step {int(state.step)}")


def is_finite(state: TrainState) -> bool:
    """Whether no number of a state is NaN or infinite."""
    return bool(_all_finite((state.masters, state.optimizer)))


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves] or [jnp.array(True)]).all()


def _is_older(path: Path) -> bool:
    """Whether a checkpoint without checksums was written by a version that made none."""
    try:
        return "checksums" not in _read_json(path / "place/metadata")
    except (OSError, ValueError, TypeError):
        return False


def _score(path: Path) -> float:
    try:
        score = float(_read_json(path / "metrics/metrics")["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return NOT_EVALUATED
    return score if math.isfinite(score) else NOT_EVALUATED


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _without_leftovers() -> Iterator[None]:
    """Silences reads that orbax abandons at the first error; they print when they are garbage-collected."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _short(error: Exception) -> str:
    """An error in a line: TensorStore's have many."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).split(" See full TensorStore")[0]
    return text if len(text) <= 160 else text[:157] + "..."


def _plain(state: TrainState) -> dict[str, Any]:
    """A state as orbax stores it: keys as their data."""
    values = state._asdict()
    if isinstance(state.key, jax.sharding.Sharding):
        return values
    if isinstance(state.key, jax.ShapeDtypeStruct):
        return values | {"key": jax.eval_shape(jax.random.key_data, state.key)}
    return values | {"key": jax.random.key_data(state.key)}
