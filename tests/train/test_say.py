"""Long silences are broken by a line that says what goes on."""

from __future__ import annotations

import time

from eagle_jax.train.report import signs_of_life


def test_a_long_silence_is_broken():
    said: list[str] = []
    with signs_of_life(said.append, "compiling", every=0.2) as say:
        while not said:
            time.sleep(0.02)
        assert said.pop(0).startswith("compiling: ")
        say.doing("")  # nothing to tell
        time.sleep(0.5)
        assert not said
        say.doing("step 1")
        say("hello")
        while len(said) < 2:
            time.sleep(0.02)
    assert said[0] == "hello" and said[1].startswith("step 1: ")
    ended = len(said)
    time.sleep(0.3)
    assert len(said) == ended
