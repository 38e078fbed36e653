"""Where arrays lie: meshes, the sharding of every parameter by its path, and constraints on states in a trace.

A path names the attribute that holds the array, such as "layers.3.attention.q" or "norm".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Axis = str | tuple[str, ...] | None
Values = TypeVar("Values")

# Axis names of a mesh: of the batch; of batch and parameters, in training; of the parts of a product. An axis that a
# mesh lacks is left out of every spec.
DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
BATCH = (DATA, FSDP)

# Last components of a path -> the mesh axis of each dimension. Heads, MLP width and vocabulary are split;
# paths not named here (norms, fc, small tables, Medusa's blocks) are replicated.
PARTITION_RULES: dict[str, tuple[str | None, ...]] = {
    "attention.q": (TENSOR, None, None),
    "attention.k": (TENSOR, None, None),
    "attention.v": (TENSOR, None, None),
    "attention.o": (None, TENSOR),
    "attention.q_bias": (TENSOR, None),
    "attention.k_bias": (TENSOR, None),
    "attention.v_bias": (TENSOR, None),
    "mlp.gate": (TENSOR, None),
    "mlp.up": (TENSOR, None),
    "mlp.down": (None, TENSOR),
    "mlp.gate_bias": (TENSOR,),
    "mlp.up_bias": (TENSOR,),
    "embed": (TENSOR, None),
    "lm_head": (TENSOR, None),
}
# Keys and values of a decoder, [batch, key-value heads, rows, head dim].
CACHE_RULE: tuple[Axis, ...] = (BATCH, TENSOR, None, None)


def make_mesh(axes: Mapping[str, int]) -> Mesh:
    """A mesh of so many devices an axis, {name: count}.

    Raises:
      ValueError: if there are fewer, or if it leaves out devices of a process that waits for the others.
    """
    needed, there = math.prod(axes.values()), jax.device_count()
    if needed > there or (needed < there and jax.process_count() > 1):
        raise ValueError(f"mesh {dict(axes)} needs {needed} devices, there are {there}")
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=jax.devices()[:needed])


def mesh_of(values: Any) -> Mesh | AbstractMesh | None:
    """The mesh that a model or a state lies on, in a traced function too; None if it lies on one device."""
    leaf = jax.tree.leaves(values)[0]
    placed = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else leaf.sharding
    return placed.mesh if isinstance(placed, NamedSharding) and placed.mesh.size > 1 else None


def path_name(path: tuple[Any, ...]) -> str:
    """(GetAttrKey('layers'), SequenceKey(3), GetAttrKey('norm'), GetAttrKey('value')) -> "layers.3.norm"."""
    parts = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    return ".".join(parts[:-1] if parts[-1] == "value" else parts)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of the array at `path`; a dimension that its axis does not divide is replicated.

    A mesh with the axis "fsdp" splits the largest dimension that is left, of matrices, by it.
    """
    rule = PARTITION_RULES.get(".".join(path.split(".")[-2:])) or PARTITION_RULES.get(path.split(".")[-1])
    fits = list(fitting(rule or (None,) * len(shape), shape, mesh))
    if FSDP in mesh.shape and len(shape) > 1:
        free = [i for i, a in enumerate(fits) if a is None and shape[i] % mesh.shape[FSDP] == 0]
        if free:
            fits[max(free, key=lambda i: shape[i])] = FSDP
    return PartitionSpec(*fits) if rule or any(fits) else PartitionSpec()


def path_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the array at `path` lies. What is computed from it the compiler places: axes of any type are Auto here."""
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names), partition_spec(path, shape, mesh))


def constrain(values: Values, like: Any) -> Values:
    """Constrains a state, or any pytree derived from one, to the mesh of `like` (a model or another state).

    Caches are split by sequence and head, the rest of the draft's memory by sequence. All else lies whole on every
    device, where every process can read it.
    """
    mesh = mesh_of(like)
    if mesh is None:
        return values

    def place(path, x):
        name = path_name(path)
        axes: tuple[Axis, ...] = (None,) * x.ndim
        if "cache.k" in name or "cache.v" in name:
            axes = CACHE_RULE
        elif name.startswith("memory."):
            axes = (BATCH, *axes[1:])
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fitting(axes, x.shape, mesh)))

    return jax.tree_util.tree_map_with_path(place, values)


def fitting(axes: Sequence[Axis], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The axes of each dimension, without those that the mesh lacks; None where they do not divide it."""

    def fit(axis: Axis, size: int) -> Axis:
        names = axis if isinstance(axis, tuple) else (axis,)
        there = tuple(name for name in names if name is not None and name in mesh.shape)
        if not there or size % math.prod(mesh.shape[name] for name in there):
            return None
        return there if len(there) > 1 else there[0]

    return PartitionSpec(*map(fit, axes, shape))
