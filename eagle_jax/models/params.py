"""Parameters as a flat `{path: array}` dictionary, which conversion, checkpoints and shardings read and write.

A path names the attribute that holds the array, such as "layers.3.attention.q" or "norm".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from eagle_jax.ops.linear import InputFirst, Weight
from eagle_jax.sharding import mesh_of, path_name

Model = TypeVar("Model")


def flatten(model: Any) -> dict[str, Any]:
    """Returns {path: array} of a model, a gradient or an abstract model.

    Raises:
      ValueError: for a copy by `input_first`, whose arrays have other shapes.
    """
    if any(
        isinstance(leaf, InputFirst) for leaf in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, InputFirst))
    ):
        raise ValueError("a model from input_first is for decoding alone: use the model that it was made from")
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}


def abstract(build: Callable[[jax.Array], Model]) -> Model:
    """Returns the model that `build(key)` would make, with ShapeDtypeStructs in place of arrays."""
    return jax.eval_shape(build, jax.random.key(0))


def load(model: Model, arrays: Mapping[str, Any]) -> Model:
    """Replaces the arrays of a model, real or abstract, by those of the same path.

    Raises:
      ValueError: naming the paths of arrays that are missing, extra, or of another shape.
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


def input_first(model: Model) -> Model:
    """Copies a model or draft for decoding on a CPU, with weights stored transposed: input dimension first.

    XLA:CPU multiplies a few rows by this layout without transposing the weight first. Results differ by rounding, and
    accelerators gain nothing. The copy is for decoding only: convert, shard or train the original. A target with tied
    embeddings gets a separate output matrix, vocab * hidden more numbers, because lookups gather rows of the embedding.
    """

    def untie(node):
        if not _is_tied(node):
            return node
        node = copy.copy(node)
        node.lm_head = nnx.data(Weight(node.embed[...]).input_first())
        return node

    turned = jax.tree.map(_turn, model, is_leaf=_is_weight)
    return jax.tree.map(untie, turned, is_leaf=_is_tied)


def _is_tied(node: Any) -> bool:
    return getattr(node, "output_is_embedding", False)


def _is_weight(node: Any) -> bool:
    return isinstance(node, Weight)


def _turn(node: Any) -> Any:
    return node.input_first() if _is_weight(node) else node


def for_this_machine(model: Any) -> Any:
    """Returns the layout that decodes fastest on this machine: `input_first` on a CPU, unless the model is sharded."""
    on_cpu = jax.default_backend() == "cpu"
    has_weights = bool(jax.tree.leaves(model))
    return input_first(model) if on_cpu and has_weights and mesh_of(model) is None else model
