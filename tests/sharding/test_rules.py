"""Where each parameter lies on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from eagle_jax.drafts.eagle.config import DraftConfig
from eagle_jax.drafts.eagle.eagle3 import Eagle3Draft
from eagle_jax.models import params
from eagle_jax.models.cache import KVCache
from eagle_jax.models.config import LlamaConfig
from eagle_jax.models.llama import Llama
from eagle_jax.sharding import constrain, make_mesh, partition_spec, path_sharding
from tests.models.reference import SMALL


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
    assert partition_spec(path, shape, mesh(tensor=4)) == PartitionSpec(*spec)
    assert partition_spec(path, shape, mesh(data=2, tensor=4)) == PartitionSpec(*spec)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("router", (4, 8), ()),
        ("experts.gate", (4, 16, 8), ("expert", "tensor", None)),
        ("experts.down", (4, 8, 16), ("expert", None, "tensor")),
        ("experts.up_bias", (4, 16), ("expert", "tensor")),
        ("experts.down_bias", (4, 8), ("expert", None)),
        ("experts.up", (3, 16, 8), (None, "tensor", None)),
        ("gate", (16, 8), ("tensor", None)),
    ],
)
def test_experts_have_an_axis_of_their_own(path, shape, spec):
    assert partition_spec(f"layers.3.mlp.{path}", shape, mesh(expert=2, tensor=4)) == PartitionSpec(*spec)


def test_a_dimension_that_its_axis_does_not_divide_is_replicated():
    assert partition_spec("embed", (130, 8), mesh(tensor=4)) == PartitionSpec(None, None)
    assert partition_spec("embed", (130, 8), mesh(tensor=2)) == PartitionSpec("tensor", None)


def test_a_mesh_without_the_axis_replicates():
    assert partition_spec("embed", (128, 8), mesh(data=4)) == PartitionSpec(None, None)


@pytest.mark.parametrize("kind", ["target", "head"])
def test_every_parameter_can_be_placed(kind):
    """Every projection is split over "tensor", nothing else is, and specs have the arrays' ranks."""
    draft = DraftConfig.from_hf(
        SMALL | dict(num_hidden_layers=1, vocab_size=64, draft_vocab_size=32), own_embedding=True
    )
    target = LlamaConfig.from_hf(SMALL | dict(vocab_size=64, attention_bias=True))
    model = params.abstract(lambda key: Llama(target, key) if kind == "target" else Eagle3Draft(draft, 3, key))
    shapes = {path: leaf.shape for path, leaf in params.flatten(model).items()}
    specs = {path: partition_spec(path, shape, mesh(tensor=2)) for path, shape in shapes.items()}
    split = {path for path, spec in specs.items() if "tensor" in spec}
    whole = ("norm", "fc", "target_ids", "o_bias", "down_bias")
    assert split == {path for path in shapes if not path.endswith(whole)}


def test_arrays_are_placed_in_parts():
    devices = Mesh(np.asarray(jax.devices()[:2]), ("tensor",))
    array = jax.device_put(jnp.zeros((64, 8)), path_sharding("embed", (64, 8), devices))
    assert [shard.data.shape for shard in array.addressable_shards] == [(32, 8)] * 2


def test_a_memory_that_is_a_cache_lies_like_a_cache():
    """That of DFlash. Whole on every device, its keys and values would be gathered in every cycle."""
    devices = make_mesh({"data": 2, "tensor": 2})
    like = jax.device_put(jnp.zeros(2), NamedSharding(devices, PartitionSpec()))
    config = LlamaConfig(8, 8, 8, 1, 4, 2, 4)
    placed = constrain({"memory": KVCache.zeros(config, 2, 16, jnp.float32), "other": jnp.zeros((2, 2, 16, 4))}, like)
    shards = [x.sharding.shard_shape(x.shape) for x in (placed["memory"].k[0], placed["memory"].v[0], placed["other"])]
    assert shards == [(1, 1, 16, 4), (1, 1, 16, 4), (2, 2, 16, 4)]
