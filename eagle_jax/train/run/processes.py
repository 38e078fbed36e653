"""Coordinates the processes of a distributed run: work for process 0 alone, agreement on errors and signals.

All processes share the run's folder. A single process is process 0.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eagle_jax.train.report import Say

Result = TypeVar("Result")
EXIT_CODES: dict[int, int] = {
    signal.SIGTERM: 143,
    signal.SIGINT: 130,
}  # 128 + the signal, as shells report it


def is_first() -> bool:
    return jax.process_index() == 0


def of_first(say: Say) -> Say:
    """Returns `say` in process 0, and a function that drops messages in the others."""
    return say if is_first() else lambda message: None


def by_first(work: Callable[[], object]) -> None:
    """Runs `work` in process 0, while the others wait.

    Raises:
      ValueError: in the others, if `work` raised in process 0.
    """
    error = None
    if is_first():
        try:
            work()
        except Exception as raised:
            error = raised
    failed = any_of(error is not None)
    if error is not None:
        raise error
    if failed:
        raise ValueError("the first process could not go on; its own message says why")


def first_then_others(work: Callable[[], Result]) -> Result:
    """Runs `work` in process 0 first, then in the others, which can read the files that it wrote.

    Raises:
      ValueError: in the others, if `work` raised in process 0.
    """
    results: list[Result] = []
    by_first(lambda: results.append(work()))
    return results[0] if results else work()


def any_of(flag: bool) -> bool:
    """Returns whether `flag` is set in any process; all of them must call this."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def of_the_first(number: int) -> int:
    """Broadcasts a number from process 0."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.array(number)))


def gathered(model: Any, mesh: Mesh) -> Any:
    """All-gathers a model into NumPy arrays in every process; all of them must call this."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda array: np.asarray(jax.device_put(array, everywhere)), model)


@contextmanager
def termination(say: Say) -> Iterator[Callable[[int], int]]:
    """Yields `ends_with(step)`: the exit code if a signal ends the run after this step, else 0.

    SIGTERM and Ctrl-C are only noted; a second Ctrl-C exits at once. If one process of several gets the signal, JAX's
    preemption service makes all of them agree on the last step.
    """
    several = jax.process_count() > 1
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        del frame
        came.append(number)
        if several and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)

    def ends_with(step: int) -> int:
        ends = multihost_utils.reached_preemption_sync_point(step) if several else bool(came)
        return EXIT_CODES[came[0] if came else signal.SIGTERM] if ends else 0

    noted = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in noted}
    try:
        with _told_at_once(say):
            yield ends_with
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _told_at_once(say: Say) -> Iterator[None]:
    """Answers signals from a thread: Python's handlers only run after a compilation, which may take minutes."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def answer() -> None:
        interrupted = False
        while number := reader.recv(1):
            if number[0] == signal.SIGINT and interrupted:
                os._exit(EXIT_CODES[signal.SIGINT])  # safe without cleanup: files are written atomically
            if number[0] == signal.SIGINT:
                interrupted = True
                say("Ctrl-C: this step is finished and saved first; Ctrl-C again ends at once, without saving")
            elif number[0] == signal.SIGTERM:
                say("SIGTERM: this step is finished and saved first")

    thread = threading.Thread(target=answer, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()
        reader.close()
