"""Every kind of draft in a running batch: rows refilled in turn have the texts of plain decoding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

import eagle_jax
from eagle_jax import Llama, SamplingConfig
from eagle_jax.prompt import reusable
from tests.drafts.kinds import KINDS
from tests.test_sampled_distribution import tiny_config
from tests.toy import rows_of, scaled

CAPACITY, WIDTH, NEW = 48, 16, 9
PROMPTS = [[1, 2, 3, 1, 2], [4] * 16, [5], [3, 1, 4, 1, 5, 9, 2, 6], [7, 8, 7, 8, 7]]
TEMPERATURES = [0.0, 1.0, 1.0, 0.0, 0.7]
CONFIG = dataclasses.replace(tiny_config(), num_layers=2)
insert = jax.jit(eagle_jax.insert, donate_argnums=0, static_argnames="reuse")


@functools.cache
def target() -> Llama:
    return scaled(Llama(CONFIG, jax.random.key(0)), 8.0)


def plain(prompts, temperatures, keys) -> list[list[int]]:
    tokens, lengths = eagle_jax.pad(prompts, buckets=(CAPACITY,))
    sampling = SamplingConfig(np.array(temperatures, np.float32), coupled=True)
    out = eagle_jax.generate(target(), None, tokens, lengths, keys, sampling=sampling, max_new_tokens=NEW)
    return rows_of(out)


@pytest.mark.parametrize("kind", ["eagle1", "eagle3", "medusa", "draft model", "lookahead", "prompt lookup", "toy"])
def test_rows_have_the_texts_of_plain_decoding(kind):
    """Prompts of several lengths and temperatures take two rows in turn; then one goes on as a conversation."""
    draft, tree = KINDS[kind].build(CONFIG, 1, 8.0), KINDS[kind].tree
    advance = functools.partial(eagle_jax.advance, target(), draft, tree=tree, cycles=2)
    keys = jax.random.split(jax.random.key(2), len(PROMPTS))
    state = eagle_jax.empty_state(target(), draft, 2, CAPACITY, sampling=SamplingConfig(1.0, coupled=True), tree=tree)
    assert reusable(target(), draft)

    def put(state, row, prompt, number, reuse=False):
        tokens, lengths = eagle_jax.pad([prompt], buckets=(CAPACITY,))
        sampling = SamplingConfig(TEMPERATURES[number], coupled=True)
        return insert(
            state, row, tokens[0], lengths[0], keys[number], sampling=sampling, max_new_tokens=NEW, reuse=reuse
        )

    def text(state, row):
        return state.tokens[row, : state.lengths[row]].tolist()

    texts, running, waiting = {}, {}, list(range(len(PROMPTS)))
    while waiting or running:
        for row in range(2):
            if row not in running and waiting:
                running[row] = waiting.pop(0)
                state = put(state, row, PROMPTS[running[row]], running[row])
        state, chunk = advance(state)
        assert not chunk.failed.any()
        for row in [row for row in running if chunk.done[row]]:
            texts[running.pop(row)] = text(state, row)
    assert [texts[number] for number in range(len(PROMPTS))] == plain(PROMPTS, TEMPERATURES, keys)

    said = text(state, 0)
    state = put(state, 0, [*said, 3, 7], 1, reuse=True)
    assert state.cache.length[0] == len(said) - 1
    while not state.done[0]:
        state, _ = advance(state)
    (expected,) = plain([[*said, 3, 7]], [TEMPERATURES[1]], keys[1:2])
    assert text(state, 0) == expected
