"""The clock of a training run."""

from __future__ import annotations

import datetime
import math
import time


class Clock:
    """Speed since the last look, and the time left. What compiles, evaluates and saves is left out."""

    def __init__(self, step: int, total: int):
        self.step, self.total, self.at, self.last = step, total, time.monotonic(), math.nan

    def rate(self, step: int) -> float:
        """Steps a second since the last look at an earlier step; NaN if all since then were left out."""
        if step > self.step:
            now = time.monotonic()
            self.last = (step - self.step) / max(now - self.at, 1e-9)
            self.step, self.at = step, now
        return self.last

    def leave_out(self, seconds: float, steps: int = 0) -> None:
        """Seconds that were spent otherwise, and steps that took place in them."""
        self.at += seconds
        self.step += steps

    def left(self, step: int) -> datetime.timedelta:
        """Until the last step, at the rate of the last ones."""
        return datetime.timedelta(seconds=round((self.total - step) / self.rate(step)))
