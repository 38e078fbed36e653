"""Two processes do not write to one place; a lock dies with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import socket

import pytest

from eagle_jax.files.lock import LOCK, Locked, locked_file, locked_folder


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path):
    said: list[str] = []
    out = tmp_path / "run"
    with locked_folder(out, said.append):
        holder = rf"{out}: another run .*process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(Locked, match=holder), locked_folder(out, said.append):
            pass
        (out / LOCK).write_text("")  # it may be read before its holder has written to it
        with pytest.raises(Locked, match="another run writes there; wait for its end"), locked_folder(out, said.append):
            pass
    assert not list(out.iterdir()) and not said
    with locked_folder(out, said.append), locked_file(out / "own.jsonl", said.append):
        with pytest.raises(Locked, match=r"own\.jsonl: another run"), locked_file(out / "own.jsonl", said.append):
            pass
        with locked_file(out / "other.jsonl", said.append):
            pass


def test_a_lock_that_a_dead_process_left_is_free(tmp_path):
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "gone"}')
    with locked_folder(tmp_path, print):
        pass


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """Else two would hold one: the removed file's, and that of the file made since."""
    real, calls = fcntl.flock, []

    def flock(file, how):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(file)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked_folder(tmp_path, print):
        assert len(calls) == 2 and (tmp_path / LOCK).exists()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    with locked_folder(tmp_path, said.append):
        pass
    assert "has no locks (No locks available)" in said[0]
