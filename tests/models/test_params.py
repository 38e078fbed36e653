"""Parameters by path: flattening, strict loading, and where each array lies on a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.models import params
from eagle_jax.models.config import LlamaConfig
from eagle_jax.models.llama import Llama
from eagle_jax.ops.linear import InputFirst
from tests.models.reference import SMALL
from tests.toy import TARGET, random_eagle3, random_target

CONFIG = LlamaConfig.from_hf(SMALL | dict(attention_bias=True, mlp_bias=True))


def build(key):
    return Llama(CONFIG, key)


class Leaf(nnx.Module):
    def __init__(self):
        self.value = nnx.Param(jnp.zeros(2))
        self.parts = nnx.List([nnx.Param(jnp.ones(1)), nnx.Param(jnp.zeros(3))])


def test_paths_name_attributes():
    assert {path: leaf.shape for path, leaf in params.flatten(Leaf()).items()} == {
        "value": (2,),
        "parts.0": (1,),
        "parts.1": (3,),
    }
    paths = set(params.flatten(params.abstract(build)))
    assert {"embed", "norm", "lm_head", "layers.1.attention.q", "layers.0.mlp.gate_bias"} < paths
    assert len(paths) == 3 + 2 * 16


def test_abstract_model_holds_shapes_only():
    leaves = params.flatten(params.abstract(build)).values()
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_loading_what_was_flattened_gives_the_model_back():
    model = build(jax.random.key(1))
    arrays = params.flatten(model)
    for empty in (params.abstract(build), build(jax.random.key(2))):
        loaded = params.load(empty, arrays)
        assert jax.tree.structure(loaded) == jax.tree.structure(model)
        for path, array in params.flatten(loaded).items():
            assert array is arrays[path]


def test_gradients_have_the_same_paths():
    model = Leaf()
    gradient = jax.grad(lambda m: jnp.sum(m.value[...] * 3) + jnp.sum(m.parts[1][...]))(model)
    assert {path: float(jnp.sum(leaf)) for path, leaf in params.flatten(gradient).items()} == {
        "value": 6.0,
        "parts.0": 0.0,
        "parts.1": 3.0,
    }


def test_loading_is_strict():
    abstract = params.abstract(build)
    arrays = {path: np.zeros(leaf.shape, np.float32) for path, leaf in params.flatten(abstract).items()}
    less = {path: array for path, array in arrays.items() if path != "layers.1.attention.k"}
    with pytest.raises(ValueError, match=r"missing \['layers.1.attention.k'\], extra \[\]"):
        params.load(abstract, less)
    with pytest.raises(ValueError, match=r"missing \[\], extra \['layers.2.norm'\]"):
        params.load(abstract, arrays | {"layers.2.norm": np.zeros(3)})
    with pytest.raises(ValueError, match=r"parameter norm has shape \(33,\), the model needs \(32,\)"):
        params.load(abstract, arrays | {"norm": np.zeros(33)})


def mesh(**axes: int) -> AbstractMesh:
    return AbstractMesh(tuple(axes.values()), tuple(axes))


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("embed", (128, 8), ("tensor", None)),
        ("lm_head", (128, 8), ("tensor", None)),
        ("layers.3.mlp.gate", (16, 8), ("tensor", None)),
        ("layers.3.mlp.up_bias", (16,), ("tensor",)),
        ("layers.3.mlp.down", (8, 16), (None, "tensor")),
        ("layers.3.mlp.down_bias", (8,), ()),
        ("layer.mlp.down", (8, 16), (None, "tensor")),
        ("layers.3.post_attention_norm", (8,), ()),
        ("norm", (8,), ()),
        ("fc", (8, 24), ()),
        ("heads.2.lm_head", (128, 8), ("tensor", None)),
        ("heads.2.blocks.0.weight", (8, 8), ()),
        ("heads.2.blocks.0.bias", (8,), ()),
        ("model.layers.3.attention.k", (4, 6, 8), ("tensor", None, None)),
        ("target_ids", (128,), ()),
    ],
)
def test_partition_rules(path, shape, spec):
    assert params.partition_spec(path, shape, mesh(tensor=4)) == PartitionSpec(*spec)
    assert params.partition_spec(path, shape, mesh(data=2, tensor=4)) == PartitionSpec(*spec)


def test_a_dimension_that_its_axis_does_not_divide_is_replicated():
    assert params.partition_spec("embed", (130, 8), mesh(tensor=4)) == PartitionSpec(None, None)
    assert params.partition_spec("embed", (130, 8), mesh(tensor=2)) == PartitionSpec("tensor", None)


def test_a_mesh_without_the_axis_replicates():
    assert params.partition_spec("embed", (128, 8), mesh(data=4)) == PartitionSpec(None, None)


@pytest.mark.parametrize("kind", ["target", "head"])
def test_every_parameter_can_be_placed(kind):
    """Every projection is split over "tensor", nothing else is, and specs have the arrays' ranks."""
    draft = DraftConfig.from_hf(
        SMALL | dict(num_hidden_layers=1, vocab_size=64, draft_vocab_size=32), own_embedding=True
    )
    target = LlamaConfig.from_hf(SMALL | dict(vocab_size=64, attention_bias=True))
    model = params.abstract(lambda key: Llama(target, key) if kind == "target" else Eagle3Draft(draft, 3, key))
    shapes = {path: leaf.shape for path, leaf in params.flatten(model).items()}
    specs = {path: params.partition_spec(path, shape, mesh(tensor=2)) for path, shape in shapes.items()}
    split = {path for path, spec in specs.items() if "tensor" in spec}
    whole = ("norm", "fc", "target_ids", "o_bias", "down_bias")
    assert split == {path for path in shapes if not path.endswith(whole)}


def test_arrays_are_placed_in_parts():
    devices = Mesh(np.asarray(jax.devices()[:2]), ("tensor",))
    array = jax.device_put(jnp.zeros((64, 8)), params.path_sharding("embed", (64, 8), devices))
    assert [shard.data.shape for shard in array.addressable_shards] == [(32, 8)] * 2


def test_input_first_turns_the_weights_of_products_alone_and_once():
    target, draft = random_target(0), random_eagle3(1)
    for model in (target, draft):
        turned = params.input_first(model)
        before, after = (jax.tree_util.tree_flatten_with_path(one)[0] for one in (model, turned))
        for (path, old), (_, new) in zip(before, after, strict=True):
            weight = params.path_name(path).split(".")[-1] in params.PRODUCT_WEIGHTS
            np.testing.assert_array_equal(new, np.moveaxis(old, -1, 0) if weight else old)
        again = jax.tree.leaves(params.input_first(turned))
        assert all(a is b for a, b in zip(again, jax.tree.leaves(turned), strict=True))
        with pytest.raises(ValueError, match="input_first is for decoding alone"):
            params.flatten(turned)


@pytest.mark.parametrize("wrap", [lambda target: target, DraftModel], ids=["target", "draft model"])
def test_input_first_gives_a_tied_target_an_output_matrix_of_its_own(wrap):
    tied = Llama(dataclasses.replace(TARGET, tie_word_embeddings=True), jax.random.key(0))
    turned = params.input_first(wrap(tied))
    ours = getattr(turned, "model", turned)
    assert isinstance(ours.lm_head, InputFirst)
    np.testing.assert_array_equal(ours.embed[...], tied.embed[...])
    hidden = jax.random.normal(jax.random.key(1), (1, 3, TARGET.hidden_size))
    np.testing.assert_allclose(ours.logits(hidden), tied.logits(hidden), rtol=1e-5, atol=1e-5)
    assert tied.lm_head is None
