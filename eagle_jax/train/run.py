"""A training run: data, models and state from settings, then steps with checkpoints, evaluation and metrics.

output/settings.yaml    what the run was started with
output/data/            tokenised documents, see dataset.py
output/checkpoints/     see checkpoint.py; a run that was ended goes on from the latest
output/metrics.jsonl    a line every log_every steps and every evaluation; output/tensorboard/ the same
output/final/, best/    the trained model as official checkpoint files, of the last step and of the best evaluation
output/plot.png         loss and accepted length over the steps
"""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.sharding import NamedSharding, PartitionSpec

from eagle_jax.convert.engines import check_engine
from eagle_jax.convert.place import new_file
from eagle_jax.models import params
from eagle_jax.train import features, loader, metrics, processes, save, setup, step
from eagle_jax.train.checkpoint import Checkpoints
from eagle_jax.train.config import TrainSettings, read_settings
from eagle_jax.train.dataset import Dataset
from eagle_jax.train.evaluate import Evaluator
from eagle_jax.train.say import Say, log
from eagle_jax.train.step import Arrays, TrainState

SETTINGS = "settings.yaml"
TERMINATED = 143  # what a shell reports for a program that SIGTERM ended
# Settings that a run may go on with in another form. All others make it another run.
MAY_CHANGE = {"output", "features", "steps", "epochs", "mesh", "accumulation", "checkpoints", "evaluation", "log_every"}


def train(settings: TrainSettings, say: Say = log) -> int:
    """Starts the run in settings.output, or goes on with it. Several processes call it alike; the first one writes.

    Returns:
      An exit code: 0, or 143 after SIGTERM, which ends a run at its next step with everything saved.
    Raises:
      ValueError: bad data (DataError), models that do not fit, or settings other than the run was started with.
    """
    output, say = Path(settings.output), processes.of_first(say)
    mesh = params.make_mesh(settings.mesh.model_dump())
    note_settings = _check_settings(output, settings)
    origin = setup.source(settings)
    begun = (output / SETTINGS).is_file()

    def documents(split: str, files: Sequence[str]) -> Dataset:
        folder = output / "data" / split
        return processes.first_then_others(lambda: setup.documents(files, settings.data, origin, folder, say, begun))

    train_data = documents("train", settings.data.train)
    held_out = documents("held_out", settings.data.held_out) if settings.data.held_out else None
    rows, counts = setup.rows_of(train_data, settings)
    total = settings.steps or loader.steps_of(rows, counts, settings.epochs or 1)

    target = None if settings.kind == "target" else setup.load_target(settings, mesh)
    model = setup.new_model(settings, origin, target, train_data, say)
    if target is not None:
        check_engine(model, target, settings.save_format)  # before training what could not be written
    masters, frozen = step.split(model, () if settings.kind == "target" else step.FROZEN)
    frozen = {path: jax.device_put(array, params.sharding(path, array.shape, mesh)) for path, array in frozen.items()}
    model = jax.eval_shape(lambda: model)
    update = step.optimizer(settings.optimizer, total)
    start = functools.partial(step.initial_state, update=update, seed=settings.seed)
    abstract = jax.eval_shape(start, masters)
    shardings = step.state_shardings(abstract, mesh)
    splits = {"train": (train_data, rows)}
    if held_out is not None:
        splits["held_out"] = (held_out, setup.rows_of(held_out, settings)[0])
    read = {}  # by split: what a file holds of the rows
    if settings.features is not None and target is not None:
        stored = features.stored(settings, model, target, splits)
        read = {split: functools.partial(stored.batch, split) for split in splits}
    blocks, of = loader.own_blocks(mesh)
    batches = loader.iterator(
        loader.batches(train_data, rows, counts, settings.seed, features=read.get("train"), blocks=blocks, of=of)
    )
    if processes.is_first():
        note_settings()
    checkpoints = Checkpoints(output / "checkpoints", settings.checkpoints.keep)
    try:
        if checkpoints.latest is None:
            state = jax.jit(start, out_shardings=shardings)(masters)
        else:
            state, place = checkpoints.restore(checkpoints.latest, abstract, mesh)
            batches.set_state(place)
            say(f"going on from step {int(state.step)} of {total}")
        del masters

        objective = setup.objective_of(settings)
        evaluator = None
        if held_out is not None:
            stored_rows = read.get("held_out")
            evaluator = Evaluator(settings, mesh, objective, model, frozen, target, held_out, origin, stored_rows)

        def advance(state, frozen, target, batch):
            return step.train_step(
                state, model, frozen, target, batch, objective=objective, update=update, pieces=settings.accumulation
            )

        everywhere = NamedSharding(mesh, PartitionSpec())
        advance = jax.jit(advance, donate_argnums=0, out_shardings=(shardings, everywhere))
        state = _loop(
            settings,
            state,
            lambda state, batch: advance(state, frozen, target, loader.on_mesh(batch, mesh)),
            batches,
            evaluator,
            checkpoints,
            total,
            say,
        )
        if processes.is_first():
            metrics.plot(output)
        number = int(state.step)
        if number < total:
            say(f"ended by SIGTERM after step {number}; the same command goes on from there")
            return TERMINATED

        def write(masters: Arrays, folder: Path) -> None:
            trained = processes.gathered(params.load(model, masters | frozen), mesh)
            if not processes.is_first():
                return
            if target is None:
                save.save_target(trained, Path(str(settings.model)), folder, settings.save_dtype)
            else:
                save.save_head(trained, target, folder, settings.save_dtype, settings.save_format)
            say(f"written: {folder}")

        write(state.masters, output / "final")
        best = checkpoints.best
        if best is not None:
            write(checkpoints.restore(best, abstract, mesh)[0].masters, output / "best")
        return 0
    finally:
        checkpoints.close()


