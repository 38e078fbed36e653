"""Several processes that train together, each on its own devices: what the first one does alone, what all agree on.

They share the run's folder. Alone, a process is the first one.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from eagle_jax.train.say import Say

Result = TypeVar("Result")


def is_first() -> bool:
    return jax.process_index() == 0


def of_first(say: Say) -> Say:
    """Says in the first process what all would say."""
    return say if is_first() else lambda message: None


def first_then_others(work: Callable[[], Result]) -> Result:
    """What `work` returns, run in the first process before the others, which find the files that it wrote.

    Raises:
      RuntimeError: in the others, if the first one's raised anything.
    """
    result, error = None, None
    if is_first():
        try:
            result = work()
        except Exception as raised:
            error = raised
    failed = multihost_utils.broadcast_one_to_all(np.array(error is not None))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError("the first process could not go on; its own message says why")
    return work() if result is None else result


def gathered(model: Any, mesh: Mesh) -> Any:
    """A model with NumPy arrays, whole in every process; all of them call it."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda array: np.asarray(jax.device_put(array, everywhere)), model)


@contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """Yields what tells, after each step, whether SIGTERM ends the run there. It ends nothing in the meantime.

    Of several processes one may get it; JAX's own service for that agrees on a step that all of them end with.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
