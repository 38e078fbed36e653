"""A training run: data, models and state from settings, then steps with checkpoints, evaluation and metrics.

output/settings.yaml    what the run goes on with, and its history, see resume.py
output/data/            tokenised documents, see ../data/dataset.py
output/checkpoints/     see checkpoint.py; a run that was ended goes on from the latest
output/metrics.jsonl    a line every log_every steps and every evaluation; output/tensorboard/ the same
output/final/, best/    the trained model as official checkpoint files, of the last step and of the best evaluation
output/plot.png         loss and accepted length over the steps
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from eagle_jax.convert.engines import check_engine
from eagle_jax.files.lock import locked_folder
from eagle_jax.models import params
from eagle_jax.sharding import make_mesh, path_sharding
from eagle_jax.train.config import LIMIT, TrainSettings
from eagle_jax.train.data import features, loader
from eagle_jax.train.data.dataset import Dataset
from eagle_jax.train.report import Say, SignsOfLife, log, signs_of_life
from eagle_jax.train.run import assemble, metrics, processes, resume, save, step
from eagle_jax.train.run.checkpoint import Checkpoints, NotFinite, is_finite
from eagle_jax.train.run.clock import Clock
from eagle_jax.train.run.evaluate import Evaluator, NotLossless
from eagle_jax.train.run.step import Arrays, TrainState

INTERRUPTED = processes.EXIT_CODES[signal.SIGINT]
MEAN_STEPS = 100  # of the running mean of the loss


def train(settings: TrainSettings, say: Say = log, command: str = "the same command") -> int:
    """Starts the run in settings.output, or goes on with it. Several processes call it alike; the first one writes.

    Args:
      command: what starts it again, for messages.
    Returns:
      An exit code: 0, or 143 after SIGTERM and 130 after Ctrl-C, which end a run at its next step, saved.
    Raises:
      ValueError: bad data (DataError), models that do not fit, settings that another run was started with, an output
        that another process writes to (Locked), damaged checkpoints only (CheckpointError), or a loss that diverged.
      NotLossless: see `Evaluator`; the step is saved.
    """
    say = processes.of_first(say)
    with contextlib.ExitStack() as held:
        processes.by_first(lambda: held.enter_context(locked_folder(Path(settings.output), say)))
        return _train(settings, held.enter_context(signs_of_life(say)), command)


def _train(settings: TrainSettings, say: SignsOfLife, command: str) -> int:
    output = Path(settings.output)
    mesh = make_mesh(settings.mesh.model_dump())
    changed = resume.changes(output, settings)
    origin = assemble.source(settings)
    begun = resume.begun(output)
    say.doing("preparing the data")

    def documents(split: str, files: Sequence[str]) -> Dataset:
        folder = output / "data" / split
        return processes.first_then_others(lambda: assemble.documents(files, settings.data, origin, folder, say, begun))

    train_data = documents("train", settings.data.train)
    held_out = documents("held_out", settings.data.held_out) if settings.data.held_out else None
    rows, counts = assemble.rows_of(train_data, settings)
    total = settings.steps or loader.steps_of(rows, counts, settings.epochs or 1)
    if total >= LIMIT:
        raise ValueError(f"epochs: {settings.epochs} are {total:,} steps, more than can be counted")

    say.doing("loading the models")
    target = None if settings.kind == "target" else assemble.load_target(settings, mesh)
    model = assemble.new_model(settings, origin, target, train_data, say)
    if target is not None:
        check_engine(model, target, settings.save_format)  # before training what could not be written
    masters, frozen = step.split(model, () if settings.kind == "target" else step.FROZEN)
    frozen = {path: jax.device_put(array, path_sharding(path, array.shape, mesh)) for path, array in frozen.items()}
    model = jax.eval_shape(lambda: model)
    update = step.optimizer(settings.optimizer, total)
    start = functools.partial(step.initial_state, update=update, seed=settings.seed)
    abstract = jax.eval_shape(start, masters)
    shardings = step.state_shardings(abstract, mesh)
    splits = {"train": (train_data, rows)}
    if held_out is not None:
        splits["held_out"] = (held_out, assemble.rows_of(held_out, settings)[0])
    read = {}  # by split: what a file holds of the rows
    if settings.features is not None and target is not None:
        stored = features.stored(settings, model, target, splits)
        read = {split: functools.partial(stored.batch, split) for split in splits}
    blocks, of = loader.own_blocks(mesh)
    batches = loader.iterator(
        loader.batches(train_data, rows, counts, settings.seed, features=read.get("train"), blocks=blocks, of=of)
    )
    say.doing("reading the latest checkpoint")
    checkpoints = Checkpoints(output / "checkpoints", settings.checkpoints.keep)
    try:
        restored = checkpoints.restore_latest(abstract, mesh, say)
        if restored is None:
            state = jax.jit(start, out_shardings=shardings)(masters)
        else:
            state, place = restored
            batches.set_state(place)
            say(f"going on from step {int(state.step)} of {total}")
        if changed:
            say(f"settings that changed since: {resume.in_words(changed)}")
        processes.by_first(lambda: resume.note(output, settings, changed, int(state.step)))
        del masters, restored

        objective = assemble.objective_of(settings)
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
        state, ended = _loop(
            settings,
            state,
            lambda state, batch: advance(state, frozen, target, loader.on_mesh(batch, mesh)),
            batches,
            evaluator,
            checkpoints,
            total,
            say,
        )
        say.doing("writing what was trained")
        if processes.is_first():
            metrics.plot(output)
        number = int(state.step)
        if ended:
            checkpoints.wait()
            by = "Ctrl-C" if ended == INTERRUPTED else "SIGTERM"
            say(f"ended by {by} after step {number} of {total}, which is saved; to go on from there: {command}")
            return ended

        def write(masters: Arrays, folder: Path) -> None:
            trained = processes.gathered(params.load(model, masters | frozen), mesh)
            if not processes.is_first():
                return
            save.check_range(trained, settings.save_dtype)
            if target is None:
                save.save_target(trained, Path(str(settings.model)), folder, settings.save_dtype)
            else:
                save.save_head(trained, target, folder, settings.save_dtype, settings.save_format)
            say(f"written: {folder}")

        write(state.masters, output / "final")
        best = checkpoints.restore_best(abstract, mesh, say)
        if best is not None:
            write(best.masters, output / "best")
        say(f"done: the run has all of its {total} steps" + (f", and {number - total} more" if number > total else ""))
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
    say: SignsOfLife,
) -> tuple[TrainState, int]:
    """Steps from `state` on until the last, or a signal; returns its exit code, else 0, with the state."""
    number, ended = int(state.step), 0
    records = metrics.Metrics(Path(settings.output), number)
    decay = step.schedule(settings.optimizer, total)
    decay(number)  # its first call compiles
    unread: list[jax.Array] = []  # losses since the last line of the log
    losses: collections.deque[float] = collections.deque(maxlen=MEAN_STEPS)
    compiled: set[tuple[int, ...]] = set()
    clock = Clock(number, total)

    @contextlib.contextmanager
    def apart(what: str, steps: int = 0) -> Iterator[None]:
        """Excludes the block from the clock's time."""
        jax.block_until_ready(state)
        began = time.monotonic()
        say.doing(what)
        yield
        clock.leave_out(time.monotonic() - began, steps)

    with processes.termination(say) as ends_with:
        while number < total and not ended:
            batch = next(batches)
            shape = batch["tokens"].shape
            if shape in compiled:
                say.doing(f"step {number + 1} of {total}")
                state, values = advance(state, batch)
            else:
                compiled.add(shape)
                with apart(f"compiling a step with rows of {shape[1]}, and running it", steps=1):
                    state, values = jax.block_until_ready(advance(state, batch))
            number += 1
            last = number == total
            unread.append(values["loss"])
            if number % settings.log_every == 0 or last:
                losses_read, found = jax.device_get((unread, values))
                for at, loss in enumerate(losses_read, number - len(unread) + 1):
                    if not math.isfinite(loss):
                        raise _diverged(f"the loss is {loss} at step {at}", settings, checkpoints)
                losses.extend(map(float, losses_read))
                unread.clear()
                rate = settings.optimizer.learning_rate * float(decay(number - 1))
                found = {"loss": losses[-1], "loss_mean": np.mean(losses), **found, "learning_rate": rate}
                words, speed = _words(found), settings.batch_tokens * clock.rate(number)
                if not math.isnan(speed):
                    found["tokens_a_second"] = speed
                    words += f"  {speed:,.0f} tok/s  ETA {clock.left(number)}"
                records.add(number, found)
                say(f"step {number}/{total}  {words}")
            score = None
            try:
                if evaluator is not None and (number % settings.evaluation.every == 0 or last):
                    with apart(f"evaluating step {number}"):
                        if not is_finite(state):
                            raise NotFinite
                        scores, score = evaluator(state.masters)
                    records.add(number, scores)
                    say(f"step {number}/{total}  {_words(scores)}")
                ended = ends_with(number)
                if score is not None or number % settings.checkpoints.every == 0 or last or ended:
                    with apart(f"saving step {number}"):
                        checkpoints.save(state, batches.get_state(), score)
            except NotFinite:
                what = f"parameters or optimizer state are NaN or infinite after step {number}"
                raise _diverged(what, settings, checkpoints) from None
            except NotLossless:
                checkpoints.save(state, batches.get_state(), None)
                raise
    records.close()
    return state, 0 if number == total else ended


def _diverged(what: str, settings: TrainSettings, checkpoints: Checkpoints) -> ValueError:
    """An error that says how to go on."""
    good = checkpoints.latest
    begin = "begins anew" if good is None else f"goes on from step {good}, the last good checkpoint,"
    clip = " or set optimizer.clip_norm" if settings.optimizer.clip_norm is None else ""
    return ValueError(
        f"{what}, and nothing of it is saved; lower optimizer.learning_rate (it is {settings.optimizer.learning_rate})"
        f"{clip}: the same command with the changed setting {begin} in {settings.output}"
    )


def _words(values: dict[str, Any]) -> str:
    def word(value: Any) -> str:
        return " ".join(f"{number:.4g}" for number in np.atleast_1d(np.asarray(value)))

    return "  ".join(f"{name} {word(value)}" for name, value in values.items())
