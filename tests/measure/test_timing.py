"""Timing: how many runs there are, what they are divided by, and that XLA leaves their work in the loop."""

from __future__ import annotations

import re
import time

import jax
import jax.numpy as jnp

from eagle_jax.measure import timing


def test_the_median_of_calls(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 29.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert timing.median_seconds(lambda: None, 3) == 2


def test_a_part_runs_as_often_as_asked_and_keeps_what_it_updates(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SECONDS", 0)  # one run a program
    repeats = 3

    def part(fixed, small, kept):
        return fixed + small + kept, kept + 1

    seconds, result, kept = timing.seconds_of(part, jnp.int32(100), jnp.int32(10), jnp.int32(0), repeats)
    assert seconds > 0
    assert int(kept) == 2 + repeats  # one run compiles, one tells how long a run takes
    assert int(result) == 100 + 10 + int(kept) - 1


def test_a_part_without_inputs_or_results_of_its_own():
    result, kept = jax.jit(lambda x: timing.repeat(lambda fixed, small, kept: ((), -kept), 3, (), (), x))(jnp.ones(2))
    assert result == () and kept.tolist() == [-1, -1]


def test_products_of_unchanged_inputs_stay_in_the_loop():
    def part(weight, x, kept):
        return x @ weight, kept

    program = jax.jit(lambda runs, weight, x: timing.repeat(part, runs, weight, x, ())[0])
    compiled = program.lower(5, jnp.ones((64, 64)), jnp.ones((8, 64))).compile()
    loops, outside = compiled.as_text().split("\nENTRY ")
    products = re.compile(r" dot\(|kind=kCustom|custom-call")
    assert products.search(loops) and not products.search(outside)
