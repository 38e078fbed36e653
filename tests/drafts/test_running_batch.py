"""Every kind of draft in a running batch: slots refilled in turn have the texts of plain decoding."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

import eagle_jax
from eagle_jax import Llama, SamplingConfig
from eagle_jax.serving import Request, RunningBatch, serve
from tests.decode.test_sampled_distribution import tiny_config
from tests.drafts.kinds import KINDS, every_kind
from tests.toy import rows_of, scaled

CAPACITY, NEW = 48, 9
PROMPTS = [[1, 2, 3, 1, 2], [4] * 16, [5], [3, 1, 4, 1, 5, 9, 2, 6], [7, 8, 7, 8, 7]]
TEMPERATURES = [0.0, 1.0, 1.0, 0.0, 0.7]
CONFIG = dataclasses.replace(tiny_config(), num_layers=2)


@functools.cache
def target() -> Llama:
    return scaled(Llama(CONFIG, jax.random.key(0)), 8.0)


def plain(prompts, temperatures, keys) -> list[list[int]]:
    tokens, lengths = eagle_jax.pad(prompts, buckets=(CAPACITY,))
    sampling = SamplingConfig(np.array(temperatures, np.float32), coupled=True)
    out = eagle_jax.generate(target(), None, tokens, lengths, keys, sampling=sampling, max_new_tokens=NEW)
    return rows_of(out)


QUICK = (
    "eagle1",
    "eagle3",
    "medusa",
    "dflash",
    "dspark",
    "p-eagle",
    "draft model",
    "lookahead",
    "prompt lookup",
    "toy",
)


@pytest.mark.parametrize("kind", every_kind(*QUICK))
def test_answers_are_the_texts_of_plain_decoding(kind):
    """Prompts of several lengths and temperatures take two slots in turn; then one goes on as a conversation."""
    draft, tree = KINDS[kind].build(CONFIG, 1, 8.0), KINDS[kind].tree
    sampling = SamplingConfig(1.0, coupled=True)
    batch = RunningBatch(
        target(), draft, slots=2, capacity=CAPACITY, tree=tree, sampling=sampling, buckets=(CAPACITY,), reuse=True
    )
    assert batch.reuse
    batch.compile(cycles=2)
    keys = jax.random.split(jax.random.key(2), len(PROMPTS))

    def request(prompt, number):
        return Request(prompt, keys[number], NEW, SamplingConfig(TEMPERATURES[number], coupled=True), id=number)

    def text(answer):
        assert answer.finish == "length"
        return [*answer.request.prompt, *answer.tokens]

    requests = [request(prompt, number) for number, prompt in enumerate(PROMPTS)]
    texts = {answer.request.id: text(answer) for answer in serve(batch, requests, cycles=2)}
    assert [texts[number] for number in range(len(PROMPTS))] == plain(PROMPTS, TEMPERATURES, keys)

    said = texts[len(PROMPTS) - 1]  # the last one is still in its slot
    (answer,) = serve(batch, [request([*said, 3, 7], 1)], cycles=2)
    assert answer.reused == len(said) - 1
    assert [text(answer)] == plain([[*said, 3, 7]], [TEMPERATURES[1]], keys[1:2])
