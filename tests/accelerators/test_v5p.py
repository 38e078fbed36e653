"""The decoder at Llama-3.1-8B's shape on one chip, by the real compiler of a TPU v5p: memory and copies."""

from __future__ import annotations

import pytest

from bench.aot import programs
from eagle_jax import SamplingConfig
from tests.accelerators.facts import FEW, MORE, caches, facts, shape
from tests.aot import tpu_devices

MIB = 2**20


def chip():
    return tpu_devices("v5p:2x2x1")[0]


@pytest.mark.slow  # over four chips it is in test_slices.py, with all layers
def test_a_cycle_updates_its_caches_in_place_and_a_layer_leaves_nothing_behind():
    made = [programs.cycle(shape(layers), 8192) for layers in (FEW, MORE)]
    few, more = (facts(program, chip()) for program in made)
    for program, found in zip(made, (few, more), strict=True):
        assert found.aliased >= caches(program)[1] and found.copies == []
    assert more.temporaries < 110 * MIB
    assert more.temporaries - few.temporaries < (MORE - FEW) * MIB  # the new keys and values, in tiles


@pytest.mark.slow  # it is in the loop of the sampled `generate` below
def test_a_sampled_cycle_updates_its_caches_in_place():
    """It holds a few arrays of [N, V] float32, 31 MB each."""
    program = programs.cycle(shape(FEW), 8192, sampling=SamplingConfig(temperature=1.0))
    found = facts(program, chip())
    assert found.aliased >= caches(program)[1] and found.copies == []
    assert found.temporaries < 256 * MIB


@pytest.mark.parametrize(
    ("sampling", "most"),
    [(SamplingConfig(temperature=1.0), 300), pytest.param(SamplingConfig(), 200, marks=pytest.mark.slow)],
    ids=["sampled", "greedy"],
)
def test_generate_needs_little_beside_its_caches(sampling, most):
    """The caches are made inside the program, so they are among its temporaries."""
    program = programs.generate(shape(FEW), 8192, 512, sampling=sampling)
    found = facts(program, chip())
    assert found.temporaries - caches(program)[1] < most * MIB
    assert found.copies == found.held == []
