"""Targets with experts, sinks and windows: decoding is lossless, sequences are independent, meshes change nothing."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import Llama
from eagle_jax.models.config import ExpertsConfig
from eagle_jax.sharding import make_mesh
from eagle_jax.testing import assert_lossless, toy_draft
from tests.decode.test_sampled_distribution import tiny_config
from tests.sharding.meshes import on_mesh
from tests.toy import rows_of, scaled

EXPERTS = ExpertsConfig(4, 2, 12, bias=True, clamp=(1.702, 2.0), dense_layers=(0,))
CONFIG = dataclasses.replace(tiny_config(), num_layers=2, windows=(3, None), sinks=True, experts=EXPERTS)


@pytest.fixture(scope="module")
def target() -> Llama:
    return scaled(Llama(CONFIG, jax.random.key(0)), 12.0)


def test_decoding_is_lossless_and_sequences_independent(target):
    """Greedy texts, the distribution of sampled ones, and the same text at any index of a batch."""
    assert assert_lossless(toy_draft(target), target=target, draws=1000).accepted > 0


def test_neighbours_change_no_bit(target):
    """A text does not depend on the experts that its neighbours crowd, padding included."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (3, 8), dtype=np.int32)
    others = tokens.copy()
    others[1:] = 1
    run = jax.jit(eagle_jax.forward)
    lengths = jnp.array([5, 8, 2])
    first, _ = run(target, jnp.asarray(tokens), lengths)
    second, _ = run(target, jnp.asarray(others), jnp.array([5, 3, 8]))
    np.testing.assert_array_equal(first[0, :5], second[0, :5])


def test_a_mesh_with_an_axis_of_experts_writes_the_same(target):
    tokens, lengths = jnp.asarray([[1, 2, 3, 4], [4, 3, 2, 1]]), jnp.array([4, 2])
    spread = on_mesh(target, make_mesh({"data": 2, "expert": 2, "tensor": 2}))
    gate = spread.layers[1].mlp.experts.gate
    assert gate.addressable_shards[0].data.shape == (2, 6, CONFIG.hidden_size)
    one, many = (eagle_jax.generate(model, None, tokens, lengths, max_new_tokens=12) for model in (target, spread))
    assert rows_of(one) == rows_of(many)
