"""Logs the progress of long work."""

from __future__ import annotations

import datetime
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Say = Callable[[str], None]
QUIET = 30.0  # the longest silence, in seconds


def log(message: str) -> None:
    """Prints to standard error, with the time of day."""
    print(f"{datetime.datetime.now():%H:%M:%S} {message}", file=sys.stderr, flush=True)


class SignsOfLife:
    """Passes messages on. After `every` silent seconds, reports the current activity and its duration (a heartbeat)."""

    def __init__(self, say: Say, every: float):
        self.say, self.every = say, every
        self.what, self.began = "", time.monotonic()
        self.said = self.began
        self.ended = threading.Event()

    def __call__(self, message: str) -> None:
        self.said = time.monotonic()
        self.say(message)

    def doing(self, what: str) -> None:
        """Names the current activity; "" turns the heartbeat off."""
        self.what, self.began = what, time.monotonic()

    def watch(self) -> None:
        """Runs in a thread until `ended` is set."""
        while not self.ended.wait(self.every / 4):
            what, now = self.what, time.monotonic()
            if what and now - max(self.said, self.began) >= self.every:
                self(f"{what}: {now - self.began:.0f} s so far")


@contextmanager
def signs_of_life(say: Say, what: str = "", every: float | None = None) -> Iterator[SignsOfLife]:
    """Yields a `SignsOfLife` around `say`, with its thread running."""
    life = SignsOfLife(say, QUIET if every is None else every)
    life.doing(what)
    thread = threading.Thread(target=life.watch, name="signs of life", daemon=True)
    thread.start()
    try:
        yield life
    finally:
        life.ended.set()
        thread.join()
