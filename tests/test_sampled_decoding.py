"""Sampled decoding end to end: its distribution, its keys, mixed batches, insert, and what else comes with a text."""

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
from eagle_jax import DraftConfig, Eagle3Draft, Llama, SamplingConfig, TreeConfig
from eagle_jax.models import params
from eagle_jax.models.layers import attention
from tests import processors
from tests.toy import TARGET, golden_pair, near_ties, random_eagle3, random_prompts, random_target, rows_of, scaled

TREE = TreeConfig(depth=3, top_k=2, num_nodes=6)
NEW = 16

# --- The distribution of the first three tokens, against enumeration of plain sampling. ---------------------------

V, DRAWS = 11, 6000
FALSE_ALARM = 1e-4  # of each chi-square test; seeds are fixed, so this is the chance that a change of seed fails
PROMPT = [3, 1, 4]


@pytest.fixture(scope="module")
def tiny():
    """A target and a draft of 11 tokens that differ, with distributions neither flat nor sharp."""
    config = dataclasses.replace(
        TARGET, vocab_size=V, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1
    )
    head = DraftConfig(
        **config.__dict__ | {"num_layers": 1, "draft_vocab_size": 7, "target_hidden_size": 16, "fc_bias": True}
    )
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


def draws(target, draft, sampling, batch: int = 1, **options) -> np.ndarray:
    """The first three tokens of DRAWS runs of each row of a batch of PROMPTs: [DRAWS, batch, 3]."""
    tokens, lengths = jnp.array([PROMPT] * batch), jnp.full(batch, len(PROMPT))

    @jax.jit
    @jax.vmap
    def run(key):
        out = eagle_jax.generate(
            target, draft, tokens, lengths, key, tree=TREE, sampling=sampling, max_new_tokens=3, **options
        )
        return out.tokens[:, len(PROMPT) :], out.failed

    tokens, failed = run(jax.random.split(jax.random.key(7), DRAWS))
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


# --- Programs of a batch of three, shared by the tests below. ------------------------------------------------------


@pytest.fixture(scope="module")
def case():
    target, draft = random_target(0, scale=6.0), random_eagle3(1, scale=6.0)
    tokens, _ = random_prompts(2, 3, 10)
    return target, draft, tokens, jnp.array([10, 1, 6])


def generate(case, key=None, speculative=True, rows=slice(None), **options):
    target, draft, tokens, lengths = case
    options = dict(tree=TREE, max_new_tokens=NEW) | options
    return eagle_jax.generate(target, draft if speculative else None, tokens[rows], lengths[rows], key, **options)


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
    run = functools.partial(eagle_jax.generate, target, tokens=tokens, lengths=lengths, max_new_tokens=60)
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
    def sizes():
        return eagle_jax.api._generate._cache_size()

    generate(case, jax.random.key(0), sampling=SamplingConfig(temperature=1.0))
    before = sizes()
    for changes in (
        dict(temperature=0.3),
        dict(top_k=5),
        dict(top_p=0.5),
        dict(min_p=0.1),
        dict(repetition_penalty=1.2),
    ):
        generate(case, jax.random.key(1), sampling=SamplingConfig(**dict(temperature=1.0) | changes))
    assert sizes() == before


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


# --- insert ---------------------------------------------------------------------------------------------------------

CAPACITY = 40
advance = functools.partial(eagle_jax.advance, tree=TREE, cycles=2)
insert = jax.jit(eagle_jax.insert, donate_argnums=0, static_argnames="reuse")


def serve(case, prompts, keys, batch, sampling, speculative=True):
    """Every prompt's text, `batch` rows at a time, each free row taking the next prompt."""
    target, draft = case[0], case[1] if speculative else None
    state = eagle_jax.empty_state(target, draft, batch, CAPACITY, sampling=sampling)
    texts, running, waiting = {}, {}, list(range(len(prompts)))
    while waiting or running:
        for row in range(batch):
            if row not in running and waiting:
                running[row] = index = waiting.pop(0)
                tokens, lengths = eagle_jax.pad([prompts[index]], buckets=(16,))
                key = None if keys is None else keys[index]
                state = insert(state, row, tokens[0], lengths[0], key, max_new_tokens=4 + 3 * index)
        state, chunk = advance(target, draft, state)
        for row in [row for row in running if chunk.done[row]]:
            assert not chunk.failed[row]
            texts[running.pop(row)] = np.asarray(state.tokens[row, : state.lengths[row]]).tolist()
    return [texts[index] for index in range(len(prompts))], state


