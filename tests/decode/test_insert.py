"""Prompts put into a state that runs, their padding, and draft attention limited to a window."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import DraftModel, SamplingConfig
from eagle_jax.decode.prefill import reusable
from eagle_jax.models.rope import ROPE_KINDS, RopeConfig
from eagle_jax.ops.attention import attention
from tests.toy import NEW, TREE, generate, near_ties, random_target, rows_of, small_case


@pytest.fixture(scope="module")
def case():
    return small_case()


CAPACITY = 40
advance = functools.partial(eagle_jax.advance, tree=TREE, cycles=2)
insert = jax.jit(eagle_jax.insert, donate_argnums=0, static_argnames="reuse")


def test_insert_does_not_touch_the_neighbours(case):
    target, draft, tokens, lengths = case
    step = jax.jit(functools.partial(eagle_jax.cycle, tree=TREE))
    start = jax.jit(functools.partial(eagle_jax.prefill, max_new_tokens=NEW))
    one = step(target, draft, start(target, draft, tokens, lengths))
    put = jax.jit(eagle_jax.insert)  # without donation: `one` is read again
    other = step(target, draft, put(one, 1, tokens[0], lengths[0]))
    same = step(target, draft, one)
    for row in (0, 2):
        for field in ("tokens", "lengths", "cycles", "accepted", "drafted"):
            np.testing.assert_array_equal(getattr(other, field)[row], getattr(same, field)[row])
    assert other.lengths[1] > lengths[0] and other.cycles[1] == 1


OPTIONS = {
    "greedy": dict(log_probs=True),
    "sampled": dict(sampling=SamplingConfig(0.9)),
    "coupled": dict(sampling=SamplingConfig(0.9, coupled=True)),
}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("speculative", [True, False])
def test_a_state_keeps_its_structure(case, speculative, kind):
    """Whatever made it and whatever it goes through, so that one program takes them all."""
    target, head, tokens, lengths = case
    draft, options = head if speculative else None, OPTIONS[kind]
    key = jax.random.key(0) if "sampling" in options else None

    def states(key):
        prefilled = eagle_jax.prefill(
            target, draft, tokens, lengths, key, max_new_tokens=CAPACITY - 10, capacity=CAPACITY, **options
        )
        yield prefilled
        state = eagle_jax.empty_state(target, draft, 3, CAPACITY, **options)
        yield state
        yield (state := eagle_jax.insert(state, 0, tokens[0], lengths[0], key))
        yield (state := eagle_jax.cycle(target, draft, state, tree=TREE))
        yield eagle_jax.advance(target, draft, state, tree=TREE)[0]
        yield eagle_jax.insert(prefilled, 1, tokens[0], lengths[0], key, reuse=True)

    seen = jax.make_jaxpr(lambda key: list(states(key)), return_shape=True)(key)
    arrays, shapes = seen[0].out_avals, seen[1]
    count = len(arrays) // len(shapes)
    assert {jax.tree.structure(state) for state in shapes} == {jax.tree.structure(shapes[0])}
    for index in range(count):  # weak types, too: they would compile anew
        assert {str(array) for array in arrays[index::count]} == {str(arrays[index])}


def test_a_service_compiles_one_cycle(case):
    target, draft, tokens, lengths = case
    cycle = jax.jit(functools.partial(eagle_jax.cycle, tree=TREE), donate_argnums=2)
    insert = jax.jit(functools.partial(eagle_jax.insert), static_argnames="reuse", donate_argnums=0)  # its own programs
    state = eagle_jax.empty_state(target, draft, 3, CAPACITY)
    for reuse in (False, True):
        state = insert(state, 0, tokens[0], lengths[0], reuse=reuse)
        state = cycle(target, draft, state)
    start = jax.jit(functools.partial(eagle_jax.prefill, max_new_tokens=CAPACITY - 10, capacity=CAPACITY))
    state = cycle(target, draft, start(target, draft, tokens, lengths))
    state = cycle(target, draft, insert(state, 1, tokens[2], lengths[2], reuse=False))
    assert (cycle._cache_size(), insert._cache_size()) == (1, 2)
    assert state.lengths.tolist()[1] > lengths[2] and state.cycles.tolist() == [2, 1, 2]


def test_a_next_turn_reuses_what_the_row_holds(case):
    target, draft, *_ = case
    state = eagle_jax.empty_state(target, draft, 1, CAPACITY)
    first = [5, 6, 7, 8, 9]
    tokens, lengths = eagle_jax.pad([first], buckets=(32,))
    state = insert(state, 0, tokens[0], lengths[0], max_new_tokens=8, reuse=True)
    assert state.cache.length[0] == 0
    while not state.done.all():
        state, _ = advance(target, draft, state)
    said = np.asarray(state.tokens[0, : state.lengths[0]]).tolist()
    for prompt, kept in (([*said, 11, 12], len(said) - 1), ([*said[:7], 50], 6), (said[:4], 3), ([1, 2], 0)):
        tokens, lengths = eagle_jax.pad([prompt], buckets=(32,))
        next_turn = insert(jax.tree.map(jnp.copy, state), 0, tokens[0], lengths[0], max_new_tokens=8, reuse=True)
        assert next_turn.cache.length[0] == kept
        while not next_turn.done.all():
            next_turn, _ = advance(target, draft, next_turn)
        plain = eagle_jax.generate(target, None, tokens, lengths, max_new_tokens=8)
        ours = np.asarray(next_turn.tokens[0, : next_turn.lengths[0]]).tolist()
        near_ties(target, [ours], rows_of(plain))
        assert len(ours) == len(prompt) + 8


def test_insert_refuses_what_cannot_be(case):
    target, draft, *_ = case
    greedy = eagle_jax.empty_state(target, draft, 2, CAPACITY)
    sampled = eagle_jax.empty_state(target, draft, 2, CAPACITY, sampling=SamplingConfig(1.0))
    key, tokens = jax.random.key(0), jnp.arange(16)
    for state, arguments, options, message in (
        (greedy, (2, tokens, 3), {}, "row must be 0 to 1, got 2"),
        (greedy, (0, tokens, 0), {}, "length = 0 is outside 1 to 16"),
        (greedy, (0, tokens, 17), {}, "length = 17 is outside 1 to 16"),
        (greedy, (0, jnp.arange(64), 40), {}, r"length = 40 is outside 1 to 39 .*capacity is 40"),
        (greedy, (0, tokens[None], 3), {}, r"tokens must be \[P\] integers"),
        (greedy, (0, tokens * 1.0, 3), {}, r"tokens must be \[P\] integers"),
        (greedy, (0, tokens, 3), dict(sampling=SamplingConfig(0.5)), "the state is greedy"),
        (greedy, (0, tokens, 3), dict(max_new_tokens=0), "max_new_tokens must be a positive integer, got 0"),
        (sampled, (0, tokens, 3), {}, "key must be the row's typed key"),
        (sampled, (0, tokens, 3, key), dict(sampling=SamplingConfig(0.5, coupled=True)), "just where the state's is"),
    ):
        with pytest.raises(ValueError, match=message):
            eagle_jax.insert(state, *arguments, **options)
    impossible = jax.jit(eagle_jax.insert)(greedy, 0, tokens, 17)
    assert impossible.failed.tolist() == [True, False] and impossible.done.all()


def test_a_window_on_the_draft_changes_no_text(case):
    target, draft, tokens, lengths = case
    plain = rows_of(generate(case, speculative=False))
    for first, recent in ((0, 1), (2, 3)):
        ours = generate((target, eagle_jax.with_window(draft, first, recent), tokens, lengths))
        assert near_ties(target, rows_of(ours), plain) == 0
    unlimited = generate((target, eagle_jax.with_window(draft, 1, 1000), tokens, lengths))
    np.testing.assert_array_equal(unlimited.accepted, generate(case).accepted)


def test_a_window_drafts_from_the_rows_it_shows(case):
    """The tree after a prompt equals that of a head whose attention a mask limits, chunked or not."""
    target, draft, tokens, lengths = case
    first, recent = 2, 4
    windowed = eagle_jax.with_window(draft, first, recent)
    tree = eagle_jax.propose(target, windowed, tokens, lengths, tree=TREE)
    full = eagle_jax.propose(target, draft, tokens, lengths, tree=TREE)
    assert (tree.scores[0] != full.scores[0]).any()
    np.testing.assert_array_equal(tree.tokens[1], full.tokens[1])  # one token: nothing to hide

    @jax.jit
    def in_chunks():
        state = eagle_jax.prefill(target, windowed, tokens, lengths, max_new_tokens=1, tree=TREE, chunk=3)
        return windowed.propose(target, state, TREE, None).tree

    chunked = in_chunks()
    np.testing.assert_allclose(chunked.scores, tree.scores, atol=1e-4)

    # By hand: the last position's logits under a mask over the whole prompt, of row 0.
    positions = jnp.arange(10)
    visible = (positions[None] <= positions[:, None]) & (
        (positions[None] < first) | (positions[None] > positions[:, None] - recent)
    )
    _, features = eagle_jax.forward(target, tokens[:1], lengths[:1], draft)
    root = tree.tokens[:1, :1]
    pairs = jnp.concatenate([tokens[:1, 1:], root], axis=1)
    hidden, _ = draft(
        target,
        draft.fuse(features),
        pairs,
        positions[None],
        lambda index, q, k, v: (attention(q, k, v, visible[None]), None),
        prompt_lengths=lengths[:1],
    )
    best = jax.lax.top_k(jax.nn.log_softmax(draft.logits(target, hidden[:, -1])), TREE.top_k)[0][0]
    children = np.asarray(tree.parents[0]) == 0
    np.testing.assert_allclose(tree.scores[0][children], best[: children.sum()], atol=1e-4)


@pytest.mark.parametrize(("first", "recent"), [(-1, 4), (0, 0), (1.0, 4)])
def test_an_impossible_window_is_refused(case, first, recent):
    with pytest.raises(ValueError, match="first >= 0 and recent >= 1"):
        eagle_jax.with_window(case[1], first, recent)


def test_pad_chooses_the_least_bucket():
    assert [eagle_jax.pad([[7] * n])[0].shape[1] for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]
    tokens, lengths = eagle_jax.pad([[1, 2, 3], [4]], buckets=(2, 5, 9))
    np.testing.assert_array_equal(tokens, [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0]])
    assert lengths.tolist() == [3, 1]
    for prompts, message in (([[1], []], "a prompt is empty"), ([], "empty"), ([[1] * 10], "10 tokens.* holds 9")):
        with pytest.raises(ValueError, match=message):
            eagle_jax.pad(prompts, buckets=(2, 5, 9))


@pytest.mark.parametrize("kind", ROPE_KINDS)
def test_keys_that_depend_on_the_length_of_their_prompt_are_not_reused(kind):
    """Of a target, and of a model that drafts for one whose keys do not depend on it."""
    target, other = random_target(0), random_target(0)
    other.config = dataclasses.replace(target.config, rope=RopeConfig(kind=kind))
    assert reusable(target, None) and reusable(target, DraftModel(target))
    independent = kind not in ("dynamic", "longrope")
    assert reusable(other, None) == reusable(target, DraftModel(other)) == independent