def _loop(
    settings: TrainSettings,
    state: TrainState,
    advance: Callable[[TrainState, loader.Batch], tuple[TrainState, dict[str, jax.Array]]],
    batches: Any,
    evaluator: Evaluator | None,
    checkpoints: Checkpoints,
    total: int,
    say: Say,
) -> TrainState:
    """Steps from `state` on until the last, or SIGTERM."""
    number = int(state.step)
    records = metrics.Metrics(Path(settings.output), number)
    clock = _Clock(number, total)
    terminated = False
    with processes.termination() as ends_with:
        while number < total and not terminated:
            state, values = advance(state, next(batches))
            number += 1
            last, terminated = number == total, ends_with(number)
            if number % settings.log_every == 0 or last:
                values = jax.device_get(values)
                if not np.isfinite(values["loss"]):
                    raise ValueError(
                        f"the loss is {values['loss']} at step {number}; lower optimizer.learning_rate, and go on from "
                        "the latest checkpoint or in another output"
                    )
                speed = settings.batch_tokens * clock.rate(number)
                records.add(number, values | {"tokens_a_second": speed})
                say(f"step {number}/{total}  {_words(values)}  {speed:,.0f} tok/s  ETA {clock.left(number)}")
            score = None
            if evaluator is not None and (number % settings.evaluation.every == 0 or last):
                before = time.monotonic()
                values, score = evaluator(state.masters)
                clock.leave_out(time.monotonic() - before)
                records.add(number, values)
                say(f"step {number}/{total}  {_words(values)}")
            if score is not None or number % settings.checkpoints.every == 0 or last or terminated:
                checkpoints.save(state, batches.get_state(), score)
    records.close()
    return state


def _check_settings(output: Path, settings: TrainSettings) -> Callable[[], None]:
    """Refuses to go on with a run under other settings; returns what notes these, once the run can begin."""
    path = output / SETTINGS
    ours = settings.model_dump(mode="json")
    if path.is_file():
        theirs = read_settings(path).model_dump(mode="json")  # a setting that is newer than the run has its default
        differing = sorted(k for k in ours if k not in MAY_CHANGE and ours[k] != theirs[k])
        if differing:
            raise ValueError(
                f"{output} holds a run with other settings ({', '.join(differing)}); choose another output, or those "
                "settings"
            )

    def note() -> None:
        with new_file(path) as partial:
            partial.write_text(yaml.safe_dump(ours, sort_keys=False), encoding="utf-8")

    return note


class _Clock:
    """Speed and time left, without the first step (which compiles) and what is left out."""

    def __init__(self, step: int, total: int):
        self.first, self.total, self.start = step, total, time.monotonic()

    def rate(self, step: int) -> float:
        """Steps a second so far."""
        return (step - self.first) / max(time.monotonic() - self.start, 1e-9)

    def leave_out(self, seconds: float) -> None:
        self.start += seconds

    def left(self, step: int) -> datetime.timedelta:
        return datetime.timedelta(seconds=round((self.total - step) / self.rate(step)))


def _words(values: dict[str, Any]) -> str:
    def word(value: Any) -> str:
        return " ".join(f"{number:.4g}" for number in np.atleast_1d(np.asarray(value)))

    return "  ".join(f"{name} {word(value)}" for name, value in values.items())
