"""The pure functions of a layer, against NumPy in float64 and against hand-worked cases; and the cache."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_jax.drafts.draft_model import DraftModel
from eagle_jax.models import layers, params
from eagle_jax.models.cache import KVCache, take_tokens
from eagle_jax.models.config import LlamaConfig, RopeConfig
from eagle_jax.models.layers import (
    CACHE_BLOCK,
    CacheLayer,
    attention,
    rms_norm,
    rope_angles,
    rope_frequencies,
    rotate,
)
from eagle_jax.models.llama import Llama
from tests.models.reference import SMALL
from tests.toy import TARGET, random_eagle3, random_target


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax_attention(q, k, v, mask):
    """q [B, T, N, H]; k, v [B, K, M, H]; mask [B, T, M] -> [B, T, N, H], one query at a time, float64."""
    batch, tokens, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(batch, tokens, heads):
        scores = k[b, n // group].astype(np.float64) @ q[b, t, n] / np.sqrt(head_dim)
        weights = np.where(mask[b, t], np.exp(scores - scores[mask[b, t]].max()), 0)
        out[b, t, n] = weights / weights.sum() @ v[b, n // group]
    return out


def random_mask(seed: int, batch: int, tokens: int, rows: int) -> np.ndarray:
    """Each query sees a random half of the rows, and row t modulo their number."""
    mask = np.random.default_rng(seed).random((batch, tokens, rows)) < 0.5
    mask[:, np.arange(tokens), np.arange(tokens) % rows] = True
    return mask


attend = jax.jit(attention, static_argnames="in_blocks")


@pytest.mark.parametrize("tokens", [1, 5, 65, 130])
def test_attention_equals_numpy(tokens):
    q, k, v = normal(0, 2, tokens, 4, 6), normal(1, 2, 2, tokens, 6), normal(2, 2, 2, tokens, 6)
    mask = random_mask(3, 2, tokens, tokens)
    np.testing.assert_allclose(attend(q, k, v, mask), softmax_attention(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize(
    ("tokens", "rows", "in_blocks"),
    [
        (1, 11, False),
        (130, 11, False),
        # In blocks: fewer rows than one block, exactly one, several, a part of one.
        (130, 11, True),
        (1, CACHE_BLOCK, True),
        (9, 2 * CACHE_BLOCK, True),
        (9, 2 * CACHE_BLOCK + 5, True),
    ],
)
def test_cached_attention_equals_attention_over_everything(tokens, rows, in_blocks):
    """Old rows below each sequence's length and new rows under a mask: one softmax over both."""
    lengths = np.array([0, 4, rows])
    q, k, v = normal(0, 3, tokens, 4, 6), normal(1, 3, 2, tokens, 6), normal(2, 3, 2, tokens, 6)
    old_k, old_v = normal(3, 3, 2, rows, 6), normal(4, 3, 2, rows, 6)
    mask = random_mask(5, 3, tokens, tokens)
    both = attend(q, k, v, mask, CacheLayer(old_k, old_v, lengths), in_blocks=in_blocks)
    seen = np.broadcast_to(np.arange(rows) < lengths[:, None, None], (3, tokens, rows))
    all_k, all_v = np.concatenate([old_k, k], axis=2), np.concatenate([old_v, v], axis=2)
    all_rows = np.concatenate([seen, mask], axis=-1)
    np.testing.assert_allclose(both, attend(q, all_k, all_v, all_rows), atol=2e-6)
    some = slice(tokens // 2, tokens // 2 + 3)  # the oracle is slow
    expected = softmax_attention(q[:, some], all_k, all_v, all_rows[:, some])
    np.testing.assert_allclose(both[:, some], expected, atol=2e-6)


def test_rows_past_the_length_hold_anything():
    q, k, v = normal(0, 1, 2, 2, 4), normal(1, 1, 2, 2, 4), normal(2, 1, 2, 2, 4)
    old = np.full((1, 2, 5, 4), 1e30, np.float32)
    old[:, :, :3] = normal(3, 1, 2, 3, 4)
    mask, length = np.ones((1, 2, 2), bool), np.array([3])
    short = attend(q, k, v, mask, CacheLayer(old[:, :, :3], old[:, :, :3], length))
    np.testing.assert_array_equal(np.isfinite(short), True)
    np.testing.assert_allclose(attend(q, k, v, mask, CacheLayer(old, old, length)), short, atol=1e-6)


def test_attention_survives_large_scores():
    """Differences of scores beyond float32's exponent: the largest one takes all."""
    q = np.full((1, 1, 1, 2), 100, np.float32)
    k = np.array([[[[100, 100], [-100, -100]]]], np.float32)
    v = np.array([[[[1, 2], [3, 4]]]], np.float32)
    seen = np.ones((1, 1, 1), bool)
    for new, old in ((0, 1), (1, 0)):
        cache = CacheLayer(k[:, :, old : old + 1], v[:, :, old : old + 1], np.array([1]))
        out = attend(q, k[:, :, new : new + 1], v[:, :, new : new + 1], seen, cache)
        np.testing.assert_array_equal(out[0, 0, 0], [1, 2])


def test_attention_keeps_bfloat16():
    q, k, v = (jnp.asarray(normal(i, 1, 3, 2, 4)).astype(jnp.bfloat16) for i in range(3))
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    out = attend(q, k, v, np.ones((1, 3, 3), bool))
    assert out.dtype == jnp.bfloat16
    exact = softmax_attention(*(np.asarray(x, np.float32) for x in (q, k, v)), np.ones((1, 3, 3), bool))
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.03)


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
    q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

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
        for part in (0, 1):
            expected = np.zeros((3, 2, 8, 6), np.float32)
            expected[:, :, 1:5] = first[layer][part]
            for row, start in enumerate(starts):
                expected[row, :, start : start + 2] = second[layer][part][row]
            np.testing.assert_array_equal(cache.layer(layer)[part], expected)


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


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
@pytest.mark.parametrize("shape", [(24,), (3, 8)])
def test_a_product_with_a_weight_is_that_of_two_matrices(rows, shape):
    rng = np.random.default_rng(rows)
    x, weight = rng.normal(size=(1, rows, 16)), rng.normal(size=(*shape, 16))
    wanted = np.tensordot(x, weight, axes=(-1, -1))
    got = jax.jit(layers.linear)(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32))
    assert got.shape == (1, rows, *shape)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("shape", [(24,), (3, 8)])
