"""Cycles of heads that draft all depths in one pass, by the real compilers of an H200 and of a TPU v5e.

A CPU's are in tests/drafts/test_one_pass.py and tests/bench/test_hlo.py.
"""

from __future__ import annotations

import re

import pytest

from bench.aot import programs, tpu
from bench.shapes import ONE_PASS
from tests.accelerators.facts import FEW, Facts, caches, facts, shape
from tests.aot import gpu_devices, tpu_devices

MIB = 2**20
MOST_KERNELS = {"dflash": 440, "dspark": 350, "peagle": 310}  # 434, 343 and 301 on 2026-11-29


def mlps(found: Facts, width: int) -> int:
    """Counts runs of an MLP by the two products, gate and up, with an axis of `width` in their result."""
    wide = (count for array, count in found.products.items() if re.search(rf"[\[,]{width}[,\]]", array))
    return sum(wide) // 2


def one_pass(head: str) -> tuple[programs.Program, int]:
    """A cycle with the head's default tree, and the layers of target and head."""
    program = programs.cycle(shape(FEW), 8192, tree=ONE_PASS[head].tree, head=head)
    return program, FEW + program.args[1].config.num_layers


@pytest.mark.slow
@pytest.mark.parametrize("head", ONE_PASS)
def test_an_h200_runs_the_head_once_and_copies_nothing(head):
    """Every layer of the target and of the head runs once in a cycle, although the tree is many levels deep."""
    program, layers = one_pass(head)
    found = facts(program, gpu_devices()[0])
    assert mlps(found, shape(FEW).target.intermediate_size) == layers
    assert found.copies == [] and found.aliased >= caches(program)[1]
    assert found.kernels <= MOST_KERNELS[head] and found.temporaries < 110 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("head", ONE_PASS)
def test_four_chips_run_the_head_once_and_copy_nothing(head):
    tpu_devices("v5e:2x2")
    row = next(row for row in tpu.ROWS if (row.topology, row.shape, row.program) == ("v5e:2x2", "8b", head))
    program, layers = one_pass(head)
    found = facts(program, row.mesh())
    assert mlps(found, shape(FEW).target.intermediate_size // row.tensor) == layers
    assert found.copies == [] and found.aliased >= caches(program)[1] / row.tensor
    assert found.temporaries < 110 * MIB
