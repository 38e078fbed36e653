"""Measures the speed of a training run."""

from __future__ import annotations

import datetime
import math
import time


class Clock:
    """Steps a second since the last call of `rate`, and the time left, without compilation, evaluation and saving."""

    def __init__(self, step: int, total: int):
        self.step, self.total, self.at, self.last = step, total, time.monotonic(), math.nan

    def rate(self, step: int) -> float:
        """Returns steps a second since the last call at an earlier step; NaN if all steps since were left out."""
        if step > self.step:
            now = time.monotonic()
            self.last = (step - self.step) / max(now - self.at, 1e-9)
            self.step, self.at = step, now
        return self.last

    def leave_out(self, seconds: float, steps: int = 0) -> None:
        """Excludes some seconds, and the steps that ran in them."""
        self.at += seconds
        self.step += steps

    def left(self, step: int) -> datetime.timedelta:
        """Estimates the time until the last step, at the latest rate."""
        return datetime.timedelta(seconds=round((self.total - step) / self.rate(step)))
