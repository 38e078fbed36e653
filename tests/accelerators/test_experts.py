"""Targets with experts, by the real compiler of an H200: memory, and no copy of experts, weights or caches."""

from __future__ import annotations

import pytest

from bench.aot import programs
from bench.shapes import ROUTED
from tests.accelerators.facts import FEW, MORE, Facts, facts
from tests.aot import gpu_devices

MIB, GIB = 2**20, 2**30
H200 = 139 * GIB
CAPACITY = 8192


def compiled(name: str, program: str, layers: int) -> Facts:
    shape = ROUTED[name].with_layers(layers)
    made = {
        "plain": lambda: programs.cycle(shape, CAPACITY, tree=None),
        "cycle": lambda: programs.cycle(shape, CAPACITY),
        "generate": lambda: programs.generate(shape, CAPACITY, 512),
    }
    return facts(made[program](), gpu_devices()[0])


def test_plain_decoding_reads_the_chosen_experts_where_they_are():
    """The experts are 1.1 GiB a layer, and no temporary comes near it."""
    found = compiled("qwen3-30b-a3b", "plain", FEW)
    assert found.copies == [] and found.temporaries < 16 * MIB
    assert found.kernels < 90  # 77 on 2026-11-29


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTED)
def test_a_cycle_fits_and_copies_nothing(name):
    few, more = (compiled(name, "cycle", layers) for layers in (FEW, MORE))
    assert few.copies == more.copies == []
    assert more.temporaries < 200 * MIB  # logits of 60 nodes in float32 are 46 MiB for gpt-oss
    assert more.temporaries - few.temporaries < (MORE - FEW) * MIB
    assert more.kernels - few.kernels <= 33 * (MORE - FEW)
    rest = (ROUTED[name].target.num_layers - FEW) / (MORE - FEW)
    assert few.peak + rest * (more.peak - few.peak) < H200 / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTED)
def test_generate_copies_no_weight_in_its_loops(name):
    """The outputs of a chunk of gpt-oss's prompt, 6 MB, have as many numbers as its head's keys' weight."""
    found = compiled(name, "generate", FEW)
    assert set(found.copies) <= {"bf16[2,128,4,2880]"} and found.temporaries < 256 * MIB
