"""Parameters as a flat `{path: array}` dictionary: the currency of conversion, checkpoints and shardings.

A path names the attribute that holds the array, such as "layers.3.attention.q" or "norm".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from eagle_jax.ops.linear import InputFirst

Model = TypeVar("Model")
Axis = str | tuple[str, ...] | None

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
# The last component of the path of every weight that `linear` multiplies with. Embeddings are read by rows, too.
PRODUCT_WEIGHTS = {"q", "k", "v", "o", "gate", "up", "down", "fc", "lm_head", "weight"}
# Keys and values of a decoder, [batch, key-value heads, rows, head dim].
CACHE_RULE: tuple[Axis, ...] = (BATCH, TENSOR, None, None)


def flatten(model: Any) -> dict[str, Any]:
    """Every array of a model (or of a gradient, or of an abstract model) by path.

    Raises:
      ValueError: if it is a copy by `input_first`, whose arrays have other shapes.
    """
    if any(
        isinstance(leaf, InputFirst) for leaf in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, InputFirst))
    ):
        raise ValueError("a model from input_first is for decoding alone: use the model that it was made from")
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def abstract(build: Callable[[jax.Array], Model]) -> Model:
    """The model that `build(key)` would make, with shapes and dtypes in place of arrays."""
    return jax.eval_shape(build, jax.random.key(0))


def load(model: Model, arrays: Mapping[str, Any]) -> Model:
    """`model` (real or abstract) with its arrays replaced by those of the same path.

    Raises:
      ValueError: naming the path, if an array is missing, extra, or of another shape.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(model)
    expected = {path_name(path): leaf for path, leaf in leaves}
    missing, extra = sorted(set(expected) - set(arrays)), sorted(set(arrays) - set(expected))
    if missing or extra:
        raise ValueError(f"parameters do not match the model: missing {missing}, extra {extra}")
    for path, leaf in expected.items():
        if tuple(arrays[path].shape) != tuple(leaf.shape):
            raise ValueError(
                f"parameter {path} has shape {tuple(arrays[path].shape)}, the model needs {tuple(leaf.shape)}"
            )
    return jax.tree_util.tree_unflatten(treedef, [arrays[path] for path in expected])


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


def input_first(model: Model) -> Model:
    """The same model (or draft) for decoding on a CPU: its weights stored with their input dimension first.

    A CPU multiplies a few rows with such a weight as it lies, and rearranges any other one first. Results differ by
    rounding. Accelerators gain nothing. The copy is for decoding alone: convert, shard or train the model it came from.
    A target whose output matrix is its embedding gets an output matrix of its own, V * D numbers more, for lookups read
    the embedding by rows.
    """

    def turn(path, leaf):
        is_weight = isinstance(leaf, nnx.Param) and getattr(path[-1], "name", None) in PRODUCT_WEIGHTS
        return _turned(leaf) if is_weight and not isinstance(leaf, InputFirst) else leaf

    def untie(node):
        if not _is_tied(node):
            return node
        node = copy.copy(node)
        node.lm_head = nnx.data(_turned(node.embed))
        return node

    turned = jax.tree_util.tree_map_with_path(turn, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return jax.tree.map(untie, turned, is_leaf=_is_tied)


def _is_tied(node: Any) -> bool:
    return getattr(node, "output_is_embedding", False)


def _turned(weight: nnx.Param) -> InputFirst:
    value = weight[...]
    if isinstance(value, jax.core.Tracer):
        return InputFirst(jnp.moveaxis(value, -1, 0))
    # By NumPy: JAX would compile a program for every shape.
    return InputFirst(jnp.asarray(np.ascontiguousarray(np.moveaxis(np.asarray(value), -1, 0))))


def for_this_machine(model: Any) -> Any:
    """A model as it decodes fastest here: `input_first` on a CPU, unless it is sharded."""
    on_cpu = jax.default_backend() == "cpu"
    has_weights = bool(jax.tree.leaves(model))
    return input_first(model) if on_cpu and has_weights and mesh_of(model) is None else model


def fitting(axes: Sequence[Axis], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The axes of each dimension, without those that the mesh lacks; None where they do not divide it."""

    def fit(axis: Axis, size: int) -> Axis:
        names = axis if isinstance(axis, tuple) else (axis,)
        there = tuple(name for name in names if name is not None and name in mesh.shape)
        if not there or size % math.prod(mesh.shape[name] for name in there):
            return None
        return there if len(there) > 1 else there[0]

    return PartitionSpec(*map(fit, axes, shape))


def path_name(path: tuple[Any, ...]) -> str:
    """(GetAttrKey('layers'), SequenceKey(3), GetAttrKey('norm'), GetAttrKey('value')) -> "layers.3.norm"."""
    parts = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    return ".".join(parts[:-1] if parts[-1] == "value" else parts)
