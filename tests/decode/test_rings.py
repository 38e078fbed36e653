"""Layers with a window have caches that are rings, shorter than a text, and the texts are the target's own."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from bench.shapes import ROUTED, abstract_pair
from eagle_jax import Llama
from eagle_jax.decode.state import check_capacity
from eagle_jax.models.cache import KVCache, layer_rows, ring_by_scatter, ring_by_slices
from eagle_jax.ops.attention import attention
from eagle_jax.ops.cached import CacheLayer, Queries, add_blocks, add_whole
from eagle_jax.ops.spec import PLAIN, Spec
from tests.toy import TARGET, TREE, random_eagle3, scaled

# Rings hold the window and a chunk of 256, in tiles of 128: 384 and 512 rows, of up to 760 positions.
CONFIG = dataclasses.replace(TARGET, windows=(5, None, 130), max_position_embeddings=1024)
PROMPT, NEW = 600, 120
LENGTHS = [600, 3, 330]  # the last one goes past the end of the shorter ring while it decodes


@functools.cache
def models():
    return scaled(Llama(CONFIG, jax.random.key(0)), 6.0), random_eagle3(1, scale=6.0)


def prompt(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TARGET.vocab_size, shape).astype(np.int32)


@jax.jit
def shortfall(target, tokens, lengths, prompt_lengths):
    """How far the logits of new tokens lie below the largest, at most, in a pass without a cache."""
    logits = eagle_jax.forward(target, tokens, lengths)[0][:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
    index = jnp.arange(chosen.shape[1])[None]
    new = (index >= prompt_lengths[:, None] - 1) & (index < lengths[:, None] - 1)
    return jnp.where(new, logits.max(axis=-1) - chosen, 0).max()


advance = functools.partial(eagle_jax.advance, tree=TREE, cycles=200)


@pytest.mark.parametrize("speculative", [True, False])
def test_texts_far_longer_than_the_rings_are_the_targets_own(speculative):
    """Of sequences of different lengths, whose prompts run in chunks as long as a ring takes at once."""
    (target, head), lengths = models(), jnp.array(LENGTHS)
    draft = head if speculative else None
    start = jax.jit(functools.partial(eagle_jax.prefill, max_new_tokens=NEW, chunk=PROMPT))
    state = start(target, draft, prompt(0, 3, PROMPT), lengths)
    assert [array.shape[2] for array in state.cache.k] == [384, 768, 512] and state.cache.most_new == 379
    state, _ = advance(target, draft, state)
    assert state.lengths.tolist() == [length + NEW for length in LENGTHS]
    assert shortfall(target, state.tokens, state.lengths, lengths) < 1e-3
    assert not speculative or state.accepted[:, 1:].sum() > 0
    other = state.tokens.at[0, PROMPT + 7].add(1)
    assert shortfall(target, other, state.lengths, lengths) > 0.1


def test_a_ring_goes_on_from_where_it_is():
    """The next turn of a conversation reuses the whole of the text; a prompt that goes back runs anew."""
    target, draft = models()
    insert = jax.jit(eagle_jax.insert, donate_argnums=0, static_argnames="reuse")
    state = eagle_jax.empty_state(target, draft, 2, PROMPT + NEW)
    neighbour, text = prompt(1, 400), prompt(2, 450)
    state = insert(state, 1, np.pad(neighbour, (0, PROMPT - 400)), 400)
    for kept, new in ((0, 40), (489, 40), (0, 20)):
        state = insert(state, 0, np.pad(text, (0, PROMPT - len(text))), len(text), max_new_tokens=new, reuse=True)
        assert state.cache.length[0] == kept
        while not state.done[0]:
            state, _ = eagle_jax.advance(target, draft, state, tree=TREE)
        begin, length = len(text), int(state.lengths[0])
        assert length == begin + new
        assert shortfall(target, state.tokens, state.lengths, jnp.array([begin, 400])) < 1e-3
        said = np.asarray(state.tokens[0, :length])
        text = np.concatenate([said, [11, 12]]) if kept == 0 else np.concatenate([said[:470], [9]])
    assert state.lengths[1] > 410


WINDOWS = (5, 90, None)
SHAPE = dataclasses.replace(CONFIG, windows=WINDOWS)
BATCH, WRITTEN = 2, 30


def cached(layer: CacheLayer, way, spec: Spec, q, positions) -> jax.Array:
    """Attention of queries [batch, kv_heads, new, head_dim] to a cache alone."""
    nothing = (jnp.full((*q.shape[:3], 1), -1e30), jnp.zeros((*q.shape[:3], 1)), jnp.zeros(q.shape))
    part = way(Queries(q, q.shape[2], spec, positions), nothing, layer)
    return part[2] / part[1]


@jax.jit
def answers(cache: KVCache, q: jax.Array) -> list[jax.Array]:
    positions = cache.length[:, None] + jnp.array([[0, 1, 1]])
    ways = (add_whole, functools.partial(add_blocks, 50))
    specs = [PLAIN if window is None else Spec(window=window) for window in WINDOWS]
    return [cached(cache.layer(i), way, spec, q, positions) for i, spec in enumerate(specs) for way in ways]


@jax.jit
def written(cache: KVCache, k: jax.Array, v: jax.Array, start: jax.Array, end: jax.Array) -> KVCache:
    """Writes as a commit does, then as a chunk of a prompt that is padding alone."""
    cache = cache.write([(k, v)] * len(WINDOWS), start)
    layers = [cache.write_layer(i, -k, -v, end + 40, end) for i in range(len(WINDOWS))]
    cache = dataclasses.replace(cache, k=[layer.k for layer in layers], v=[layer.v for layer in layers])
    return cache.with_length(end)


def test_a_ring_answers_what_a_whole_cache_does():
    """After every write of a text of 700 positions, most of them partly overwritten by the next."""
    rng = np.random.default_rng(0)
    ring, whole = (KVCache.zeros(SHAPE, BATCH, 768, jnp.float32, margin) for margin in (WRITTEN, None))
    assert (ring.rings, whole.rings) == ((5, 90, None), ()) and ring.most_new == 128 - 90
    length = np.array([0, 3])
    while length.max() < 700:
        k, v, q = rng.normal(size=(3, BATCH, 2, WRITTEN, 8)).astype(np.float32)
        taken = rng.integers(1, [4, WRITTEN])
        ring, whole = (written(cache, k, v, length, length + taken) for cache in (ring, whole))
        length += taken
        for ours, theirs in zip(answers(ring, q[:, :, :3]), answers(whole, q[:, :, :3]), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("write", [ring_by_scatter, ring_by_slices])
def test_every_way_to_write_a_ring(write):
    """A GPU scatters. Sequences begin at the ring's start, before its end, and after many rounds."""
    rng, start = np.random.default_rng(0), np.array([0, 115, 1000, 98])
    cache, new = rng.normal(size=(4, 2, 128, 8)).astype(np.float32), rng.normal(size=(4, 2, 30, 8)).astype(np.float32)
    ours = jax.jit(write)(jnp.asarray(cache), jnp.asarray(new), jnp.asarray(start))
    for index in range(30):
        cache[np.arange(4), :, (start + index) % 128] = new[:, :, index]
    np.testing.assert_array_equal(ours, cache)


