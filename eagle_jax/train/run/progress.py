"""Reports the progress of a run to the log, metrics.jsonl and TensorBoard."""

from __future__ import annotations

import collections
import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eagle_jax.train.config import TrainSettings
from eagle_jax.train.loss.objective import Metrics
from eagle_jax.train.report import SignsOfLife
from eagle_jax.train.run import metrics, optimizer
from eagle_jax.train.run.checkpoint import NotFinite
from eagle_jax.train.run.clock import Clock

MEAN_STEPS = 100  # window of the running mean of the loss


class Progress:
    """Reports losses, learning rate, speed and evaluations from step `number` on."""

    def __init__(self, settings: TrainSettings, number: int, total: int, say: SignsOfLife):
        self.settings, self.total, self.say = settings, total, say
        self.records = metrics.Metrics(Path(settings.output), number)
        self.decay = optimizer.schedule(settings.optimizer, total)
        self.decay(number)  # compile it before the clock starts
        self.unread: list[jax.Array] = []  # losses on the device since the last line of the log
        self.losses: collections.deque[float] = collections.deque(maxlen=MEAN_STEPS)
        self.clock = Clock(number, total)

    def add(self, number: int, values: Metrics) -> None:
        """Adds the metrics of step `number`. Every log_every steps, fetches them from the device and reports them.

        Raises:
          NotFinite: if a loss since the last report is not finite.
        """
        self.unread.append(values["loss"])
        if number % self.settings.log_every and number != self.total:
            return
        losses, found = jax.device_get((self.unread, values))
        for at, loss in enumerate(losses, number - len(losses) + 1):
            if not math.isfinite(loss):
                raise NotFinite(f"the loss is {loss} at step {at}")
        self.losses.extend(map(float, losses))
        self.unread.clear()
        rate = self.settings.optimizer.learning_rate * float(self.decay(number - 1))
        found = {"loss": self.losses[-1], "loss_mean": np.mean(self.losses), **found, "learning_rate": rate}
        words, speed = _words(found), self.settings.batch_tokens * self.clock.rate(number)
        if not math.isnan(speed):
            found["tokens_a_second"] = speed
            words += f"  {speed:,.0f} tok/s  ETA {self.clock.left(number)}"
        self._report(number, found, words)

    def add_scores(self, number: int, scores: dict[str, Any]) -> None:
        """Reports an evaluation after step `number`."""
        self._report(number, scores, _words(scores))

    def _report(self, number: int, values: dict[str, Any], words: str) -> None:
        self.records.add(number, values)
        self.say(f"step {number}/{self.total}  {words}")

    @contextlib.contextmanager
    def apart(self, state: Any, what: str, steps: int = 0) -> Iterator[None]:
        """Excludes the time of the block, and the `steps` steps in it, from the speed. Waits for `state` first."""
        jax.block_until_ready(state)
        began = time.monotonic()
        self.say.doing(what)
        yield
        self.clock.leave_out(time.monotonic() - began, steps)

    def close(self) -> None:
        self.records.close()


def _words(values: dict[str, Any]) -> str:
    def word(value: Any) -> str:
        return " ".join(f"{number:.4g}" for number in np.atleast_1d(np.asarray(value)))

    return "  ".join(f"{name} {word(value)}" for name, value in values.items())
