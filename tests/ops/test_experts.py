"""Routed experts, against NumPy in float64. Whole models are compared in tests/models/test_architectures.py."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from eagle_jax.ops import experts
from eagle_jax.sharding import make_mesh, partition_spec

HIDDEN, WIDTH = 8, 12
WAYS = {
    "one by one": functools.partial(experts.in_blocks, 1),
    "blocks": functools.partial(experts.in_blocks, 4),
    "ragged dot": experts.by_ragged_dot,
    "gathered": experts.gathered,
    "every expert": experts.every_expert,
}
GPT_OSS = functools.partial(experts.clamped_swiglu, 1.702, 0.7)  # a limit that values reach
CASES = {"plain": (False, experts.swiglu), "gpt-oss": (True, GPT_OSS)}


def random_weights(count: int, biases: bool, seed: int = 0) -> experts.ExpertWeights:
    rng = np.random.default_rng(seed)
    shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH,), (WIDTH,), (HIDDEN,)]
    made = [jnp.asarray(rng.normal(size=(count, *shape)), jnp.float32) for shape in shapes]
    return experts.ExpertWeights(*made[: 6 if biases else 3])


def random_tokens(shape: tuple[int, ...], seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, HIDDEN)), jnp.float32)


def random_choices(tokens: int, count: int, top_k: int, seed: int = 2) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray([rng.permutation(count)[:top_k] for _ in range(tokens)], jnp.int32)


def outputs_of(x: Any, chosen: Any, weights: experts.ExpertWeights, case: str) -> np.ndarray:
    """The output of every choice, one after the other in float64; zero for an expert of another device."""
    w = [None if each is None else np.asarray(each, np.float64) for each in weights]
    out = np.zeros((*chosen.shape, HIDDEN))
    for token, choice in np.ndindex(chosen.shape):
        e, row = int(chosen[token, choice]), np.asarray(x[token], np.float64)
        if not 0 <= e < len(w[0]):
            continue
        gate, up = w[0][e] @ row, w[1][e] @ row
        if case == "gpt-oss":
            gate, up = np.minimum(gate + w[3][e], 0.7), np.clip(up + w[4][e], -0.7, 0.7)
            out[token, choice] = w[2][e] @ (gate / (1 + np.exp(-1.702 * gate)) * (up + 1)) + w[5][e]
        else:
            out[token, choice] = w[2][e] @ (gate / (1 + np.exp(-gate)) * up)
    return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("case", "tokens", "count", "top_k"), [("plain", 7, 3, 2), ("gpt-oss", 3, 40, 4)])
def test_every_way_computes_the_chosen_experts(way, case, tokens, count, top_k):
    biases, activation = CASES[case]
    weights, x, chosen = random_weights(count, biases), random_tokens((tokens,)), random_choices(tokens, count, top_k)
    got = jax.jit(functools.partial(WAYS[way], activation))(x, chosen, weights)
    np.testing.assert_allclose(got, outputs_of(x, chosen, weights, case), rtol=1e-4, atol=1e-4)


def test_more_tokens_than_a_gpu_takes_at_once():
    weights, tokens = random_weights(3, False), experts.GPU_ROWS + 5
    x, chosen = random_tokens((tokens,)), random_choices(tokens, 3, 1)
    got = jax.jit(functools.partial(experts.every_expert, experts.swiglu))(x, chosen, weights)
    np.testing.assert_allclose(got, outputs_of(x, chosen, weights, "plain"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_does_not_notice_its_neighbours(way):
    """Bit for bit, where they crowd its experts, and where all of theirs are on other devices."""
    weights, x, chosen = random_weights(5, True), random_tokens((9,)), random_choices(9, 5, 2)
    run = jax.jit(functools.partial(WAYS[way], experts.swiglu))
    wanted = run(x, chosen, weights)[4]
    others = jnp.arange(9)[:, None] != 4
    noise = jnp.where(others, 1e6, x)
    for theirs in (chosen[4], jnp.asarray([5, 5])):
        np.testing.assert_array_equal(run(noise, jnp.where(others, theirs[None], chosen), weights)[4], wanted)


def test_vmap_adds_tokens():
    weights, x = random_weights(4, True), random_tokens((3, 1, 2))
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(3, 1, 2, 4)), jnp.float32)

    def run(x, logits):
        return experts.mix(x, experts.route(logits, 2, normalised=True), weights, experts.swiglu)

    one, both = jax.jit(run), jax.jit(jax.vmap(run))(x, logits)
    np.testing.assert_allclose(both, np.stack([one(*each) for each in zip(x, logits, strict=True)]), atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(run, (0, None)))(x, logits[0])[0], both[0], atol=1e-5)
    with pytest.raises(NotImplementedError, match="weights of experts"):
        jax.vmap(experts.mix, (None, None, 0, None))(
            x[0], experts.route(logits[0], 2, normalised=True), jax.tree.map(lambda w: w[None], weights), experts.swiglu
        )


@pytest.mark.parametrize("normalised", [True, False])
def test_equal_logits_choose_the_first_expert(normalised):
    logits = jnp.asarray([[[1.0, 3.0, 2.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]]])
    routing = experts.route(logits, 2, normalised=normalised)
    assert routing.experts.tolist() == [[[1, 3], [0, 1]]]
    wanted = 0.5 if normalised else float(1 / (3 + np.exp(-2.0) + np.exp(-1.0)))
    np.testing.assert_allclose(routing.weights[0], [[wanted] * 2, [0.5 if normalised else 0.2] * 2], rtol=1e-6)


@pytest.mark.parametrize("axes", [{"data": 2, "expert": 2, "tensor": 2}, {"expert": 8}], ids=str)
def test_a_mesh_changes_nothing(axes):
    """Eight devices do not divide six experts: then each computes all of them."""
    biases, activation = CASES["gpt-oss"]
    count = 6 if axes == {"expert": 8} else 4
    weights, x = random_weights(count, biases), random_tokens((2, 3))
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, count)), jnp.float32)
    routing = experts.route(logits, 3, normalised=True)
    mesh = make_mesh(axes)
    placed = experts.ExpertWeights(
        *(
            jax.device_put(w, NamedSharding(mesh, partition_spec(f"layers.0.mlp.experts.{name}", w.shape, mesh)))
            for name, w in weights._asdict().items()
        )
    )
    assert (len(placed.gate.addressable_shards[0].data) < count) == (count == 4)
    run = jax.jit(experts.mix, static_argnums=3)
    np.testing.assert_allclose(run(x, routing, placed, activation), run(x, routing, weights, activation), atol=1e-5)
