"""Models on meshes: what the tests of sharding share."""

from __future__ import annotations

import os
from typing import Any

import jax
from jax.sharding import Mesh

from eagle_jax.sharding import make_mesh, path_name, path_sharding


def child_environment() -> dict[str, str]:
    """Returns the environment of a process that shares this one's compilation cache, with its lock."""
    cache = {
        name: str(jax.config.values[name]) for name in ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
    }
    return dict(os.environ) | {name.upper(): value for name, value in cache.items()}


def mesh_of(data: int, tensor: int) -> Mesh:
    return make_mesh({"data": data, "tensor": tensor})


def on_mesh(model: Any, mesh: Mesh) -> Any:
    """Places a model of one device on a mesh, as `load(mesh=...)` does."""

    def place(path, leaf):
        return jax.device_put(leaf, path_sharding(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, model)
