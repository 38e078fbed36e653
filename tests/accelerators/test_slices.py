"""Pairs on slices of a TPU, by its real compiler: what each chip holds, and copies."""

from __future__ import annotations

import pytest

from bench.aot import tpu
from tests.accelerators.facts import ALL, FEW, caches, facts, shape
from tests.aot import tpu_devices


def four_chips(program: str) -> tpu.Row:
    tpu_devices("v5e:2x2")
    return next(row for row in tpu.ROWS if (row.topology, row.program) == ("v5e:2x2", program))


def test_a_cycle_fits_four_chips():
    """Weights and caches of all layers are split: 16 GB of weights over four chips of 16 GiB."""
    row = four_chips("cycle")
    program = tpu.PROGRAMS[row.program](shape(ALL), row.batch)
    found = facts(program, row.mesh())
    assert 4 < found.arguments / tpu.GIB < 5
    assert found.peak / tpu.GIB < 6
    assert found.aliased >= caches(program)[1] / 4  # they are updated in place
    assert found.copies == []


@pytest.mark.slow  # libtpu takes minutes for its loss; test_training.py has an H200's
def test_a_training_step_fits_four_chips():
    """Every chip has the flash kernel for its own sequences; no weight is copied."""
    measured = tpu.measure(four_chips("train"), layers=FEW)
    assert measured["fits"] and measured["copies"] == 0


# GiB a chip with all layers, of a cycle with an EAGLE-3 head.
TARGETS = {"qwen3-8b": 4.6, "gpt-oss-20b": 5.3, "qwen3-30b-a3b": 11.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_targets_of_other_architectures_fit_and_copy_nothing(name):
    """No weight, expert or cache is copied: gpt-oss's embedding neither, whose rows are no multiple of 128."""
    rows = {row.program: row for row in tpu.ROWS if row.shape == name}
    tpu_devices(rows["cycle"].topology)
    measured = tpu.measure(rows["cycle"])
    assert measured["copies"] == 0 and measured["total GiB"] < TARGETS[name]
    assert tpu.measure(rows["generate"], layers=FEW)["copies"] == 0
