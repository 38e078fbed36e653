"""Attention against NumPy in float64, and by hand."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax.ops import attention as door
from eagle_jax.ops import flash
from eagle_jax.ops.attention import CACHE_BLOCK, Backend, CacheLayer, attention, causal
from eagle_jax.ops.cached import add_blocks, add_whole
from eagle_jax.ops.causal import OwnKV, in_blocks
from eagle_jax.ops.layout import layout
from eagle_jax.ops.spec import PLAIN, Spec


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax_attention(q, k, v, mask, spec=PLAIN):
    """q [B, T, N, H]; k, v [B, K, M, H]; mask [B, T, M] -> [B, T, N, H], one query at a time, float64.

    Of the spec, scale, softcap and sinks; `mask` is its window.
    """
    batch, tokens, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(batch, tokens, heads):
        scores = k[b, n // group].astype(np.float64) @ q[b, t, n]
        scores = scores / np.sqrt(head_dim) if spec.scale is None else scores * spec.scale
        scores = scores if spec.softcap is None else spec.softcap * np.tanh(scores / spec.softcap)
        top = scores[mask[b, t]].max()
        weights = np.where(mask[b, t], np.exp(scores - top), 0)
        total = weights.sum() + (0 if spec.sinks is None else np.exp(spec.sinks[n] - top))
        out[b, t, n] = weights / total @ v[b, n // group]
    return out


def shown(spec, queries, keys):
    """Which of the key positions [M] the window shows to the query positions [T], whatever is to come: [T, M]."""
    distance = queries[:, None] - keys[None]
    if spec.window is None:
        return np.ones(distance.shape, bool)
    return (distance < spec.window) | (keys[None] < spec.first)


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


SINKS = jnp.asarray(normal(7, 4))
SPECS = {
    "plain": PLAIN,
    "scale": Spec(scale=0.9),
    "sinks": Spec(sinks=SINKS),
    "scale and sinks": Spec(scale=0.1, sinks=SINKS),
    "softcap": Spec(softcap=0.7),
    "window": Spec(window=6),
    "window below the new tokens": Spec(window=2),
    "window and first": Spec(window=11, first=3),
    "all": Spec(window=5, first=2, sinks=SINKS, softcap=1.5, scale=0.8),
}


def interpreted(kernel):
    """A kernel's backend on this CPU, in float32: what it supports in half precision."""
    way = door.by_kernel(functools.partial(kernel, interpret=True))
    return Backend(way, "cpu", lambda spec, q: flash.supports(spec, q.astype(jnp.bfloat16)))


