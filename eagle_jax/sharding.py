"""Sharding: meshes, the partition rule of every parameter by its path, and constraints on states in a trace.

A path names the attribute that holds the array, such as "layers.3.attention.q" or "norm".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.experimental.layout import Layout
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Axis = str | tuple[str, ...] | None
Values = TypeVar("Values")

# Mesh axes: data parallelism; data and parameters, in training (FSDP); tensor parallelism; expert parallelism. Specs
# omit axes that a mesh lacks.
DATA, FSDP, TENSOR, EXPERT = "data", "fsdp", "tensor", "expert"
BATCH = (DATA, FSDP)

# The last components of a path -> the mesh axis of each dimension. Heads, MLP width and vocabulary are sharded. Other
# parameters (norms, fc, small tables, Medusa's blocks) are replicated.
PARTITION_RULES: dict[str, tuple[str | None, ...]] = {
    "attention.q": (TENSOR, None, None),
    "attention.k": (TENSOR, None, None),
    "attention.v": (TENSOR, None, None),
    "attention.o": (None, TENSOR),
    "attention.q_bias": (TENSOR, None),
    "attention.k_bias": (TENSOR, None),
    "attention.v_bias": (TENSOR, None),
    "attention.sinks": (TENSOR,),
    "mlp.gate": (TENSOR, None),
    "mlp.up": (TENSOR, None),
    "mlp.down": (None, TENSOR),
    "mlp.gate_bias": (TENSOR,),
    "mlp.up_bias": (TENSOR,),
    "experts.gate": (EXPERT, TENSOR, None),
    "experts.up": (EXPERT, TENSOR, None),
    "experts.down": (EXPERT, None, TENSOR),
    "experts.gate_bias": (EXPERT, TENSOR),
    "experts.up_bias": (EXPERT, TENSOR),
    "experts.down_bias": (EXPERT, None),
    "embed": (TENSOR, None),
    "lm_head": (TENSOR, None),
}
# Cached keys and values, [batch, kv_heads, positions, head_dim].
CACHE_RULE: tuple[Axis, ...] = (BATCH, TENSOR, None, None)
CACHED = re.compile(r"cache\.[kv]|^memory\.[kv]\.")  # their paths in a state; the memory of a draft may be one itself


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """Makes a mesh from {axis name: number of devices}.

    Raises:
      ValueError: for more devices than there are. With several processes, also for fewer, as the others would wait.
    """
    needed, there = math.prod(axes.values()), jax.device_count()
    if needed > there or (needed < there and jax.process_count() > 1):
        raise ValueError(f"mesh {dict(axes)} needs {needed} devices, there are {there}")
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=jax.devices()[:needed])


def mesh_of(values: Any) -> Mesh | AbstractMesh | None:
    """Returns the mesh of a model or a state, also in a trace; None if it is on a single device."""
    leaf = jax.tree.leaves(values)[0]
    placed = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else leaf.sharding
    return placed.mesh if isinstance(placed, NamedSharding) and placed.mesh.size > 1 else None


def path_name(path: tuple[Any, ...]) -> str:
    """Converts (GetAttrKey('layers'), SequenceKey(3), GetAttrKey('norm'), GetAttrKey('value')) to "layers.3.norm"."""
    parts = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    return ".".join(parts[:-1] if parts[-1] == "value" else parts)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the PartitionSpec of the array at `path`. A dimension that its axis does not divide is replicated.

    On a mesh with the axis "fsdp", the largest remaining dimension of a matrix is sharded over it.
    """
    rule = PARTITION_RULES.get(".".join(path.split(".")[-2:])) or PARTITION_RULES.get(path.split(".")[-1])
    fits = list(fitting(rule or (None,) * len(shape), shape, mesh))
    if FSDP in mesh.shape and len(shape) > 1:
        free = [i for i, a in enumerate(fits) if a is None and shape[i] % mesh.shape[FSDP] == 0]
        if free:
            fits[max(free, key=lambda i: shape[i])] = FSDP
    return PartitionSpec(*fits) if rule or any(fits) else PartitionSpec()


def path_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns the NamedSharding of the array at `path`.

    Its axes are Auto whatever the mesh has, so the compiler shards everything computed from the array.
    """
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), partition_spec(path, shape, mesh))


def path_layout(path: str, shape: tuple[int, ...]) -> Layout | None:
    """Returns the layout of the array at `path`: row-major for some, None for the device's own choice.

    By itself a TPU stores a matrix in the order that pads less: by columns, if a row is no multiple of 128 (2880 in
    gpt-oss). Lookups, and the grouped products of a prompt, then copy the matrix first.
    """
    names = path.split(".")
    row_major = names[-1] == "embed" or names[-2:] == ["experts", "down"]
    return Layout(tuple(range(len(shape)))) if row_major else None


def constrain(values: Values, like: Any) -> Values:
    """Constrains a state, or any pytree derived from one, to the mesh of `like` (a model or another state).

    Caches are sharded by sequence and head, the rest of the draft's memory by sequence. Everything else is replicated,
    so that every process can read it.
    """
    mesh = mesh_of(like)
    if mesh is None:
        return values

    def place(path, x):
        name = path_name(path)
        axes: tuple[Axis, ...] = (None,) * x.ndim
        if CACHED.search(name):
            axes = CACHE_RULE
        elif name.startswith("memory."):
            axes = (BATCH, *axes[1:])
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting(axes, x.shape, mesh)))

    return jax.tree_util.tree_map_with_path(place, values)


def fitting(axes: Sequence[Axis], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Returns a PartitionSpec without axes that the mesh lacks, and None where axes do not divide a dimension."""

    def fit(axis: Axis, size: int) -> Axis:
        names = axis if isinstance(axis, tuple) else (axis,)
        there = tuple(name for name in names if name is not None and name in mesh.shape)
        if not there or size % math.prod(mesh.shape[name] for name in there):
            return None
        return there if len(there) > 1 else there[0]

    return PartitionSpec(*map(fit, axes, shape))
