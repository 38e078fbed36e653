"""Drafts that users wrote against the names of November 2026 (old_names.py) go on working, and change no text."""

from __future__ import annotations

import jax
import pytest

import eagle_jax
from eagle_jax import SamplingConfig
from tests.drafts import old_names
from tests.drafts.test_lossless import BATCH, WIDTH, prompts, target_of
from tests.toy import NEW, near_ties, rows_of

DRAFTS = [old_names.Successors(3), old_names.Repeated()]


@pytest.mark.parametrize("draft", DRAFTS, ids=["successors", "repeated"])
def test_greedy_and_coupled_texts_are_those_of_plain_decoding(draft):
    target = target_of(0)
    for seed, sampling in enumerate([SamplingConfig(), SamplingConfig(temperature=1.0, coupled=True)]):
        tokens, lengths = prompts(seed + 5)
        ours, plain = (
            eagle_jax.generate(target, d, tokens, lengths, jax.random.key(1), sampling=sampling, max_new_tokens=NEW)
            for d in (draft, None)
        )
        if sampling.greedy:
            assert near_ties(target, rows_of(ours), rows_of(plain)) <= 1
        else:
            assert sum(a == b for a, b in zip(rows_of(ours), rows_of(plain), strict=True)) >= BATCH - 1
        assert ours.cycles.sum() < plain.cycles.sum()


def test_prompts_that_come_by_insert():
    target, draft = target_of(0), DRAFTS[0]
    tokens, lengths = prompts(5)
    state = eagle_jax.empty_state(target, draft, BATCH, WIDTH + NEW)
    for row in range(BATCH):
        state = eagle_jax.insert(state, row, tokens[row], lengths[row], max_new_tokens=NEW)
    cycle = jax.jit(eagle_jax.cycle, donate_argnames="state")
    while not state.done.all():
        state = cycle(target, draft, state)
    plain = eagle_jax.generate(target, None, tokens, lengths, max_new_tokens=NEW)
    assert near_ties(target, rows_of(state), rows_of(plain)) <= 1
