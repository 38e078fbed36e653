"""Every kind of draft is lossless: greedy text, stops, rows that depend on themselves alone, coupled text."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eagle_jax
from eagle_jax import Llama, SamplingConfig
from tests.decode.test_sampled_distribution import tiny_config
from tests.drafts.kinds import KINDS, OWN_WAYS, VARIANTS, every_kind
from tests.toy import NEW, near_ties, random_prompts, rows_of, scaled

BATCH, WIDTH = 3, 10
CONFIG = tiny_config()  # of a few tokens, so that random drafts are often right
prompts = functools.partial(random_prompts, batch=BATCH, width=WIDTH, vocab=CONFIG.vocab_size)
compared = {"rows": 0, "near-ties": 0}


def target_of(seed: int, scale: float = 12.0) -> Llama:
    return scaled(Llama(CONFIG, jax.random.key(seed)), scale)


def run(kind, seed, tokens, lengths, key=None, scale=12.0, **options) -> eagle_jax.Output:
    """Text of the target of a seed, by a draft of this kind; None: plain."""
    draft, tree = None, eagle_jax.TreeConfig()
    if kind is not None:
        draft, tree = KINDS[kind].build(CONFIG, seed + 1, scale), KINDS[kind].tree
    return eagle_jax.generate(
        target_of(seed, scale), draft, tokens, lengths, key, tree=tree, **dict(max_new_tokens=NEW) | options
    )


# Variants of one-pass heads; the other variants take less time to compile.
ONE_PASS = [kind for kind in VARIANTS if kind.split()[0] in ("dflash", "jetspec", "dspark", "p-eagle")]


@pytest.mark.parametrize("kind", every_kind(*(kind for kind in KINDS if kind not in ONE_PASS)))
def test_greedy_text_is_that_of_plain_decoding(kind):
    """Token for token, and ended by the same stop token or limit."""
    accepted, stopped = set(), set()

    @settings(max_examples=10)
    @given(seed=st.integers(0, 10_000), scale=st.sampled_from([8.0, 12.0]), stop=st.integers(0, CONFIG.vocab_size - 1))
    def check(seed, scale, stop):
        tokens, lengths = prompts(seed + 2)
        ours, plain = (run(k, seed, tokens, lengths, scale=scale, stop_tokens=(stop,)) for k in (kind, None))
        compared["rows"] += BATCH
        compared["near-ties"] += near_ties(target_of(seed, scale), rows_of(ours), rows_of(plain), kind)
        assert compared["near-ties"] <= 1 + compared["rows"] // 50
        assert not ours.failed.any()
        np.testing.assert_array_equal(ours.accepted.sum(axis=1), ours.cycles)
        accepted.update(np.flatnonzero(np.asarray(ours.accepted).sum(axis=0)).tolist())
        stopped.update((np.asarray(ours.lengths) < lengths + NEW).tolist())

    check()
    assert len(accepted) >= 2, "no guess was ever right, so nothing was tested"
    assert stopped == {False, True}


@pytest.mark.parametrize("kind", every_kind("eagle1", "eagle3", "medusa", "draft model"))
def test_weights_stored_input_first_give_the_same_text(kind):
    target, draft = target_of(3), KINDS[kind].build(CONFIG, 4, 12.0)
    tokens, lengths = prompts(5)
    options = dict(tree=KINDS[kind].tree, max_new_tokens=NEW)
    plain = eagle_jax.generate(target, None, tokens, lengths, max_new_tokens=NEW)
    ours = eagle_jax.generate(*map(eagle_jax.input_first, (target, draft)), tokens, lengths, **options)
    assert near_ties(target, rows_of(ours), rows_of(plain), kind) <= 1
    assert ours.cycles.sum() < plain.cycles.sum()


def sampling(temperature, top_k=(0, 0, 0), top_p=(1.0, 1.0, 1.0), rows: int = BATCH) -> SamplingConfig:
    """Settings a row, so that all tests share a program."""
    return SamplingConfig(*(jnp.array(values[:rows]) for values in (temperature, top_k, top_p)))


MIXED = sampling((0.0, 0.7, 1.3), (0, 8, 0), (1.0, 0.95, 0.9))
SAMPLED = every_kind(*OWN_WAYS)
SEES_THE_WHOLE_TEXT = ("lookahead", "prompt lookup", "prompt lookup tree", "draft model")


@pytest.mark.parametrize("kind", SAMPLED)
def test_sampled_rows_depend_on_themselves_alone(kind):
    """Neither on neighbours, nor on padding, nor on other keys; and a greedy row among them is the greedy text."""
    tokens, _ = prompts(2)
    lengths, keys = jnp.array([10, 2, 6]), jax.random.split(jax.random.key(3), BATCH)
    sampled = functools.partial(run, kind, 0, sampling=MIXED)
    together = sampled(tokens, lengths, keys)
    greedy = run(kind, 0, tokens, lengths)
    assert rows_of(together)[0] == rows_of(greedy)[0] and together.cycles[0] == greedy.cycles[0]
    assert rows_of(together)[1:] != rows_of(greedy)[1:]
    for row in range(BATCH):
        others = jnp.arange(BATCH)[:, None] != row
        strangers = jnp.where(others, (tokens + 3) % CONFIG.vocab_size, tokens)
        strangers = jnp.where(jnp.arange(WIDTH)[None] < lengths[:, None], strangers, 5)  # the padding, too
        other_lengths = jnp.where(others[:, 0], jnp.array([3, 9, 1]), lengths)
        other_keys = jax.random.split(jax.random.key(8), BATCH).at[row].set(keys[row])
        again = sampled(strangers, other_lengths, other_keys)
        assert rows_of(again)[row] == rows_of(together)[row]
        assert again.cycles[row] == together.cycles[row]
    if kind in SEES_THE_WHOLE_TEXT:
        wide = jnp.pad(tokens, [(0, 0), (0, 23)])
        assert rows_of(sampled(wide, lengths, keys)) == rows_of(together)


@pytest.mark.parametrize("kind", every_kind("eagle1", "medusa", "lookahead", "draft model tree"))
def test_coupled_sampling_gives_the_text_of_plain_sampling(kind):
    """Greedy among sampled sequences, and ended by the same stop token or limit."""
    tokens, lengths = prompts(5)
    warm = SamplingConfig(temperature=jnp.array([1.0, 0.0, 1.0]), coupled=True)
    key, options = jax.random.key(4), dict(sampling=warm, stop_tokens=(4,))
    ours, plain = (rows_of(run(k, 0, tokens, lengths, key, **options)) for k in (kind, None))
    # Rounding may part a text from the plain one where two sums of logit and noise tie: once in thousands of tokens.
    assert sum(a == b for a, b in zip(ours, plain, strict=True)) >= BATCH - 1
    assert {len(text) - length < NEW for text, length in zip(plain, lengths.tolist(), strict=True)} == {False, True}
