"""Checkpoints of a run by orbax: state, position in the data, score. Written asynchronously and atomically.

    folder/STEP/state/, place/, metrics/   orbax items
    folder/STEP/checksums.json             size and SHA-256 of each of those files, written last
    folder/STEP.unusable                   a damaged checkpoint that a resumed run skipped

A folder is renamed to STEP once it is complete. Checkpoints of older versions have no checksums.
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
)  # the items with checksums; orbax changes its metadata files after these are computed


class CheckpointError(ValueError):
    """Raised for a checkpoint that is damaged, not finite, or could not be written."""


class DoesNotFit(ValueError):
    """Raised for an undamaged checkpoint that this run cannot read."""


class NotFinite(ValueError):
    """Raised for a state with NaN or infinite numbers, which is not saved."""


class _Handler(ocp.CompositeCheckpointHandler):
    """Writes the checksums after all items, before orbax renames the folder to its final name."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        folder = Path(directory)
        checksums.write(folder, (path for item in OURS for path in (folder / item).rglob("*") if path.is_file()))


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)
class _Items(ocp.args.Composite):
    """The arguments of `_Handler`."""


class Checkpoints:
    """A folder that keeps the latest `keep` checkpoints and the one with the best score.

    All processes must call every method; process 0 writes, deletes and verifies checksums.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder.resolve(), keep
        if processes.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in (*self.folder.glob("*.orbax-checkpoint-tmp*"), *self.folder.glob(".*.removed")):
                shutil.rmtree(left, ignore_errors=True)  # partial folders of a killed process
        json_file = ocp.JsonCheckpointHandler
        handler = _Handler(state=ocp.StandardCheckpointHandler(), place=json_file(), metrics=json_file("metrics"))
        self.writer = ocp.AsyncCheckpointer(handler)
        self.writing: int | None = None
        self.reader = ocp.StandardCheckpointHandler()

    def save(self, state: TrainState, place: dict[str, Any], score: float | None) -> None:
        """Starts an asynchronous save; `state` may be donated afterwards. Skips a step that is already saved.

        Args:
          score: higher is better. None or a number that is not finite means not evaluated.
        Raises:
          NotFinite: if the state is not finite; nothing is written.
          CheckpointError: if the previous save failed.
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
        """Waits for the asynchronous save.

        Raises:
          CheckpointError: if it failed.
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
        """Returns the step with the highest score; None if none was evaluated."""
        return next(iter(self._by_score()), None)

    def _by_score(self) -> list[int]:
        """Returns the evaluated steps by descending score; ties by the latest step."""
        self.wait()
        scores = {step: _score(self.folder / str(step)) for step in self.steps()}
        evaluated = [step for step, score in scores.items() if score > NOT_EVALUATED]
        return sorted(evaluated, key=lambda step: (scores[step], step), reverse=True)

    def restore(self, step: int, like: TrainState, mesh: Any) -> tuple[TrainState, dict[str, Any]]:
        """Restores a step directly into its shardings on `mesh`; returns the state and the position in the data.

        Args:
          like: an abstract state. Its gradient clipping, which is stateless, may differ from the checkpoint's.
        Raises:
          CheckpointError: naming the checkpoint and the file that is damaged or not finite.
          DoesNotFit: if its shapes differ from `like`, or memory is too small.
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
        """Raises in all processes if any of them found a fault."""
        if processes.any_of(fault is not None):
            raise kind(f"checkpoint {path}: {fault or 'another process cannot use it'}")

    def _restored(self, path: Path, like: TrainState, mesh: Any) -> TrainState:
        saved = like
        count = len(self.reader.metadata(path).tree["optimizer"]) if isinstance(like.optimizer, tuple) else 0
        if count and count != len(like.optimizer):  # another number of clipping transforms in the chain
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
        """Restores the latest usable checkpoint; None if there are none.

        Damaged ones are reported and renamed to STEP.unusable, which lets the run save these steps again.

        Raises:
          CheckpointError: if all are unusable.
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
        """Restores the usable state with the highest score; None if none was evaluated."""
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
            removed = self.folder / f".{step}.removed"  # rename first: a folder with a number must be complete
            os.rename(self.folder / str(step), removed)
            shutil.rmtree(removed, ignore_errors=True)

    def close(self) -> None:
        """Waits for the last save and closes orbax."""
        try:
            self.wait()
            self._delete_old()
        finally:
            self.writer.close()


def damage(path: Path) -> str | None:
    """Returns the first fault of a checkpoint's files; None if they are intact, or older than checksums."""
    try:
        return checksums.fault(path)
    except FileNotFoundError:
        return None if _is_older(path) else f"it was not written or copied whole ({checksums.NAME} is missing)"
    except OSError as error:  # unreadable sectors are damage, too
        return f"cannot be read: {_short(error)}"


def check_finite(state: TrainState) -> None:
    """Refuses a state with NaN or infinite numbers.

    Raises:
      NotFinite: naming its step.
    """
    if not is_finite(state):
        raise NotFinite(f"parameters or optimizer state are NaN or infinite after step {int(state.step)}")


def is_finite(state: TrainState) -> bool:
    """Returns whether all numbers of a state are finite."""
    return bool(_all_finite((state.masters, state.optimizer)))


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves] or [jnp.array(True)]).all()


def _is_older(path: Path) -> bool:
    """Returns whether a checkpoint without checksums comes from a version that wrote none."""
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
    """Silences the reads that orbax abandons at the first error, which print when they are garbage-collected."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _short(error: Exception) -> str:
    """Shortens a multi-line TensorStore error to one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).split(" See full TensorStore")[0]
    return text if len(text) <= 160 else text[:157] + "..."


def _plain(state: TrainState) -> dict[str, Any]:
    """Converts a state for orbax: typed keys become their key data."""
    values = state._asdict()
    if isinstance(state.key, jax.sharding.Sharding):
        return values
    if isinstance(state.key, jax.ShapeDtypeStruct):
        return values | {"key": jax.eval_shape(jax.random.key_data, state.key)}
    return values | {"key": jax.random.key_data(state.key)}
