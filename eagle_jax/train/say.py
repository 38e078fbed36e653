"""What long work tells while it goes on."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable

Say = Callable[[str], None]


def log(message: str) -> None:
    """To standard error, with the time."""
    print(f"{datetime.datetime.now():%H:%M:%S} {message}", file=sys.stderr, flush=True)
