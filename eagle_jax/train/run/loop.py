"""A training run from its settings: builds data, models and state, then takes steps and saves, evaluates and logs.

output/settings.yaml    the settings, and their history, see resume.py
output/data/            tokenised documents, see ../data/dataset.py
output/checkpoints/     see checkpoint.py; an interrupted run resumes from the latest
output/metrics.jsonl    a line per log_every steps and per evaluation; output/tensorboard/ the same
output/final/, best/    checkpoint folders of the model after the last step and at the best evaluation
output/plot.png         loss and accepted length over the steps
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eagle_jax.convert.engine_plan import check_engine
from eagle_jax.files.lock import locked_folder
from eagle_jax.models import params
from eagle_jax.models.llama import Llama
from eagle_jax.sharding import make_mesh, path_sharding
from eagle_jax.train.config import TrainSettings
from eagle_jax.train.data import features, loader
from eagle_jax.train.loss.objective import Metrics, Objective
from eagle_jax.train.report import Say, SignsOfLife, log, signs_of_life
from eagle_jax.train.run import assemble, metrics, optimizer, processes, resume, save, step
from eagle_jax.train.run.checkpoint import Checkpoints, NotFinite, check_finite
from eagle_jax.train.run.evaluate import Evaluator, NotLossless
from eagle_jax.train.run.progress import Progress
from eagle_jax.train.run.step import Arrays, TrainState

INTERRUPTED = processes.EXIT_CODES[signal.SIGINT]
Advance = Callable[[TrainState, loader.Batch], tuple[TrainState, Metrics]]


def train(settings: TrainSettings, say: Say = log, command: str = "the same command") -> int:
    """Starts or resumes the run in settings.output. All processes of a distributed run call this; process 0 writes.

    Args:
      command: the command line that resumes the run, for messages.
    Returns:
      The exit code: 0, or 143 after SIGTERM and 130 after Ctrl-C. These save the next step and end the run.
    Raises:
      ValueError: for bad data (DataError), models that do not fit each other, settings that differ from the run's, an
        output in use (Locked), unusable checkpoints (CheckpointError), or a loss that diverged.
      NotLossless: see `Evaluator`; the step is saved first.
    """
    say = processes.of_first(say)
    with contextlib.ExitStack() as held:
        processes.by_first(lambda: held.enter_context(locked_folder(Path(settings.output), say)))
        return _train(settings, held.enter_context(signs_of_life(say)), command)


def _train(settings: TrainSettings, say: SignsOfLife, command: str) -> int:
    output = Path(settings.output)
    changed = resume.changes(output, settings)
    parts, masters = _prepare(settings, say)
    total, mesh = parts.total, parts.mesh
    update = optimizer.optimizer(settings.optimizer, total)
    start = functools.partial(step.initial_state, update=update, seed=settings.seed)
    abstract = jax.eval_shape(start, masters)
    shardings = step.state_shardings(abstract, mesh)
    batches = parts.batches()
    say.doing("reading the latest checkpoint")
    with contextlib.closing(Checkpoints(output / "checkpoints", settings.checkpoints.keep)) as checkpoints:
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
        del masters, restored  # `state` has its own arrays: free these before the first step
        advance = parts.advance(update, shardings)
        state, ended = _Loop(settings, advance, batches, parts.evaluator(), checkpoints, total, say).run(state)
        say.doing("writing what was trained")
        if processes.is_first():
            metrics.plot(output)
        number = int(state.step)
        if ended:
            checkpoints.wait()
            by = "Ctrl-C" if ended == INTERRUPTED else "SIGTERM"
            say(f"ended by {by} after step {number} of {total}, which is saved; to go on from there: {command}")
            return ended
        parts.write(state.masters, output / "final", say)
        best = checkpoints.restore_best(abstract, mesh, say)
        if best is not None:
            parts.write(best.masters, output / "best", say)
        say(f"done: the run has all of its {total} steps" + (f", and {number - total} more" if number > total else ""))
        return 0


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The data and models of a run, which its steps do not change.

    splits: see `assemble.splits`.
    stored: the readers of precomputed features, by split.
    total: the number of steps.
    target: of a head; None if a target is trained.
    model: the trained module, abstract. frozen: its arrays that are not trained.
    """

    settings: TrainSettings
    mesh: Mesh
    origin: assemble.DataSource
    splits: assemble.Splits
    stored: Mapping[str, Callable[..., loader.Batch]]
    total: int
    target: Llama | None
    model: Any
    frozen: Arrays
    objective: Objective

    def batches(self) -> Any:
        """Returns an iterator over this process's shards of the training batches."""
        data, rows = self.splits["train"]
        blocks, of = loader.own_blocks(self.mesh)
        seed, counts = self.settings.seed, assemble.rows_of_a_batch(rows, self.settings)
        read = self.stored.get("train")
        return loader.iterator(loader.batches(data, rows, counts, seed, features=read, blocks=blocks, of=of))

    def advance(self, update: optax.GradientTransformation, shardings: TrainState) -> Advance:
        """Returns the jitted step, which donates the state."""
        model, frozen, target, mesh = self.model, self.frozen, self.target, self.mesh
        fixed = {"objective": self.objective, "update": update, "pieces": self.settings.accumulation}

        def one(state, frozen, target, batch):
            return step.train_step(state, model, frozen, target, batch, **fixed)

        everywhere = NamedSharding(mesh, PartitionSpec())
        compiled = jax.jit(one, donate_argnums=0, out_shardings=(shardings, everywhere))
        return lambda state, batch: compiled(state, frozen, target, loader.on_mesh(batch, mesh))

    def evaluator(self) -> Evaluator | None:
        """Returns the evaluator; None without held-out data."""
        if "held_out" not in self.splits:
            return None
        return Evaluator(
            self.settings,
            self.mesh,
            self.objective,
            self.model,
            self.frozen,
            self.target,
            *self.splits["held_out"],
            self.origin,
            self.stored.get("held_out"),
        )

    def write(self, masters: Arrays, folder: Path, say: SignsOfLife) -> None:
        """Writes the trained model as a checkpoint folder."""
        trained = processes.gathered(params.load(self.model, masters | self.frozen), self.mesh)
        if processes.is_first():
            save.save(trained, self.target, folder, self.settings)
            say(f"written: {folder}")


