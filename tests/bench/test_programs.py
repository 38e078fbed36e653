"""bench/aot/programs.py: what each chip of a mesh holds of a program's arguments."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from bench.aot import programs
from bench.shapes import SHAPES

TINY = SHAPES["tiny"]


def mesh(*shape: int) -> Mesh:
    chips = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(chips, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: programs.train_step(TINY, rows=4, width=16), (1, 4, 1)),
        (lambda: programs.cycle(TINY, capacity=2048, batch=2), (2, 1, 2)),
        (lambda: programs.prefill(TINY, capacity=2048, prompt=512, batch=2), (2, 1, 2)),
    ],
)
def test_chips_of_a_mesh_hold_a_share_each(make, shape):
    """Weights and caches are split; norms, counts and tokens are whole everywhere."""
    whole = share = 0
    for x in jax.tree.leaves(make().placed(mesh(*shape))):
        whole += x.size
        share += math.prod(x.sharding.shard_shape(x.shape))
    assert whole / 4 < share < whole / (3 if shape[1] == 4 else 2)


def test_caches_are_split_by_sequence_and_by_head():
    state = programs.cycle(TINY, capacity=2048, batch=2).placed(mesh(2, 1, 2))[2]
    for cache in (state.cache, state.draft.cache):
        assert cache.k[0].sharding.shard_shape(cache.k[0].shape) == (1, 1, cache.rows, 16)
    assert state.tokens.sharding.is_fully_replicated
