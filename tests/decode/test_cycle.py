"""The decoder: speculative equals plain, rows are independent, stops are exact, broken logits end a row."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eagle_jax
from eagle_jax import TreeConfig
from eagle_jax.decode.cycle import step
from eagle_jax.models import params
from tests.toy import golden_pair, near_ties, random_eagle1, random_eagle3, random_prompts, random_target, rows_of

# Batch, prompt width and tree of each compiled program; weights, prompts and lengths vary within one.
SHAPES = [
    (3, 10, TreeConfig(depth=4, top_k=3, num_nodes=12)),
    (1, 7, TreeConfig(depth=5, top_k=1, num_nodes=6)),
    (2, 5, TreeConfig(depth=1, top_k=4, num_nodes=5)),
    (2, 6, TreeConfig(depth=4, top_k=2, num_nodes=3)),  # fewer nodes than levels
    (4, 12, TreeConfig(depth=6, top_k=5, num_nodes=30)),
]
NEW = 24


def hostile(draft, how: str):
    """The draft with its logits replaced: all equal, one token certain, unordered garbage, or NaN."""
    arrays = params.flatten(draft)
    change = {
        "random": lambda head: head,
        "constant": jnp.zeros_like,
        "saturated": lambda head: head * 3000,
        "nan": lambda head: head * jnp.nan,
    }
    arrays["lm_head"] = change[how](arrays["lm_head"])
    return params.load(draft, arrays)


compared = {"rows": 0, "near-ties": 0}


@settings(max_examples=60)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 10_000),
    how=st.sampled_from(["random", "constant", "saturated", "nan", "eagle1"]),
)
def test_speculative_equals_plain_for_any_draft(shape, seed, how):
    batch, width, tree = shape
    target = random_target(seed)
    draft = random_eagle1(seed + 1) if how == "eagle1" else hostile(random_eagle3(seed + 1), how)
    tokens, lengths = random_prompts(seed + 2, batch, width)
    ours = eagle_jax.generate(target, draft, tokens, lengths, tree=tree, max_new_tokens=NEW)
    plain = eagle_jax.generate(target, None, tokens, lengths, max_new_tokens=NEW)
    compared["rows"] += batch
    compared["near-ties"] += near_ties(target, rows_of(ours), rows_of(plain), how)
    assert compared["near-ties"] <= 1 + compared["rows"] // 50
    assert not (ours.failed.any() or plain.failed.any())
    np.testing.assert_array_equal(ours.lengths, lengths + NEW)
    np.testing.assert_array_equal(plain.cycles, NEW - 1)
    np.testing.assert_array_equal(ours.accepted.sum(axis=1), ours.cycles)
    assert ours.accepted.shape == (batch, tree.depth + 1) and plain.accepted.shape == (batch, 1)


def test_a_good_draft_saves_passes_and_changes_nothing():
    target, draft = golden_pair()
    tokens, lengths = random_prompts(5, 4, 40, vocab=120)
    ours = eagle_jax.generate(target, draft, tokens, lengths, max_new_tokens=100)
    plain = eagle_jax.generate(target, None, tokens, lengths, max_new_tokens=100)
    assert near_ties(target, rows_of(ours), rows_of(plain)) == 0
    assert (ours.cycles < plain.cycles).all()
    depths = np.arange(ours.accepted.shape[1])
    # Every cycle brings its accepted tokens and one more; the first token costs none, the last cycle may be cut.
    brought = 1 + (np.asarray(ours.accepted) * (depths + 1)).sum(axis=1)
    assert (brought >= 100).all() and (brought <= 100 + depths[-1]).all()


@pytest.fixture(scope="module")
def batch():
    """Three rows of different lengths, their plain and speculative output."""
    target, draft = random_target(0), random_eagle3(1)
    tokens, _ = random_prompts(2, 3, 10)
    lengths = jnp.array([10, 1, 6])
    tree = SHAPES[0][2]
    ours = eagle_jax.generate(target, draft, tokens, lengths, tree=tree, max_new_tokens=NEW)
    plain = eagle_jax.generate(target, None, tokens, lengths, max_new_tokens=NEW)
    assert near_ties(target, rows_of(ours), rows_of(plain)) == 0
    return target, draft, tokens, lengths, tree, ours, plain


def test_rows_do_not_depend_on_their_neighbours(batch):
    target, draft, tokens, lengths, tree, ours, _ = batch
    for row in range(3):
        alone = eagle_jax.generate(
            target, draft, tokens[row : row + 1], lengths[row : row + 1], tree=tree, max_new_tokens=NEW
        )
        assert rows_of(alone)[0] == rows_of(ours)[row]
        assert alone.cycles[0] == ours.cycles[row]
        np.testing.assert_array_equal(alone.accepted[0], ours.accepted[row])


def test_padding_is_not_read(batch):
    target, draft, tokens, lengths, tree, ours, _ = batch
    noise = jnp.where(jnp.arange(10)[None] < lengths[:, None], tokens, 96 - tokens)
    again = eagle_jax.generate(target, draft, noise, lengths, tree=tree, max_new_tokens=NEW)
    assert rows_of(again) == rows_of(ours)


def test_output_is_prompt_then_new_tokens_then_zeros(batch):
    _, _, tokens, lengths, _, ours, _ = batch
    assert ours.tokens.shape == (3, 10 + NEW) and ours.tokens.dtype == jnp.int32
    for row in range(3):
        np.testing.assert_array_equal(ours.tokens[row, : lengths[row]], tokens[row, : lengths[row]])
        assert (ours.tokens[row, ours.lengths[row] :] == 0).all()


@pytest.mark.parametrize("speculative", [True, False])
def test_stop_tokens_end_a_row_exactly(batch, speculative):
    target, draft, tokens, lengths, tree, _, plain = batch
    rows = rows_of(plain)
    for position in (0, 1, 2, 7, NEW - 1):
        stop = rows[0][lengths[0] + position]
        out = eagle_jax.generate(
            target, draft if speculative else None, tokens, lengths, tree=tree, max_new_tokens=NEW, stop_tokens=(stop,)
        )
        for row, result in enumerate(rows_of(out)):
            new = rows[row][lengths[row] :]
            end = new.index(stop) + 1 if stop in new else NEW
            assert result == rows[row][: lengths[row] + end]


@pytest.mark.parametrize("speculative", [True, False])
def test_capacity_ends_a_row_exactly(batch, speculative):
    target, draft, tokens, lengths, tree, _, plain = batch
    out = eagle_jax.generate(
        target, draft if speculative else None, tokens, lengths, tree=tree, max_new_tokens=NEW, capacity=17
    )
    assert rows_of(out) == [row[:17] for row in rows_of(plain)]


def test_prompts_may_be_padded_beyond_the_capacity(batch):
    target, draft, tokens, lengths, tree, _, plain = batch
    wide = jnp.pad(tokens, [(0, 0), (0, 190)])
    out = eagle_jax.generate(target, draft, wide, lengths, tree=tree, max_new_tokens=NEW, capacity=17)
    assert rows_of(out) == [row[:17] for row in rows_of(plain)]


def test_one_new_token_costs_no_cycle(batch):
    target, draft, tokens, lengths, tree, _, plain = batch
    out = eagle_jax.generate(target, draft, tokens, lengths, tree=tree, max_new_tokens=1)
    assert rows_of(out) == [row[: length + 1] for row, length in zip(rows_of(plain), lengths, strict=True)]
    assert (out.cycles == 0).all() and (out.accepted == 0).all()


def test_finished_rows_cost_no_cycles_and_do_not_change(batch):
    target, draft, tokens, lengths, tree, ours, _ = batch
    cycle = jax.jit(functools.partial(eagle_jax.cycle, tree=tree))
    state = jax.jit(functools.partial(eagle_jax.prefill, max_new_tokens=NEW))(target, draft, tokens, lengths)
    while not state.done.all():
        after = cycle(target, draft, state)
        for row in np.flatnonzero(state.done):
            for old, new in (
                (state.tokens, after.tokens),
                (state.cycles, after.cycles),
                (state.accepted, after.accepted),
            ):
                np.testing.assert_array_equal(old[row], new[row])
        state = after
    np.testing.assert_array_equal(state.cycles, ours.cycles)
    np.testing.assert_array_equal(state.tokens, ours.tokens)
    idle = cycle(target, draft, state)
    np.testing.assert_array_equal(idle.tokens, state.tokens)
    np.testing.assert_array_equal(idle.cycles, state.cycles)


def test_a_prompt_in_chunks_equals_one_pass():
    target, draft = golden_pair()
    tokens, lengths = random_prompts(7, 3, 50, vocab=256)
    run = functools.partial(eagle_jax.prefill, target, draft, tokens, lengths, max_new_tokens=8)
    whole = jax.jit(run)()
    chunked = jax.jit(lambda: run(chunk=8))()  # seven chunks, the last one padded
    np.testing.assert_array_equal(whole.tokens, chunked.tokens)
    np.testing.assert_allclose(whole.draft.hidden, chunked.draft.hidden, atol=1e-4)
    for ours, theirs in ((whole.cache, chunked.cache), (whole.draft.cache, chunked.draft.cache)):
        np.testing.assert_array_equal(ours.length, theirs.length)
        for a, b in zip(ours.k + ours.v, theirs.k + theirs.v, strict=True):
            for row, length in enumerate(ours.length):
                np.testing.assert_allclose(a[row, :, :length], b[row, :, :length], atol=1e-4)


@pytest.mark.parametrize("speculative", [True, False])
def test_broken_logits_end_their_row_only(batch, speculative):
    target, draft, tokens, lengths, tree, _, plain = batch
    rows = rows_of(plain)
    others = set(rows[1]) | set(rows[2])
    position, poison = next((i, t) for i, t in enumerate(rows[0]) if i >= 10 and t not in others)
    arrays = params.flatten(target)
    arrays["embed"] = arrays["embed"].at[poison].set(jnp.nan)
    broken = params.load(target, arrays)
    # The draft has an eye for it too: its own embedding is the target's.
    out = eagle_jax.generate(broken, draft if speculative else None, tokens, lengths, tree=tree, max_new_tokens=NEW)
    results = rows_of(out)
    assert out.failed[0]
    # The poisoned token itself was chosen from sound logits; nothing follows it.
    assert results[0] == rows[0][: len(results[0])] and len(results[0]) <= position + 1
    if not speculative:
        assert len(results[0]) == position + 1
        assert results[1:] == rows[1:] and not out.failed[1:].any()


def test_broken_logits_at_the_prompt_give_no_token(batch):
    target, draft, tokens, lengths, tree, *_ = batch
    arrays = params.flatten(target)
    arrays["embed"] = arrays["embed"].at[96].set(jnp.inf)
    tokens = jnp.where(tokens == 96, 0, tokens).at[2, 3].set(96)
    out = eagle_jax.generate(params.load(target, arrays), draft, tokens, lengths, tree=tree, max_new_tokens=NEW)
    assert out.failed.tolist()[2] and out.lengths[2] == lengths[2] and out.cycles[2] == 0


def test_a_tree_deeper_than_the_scratch_is_refused(batch):
    target, draft, tokens, lengths, *_ = batch
    deep = TreeConfig(depth=40, top_k=1, num_nodes=41)
    state = jax.eval_shape(functools.partial(eagle_jax.prefill, max_new_tokens=NEW), target, draft, tokens, lengths)
    with pytest.raises(ValueError, match=r"tree.depth = 40 exceeds the 31"):
        jax.eval_shape(functools.partial(eagle_jax.cycle, tree=deep), target, draft, state)
    prefill = functools.partial(eagle_jax.prefill, max_new_tokens=NEW, tree=deep)
    state = jax.eval_shape(prefill, target, draft, tokens, lengths)
    jax.eval_shape(functools.partial(eagle_jax.cycle, tree=deep), target, draft, state)


def test_generate_runs_prompts_before_its_cycles_alone(batch):
    """Its loop holds a step, no prefill: pending prompts are for `cycle` and `advance`."""
    target, _, tokens, lengths, *_ = batch

    def loops(function, *args):
        return str(jax.make_jaxpr(function)(*args)).count("while[")

    prefill = functools.partial(eagle_jax.prefill, target, None, max_new_tokens=NEW)
    state = jax.eval_shape(prefill, tokens, lengths)
    in_step = loops(lambda state: step(target, None, state).state, state)
    assert loops(lambda state: eagle_jax.cycle(target, None, state), state) > in_step
    generate = functools.partial(eagle_jax.generate, target, None, max_new_tokens=NEW)
    assert loops(generate, tokens, lengths) == loops(prefill, tokens, lengths) + 1 + in_step
