"""Drafts that users wrote against the names of November 2026 (old_names.py) go on working, and change no text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import eagle_jax
from eagle_jax import SamplingConfig
from tests.drafts import old_names
from tests.drafts.test_lossless import BATCH, WIDTH, prompts, target_of
from tests.toy import NEW, near_ties, rows_of


@pytest.mark.parametrize("draft", [old_names.Successors(3), old_names.Repeated()], ids=["successors", "repeated"])
def test_greedy_and_coupled_texts_are_those_of_plain_decoding(draft):
    """Rows of one batch; the next test has a batch that is greedy altogether."""
    tokens, lengths = prompts(5)
    options = dict(sampling=SamplingConfig(jnp.array([0.0, 1.0, 1.0]), coupled=True), max_new_tokens=NEW)
    ours, plain = (
        eagle_jax.generate(target_of(0), d, tokens, lengths, jax.random.key(1), **options) for d in (draft, None)
    )
    assert rows_of(ours) == rows_of(plain)
    assert ours.cycles[0] < plain.cycles[0] and ours.cycles[1:].sum() < plain.cycles[1:].sum()


def test_prompts_that_come_by_insert():
    target, draft = target_of(0), old_names.Repeated()
    tokens, lengths = prompts(5)
    state = eagle_jax.empty_state(target, draft, BATCH, WIDTH + NEW)
    insert, cycle = (jax.jit(function, donate_argnames="state") for function in (eagle_jax.insert, eagle_jax.cycle))
    for row in range(BATCH):
        state = insert(state, row, tokens[row], lengths[row], max_new_tokens=NEW)
    while not state.done.all():
        state = cycle(target, draft, state)
    plain = eagle_jax.generate(target, None, tokens, lengths, max_new_tokens=NEW)
    assert near_ties(target, rows_of(state), rows_of(plain)) <= 1