def test_a_weight_stored_input_first_multiplies_as_it_did(rows, shape):
    rng = np.random.default_rng(rows)
    x, weight = rng.normal(size=(1, rows, 16)), rng.normal(size=(*shape, 16))
    stored = layers.InputFirst(jnp.asarray(np.moveaxis(weight, -1, 0), jnp.float32))
    assert layers.input_size(stored) == layers.input_size(nnx.Param(jnp.asarray(weight))) == 16
    got = jax.jit(layers.linear)(jnp.asarray(x, jnp.float32), stored)
    np.testing.assert_allclose(got, np.tensordot(x, weight, axes=(-1, -1)), rtol=1e-5, atol=1e-5)


def test_input_first_turns_the_weights_of_products_alone_and_once():
    target, draft = random_target(0), random_eagle3(1)
    for model in (target, draft):
        turned = layers.input_first(model)
        before, after = (jax.tree_util.tree_flatten_with_path(one)[0] for one in (model, turned))
        for (path, old), (_, new) in zip(before, after, strict=True):
            weight = params.path_name(path).split(".")[-1] in layers.PRODUCT_WEIGHTS
            np.testing.assert_array_equal(new, np.moveaxis(old, -1, 0) if weight else old)
        again = jax.tree.leaves(layers.input_first(turned))
        assert all(a is b for a, b in zip(again, jax.tree.leaves(turned), strict=True))
        with pytest.raises(ValueError, match="input_first is for decoding alone"):
            params.flatten(turned)


@pytest.mark.parametrize("wrap", [lambda target: target, DraftModel], ids=["target", "draft model"])
def test_input_first_gives_a_tied_target_an_output_matrix_of_its_own(wrap):
    tied = Llama(dataclasses.replace(TARGET, tie_word_embeddings=True), jax.random.key(0))
    turned = layers.input_first(wrap(tied))
    ours = getattr(turned, "model", turned)
    assert isinstance(ours.lm_head, layers.InputFirst)
    np.testing.assert_array_equal(ours.embed[...], tied.embed[...])
    hidden = jax.random.normal(jax.random.key(1), (1, 3, TARGET.hidden_size))
    np.testing.assert_allclose(ours.logits(hidden), tied.logits(hidden), rtol=1e-5, atol=1e-5)
    assert tied.lm_head is None


@pytest.mark.parametrize("rows", [2, layers.CPU_EIGEN_ROWS])
def test_few_rows_go_to_eigen_whatever_the_library_that_xla_prefers(rows):
    """Eigen takes less time for them. YNNPACK gets no product whose left side has its rows last."""
    x, weight = jnp.ones((1, rows, 64)), layers.InputFirst(jnp.ones((64, 128)))
    text = jax.jit(layers.linear).lower(x, weight).compile().as_text()
    assert "ynn" not in text and " dot(" in text
    assert "ynn" in jax.jit(jnp.dot).lower(x[0], weight[...]).compile().as_text()


def test_a_cpu_rounds_few_rows_as_it_rounds_one():
    """So the logits of a small tree's products are those of plain decoding, bit for bit with jax 0.10."""
    keys = jax.random.split(jax.random.key(0))
    x, weight = jax.random.normal(keys[0], (1, layers.CPU_FEW_ROWS, 192)), jax.random.normal(keys[1], (512, 192))
    together = jax.jit(layers.linear)(x, weight)
    for row in range(layers.CPU_FEW_ROWS):
        alone = jax.jit(layers.linear)(x[:, row], weight)
        if jax.__version_info__ < (0, 11):
            np.testing.assert_array_equal(together[:, row], alone)
        else:  # later releases compile a row in a loop otherwise than a row alone: the last bits differ
            np.testing.assert_allclose(together[:, row], alone, atol=2e-5)


def test_a_product_of_few_rows_has_a_gradient():
    x, weight = jnp.ones((1, 2, 4)), jnp.arange(12.0).reshape(3, 4)
    gradients = jax.jit(jax.grad(lambda x, w: layers.linear(x, w).sum(), (0, 1)))(x, weight)
    np.testing.assert_allclose(gradients[0], np.broadcast_to(weight.sum(0), (1, 2, 4)))
    np.testing.assert_allclose(gradients[1], np.full((3, 4), 2.0))