def test_what_a_ring_cannot_do_is_refused():
    ring = KVCache.zeros(SHAPE, BATCH, 768, jnp.float32, WRITTEN)
    many = jnp.zeros((BATCH, 2, 39, 8))
    with pytest.raises(ValueError, match="a ring of 128 rows, window 90, cannot take 39 at once"):
        ring.write([(many, many)] * 3, jnp.zeros((), jnp.int32))
    q, k = jnp.zeros((BATCH, 1, 4, 8)), jnp.zeros((BATCH, 2, 1, 8))
    for spec in (PLAIN, Spec(window=6), Spec(window=5, first=1)):
        with pytest.raises(ValueError, match="the cache of this layer is a ring for a window of 5"):
            positions = jnp.zeros((BATCH, 1), jnp.int32)
            attention(q, k, k, jnp.ones((BATCH, 1, 1), bool), ring.layer(0), spec=spec, positions=positions)


def test_half_of_a_large_model_has_short_caches():
    """gpt-oss-20b with 8192 tokens: 128 positions and a chunk in every other layer. The head's cache is whole."""
    target, draft = abstract_pair(ROUTED["gpt-oss-20b"])
    state = jax.eval_shape(lambda target, draft: eagle_jax.empty_state(target, draft, 1, 8192), target, draft)
    assert [array.shape[2] for array in state.cache.k] == [384, 8320] * 12
    assert state.draft.cache.k[0].shape[2] == 8320


def test_a_capacity_is_checked_by_what_its_rings_need():
    config = dataclasses.replace(CONFIG, windows=(5, 5, 5))
    most = 2**31 - 2**12
    assert layer_rows(config, most, 256) == [384] * 3
    check_capacity(Llama(config, jax.random.key(0)), 64, most)
    with pytest.raises(ValueError, match="need a cache of"):
        check_capacity(models()[0], 64, most)
