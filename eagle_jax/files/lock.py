"""Locks an output, so that two runs do not overwrite each other. The lock holds across processes and ends with them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"


class Locked(ValueError):
    """Another process writes to the same place."""


@contextmanager
def locked_folder(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Locks a folder, which is created if needed. See `locked`."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder to write to; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, folder / LOCK, say):
        yield


@contextmanager
def locked_file(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Locks a file that is to be written, by a lock file beside it. See `locked`."""
    with locked(out, out.with_name(f".{out.name}{LOCK}"), say):
        yield


@contextmanager
def locked(what: Path, lock: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock file `lock` while the block runs; the operating system releases it if the process dies.

    Args:
      what: the output, for messages. say: called if there are no locks on this system or file system.
    Raises:
      Locked: if another process holds the lock; names `what` and, where known, that process.
    """
    file = _take(what, lock, say)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                lock.unlink()  # while it is held: whoever takes it next makes a new one
            os.close(file)


def _take(what: Path, lock: Path, say: Callable[[str], None]) -> int | None:
    """Returns the open lock file; None where the file system has no locks."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        say(f"{what}: this system has no file locks; take care that no other run writes there")
        return None
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(file)
            os.close(file)
            raise Locked(
                f"{what}: another run writes there{holder}; wait for its end, end it, or choose another output"
            ) from None
        except OSError as error:
            os.close(file)
            say(f"{what}: its file system has no locks ({error.strerror}); take care that no other run writes there")
            return None
        if _is_still(lock, file):
            os.truncate(file, 0)
            os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
            return file
        os.close(file)  # its holder removed it between our opening and locking it


def _is_still(lock: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(lock), os.fstat(file))
    except FileNotFoundError:
        return False


def _holder(file: int) -> str:
    try:
        known = json.loads(os.pread(file, 1000, 0))
        return f" (process {known['pid']} on {known['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
