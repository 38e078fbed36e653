"""Parameters by path: flattening, strict loading, and the copy for decoding on a CPU."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.drafts.medusa import Medusa, MedusaConfig
from eagle_jax.models import params
from eagle_jax.models.config import LlamaConfig
from eagle_jax.models.llama import Llama
from eagle_jax.ops.linear import InputFirst
from eagle_jax.sharding import path_name
from tests.models.reference import SMALL
from tests.toy import TARGET, random_eagle1, random_eagle3, random_target

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


def test_input_first_turns_the_weights_of_products_alone_and_once():
    medusa = Medusa(MedusaConfig(vocab_size=97, hidden_size=32, num_heads=1), jax.random.key(0))
    biased = build(jax.random.key(0))
    for model in (random_target(0), random_eagle3(1), random_eagle1(1), medusa, biased):
        turned = params.input_first(model)
        before, after = (jax.tree_util.tree_flatten_with_path(one)[0] for one in (model, turned))
        for (path, old), (_, new) in zip(before, after, strict=True):
            weight = old.ndim > 1 and not path_name(path).endswith(("embed", "_bias"))
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