BACKENDS = {
    "cached: one product": ("CACHED", Backend(add_whole)),
    "cached: blocks of a CPU": ("CACHED", Backend(functools.partial(add_blocks, 16))),
    "cached: blocks of a prompt": ("CACHED_LONG", Backend(functools.partial(add_blocks, 64))),
    "causal: blocks": ("CAUSAL", Backend(None)),
    "causal: a CUDA GPU's kernel": ("CAUSAL", interpreted(flash.triton)),
    "causal: a TPU's kernel": ("CAUSAL", interpreted(flash.splash)),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_is_numpy_under_every_spec_that_it_supports(name, monkeypatch):
    """The last tokens of two sequences, of different lengths, in a batch."""
    table, backend = BACKENDS[name]
    plain = [other for other in getattr(door, table) if other.platform is None]
    monkeypatch.setattr(door, table, (backend, *plain) if backend.platform else (backend,))
    width, new, lengths = 90, 5, np.array([90, 41])
    last = lengths[:, None] - new + np.arange(new)  # [B, new]: positions of the queries that are compared
    q, k, v = normal(0, 2, width, 4, 16), normal(1, 2, 2, width, 16), normal(2, 2, 2, width, 16)
    queries = jnp.asarray(np.take_along_axis(q, last[:, :, None, None], axis=1))
    specs = {what: spec for what, spec in SPECS.items() if backend.supports(spec, jnp.asarray(q))}
    assert len(specs) == (4 if backend.platform else len(SPECS))

    @jax.jit
    def compute(q, k, v):
        if table == "CAUSAL":
            text = layout(jnp.asarray(lengths), width)
            return [jax.vmap(lambda row, at: row[at])(causal(q, k, v, text, spec), last) for spec in specs.values()]
        cache = CacheLayer(k, v, lengths - new)  # at and past the length lie rows that must not be seen
        new_k, new_v = (jax.vmap(lambda row, at: row[:, at])(array, last) for array in (k, v))
        mask, options = jnp.tri(new, dtype=bool)[None].repeat(2, axis=0), dict(in_blocks=table == "CACHED_LONG")
        return [
            attention(queries, new_k, new_v, mask, cache, spec=spec, positions=jnp.asarray(last), **options)
            for spec in specs.values()
        ]

    for (what, spec), ours in zip(specs.items(), compute(q, k, v), strict=True):
        keys = np.arange(width)
        mask = np.stack([shown(spec, row, keys) & (keys[None] <= row[:, None]) for row in last])
        expected = softmax_attention(queries, k, v, mask, spec)
        np.testing.assert_allclose(ours, expected, atol=3e-6, err_msg=what)


@pytest.mark.parametrize("spec", [Spec(window=3), Spec(softcap=1.0)])
def test_what_a_kernel_does_not_support_goes_in_blocks(spec):
    q = jnp.zeros((1, 1, 1, 2, 64), jnp.bfloat16)
    assert door.pick(door.CAUSAL, PLAIN, q).keys() == {"cuda", "tpu", None}
    assert door.pick(door.CAUSAL, spec, q).keys() == {None}
    assert door.pick(door.CAUSAL, PLAIN, q.astype(jnp.float32)).keys() == {None}


def test_a_window_needs_positions():
    with pytest.raises(ValueError, match="a window needs the positions"):
        attention(*[jnp.zeros((1, 1, 1, 4))] * 3, jnp.ones((1, 1, 1), bool), spec=Spec(window=3))


def test_a_plain_spec_is_one_that_changes_nothing():
    assert {name: spec.plain for name, spec in SPECS.items()} == {name: name == "plain" for name in SPECS}


@pytest.mark.parametrize("spec", [PLAIN, SPECS["all"]], ids=["plain", "all"])
def test_blocks_of_queries_change_nothing(spec):
    """The last block is padded; documents begin within blocks, and a window counts from a document's start."""
    q, k, v, of_out = (normal(i, 2, 1, 4, 23, 16) for i in range(4))
    k, v = k[:, :, 0], v[:, :, 0]
    documents = jnp.asarray(np.arange(23)[None] >= np.array([[10], [4]]), jnp.int32)
    text = layout(jnp.array([23, 9]), 23, documents)

    @functools.partial(jax.jit, static_argnames="block")
    def measure(q, k, v, block):
        def attended(q, k, v):
            _, total, out = in_blocks(q, k, v, text, spec, block=block)
            return out / total

        out, pull = jax.vjp(attended, q, k, v)
        return out, *pull(of_out)

    whole = measure(q, k, v, 512)
    for a, b in zip(whole, measure(q, k, v, 8), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    first, end = np.asarray(text.first), np.asarray(text.end)
    at = np.arange(23)
    mask = (at <= at[:, None]) & (at >= first[:, :, None]) & (at < end[:, :, None])
    mask &= np.stack([[shown(spec, at[t : t + 1] - f, at - f)[0] for t, f in enumerate(row)] for row in first])
    without = dataclasses.replace(spec, sinks=None)
    expected = softmax_attention(np.moveaxis(q[:, 0], 1, 2), k, v, mask, without)
    np.testing.assert_allclose(np.moveaxis(whole[0][:, 0], 1, 2), expected, atol=3e-6)


def test_later_steps_see_their_own_keys_and_a_window_that_moved_on():
    """By NumPy: the keys of the text, then each position's own, of which 2 of 3 steps have come."""
    spec, width, steps = SPECS["all"], 12, 2
    q, k, v = normal(0, 1, width, 4, 16), normal(1, 1, 2, width, 16), normal(2, 1, 2, width, 16)
    own_k, own_v = normal(3, 1, width, 2, 3, 16), normal(4, 1, width, 2, 3, 16)
    text = layout(jnp.array([width]), width)
    ours = jax.jit(causal)(q, k, v, text, spec, OwnKV(own_k, own_v, jnp.int32(steps)))
    at = np.arange(width)
    for t in range(width):
        mask = np.append(shown(spec, at[t : t + 1] + steps, at)[0] & (at <= t), [True] * steps)[None, None]
        keys, values = (np.append(a, own[:, t, :, :steps], axis=2) for a, own in ((k, own_k), (v, own_v)))
        expected = softmax_attention(q[:, t : t + 1], keys, values, mask, spec)
        np.testing.assert_allclose(ours[:, t : t + 1], expected, atol=3e-6)
