"""Sampled decoding: keys, mixed batches, temperature 0, penalties, samples, log-probabilities, broken logits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import SamplingConfig
from eagle_jax.models import params
from tests import processors
from tests.toy import (
    NEW,
    TREE,
    generate,
    golden_pair,
    random_prompts,
    rows_of,
    small_case,
    traced,
)


@pytest.fixture(scope="module")
def case():
    return small_case()


MIXED = SamplingConfig(
    temperature=jnp.array([0.0, 0.7, 1.3]),
    top_k=jnp.array([0, 20, 0]),
    top_p=jnp.array([1.0, 0.95, 0.9]),
    repetition_penalty=jnp.array([1.0, 1.2, 1.0]),
)


def test_a_row_depends_on_its_own_key_alone(case):
    key = jax.random.key(3)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(3))
    together = rows_of(generate(case, key, sampling=MIXED))
    assert rows_of(generate(case, keys, sampling=MIXED)) == together
    assert rows_of(generate(case, key, sampling=MIXED)) == together
    others = rows_of(generate(case, keys.at[2].set(jax.random.key(9)), sampling=MIXED))
    assert others[:2] == together[:2] and others[2] != together[2]
    for row in range(3):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1] if x.ndim else x, MIXED.rows(3))
        assert rows_of(generate(case, keys[row : row + 1], rows=slice(row, row + 1), sampling=one)) == [together[row]]


def test_chunks_do_not_change_a_text(case):
    target, draft, tokens, lengths = case
    key = jax.random.key(3)
    whole = generate(case, key, sampling=MIXED, log_probs=True)
    for cycles in (1, 3):
        chunks = jax.device_get(
            list(
                eagle_jax.stream(
                    target,
                    draft,
                    tokens,
                    lengths,
                    key,
                    tree=TREE,
                    sampling=MIXED,
                    max_new_tokens=NEW,
                    log_probs=True,
                    cycles_per_chunk=cycles,
                )
            )
        )
        for row, length in enumerate(lengths):
            new = np.concatenate([c.tokens[row, : c.counts[row]] for c in chunks])
            np.testing.assert_array_equal(new, whole.tokens[row, length : whole.lengths[row]])
            scores = np.concatenate([c.log_probs[row, : c.counts[row]] for c in chunks])
            np.testing.assert_allclose(scores, whole.log_probs[row, length : whole.lengths[row]], atol=1e-5)


@pytest.mark.parametrize("speculative", [True, False])
def test_temperature_0_in_an_array_equals_greedy_bit_for_bit(case, speculative):
    greedy = generate(case, speculative=speculative)
    key = jax.random.key(0)
    for coupled in (False, True) if speculative else (False,):
        ours = generate(
            case, key, speculative=speculative, sampling=SamplingConfig(temperature=jnp.zeros(3), coupled=coupled)
        )
        for field in ("tokens", "lengths", "cycles", "accepted", "drafted", "failed"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(greedy, field))


def test_a_low_temperature_gives_the_greedy_text(case):
    sampling = SamplingConfig(temperature=jnp.full(3, 1e-6))
    assert rows_of(generate(case, jax.random.key(0), sampling=sampling)) == rows_of(generate(case))


def test_coupled_sampling_gives_the_text_of_plain_sampling():
    target, draft = golden_pair()
    tokens, lengths = random_prompts(5, 4, 40, vocab=120)
    run = functools.partial(eagle_jax.generate, target, tokens=tokens, lengths=lengths, tree=TREE, max_new_tokens=60)
    key = jax.random.key(4)
    plain = run(draft=None, key=key, sampling=SamplingConfig(temperature=1.0, top_p=0.95))
    usual, coupled = (
        run(draft=draft, key=key, sampling=SamplingConfig(temperature=1.0, top_p=0.95, coupled=coupled))
        for coupled in (False, True)
    )
    # Rounding may part a text from the plain one where two sums of logit and noise tie: once in thousands of tokens.
    assert sum(a == b for a, b in zip(rows_of(coupled), rows_of(plain), strict=True)) >= 3
    assert rows_of(usual) != rows_of(plain)
    assert coupled.cycles.sum() < usual.cycles.sum() < plain.cycles.sum()


def test_no_number_and_no_key_compiles_anew(case):
    generate(case, jax.random.key(0), sampling=SamplingConfig(temperature=1.0))
    with traced() as names:
        for changes in (
            dict(temperature=0.3),
            dict(top_k=5),
            dict(top_p=0.5),
            dict(min_p=0.1),
            dict(repetition_penalty=1.2),
        ):
            generate(case, jax.random.key(1), sampling=SamplingConfig(**dict(temperature=1.0) | changes))
    assert eagle_jax.api._generate.__name__ not in names


@pytest.mark.parametrize("coupled", [False, True])
def test_greedy_with_a_penalty_and_a_bias(case, coupled):
    """Token by token from plain passes over the whole text: each tree node must see its own ancestors."""
    target, _, _, lengths = case
    bias = jnp.asarray(np.random.default_rng(0).normal(size=97), jnp.float32).at[5].set(-jnp.inf)
    sampling = SamplingConfig(repetition_penalty=1.5, logit_bias=bias, coupled=coupled)
    for speculative in (True, False):
        out = rows_of(generate(case, jax.random.key(0), speculative=speculative, sampling=sampling))
        for row, text in enumerate(out):
            logits, _ = eagle_jax.forward(target, *eagle_jax.pad([text]))
            for place in range(int(lengths[row]), len(text)):
                p = processors.probabilities(
                    np.asarray(logits[0, place - 1]),
                    repetition_penalty=1.5,
                    logit_bias=np.asarray(bias),
                    seen=set(text[:place]),
                )
                order = np.sort(p)
                assert p[text[place]] == order[-1] or order[-1] - order[-2] < 1e-4
    # The penalty changed something.
    assert out != rows_of(generate(case))


def test_several_samples_of_a_prompt(case):
    target, draft, tokens, lengths = case
    key = jax.random.key(5)
    sampling = SamplingConfig(temperature=1.0)
    out = generate(case, key, sampling=sampling, num_samples=2, log_probs=True)
    rows = rows_of(out)
    assert len(rows) == 6 and len({tuple(row) for row in rows}) == 6
    keys = [jax.random.fold_in(jax.random.fold_in(key, i), j) for i in range(3) for j in range(2)]
    again = eagle_jax.generate(
        target,
        draft,
        jnp.repeat(tokens, 2, axis=0),
        jnp.repeat(lengths, 2),
        jnp.stack(keys),
        tree=TREE,
        sampling=sampling,
        max_new_tokens=NEW,
    )
    assert rows_of(again) == rows


@pytest.mark.parametrize("speculative", [True, False])
def test_log_probabilities_and_drafted_flags(case, speculative):
    target, _, _, lengths = case
    out = generate(case, jax.random.key(3), sampling=MIXED, speculative=speculative, log_probs=True)
    for row, text in enumerate(rows_of(out)):
        logits, _ = eagle_jax.forward(target, *eagle_jax.pad([text]))
        expected = jax.nn.log_softmax(logits[0], axis=-1)[jnp.arange(len(text) - 1), jnp.array(text[1:])]
        start = int(lengths[row])
        np.testing.assert_allclose(out.log_probs[row, start : len(text)], expected[start - 1 :], atol=2e-4)
        assert not out.log_probs[row, :start].any() and not out.log_probs[row, len(text) :].any()
        new = np.asarray(out.drafted[row, start : len(text)])
        assert not new[0]  # the prefill's own choice
        # One token a cycle is the target's own, but that of a cycle cut short by the limit.
        assert out.cycles[row] - 1 <= (~new[1:]).sum() <= out.cycles[row]
        assert not out.drafted[row, :start].any() and not out.drafted[row, len(text) :].any()
        if not speculative:
            assert not new.any()


def test_an_acceptance_rule_of_one_s_own(case):
    def only_the_root(tree, logits, keys):
        whole = eagle_jax.tree.accept_greedy(tree, logits)
        path = jnp.where(jnp.arange(tree.num_nodes)[None] == 0, whole.path, -1)
        return eagle_jax.tree.Acceptance(path, jnp.zeros_like(whole.length), jnp.argmax(logits[:, 0], axis=-1))

    ours = generate(case, accept_fn=only_the_root)
    assert rows_of(ours) == rows_of(generate(case))
    assert (ours.cycles == NEW - 1).all() and not ours.drafted.any()
    with pytest.raises(ValueError, match="coupled sampling drafts for its own acceptance rule"):
        generate(case, jax.random.key(0), sampling=SamplingConfig(1.0, coupled=True), accept_fn=only_the_root)


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_broken_logits_end_their_row_only(case, poison):
    target, _, tokens, lengths = case
    arrays = params.flatten(target)
    arrays["embed"] = arrays["embed"].at[96].set(poison)
    key = jax.random.key(3)
    tokens = jnp.where(tokens == 96, 0, tokens)
    forbid = jnp.zeros(97).at[96].set(-jnp.inf)  # so that only the prompt can hold it
    sampling = dataclasses.replace(MIXED, logit_bias=forbid)
    broken = params.load(target, arrays)
    sound = generate((broken, None, tokens, lengths), key, sampling=sampling, speculative=False)
    out = generate((broken, None, tokens.at[0, 3].set(96), lengths), key, sampling=sampling, speculative=False)
    assert out.failed.tolist() == [True, False, False] and out.lengths[0] == lengths[0]
    assert rows_of(out)[1:] == rows_of(sound)[1:]


def test_a_bias_that_forbids_everything_gives_no_token(case):
    bias = jnp.zeros((3, 97)).at[1].set(-jnp.inf)
    out = generate(case, jax.random.key(0), sampling=dataclasses.replace(MIXED, logit_bias=bias), speculative=False)
    assert out.failed.tolist() == [False, True, False] and out.lengths[1] == case[3][1]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (lambda: None, "got None"),
        (lambda: jax.random.PRNGKey(0), r"got uint32\[2\]"),
        (lambda: jax.random.split(jax.random.key(0), 2), r"or \[3\] of them, one a row; got key<fry>\[2\]"),
    ],
)
def test_a_key_that_is_none_is_refused(case, key, message):
    with pytest.raises(ValueError, match=rf"sampling needs key: one typed key, jax.random.key\(seed\).*{message}"):
        generate(case, key(), sampling=SamplingConfig(temperature=1.0))


def test_beyond_what_the_target_was_made_for_there_is_a_warning(case):
    target, draft, tokens, lengths = case
    lower = jax.eval_shape
    with pytest.warns(UserWarning, match=r"may reach 257 tokens, beyond the 256 .*max_position_embeddings"):
        lower(lambda: eagle_jax.generate(target, draft, tokens, lengths, max_new_tokens=247))
    lower(lambda: eagle_jax.generate(target, draft, tokens, lengths, max_new_tokens=247, capacity=256))
