"""The distribution of the first three tokens, against enumeration of plain sampling."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import eagle_jax
from eagle_jax import DraftConfig, Eagle3Draft, Llama, LlamaConfig, SamplingConfig, TreeConfig
from tests import processors
from tests.toy import TARGET, scaled

TREE = TreeConfig(depth=3, top_k=2, num_nodes=6)
V, DRAWS = 11, 6000
FALSE_ALARM = 1e-4  # of each chi-square test; seeds are fixed, so this is the chance that a change of seed fails
PROMPT = [3, 1, 4]


def tiny_config() -> LlamaConfig:
    return dataclasses.replace(TARGET, vocab_size=V, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1)


@pytest.fixture(scope="module")
def tiny():
    """A target and a draft of 11 tokens that differ, with distributions neither flat nor sharp."""
    config = tiny_config()
    head = DraftConfig(**config.__dict__ | {"num_layers": 1, "draft_vocab_size": 7, "target_hidden_size": 16})
    target = scaled(Llama(config, jax.random.key(0)), 12.0)
    return target, scaled(Eagle3Draft(head, 3, jax.random.key(1)), 12.0)


def exact_text_probabilities(target, **controls) -> np.ndarray:
    """[V, V, V]: of the first three tokens after PROMPT, from the target's logits and the NumPy processors."""
    joint = np.ones((V, V, V))
    for known in range(3):
        texts = [[*PROMPT, *tail] for tail in itertools.product(range(V), repeat=known)]
        tokens, lengths = jnp.array(texts), jnp.full(len(texts), len(texts[0]))
        logits, _ = eagle_jax.forward(target, tokens, lengths)
        for text, last in zip(texts, np.asarray(logits[:, -1]), strict=True):
            p = processors.probabilities(last, **controls, seen=set(text))
            joint[tuple(text[len(PROMPT) :])] *= p.reshape(-1, *[1] * (2 - known))
    return joint


@functools.partial(jax.jit, static_argnames="tree")  # settings are data: cases share a program
@functools.partial(jax.vmap, in_axes=(0, *[None] * 6))
def run(key, target, draft, tokens, lengths, sampling, tree):
    out = eagle_jax.generate(target, draft, tokens, lengths, key, tree=tree, sampling=sampling, max_new_tokens=3)
    return out.tokens[:, len(PROMPT) :], out.failed


def draws(target, draft, sampling, batch: int = 1, tree=TREE) -> np.ndarray:
    """The first three tokens of DRAWS runs of each row of a batch of PROMPTs: [DRAWS, batch, 3]."""
    tokens, lengths = jnp.array([PROMPT] * batch), jnp.full(batch, len(PROMPT))
    keys = jax.random.split(jax.random.key(7), DRAWS)
    tokens, failed = run(keys, target, draft, tokens, lengths, sampling, tree)
    assert not failed.any()
    return np.asarray(tokens)


def p_value(texts: np.ndarray, joint: np.ndarray) -> float:
    """Of Pearson's chi-square, texts expected fewer than 5 times pooled."""
    assert np.isclose(joint.sum(), 1)
    observed = np.zeros_like(joint)
    np.add.at(observed, tuple(texts.T), 1)
    assert observed[joint == 0].sum() == 0, "an impossible text was drawn"
    expected, observed = len(texts) * joint.ravel(), observed.ravel()
    common = expected >= 5
    assert common.sum() >= 15
    rest = [expected[~common].sum()], [observed[~common].sum()]
    expected, observed = (np.concatenate([x[common], y]) for x, y in ((expected, rest[0]), (observed, rest[1])))
    if expected[-1] < 5:  # even pooled: with the next
        expected[-2] += expected[-1]
        observed[-2] += observed[-1]
        expected, observed = expected[:-1], observed[:-1]
    return stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


RICH = dict(temperature=0.8, top_k=8, top_p=0.9, min_p=0.01, repetition_penalty=1.4)


@pytest.mark.parametrize(
    ("speculative", "controls", "coupled"),
    [
        (False, dict(temperature=1.0), False),
        (True, dict(temperature=1.0), False),
        (True, dict(temperature=1.0), True),
        (True, RICH, False),
        (True, RICH, True),
    ],
)
def test_three_tokens_have_the_target_s_distribution(tiny, speculative, controls, coupled):
    target, draft = tiny
    texts = draws(target, draft if speculative else None, SamplingConfig(**controls, coupled=coupled))[:, 0]
    assert p_value(texts, exact_text_probabilities(target, **controls)) > FALSE_ALARM


def test_the_test_has_power(tiny):
    """Texts drawn at one temperature are not taken for those of another, a tenth away."""
    target, _ = tiny
    texts = draws(target, None, SamplingConfig(temperature=1.0))[:, 0]
    assert p_value(texts, exact_text_probabilities(target, temperature=1.1)) < FALSE_ALARM


def test_a_mixed_batch_has_each_row_s_distribution(tiny):
    target, draft = tiny
    columns = {name: jnp.array([value, default]) for name, value, default in (
        ("temperature", RICH["temperature"], 0.0), ("top_k", RICH["top_k"], 0), ("top_p", RICH["top_p"], 1.0),
        ("min_p", RICH["min_p"], 0.0), ("repetition_penalty", RICH["repetition_penalty"], 1.0),
    )}  # fmt: skip
    texts = draws(target, draft, SamplingConfig(**columns), batch=2)
    assert p_value(texts[:, 0], exact_text_probabilities(target, **RICH)) > FALSE_ALARM
    greedy = eagle_jax.generate(target, draft, jnp.array([PROMPT]), jnp.array([3]), tree=TREE, max_new_tokens=3)
    assert (texts[:, 1] == np.asarray(greedy.tokens[:, 3:])).all()
