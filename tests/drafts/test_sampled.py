"""Sampled text by every kind of draft: its distribution, and prompts put into a running batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import SamplingConfig
from tests.decode.test_insert import CAPACITY, insert
from tests.decode.test_sampled_distribution import FALSE_ALARM, draws, exact_text_probabilities, p_value
from tests.drafts.kinds import KINDS, OWN_WAYS, every_kind
from tests.drafts.test_lossless import BATCH, CONFIG, prompts, run, sampling, target_of
from tests.toy import NEW, rows_of


@pytest.mark.parametrize("kind", every_kind(*OWN_WAYS, "draft model dynamic"))
def test_sampled_text_has_the_target_s_distribution(kind):
    target, draft = target_of(0), KINDS[kind].build(CONFIG, 1, 12.0)
    controls = dict(temperature=0.8, top_k=8, top_p=0.95, repetition_penalty=1.2)
    texts = draws(target, draft, SamplingConfig(**controls), tree=KINDS[kind].tree)[:, 0]
    assert p_value(texts, exact_text_probabilities(target, **controls)) > FALSE_ALARM


@pytest.mark.parametrize("kind", ["draft model"])  # the others: test_running_batch.py
def test_prompts_put_into_a_running_batch_have_the_texts_of_generate(kind):
    """The second prompt of a row finds nothing of the first."""
    target, draft = target_of(0), KINDS[kind].build(CONFIG, 1, 12.0)
    keys = jax.random.split(jax.random.key(2), BATCH)
    tokens, _ = prompts(4)
    lengths, warm = jnp.array([10, 4, 7]), (0.9, 0.9, 0.9)
    alone = run(kind, 0, tokens, lengths, keys, sampling=sampling(warm))
    state = eagle_jax.empty_state(target, draft, 2, CAPACITY, sampling=sampling(warm, rows=2), tree=KINDS[kind].tree)
    advance = functools.partial(eagle_jax.advance, target, draft, tree=KINDS[kind].tree, cycles=3)
    texts = []
    for row, index in enumerate((0, 0, 1, 2)):  # one in row 0, then all in row 1, one after the other
        state = insert(state, min(row, 1), tokens[index], lengths[index], keys[index], max_new_tokens=NEW)
        chunk = None
        while row > 0 and (chunk is None or not chunk.done[1]):
            state, chunk = advance(state)
        if row > 0:
            texts.append(np.asarray(state.tokens[1, : state.lengths[1]]).tolist())
    assert texts == rows_of(alone)
