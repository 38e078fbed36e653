"""Llama-3.3-70B and its head on eight devices, by shapes alone: what each holds, and what `generate` returns."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import eagle_jax
from bench.shapes import SHAPES, abstract_pair
from eagle_jax.models import params
from eagle_jax.sharding import CACHE_RULE, fitting, path_sharding
from tests.sharding.meshes import mesh_of

BATCH, PROMPT, NEW = 8, 1024, 1024


def gigabytes(arrays: dict[str, Any], sharding_of: Any) -> float:
    """Of one device, in 10^9 bytes. arrays: {path: abstract array}; sharding_of(path, shape)."""
    shards = ((sharding_of(path, a.shape).shard_shape(a.shape), a.dtype.itemsize) for path, a in arrays.items())
    return sum(math.prod(shape) * size for shape, size in shards) / 1e9


def test_the_70b_pair_on_eight_devices():
    mesh = mesh_of(1, 8)
    target, draft = abstract_pair(SHAPES["70b"])
    placed = functools.partial(path_sharding, mesh=mesh)
    weights = [gigabytes(params.flatten(model), placed) for model in (target, draft)]
    whole = [sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(model)) / 1e9 for model in (target, draft)]
    assert [round(size, 2) for size in whole] == [141.11, 2.81]
    assert [round(size, 2) for size in weights] == [17.64, 0.70]  # fc, 0.40, lies whole on every device

    def start(target, draft):
        return eagle_jax.empty_state(target, draft, BATCH, PROMPT + NEW)

    state = params.flatten(jax.eval_shape(start, target, draft))
    caches = {path: a for path, a in state.items() if a.ndim == 4}
    assert len(caches) == 2 * (80 + 1) and caches["cache.k.79"].shape == (BATCH, 8, 2176, 128)

    def cache_sharding(path, shape):
        return NamedSharding(mesh, fitting(CACHE_RULE, shape, mesh))

    assert round(gigabytes(caches, cache_sharding), 2) == 0.72


def test_generate_s_outputs_by_shapes_alone():
    out = jax.eval_shape(
        functools.partial(eagle_jax.generate, max_new_tokens=NEW),
        *abstract_pair(SHAPES["70b"]),
        jax.ShapeDtypeStruct((BATCH, PROMPT), jnp.int32),
        jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    )
    assert out.tokens.shape == out.drafted.shape == (BATCH, PROMPT + NEW)
    assert out.lengths.shape == out.cycles.shape == out.failed.shape == (BATCH,)
    assert out.accepted.shape == (BATCH, 9)
