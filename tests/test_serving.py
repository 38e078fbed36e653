"""A running batch and the loop that keeps it full: texts, programs, ends, tasks."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import eagle_jax
from eagle_jax import SamplingConfig
from eagle_jax.serving import Request, RunningBatch, run, serve
from tests.scripted import ScriptedBatch
from tests.toy import NEW, TREE, near_ties, rows_of, small_case, traced

CAPACITY = 40
PROMPTS = [np.random.default_rng(1).integers(0, 97, size).tolist() for size in (5, 16, 1, 9, 3)]
KEYS = jax.random.split(jax.random.key(2), len(PROMPTS))
PAIR = small_case()[:2]


def running(plain: bool = False, **options) -> RunningBatch:
    target, draft = PAIR
    draft = None if plain else draft
    return RunningBatch(target, draft, slots=2, capacity=CAPACITY, tree=TREE, buckets=(16, 32), **options)


def alone(index: int, plain: bool = False, **options) -> list[int]:
    """What `generate` gives for a prompt."""
    target, draft = PAIR
    tokens, lengths = eagle_jax.pad([PROMPTS[index]], buckets=(16,))
    draft = None if plain else draft
    out = eagle_jax.generate(
        target, draft, tokens, lengths, KEYS[index][None], tree=TREE, max_new_tokens=NEW, **options
    )
    return rows_of(out)[0]


@pytest.mark.parametrize("kind", ["greedy", "plain", "sampled"])  # coupled: drafts/test_running_batch.py
def test_answers_are_those_of_generate_in_any_order_by_programs_compiled_before(kind):
    plain, sampled = kind == "plain", kind == "sampled"
    sampling = SamplingConfig(0.9) if sampled else SamplingConfig()
    batch = running(plain, sampling=sampling)
    batch.compile(cycles=2)
    requests = [
        Request(prompt, KEYS[index] if sampled else None, max_new_tokens=4 + 3 * index, id=index)
        for index, prompt in enumerate(PROMPTS)
    ]
    cancelled = Request(PROMPTS[0], KEYS[0], on_tokens=lambda tokens: True)
    wider = Request(PROMPTS[0] * 4, KEYS[0], sampling=sampling)
    answers = {answer.request.id: answer for answer in serve(batch, requests, cycles=2)}
    with traced() as names:
        again = {answer.request.id: answer for answer in serve(batch, reversed(requests), cycles=2)}
        list(serve(batch, [cancelled, wider][: 1 + plain], cycles=2))
    assert names.count("insert") == plain and not {"advance", "<lambda>"} & {*names}  # for the wider prompt
    assert batch.state.done.all() and sorted(batch.free) == [0, 1]
    for index, prompt in enumerate(PROMPTS):
        text = alone(index, plain, sampling=sampling)[: len(prompt) + 4 + 3 * index]
        for answer in (answers[index], again[index]):
            near_ties(PAIR[0], [[*prompt, *answer.tokens]], [text])
            assert answer.finish == "length" and len(answer.tokens) == 4 + 3 * index
            assert not sampled or [*prompt, *answer.tokens] == text


@pytest.fixture(scope="module")
def batch():
    return running(log_probs=True)


def test_every_answer_ends_where_its_request_says(batch):
    whole = [alone(index, sampling=SamplingConfig())[len(prompt) :] for index, prompt in enumerate(PROMPTS)]
    parts: list[list[int]] = []

    def until_seven(tokens):
        parts.append(tokens)
        return sum(map(len, parts)) >= 7

    requests = [
        Request(PROMPTS[0], max_new_tokens=3),
        Request(PROMPTS[1], stop_tokens=(whole[1][5],)),
        Request(PROMPTS[2], on_tokens=until_seven),
        Request(PROMPTS[3]),
        Request(PROMPTS[4], max_new_tokens=NEW),
    ]
    answers = {requests.index(answer.request): answer for answer in serve(batch, requests, cycles=2)}
    assert [answers[index].finish for index in range(5)] == ["length", "stop", "cancelled", "context", "length"]
    ends = [3, 1 + whole[1].index(whole[1][5]), sum(map(len, parts)), CAPACITY - len(PROMPTS[3]), NEW]
    for index, end in enumerate(ends):
        answer = answers[index]
        assert len(answer.tokens) == len(answer.log_probs) == end and answer.cycles > 0
        near_ties(PAIR[0], [[*PROMPTS[index], *answer.tokens[:NEW]]], [[*PROMPTS[index], *whole[index][:end]]])
    assert [token for part in parts for token in part] == answers[2].tokens and 7 <= len(answers[2].tokens) < NEW
    assert batch.state.done.all()  # the slots of answers that ended early, too


def test_what_is_left_of_a_loop_is_dropped(batch):
    requests = [Request(prompt, max_new_tokens=2 + index) for index, prompt in enumerate(PROMPTS)]
    for answer in serve(batch, requests, cycles=2):
        assert answer.request is requests[0]
        break
    assert sorted(batch.free) == [0, 1] and batch.state.done.all()
    slot = batch.insert(requests[0])
    with pytest.raises(ValueError, match=rf"slots \[{slot}\] hold requests; clear\(\) drops them"):
        next(serve(batch, requests))
    batch.insert(requests[1])
    with pytest.raises(ValueError, match="no slot is free"):
        batch.insert(requests[2])
    assert (batch.take(slot).finish, batch.free) == ("cancelled", [slot])
    with pytest.raises(ValueError, match=f"slot {slot} holds no request"):
        batch.take(slot)
    batch.clear()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "the prompt has 0 tokens; this batch takes 1 to 32"),
        (Request([1] * 33), "the prompt has 33 tokens; this batch takes 1 to 32"),
        (Request([1, 97]), "prompt: token 97 is outside the vocabulary, 0 to 96"),
        (Request([0.5]), r"prompt must be token ids, got float64\[1\]"),
        (Request([1], stop_tokens=(-1,)), "stop_tokens: token -1 is outside"),
        (Request([1], max_new_tokens=0), "max_new_tokens must be a positive integer, got 0"),
        (Request([1], KEYS[0], sampling=SamplingConfig(1.0)), "this batch is greedy"),
    ],
)
def test_requests_that_cannot_be_are_refused(batch, request_, message):
    with pytest.raises(ValueError, match=message):
        batch.insert(request_)
    assert len(batch.free) == 2


def test_requests_of_a_batch_that_samples_are_checked():
    batch = running(plain=True, sampling=SamplingConfig(1.0))
    for request, message in (
        (Request([1]), "key must be one typed key"),
        (Request([1], KEYS), "key must be one typed key"),
        (Request([1], KEYS[0], sampling=SamplingConfig(np.ones(2))), "sampling.temperature must be one number"),
        (Request([1], KEYS[0], sampling=SamplingConfig(coupled=True)), "just where the batch's is"),
    ):
        with pytest.raises(ValueError, match=message):
            batch.check(request)
    for options, message in (
        ({"slots": 0}, "slots must be a positive integer"),
        ({"stop_tokens": (97,)}, "stop_tokens: token 97 is outside"),
        ({"capacity": 1}, "capacity must be an integer of at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            RunningBatch(PAIR[0], None, **{"slots": 2, "capacity": 8} | options)


def test_a_prompt_goes_to_the_slot_whose_text_it_continues():
    batch = running(reuse=True)
    requests = [Request(PROMPTS[0], max_new_tokens=1), Request(PROMPTS[3], max_new_tokens=8)]
    first, other = serve(batch, requests, cycles=2)
    said = [*PROMPTS[3], *other.tokens]
    assert batch.free == [0, 1] and other.request is requests[1]
    assert batch.insert(Request([*said, 7], max_new_tokens=2)) == 1
    batch.advance()
    assert batch.take(1).reused == len(said) - 1
    assert batch.insert(Request([96], max_new_tokens=2)) == 0  # the one that was not used for longest
    batch.clear()
    assert first.reused == other.reused == 0


def count(start: int, until: int):
    """Asks for the number after the last one, from a batch that counts."""
    number = start
    while number < until:
        answer = yield Request([number], max_new_tokens=1)
        number = answer.tokens[0]
    return start, number


def test_tasks_run_side_by_side_and_the_answered_ones_first():
    batch = ScriptedBatch(lambda prompt, key: ([prompt[0] + 1], False), slots=2)
    tasks = [count(0, 2), None, count(10, 11), count(5, 5), count(20, 23)]
    assert list(run(batch, tasks)) == [(0, 2), (10, 11), (5, 5), (20, 23)]
    assert [request.prompt for request in batch.requests] == [[0], [1], [10], [20], [21], [22]]
    assert list(run(batch, [])) == []
