"""The public functions under the caller's own jit, streams, and arguments."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import ConfigError, Eagle3Draft, SamplingConfig, TreeConfig
from eagle_jax.tree import accept_greedy
from tests.toy import draft_config, random_eagle1, random_eagle3, random_prompts, random_target, rows_of, traced

TREE = TreeConfig(depth=4, top_k=3, num_nodes=12)
NEW = 24
STATIC = ("tree", "max_new_tokens", "stop_tokens", "capacity")


@pytest.fixture(scope="module")
def case():
    target, draft = random_target(0), random_eagle3(1)
    tokens, lengths = random_prompts(2, 3, 10)
    return (
        target,
        draft,
        tokens,
        lengths,
        eagle_jax.generate(target, draft, tokens, lengths, tree=TREE, max_new_tokens=NEW),
    )


def test_one_trace_a_bucket_and_no_transfers(case):
    target, draft, tokens, lengths, expected = case
    traces = []

    def counted(*args, **kwargs):
        traces.append(1)
        return eagle_jax.generate(*args, **kwargs)

    run = jax.jit(counted, static_argnames=STATIC)
    first = run(target, draft, tokens, lengths, tree=TREE, max_new_tokens=NEW)
    prompts = [jax.device_put(random_prompts(seed, 3, 10)) for seed in range(5)]
    with jax.transfer_guard("disallow"):
        for prompt, length in prompts:
            run(target, draft, prompt, length, tree=TREE, max_new_tokens=NEW)
    assert len(traces) == 1
    assert rows_of(first) == rows_of(expected)
    compiled = run.lower(target, draft, tokens, lengths, tree=TREE, max_new_tokens=NEW).compile().as_text()
    assert "callback" not in compiled and "infeed" not in compiled and "outfeed" not in compiled


def test_bare_generate_traces_once_a_bucket(case):
    target, draft, tokens, lengths, _ = case
    # Here, too: programs of the fixture may have been dropped since (conftest.py's forget_programs).
    eagle_jax.generate(target, draft, tokens, lengths, tree=TREE, max_new_tokens=NEW)
    with traced() as names:
        for seed in range(3):
            eagle_jax.generate(target, draft, *random_prompts(seed, 3, 10), tree=TREE, max_new_tokens=NEW)
            # So is a numpy prompt.
            eagle_jax.generate(target, draft, *map(np.asarray, (tokens, lengths)), tree=TREE, max_new_tokens=NEW)
    assert eagle_jax.api._generate.__name__ not in names


def test_generate_inside_a_larger_program(case):
    target, draft, tokens, lengths, expected = case

    @jax.jit
    def count_new(target, draft, tokens, lengths):
        out = eagle_jax.generate(target, draft, tokens, lengths, tree=TREE, max_new_tokens=NEW)
        return out.tokens, out.lengths - lengths

    tokens_out, new = count_new(target, draft, tokens, lengths)
    np.testing.assert_array_equal(tokens_out, expected.tokens)
    np.testing.assert_array_equal(new, NEW)


@pytest.mark.parametrize("cycles_per_chunk", [1, 3])
@pytest.mark.parametrize("speculative", [True, False])
def test_stream_yields_what_generate_returns(case, cycles_per_chunk, speculative):
    target, draft, tokens, lengths, expected = case
    rows = [row[:length].tolist() for row, length in zip(np.asarray(tokens), lengths, strict=True)]
    chunks = list(
        eagle_jax.stream(
            target,
            draft if speculative else None,
            tokens,
            lengths,
            tree=TREE,
            max_new_tokens=NEW,
            cycles_per_chunk=cycles_per_chunk,
        )
    )
    assert chunks[0].tokens.shape == (3, 1) and (chunks[0].counts == 1).all()
    for chunk in chunks:
        for row, count in enumerate(chunk.counts):
            rows[row] += chunk.tokens[row, :count].tolist()
            assert (chunk.tokens[row, count:] == 0).all()
    assert rows == rows_of(expected)
    assert chunks[-1].done.all() and not chunks[-2].done.all()


def test_cycle_by_hand_with_a_rule_of_ones_own(case):
    target, draft, tokens, lengths, expected = case
    keys = jax.random.split(jax.random.key(0), 3)
    seen = []

    def accept_fn(tree, logits, keys):
        seen.append((tree.num_nodes, logits.shape))
        return accept_greedy(tree, logits)

    state = jax.jit(functools.partial(eagle_jax.prefill, max_new_tokens=NEW))(target, draft, tokens, lengths, keys)
    step = jax.jit(functools.partial(eagle_jax.cycle, tree=TREE, accept_fn=accept_fn), donate_argnums=2)
    while not state.done.all():
        state = step(target, draft, state)
    np.testing.assert_array_equal(state.tokens, expected.tokens)
    np.testing.assert_array_equal(state.lengths, expected.lengths)
    assert seen == [(12, (3, 12, 97))]


def test_a_donated_cycle_aliases_its_caches(case):
    target, draft, tokens, lengths, _ = case
    state = jax.eval_shape(functools.partial(eagle_jax.prefill, max_new_tokens=NEW), target, draft, tokens, lengths)
    compiled = jax.jit(functools.partial(eagle_jax.cycle, tree=TREE), donate_argnums=2).lower(target, draft, state)
    caches = state.cache.k + state.cache.v + state.draft.cache.k + state.draft.cache.v
    size = sum(array.size * array.dtype.itemsize for array in caches)
    assert compiled.compile().memory_analysis().alias_size_in_bytes >= size


def test_propose_forward_and_draft_forward_agree_with_the_decoder(case):
    target, draft, tokens, lengths, expected = case
    tree = eagle_jax.propose(target, draft, tokens, lengths, tree=TREE)
    assert tree.tokens.shape == (3, 12)
    logits, features = eagle_jax.forward(target, tokens, lengths, draft)
    assert logits.shape == (3, 10, 97) and logits.dtype == jnp.float32 and features.shape == (3, 10, 96)
    np.testing.assert_array_equal(eagle_jax.forward(target, tokens, lengths)[1].shape, (3, 10, 96))
    for row, length in enumerate(lengths.tolist()):
        root = int(jnp.argmax(logits[row, length - 1]))
        assert tree.tokens[row, 0] == root == expected.tokens[row, length]
        # Pairs: feature i with token i + 1, the last one with the root.
        paired = jnp.append(tokens[row, 1:length], root)[None]
        hidden, drafted = eagle_jax.draft_forward(
            draft, target, features[row : row + 1, :length], paired, lengths[row : row + 1]
        )
        assert hidden.shape == (1, length, 32) and drafted.shape == (1, length, 41)
        log_probs = jax.nn.log_softmax(drafted[0, -1])
        best = jax.lax.top_k(log_probs, 3)
        children = np.asarray(tree.parents[row]) == 0
        np.testing.assert_allclose(tree.scores[row][children], best[0][: children.sum()], atol=1e-4)
        np.testing.assert_array_equal(tree.tokens[row][children], draft.target_ids[best[1]][: children.sum()])


def test_eagle1_features_are_the_final_hidden_state(case):
    target, _, tokens, lengths, _ = case
    logits, features = eagle_jax.forward(target, tokens, lengths, random_eagle1(0))
    assert features.shape == (3, 10, 32)
    np.testing.assert_allclose(target.logits(features), logits, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lengths=jnp.array([3, 0, 2])), r"lengths\[1\] = 0 is outside 1 to 10"),
        (dict(lengths=jnp.array([3, 11, 2])), r"lengths\[1\] = 11 is outside 1 to 10"),
        (dict(lengths=jnp.array([3, 2])), r"tokens must be \[B, P\] and lengths \[B\]"),
        (dict(lengths=jnp.array([3.0, 2.0, 1.0])), "lengths must be integers"),
        (dict(tokens=jnp.zeros((3, 0), jnp.int32)), r"tokens must be \[B, P\]"),
        (dict(tokens=jnp.full((3, 10), 97)), r"tokens\[0, 0\] = 97 is outside 0 to 96"),
        (dict(tokens=jnp.full((3, 10), -1)), r"tokens\[0, 0\] = -1 is outside 0 to 96"),
        (dict(capacity=5), r"lengths\[0\] = 7 is outside 1 to 4 .*capacity is 5"),
        (dict(capacity=1), "capacity must be an integer of at least 2"),
        (dict(max_new_tokens=0), "max_new_tokens must be a positive integer, got 0"),
        (dict(stop_tokens=(97,)), "stop token 97 is outside the vocabulary, 0 to 96"),
        (dict(stop_tokens=(None,)), "stop_tokens must be token ids, got None among them"),
        (dict(stop_tokens=5), r"stop_tokens must be a tuple of token ids, such as \(2,\); got 5"),
        (dict(max_new_tokens=2**31), r"up to 2147483658 tokens .*: positions end at 2147479552; lower max_new_tokens"),
        (dict(max_new_tokens=10**9), r"3 row\(s\) of up to 1000000010 tokens .* need a cache of 1152.0 GB, the memory"),
        (dict(capacity=2**40), "up to 1099511627776 tokens .*: positions end at"),
        (dict(num_samples=10**8), r"300000000 row\(s\) of up to 34 tokens"),
        (dict(tree=(4, 3, 12)), "tree must be a TreeConfig"),
        (dict(tree=TreeConfig(depth=2, top_k=50, num_nodes=60)), "top_k = 50 exceeds the draft vocabulary of 41"),
        (dict(sampling=SamplingConfig(temperature=0.7)), "sampling needs key: one typed key.*got None"),
    ],
)
@pytest.mark.parametrize("function", [eagle_jax.generate, lambda *a, **k: list(eagle_jax.stream(*a, **k))])
def test_impossible_arguments_are_refused(case, function, changes, message):
    target, draft, tokens, *_ = case
    arguments = dict(tokens=tokens, lengths=jnp.array([7, 3, 2]), tree=TREE, max_new_tokens=NEW) | changes
    with pytest.raises(ValueError, match=message):
        function(target, draft, arguments.pop("tokens"), arguments.pop("lengths"), **arguments)


def test_impossible_capacities_are_refused_everywhere(case):
    target, draft, tokens, lengths, _ = case
    for function in (
        lambda: eagle_jax.prefill(target, draft, tokens, lengths, max_new_tokens=10**9),
        lambda: eagle_jax.prefill(target, draft, tokens, lengths, capacity=10**9),
        lambda: eagle_jax.empty_state(target, None, 2, 10**9),
        lambda: jax.jit(lambda: eagle_jax.empty_state(target, None, 2, 2**32))(),
    ):
        with pytest.raises(ValueError, match="lower max_new_tokens, or set capacity"):
            function()
    for capacity in (1, 10.0, None):
        with pytest.raises(ValueError, match="capacity must be an integer of at least 2"):
            eagle_jax.empty_state(target, None, 2, capacity)


def test_more_new_tokens_than_the_capacity_are_as_many_as_fit(case):
    target, draft, tokens, lengths, expected = case
    for most in (2**31 - 1, 2**40):
        trace = jax.eval_shape(
            functools.partial(eagle_jax.generate, max_new_tokens=most, capacity=18), target, None, tokens, lengths
        )
        assert trace.tokens.shape == (3, 10 + 18)
    out = eagle_jax.generate(target, draft, tokens, lengths, tree=TREE, max_new_tokens=2**40, capacity=18)
    assert rows_of(out) == [row[:18] for row in rows_of(expected)]
    for most in (18, 2**31 - 1, 2**40, np.int64(2**40), jnp.int32(2**31 - 1)):

        @jax.jit
        def limits(most=most):
            state = eagle_jax.empty_state(target, None, 1, 18)
            return eagle_jax.insert(state, 0, tokens[0], lengths[0], max_new_tokens=most).limits

        assert limits().tolist() == [18]


def test_what_is_no_draft_is_refused_in_a_few_words(case):
    """Whatever it holds: a model's repr is its weights."""
    target, draft, tokens, lengths, _ = case
    state = jax.eval_shape(functools.partial(eagle_jax.prefill, max_new_tokens=NEW), target, None, tokens, lengths)
    features = jnp.zeros((*tokens.shape, 3 * target.config.hidden_size))
    wrap = r"draft is a Llama; to draft with a smaller model, wrap it: eagle_jax.DraftModel\(draft\)"
    for function, message in (
        (lambda: eagle_jax.generate(target, target, tokens, lengths), wrap),
        (lambda: next(eagle_jax.stream(target, target, tokens, lengths)), wrap),
        (lambda: eagle_jax.prefill(target, target, tokens, lengths), wrap),
        (lambda: eagle_jax.empty_state(target, target, 1, 30), wrap),
        (lambda: eagle_jax.propose(target, target, tokens, lengths), wrap),
        (lambda: jax.eval_shape(eagle_jax.cycle, target, target, state), wrap),
        (lambda: eagle_jax.forward(target, tokens, lengths, target), "must be an EAGLE head.*, got a Llama"),
        (lambda: eagle_jax.draft_forward(target, target, features, tokens, lengths), "must be an EAGLE head"),
        (
            lambda: eagle_jax.generate(draft, target, tokens, lengths),
            "target is a draft, a Eagle3Draft; pass the target",
        ),
        (lambda: eagle_jax.generate((target, draft), None, tokens, lengths), "target must be a Llama.*; got a tuple"),
        (lambda: eagle_jax.generate(target, (draft,), tokens, lengths), "draft must be a Draft .*; got a tuple"),
        (lambda: eagle_jax.generate(target, eagle_jax.Lookahead, tokens, lengths), "draft is the class Lookahead"),
        (lambda: eagle_jax.generate(target, "head/", tokens, lengths), r"load it: eagle_jax.load_draft\('head/', tar"),
        (lambda: eagle_jax.generate(target, draft, tokens, lengths, tree=tokens), r"TreePolicy, got an array int32\["),
        (lambda: eagle_jax.generate(target, draft, tokens, lengths, sampling={}), "SamplingConfig, got a dict"),
        (lambda: eagle_jax.generate(target, draft, tokens, lengths, max_new_tokens=tokens), "integer, got an array"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            function()
        assert len(str(refused.value)) < 200


def test_impossible_lengths_inside_jit_come_back_as_failed(case):
    target, draft, tokens, lengths, expected = case
    run = jax.jit(functools.partial(eagle_jax.generate, tree=TREE, max_new_tokens=NEW))
    out = run(target, draft, tokens, lengths.at[0].set(0).at[1].set(11))
    assert out.failed.tolist() == [True, True, False]
    assert out.cycles.tolist()[:2] == [0, 0]
    assert rows_of(out)[2] == rows_of(expected)[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vocab_size=98), "vocab_size is 98 in the draft, 97 in the target"),
        (dict(hidden_size=16, target_hidden_size=16), "hidden_size is 16 in the draft, 32 in the target"),
        (dict(own_embedding=True, target_hidden_size=64), "target_hidden_size is 64 in the draft, 32 in the target"),
        (dict(hidden_size=16), "no embedding of its own.* is 16 in the draft, 32 in the target"),
        (dict(taps=(1, 2)), "is 96 in the draft, 64 in the target"),
        (dict(taps=(1, 2, 4)), "taps layer 4, the target has 3 layers"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(case, changes, message):
    target, _, tokens, lengths, _ = case
    misfit = Eagle3Draft(draft_config(**changes), 3, jax.random.key(0))
    with pytest.raises(ConfigError, match=message):
        eagle_jax.generate(target, misfit, tokens, lengths, tree=TREE, max_new_tokens=NEW)
