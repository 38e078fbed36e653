"""Shows progress on stderr: animated on a terminal, plain lines elsewhere, such as in a log."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

EVERY = 10.0  # seconds between two lines; shorter work prints none


@contextlib.contextmanager
def status(console: Any, doing: str, every: float = EVERY) -> Iterator[None]:
    """Shows that work goes on, such as "compiling". every: seconds between two plain lines."""
    if console.is_terminal:
        with console.status(doing):
            yield
    else:
        with _lines(console, every, lambda seconds: f"{doing}, {_clock(seconds)}"):
            yield


@contextlib.contextmanager
def bar(console: Any, doing: str, total: int, before: int = 0, every: float = EVERY) -> Iterator[Callable[..., None]]:
    """Shows how many of `total` pieces are done, and when the rest may be.

    Args:
      before: pieces that an earlier run did; the estimate of the time left excludes them.
      every: seconds between two plain lines.
    Yields:
      advance(count=1, note=""): call it after `count` more pieces, with a note to show.
    """
    if console.is_terminal:
        with _bar(console, doing, total, before) as advance:
            yield advance
        return
    done, shown = before, ""

    def advance_lines(count: int = 1, note: str = "") -> None:
        nonlocal done, shown
        done, shown = done + count, note

    def line(seconds: float) -> str:
        left = f", ETA {_clock(seconds * (total - done) / (done - before))}" if done > before else ""
        return f"{doing}, {done} of {total}, {_clock(seconds)}{left}" + (f", {shown}" if shown else "")

    with _lines(console, every, line):
        yield advance_lines


@contextlib.contextmanager
def _bar(console: Any, doing: str, total: int, before: int) -> Iterator[Callable[..., None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = SpinnerColumn(), doing, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), "ETA"
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as shown:
        task = shown.add_task("", total=total, completed=before, note="")
        yield lambda count=1, note="": shown.update(task, advance=count, note=note)


@contextlib.contextmanager
def _lines(console: Any, every: float, line: Callable[[float], str]) -> Iterator[None]:
    """Prints line(seconds so far) periodically, from a thread: compilation blocks the main one."""
    ended, began = threading.Event(), time.monotonic()

    def run() -> None:
        while not ended.wait(every):
            with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any longer
                console.print(line(time.monotonic() - began), soft_wrap=True, markup=False)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _clock(seconds: float) -> str:
    """Formats seconds as "1:23:45", or "0:07"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
