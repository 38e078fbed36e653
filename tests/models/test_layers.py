"""Norms, RoPE and the cache, against NumPy in float64 and against hand-worked cases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_jax.models.cache import KVCache, take_tokens
from eagle_jax.models.config import LlamaConfig, RopeConfig
from eagle_jax.models.layers import rms_norm
from eagle_jax.models.rope import rope_angles, rope_frequencies, rotate
from tests.models.reference import SMALL


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm():
    x, weight = normal(0, 2, 3, 8), normal(1, 8)
    expected = x / np.sqrt(np.mean(x.astype(np.float64) ** 2, -1, keepdims=True) + 0.5) * weight
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(weight), 0.5), expected, atol=1e-6)
    tiny = jnp.full((1, 1, 8), 1e-3, jnp.bfloat16)  # its square is lost beside eps unless computed in float32
    out = rms_norm(tiny, jnp.ones(8, jnp.bfloat16), 1e-6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 0.707, atol=0.01)


def test_rotation_pairs_the_halves():
    """A quarter turn of [1, 2, 3, 4] by halves: (1, 3) -> (-3, 1) and (2, 4) -> (-4, 2)."""
    x = jnp.arange(1.0, 5.0).reshape(1, 1, 1, 4)
    cos, sin = jnp.zeros((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2))
    np.testing.assert_array_equal(rotate(x, cos, sin).ravel(), [-3, -4, 1, 2])


@settings(max_examples=15)
@given(shift=st.integers(0, 5000), base=st.sampled_from([10000.0, 500000.0]))
def test_rotated_products_depend_on_distance(shift, base):
    q, k = jnp.asarray(normal(0, 1, 1, 1, 8)), jnp.asarray(normal(1, 1, 1, 1, 8))

    def product(i: int, j: int) -> float:
        cos, sin = rope_angles(RopeConfig(theta=base), 8, jnp.asarray([[i, j]]), jnp.zeros(1, jnp.int32))
        return float(jnp.sum(rotate(q, cos[:, :1], sin[:, :1]) * rotate(k, cos[:, 1:], sin[:, 1:])))

    assert product(7 + shift, 3 + shift) == pytest.approx(product(7, 3), abs=5e-3)


def test_rope_frequencies():
    plain = rope_frequencies(RopeConfig(theta=100.0), 4)
    np.testing.assert_allclose(plain, [1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(rope_frequencies(RopeConfig(100.0, "linear", 4.0), 4), [0.25, 0.025], rtol=1e-6)


def test_llama3_frequencies():
    """Wavelengths 2 pi base^(2i/H). At 8192 / 4 tokens and below they are kept, at 8192 / 1 and above divided by 8."""
    rope = RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    plain, scaled = rope_frequencies(RopeConfig(500000.0), 128), rope_frequencies(rope, 128)
    wavelength = 2 * np.pi / plain.astype(np.float64)
    short, long = wavelength <= 2048, wavelength >= 8192
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert short.any() and long.any() and between.any()
    smooth = (8192 / wavelength[between] - 1) / 3
    np.testing.assert_allclose(scaled[between], (1 - smooth) * plain[between] / 8 + smooth * plain[between], rtol=1e-5)


def test_angles_stay_exact_at_far_positions():
    """The fastest frequency is 1: its angle is the position, which bfloat16 would round to a multiple of 512."""
    cos, sin = rope_angles(RopeConfig(), 4, jnp.asarray([[100_001]]), jnp.zeros(1, jnp.int32))
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose([cos[0, 0, 0, 0], sin[0, 0, 0, 0]], [np.cos(100_001), np.sin(100_001)], atol=1e-5)


def test_dynamic_angles_read_the_prompt_length():
    """A prompt of 20 tokens is rotated as a text of 20 from its first token on; later tokens as texts they end."""
    rope = RopeConfig(10000.0, "dynamic", 4.0, original_length=16)

    def frequency(position: int, prompt: int) -> float:  # the slow one of head_dim 4
        cos, sin = rope_angles(rope, 4, jnp.asarray([[position]]), jnp.asarray([prompt]))
        return float(jnp.arctan2(sin, cos)[0, 0, 0, 1]) / position

    def expected(length: int) -> float:
        return (10000.0 * (4 * length / 16 - 3) ** 2) ** -0.5

    assert frequency(5, 6) == pytest.approx(0.01)
    assert frequency(5, 16) == pytest.approx(0.01)
    assert frequency(5, 20) == pytest.approx(expected(20))
    assert frequency(20, 20) == pytest.approx(expected(21))
    assert frequency(16, 6) == pytest.approx(expected(17))


CACHED = LlamaConfig.from_hf(SMALL | dict(num_key_value_heads=2, head_dim=6))


def rows_of(seed: int, batch: int, tokens: int) -> list[tuple[jax.Array, jax.Array]]:
    shape = (CACHED.num_layers, 2, batch, CACHED.num_kv_heads, tokens, CACHED.head_dim)
    return [(jnp.asarray(k), jnp.asarray(v)) for k, v in normal(seed, *shape)]


def test_cache_writes_at_one_offset_or_one_a_sequence():
    cache = KVCache.zeros(CACHED, batch=3, rows=8, dtype=jnp.float32)
    assert (cache.rows, cache.k[0].shape, len(cache.v)) == (8, (3, 2, 8, 6), CACHED.num_layers)
    first, second = rows_of(0, 3, 4), rows_of(1, 3, 2)
    starts = np.array([0, 4, 6])
    cache = cache.write(first, jnp.asarray(1)).write(second, jnp.asarray(starts))
    np.testing.assert_array_equal(cache.length, 0)
    for layer in range(CACHED.num_layers):
        for part, name in enumerate("kv"):
            expected = np.zeros((3, 2, 8, 6), np.float32)
            expected[:, :, 1:5] = first[layer][part]
            for row, start in enumerate(starts):
                expected[row, :, start : start + 2] = second[layer][part][row]
            np.testing.assert_array_equal(getattr(cache.layer(layer), name), expected)


def test_cache_keeps_its_dtype():
    cache = KVCache.zeros(CACHED, batch=1, rows=4, dtype=jnp.bfloat16).write(rows_of(0, 1, 2), jnp.asarray(0))
    assert {array.dtype for array in (*cache.k, *cache.v)} == {jnp.dtype(jnp.bfloat16)}


def test_take_tokens():
    rows = rows_of(0, 2, 5)
    index = np.array([[0, 3, 3], [4, 1, 0]])
    for (k, v), (taken_k, taken_v) in zip(rows, take_tokens(rows, jnp.asarray(index)), strict=True):
        for row in range(2):
            np.testing.assert_array_equal(taken_k[row], k[row][:, index[row]])
            np.testing.assert_array_equal(taken_v[row], v[row][:, index[row]])