@pytest.mark.parametrize("kind", ["greedy", "plain", "sampled", "coupled"])
def test_rows_served_in_turn_have_the_texts_of_generate(case, kind):
    target, draft, *_ = case
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 97, n).tolist() for n in (5, 16, 1, 9, 3)]
    sampling = SamplingConfig() if kind in ("greedy", "plain") else SamplingConfig(0.9, coupled=kind == "coupled")
    keys = None if sampling.greedy else jax.random.split(jax.random.key(2), len(prompts))
    texts, state = serve(case, prompts, keys, 2, sampling, speculative=kind != "plain")
    for index, prompt in enumerate(prompts):
        tokens, lengths = eagle_jax.pad([prompt], buckets=(16,))
        alone = eagle_jax.generate(
            target,
            None if kind == "plain" else draft,
            tokens,
            lengths,
            None if keys is None else keys[index][None],
            tree=TREE,
            sampling=sampling,
            max_new_tokens=4 + 3 * 4,
        )
        (whole,) = rows_of(alone)
        assert len(texts[index]) == len(prompt) + 4 + 3 * index
        near_ties(target, [texts[index]], [whole[: len(texts[index])]])
        if keys is not None:
            assert texts[index] == whole[: len(texts[index])]
    assert state.done.all()


def test_insert_does_not_touch_the_neighbours(case):
    target, draft, tokens, lengths = case
    step = jax.jit(functools.partial(eagle_jax.cycle, tree=TREE))
    start = jax.jit(functools.partial(eagle_jax.prefill, max_new_tokens=NEW))
    one = step(target, draft, start(target, draft, tokens, lengths))
    other = step(target, draft, eagle_jax.insert(one, 1, tokens[0], lengths[0]))
    same = step(target, draft, one)
    for row in (0, 2):
        for field in ("tokens", "lengths", "cycles", "accepted", "drafted"):
            np.testing.assert_array_equal(getattr(other, field)[row], getattr(same, field)[row])
    assert other.lengths[1] > lengths[0] and other.cycles[1] == 1


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
        (sampled, (0, tokens, 3), {}, "key must be the row's typed key"),
        (sampled, (0, tokens, 3, key), dict(sampling=SamplingConfig(0.5, coupled=True)), "just where the state's is"),
    ):
        with pytest.raises(ValueError, match=message):
            eagle_jax.insert(state, *arguments, **options)
    impossible = jax.jit(eagle_jax.insert)(greedy, 0, tokens, 17)
    assert impossible.failed.tolist() == [True, False] and impossible.done.all()


# --- A draft that attends to a window -------------------------------------------------------------------------------


def test_a_window_on_the_draft_changes_no_text(case):
    target, draft, tokens, lengths = case
    plain = rows_of(generate(case, speculative=False))
    for first, recent in ((0, 1), (2, 3)):
        ours = generate((target, eagle_jax.with_window(draft, first, recent), tokens, lengths))
        assert near_ties(target, rows_of(ours), plain) == 0
    unlimited = generate((target, eagle_jax.with_window(draft, 1, 1000), tokens, lengths))
    np.testing.assert_array_equal(unlimited.accepted, generate(case).accepted)


def test_a_window_drafts_from_the_rows_it_shows(case, monkeypatch):
    """The tree after a prompt equals that of a head whose attention a mask limits, chunked or not."""
    target, draft, tokens, lengths = case
    first, recent = 2, 4
    windowed = eagle_jax.with_window(draft, first, recent)
    tree = eagle_jax.propose(target, windowed, tokens, lengths, tree=TREE)
    full = eagle_jax.propose(target, draft, tokens, lengths, tree=TREE)
    assert (tree.scores[0] != full.scores[0]).any()
    np.testing.assert_array_equal(tree.tokens[1], full.tokens[1])  # one token: nothing to hide
    monkeypatch.setattr(eagle_jax.prompt, "PREFILL_CHUNK", 3)
    chunked = jax.jit(lambda: eagle_jax.api.propose.__wrapped__(target, windowed, tokens, lengths, tree=TREE))()
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
        lambda q, k, v: (attention(q, k, v, visible[None]), None),
        prompt_lengths=lengths[:1],
    )
    best = jax.lax.top_k(jax.nn.log_softmax(draft.logits(target, hidden[:, -1])), TREE.top_k)[0][0]
    children = np.asarray(tree.parents[0]) == 0
    np.testing.assert_allclose(tree.scores[0][children], best[: children.sum()], atol=1e-4)


@pytest.mark.parametrize(("first", "recent"), [(-1, 4), (0, 0), (1.0, 4)])
def test_an_impossible_window_is_refused(case, first, recent):
    with pytest.raises(ValueError, match="first >= 0 and recent >= 1"):
        eagle_jax.with_window(case[1], first, recent)


# --- pad ------------------------------------------------------------------------------------------------------------


def test_pad_chooses_the_least_bucket():
    assert [eagle_jax.pad([[7] * n])[0].shape[1] for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128]
    tokens, lengths = eagle_jax.pad([[1, 2, 3], [4]], buckets=(2, 5, 9))
    np.testing.assert_array_equal(tokens, [[1, 2, 3, 0, 0], [4, 0, 0, 0, 0]])
    assert lengths.tolist() == [3, 1]
    for prompts, message in (([[1], []], "a prompt is empty"), ([], "empty"), ([[1] * 10], "10 tokens.* holds 9")):
        with pytest.raises(ValueError, match=message):
            eagle_jax.pad(prompts, buckets=(2, 5, 9))
