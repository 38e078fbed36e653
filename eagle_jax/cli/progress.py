"""Signs of life of long work: spinners and bars on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

EVERY = 30.0  # seconds between two lines where there is no terminal


@contextlib.contextmanager
def status(console: Any, doing: str) -> Iterator[None]:
    """Shows that something is going on, such as "loading".

    Args:
      console: a rich Console. If it is no terminal, what takes longer than EVERY seconds says so in plain lines.
    """
    if console.is_terminal:
        with console.status(doing):
            yield
        return
    began, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(EVERY):
            console.print(f"{doing}, {time.monotonic() - began:.0f} s so far", style="dim", soft_wrap=True)

    thread = threading.Thread(target=tell, daemon=True)  # this one is busy: in a compiler, or waiting for a device
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def bar(console: Any, doing: str, total: int, before: int = 0) -> Iterator[Callable[..., None]]:
    """Shows how much of some work is done; gives `advance(count=1, note="")`, to call as more is done.

    Args:
      console: a rich Console. If it is no terminal, a plain line comes every EVERY seconds.
      doing: what is done, such as "measuring".
      before: how much was done before this work began; the time left is not judged by it.
    """
    done, began = before, time.monotonic()
    last = began

    def tell(count: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= EVERY:
            last = now
            parts = [f"{doing}: {done} of {total}", *([note] if note else [])]
            if done > before:
                parts.append(f"{_clock((now - began) * (total - done) / (done - before))} left")
            console.print(", ".join(parts), style="dim", soft_wrap=True)

    if not console.is_terminal:
        yield tell
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = SpinnerColumn(), doing, BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), "ETA"
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as shown:
        task = shown.add_task("", total=total, completed=before, note="")
        yield lambda count=1, note="": shown.update(task, advance=count, note=note)


def _clock(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
