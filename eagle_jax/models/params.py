"""Parameters as a flat `{path: array}` dictionary: the currency of conversion, checkpoints and shardings.

A path names the attribute that holds the array, such as "layers.3.attention.q" or "norm".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Model = TypeVar("Model")

# Axis names of a mesh: of the batch; of batch and parameters, in training; of the parts of a product. An axis that a
# mesh lacks is left out of every spec.
DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

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


def flatten(model: Any) -> dict[str, Any]:
    """Every array of a model (or of a gradient, or of an abstract model) by path."""
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
    axes = rule or (None,) * len(shape)
    fits = [a if a in mesh.shape and size % mesh.shape[a] == 0 else None for a, size in zip(axes, shape, strict=True)]
    if FSDP in mesh.shape and len(shape) > 1:
        free = [i for i, a in enumerate(fits) if a is None and shape[i] % mesh.shape[FSDP] == 0]
        if free:
            fits[max(free, key=lambda i: shape[i])] = FSDP
    return PartitionSpec(*fits) if rule or any(fits) else PartitionSpec()


def sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition_spec(path, shape, mesh))


def path_name(path: tuple[Any, ...]) -> str:
    """(GetAttrKey('layers'), SequenceKey(3), GetAttrKey('norm'), GetAttrKey('value')) -> "layers.3.norm"."""
    parts = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in path]
    return ".".join(parts[:-1] if parts[-1] == "value" else parts)
