"""Targets of other architectures than Llama, with EAGLE-3 heads, by the real compiler of an H200."""

from __future__ import annotations

import pytest

from bench.aot import programs
from bench.shapes import SHAPES
from tests.accelerators.facts import FEW, MORE, caches, facts
from tests.aot import gpu_devices

MIB, GIB = 2**20, 2**30


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernels", "gib"), [("qwen3-8b", 27, 18), ("gemma2-9b", 25, 22)])
def test_a_cycle_updates_its_caches_in_place_and_fits(name, kernels, gib):
    """The kernels of a layer, and the weights and caches of all layers, of which none is copied."""
    shape = SHAPES[name]
    few, more = (
        facts(program, gpu_devices()[0])
        for program in (programs.cycle(shape.with_layers(layers), 8192) for layers in (FEW, MORE))
    )
    assert few.copies == more.copies == []
    assert more.aliased >= caches(programs.cycle(shape.with_layers(MORE), 8192))[1]
    assert more.temporaries < 110 * MIB
    assert more.kernels - few.kernels <= kernels * (MORE - FEW)
    of_a_layer = (more.arguments - few.arguments) / (MORE - FEW)
    assert few.arguments + of_a_layer * (shape.target.num_layers - FEW) < gib * GIB