def _prepare(settings: TrainSettings, say: SignsOfLife) -> tuple[_Parts, Arrays]:
    """Tokenises the data and loads the models.

    Returns the float32 masters separately: the caller frees them once the state has its copy.
    """
    mesh = make_mesh(settings.mesh.model_dump())
    origin = assemble.source(settings)
    say.doing("preparing the data")
    splits = assemble.splits(settings, origin, say)
    total = assemble.total_steps(settings, splits["train"][1])
    say.doing("loading the models")
    target = None
    if settings.kind != "target":
        target = assemble.load_target(settings, mesh, layers=assemble.runs_target(settings))
    model = assemble.new_model(settings, origin, target, splits["train"][0], say)
    if target is not None:
        check_engine(model, target, settings.save_format)  # refuse a shape that cannot be written before training it
    masters, frozen = step.split(model, () if settings.kind == "target" else step.FROZEN)
    frozen = {path: jax.device_put(array, path_sharding(path, array.shape, mesh)) for path, array in frozen.items()}
    read = {}
    if settings.features is not None and target is not None:
        stored = features.stored(settings, model, target, splits)
        read = {split: functools.partial(stored.batch, split) for split in splits}
    abstract, objective = jax.eval_shape(lambda: model), assemble.objective_of(settings)
    return _Parts(settings, mesh, origin, splits, read, total, target, abstract, frozen, objective), masters


class _Loop:
    """The loop over steps, with evaluation and checkpoints."""

    def __init__(
        self,
        settings: TrainSettings,
        advance: Advance,
        batches: Any,
        evaluator: Evaluator | None,
        checkpoints: Checkpoints,
        total: int,
        say: SignsOfLife,
    ):
        self.settings, self.advance, self.batches, self.total, self.say = settings, advance, batches, total, say
        self.evaluator, self.checkpoints = evaluator, checkpoints
        self.compiled: set[tuple[int, ...]] = set()

    def run(self, state: TrainState) -> tuple[TrainState, int]:
        """Takes steps until the last one or a signal; returns the state, and the signal's exit code or 0."""
        number, ended = int(state.step), 0
        progress = Progress(self.settings, number, self.total, self.say)
        with processes.termination(self.say) as ends_with:
            while number < self.total and not ended:
                state, values = self.step(state, number + 1, progress)
                number += 1
                try:
                    progress.add(number, values)
                    score = self.evaluate(state, number, progress)
                    ended = ends_with(number)
                    if score is not None or self.due(number, self.settings.checkpoints.every) or ended:
                        with progress.apart(state, f"saving step {number}"):
                            self.save(state, score)
                except NotFinite as error:
                    raise _diverged(str(error), self.settings, self.checkpoints) from None
                except NotLossless:
                    self.save(state, None)
                    raise
        progress.close()
        return state, 0 if number == self.total else ended

    def due(self, number: int, every: int) -> bool:
        """Returns whether step `number` is a multiple of `every`, or the last step."""
        return number % every == 0 or number == self.total

    def step(self, state: TrainState, number: int, progress: Progress) -> tuple[TrainState, Metrics]:
        """Takes step `number`. Each sequence length compiles one program; the clock excludes that time."""
        batch = next(self.batches)
        shape = batch["tokens"].shape
        if shape in self.compiled:
            self.say.doing(f"step {number} of {self.total}")
            return self.advance(state, batch)
        self.compiled.add(shape)
        with progress.apart(state, f"compiling a step with rows of {shape[1]}, and running it", steps=1):
            return jax.block_until_ready(self.advance(state, batch))

    def evaluate(self, state: TrainState, number: int, progress: Progress) -> float | None:
        """Returns the score after step `number`; None if no evaluation is due.

        Raises:
          NotFinite: before evaluating a diverged state. NotLossless: see `Evaluator`.
        """
        if self.evaluator is None or not self.due(number, self.settings.evaluation.every):
            return None
        with progress.apart(state, f"evaluating step {number}"):
            check_finite(state)
            scores, score = self.evaluator(state.masters)
        progress.add_scores(number, scores)
        return score

    def save(self, state: TrainState, score: float | None) -> None:
        self.checkpoints.save(state, self.batches.get_state(), score)


def _diverged(what: str, settings: TrainSettings, checkpoints: Checkpoints) -> ValueError:
    """Returns an error that names the settings to change and the step to resume from."""
    good = checkpoints.latest
    begin = "begins anew" if good is None else f"goes on from step {good}, the last good checkpoint,"
    clip = " or set optimizer.clip_norm" if settings.optimizer.clip_norm is None else ""
    return ValueError(
        f"{what}, and nothing of it is saved; lower optimizer.learning_rate (it is {settings.optimizer.learning_rate})"
        f"{clip}: the same command with the changed setting {begin} in {settings.output}"
    )
