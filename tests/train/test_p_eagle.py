"""The rows that a P-EAGLE head is trained on are those that the decoder runs, at every depth."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax import Committed, TargetOutput
from eagle_jax.models import params
from eagle_jax.train.loss import objective, p_eagle
from eagle_jax.train.loss.p_eagle import Group, PEagleObjective, choose_chains, groups, shares
from tests.drafts.kinds import KINDS
from tests.drafts.test_lossless import CONFIG, target_of
from tests.train.test_dflash import batch_of

WIDTH, DEPTHS = 20, 4
SHARES = shares(DEPTHS, 0.8, 0.6)  # 0.8, 0.64, 0.6


def head(**changes):
    """Two layers with windows shorter than a chain, q and k with norms, two thirds of the vocabulary."""
    draft = KINDS["p-eagle"].build(CONFIG, 1, 6.0)
    draft.config = dataclasses.replace(draft.config, windows=(2, 2), **changes)
    return draft


@pytest.fixture(scope="module")
def made():
    return jax.jit(objective.examples, static_argnames="chunk")(head(), target_of(0), batch_of(), chunk=7)


@jax.jit
def decoded(target, draft, made, start, pairs):
    """Logits of all depths after `pairs` pairs of a document of the first sequence, which begins at `start`."""
    features = jax.lax.dynamic_slice_in_dim(made.features[:1], start, 9, axis=1)
    following = jax.lax.dynamic_slice_in_dim(jnp.pad(made.tokens[:1], [(0, 0), (0, 1)]), start + 1, 9, axis=1)
    output = TargetOutput(features[:, :, : CONFIG.hidden_size], features)
    lengths = jnp.full(1, 3, jnp.int32)
    committed = Committed(following, following, jnp.zeros(1, jnp.int32), pairs[None], output, lengths)
    memory = draft.update(target, draft.start(target, 1, 128), committed)
    return draft.logits(target, memory.hidden)[0]


def test_every_depth_in_training_is_that_depth_of_the_decoder(made):
    target, draft = target_of(0), head()
    of = groups(WIDTH, SHARES)
    starts = jnp.array([[3, 14, 0, 9, 12, 1, 5, 16, 10, 2, 6, 11, 13, 4, 17, 15], range(16)], jnp.int32)
    x = jax.jit(p_eagle.row_outputs, static_argnames="shares")(draft, target, made, starts, shares=SHARES)
    logits = np.asarray(x[0] @ draft.output_weight(target).T)
    pairs, depths = (np.asarray(rows) for rows in p_eagle.rows_of(starts, WIDTH, of))
    compared = 0
    for pair in starts[0].tolist():
        start = 0 if pair < 9 else 9
        theirs = np.asarray(decoded(target, draft, made, jnp.int32(start), jnp.int32(pair + 1 - start)))
        (rows,) = np.nonzero(pairs[0] == pair)
        assert depths[0, rows].tolist() == list(range(len(rows)))
        np.testing.assert_allclose(logits[rows], theirs[: len(rows)], rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
        compared += len(rows)
    assert compared == 16 + 16 + 12 + 12 and np.abs(logits).max() > 1


def test_a_pass_has_no_more_rows_than_the_shares_say():
    assert groups(10, shares(4, 0.7, 0.0)) == [Group(0, 3, 3), Group(3, 1, 2), Group(4, 3, 1)]
    assert shares(5, 0.5, 0.2) == (0.5, 0.25, 0.2, 0.2)
    of = groups(2048, shares(8, 0.7, 0.2))
    assert sum(group.chains * group.length for group in of) == 1433 + 1003 + 702 + 491 + 3 * 409
    assert groups(10, shares(3, 1.0, 0.0)) == [Group(0, 10, 2)]


def test_chains_are_those_that_decoding_can_have(made):
    choose = jax.jit(functools.partial(choose_chains, shares=SHARES, decay=2.0))
    starts, weights = map(np.asarray, choose(made, jax.random.key(0)))
    pairs, depths = (np.asarray(rows) for rows in p_eagle.rows_of(starts, WIDTH, groups(WIDTH, SHARES)))
    depths = depths[0]
    known, learned = np.asarray(made.known), np.asarray(made.loss_mask)
    # Tokens 4 to 8 and 9 to 19 are two documents; a document's first two tokens are not predicted.
    for row, usable in enumerate([{2, 3, 4, 5, 6, *range(9, 18)}, set(range(12))]):
        end = [9 if pair < 9 else 20 for pair in pairs[row]] if row == 0 else [14] * len(depths)
        token = pairs[row] + 2 + depths
        wanted = (token < end) & (learned[row][np.minimum(token, 19)] > 0) & (known[row][np.minimum(token, 20) - 1] > 0)
        drawn = {depth: pairs[row][(depths == depth) & (weights[row] > 0)] for depth in range(DEPTHS)}
        assert set(drawn[0].tolist()) == {pair for pair in usable if known[row][pair + 1] > 0}
        falling = np.exp(-depths / 2.0) * wanted
        for depth, share in enumerate((1.0, *SHARES)):
            of_depth = depths == depth
            kept = of_depth & np.isin(pairs[row], starts[row][: int(len(usable) * share)] if depth else pairs[row])
            np.testing.assert_allclose(weights[row][of_depth], (falling * kept)[of_depth], rtol=1e-6)
        assert set(starts[row][: int(len(usable) * 0.8)].tolist()) <= usable
    other, _ = choose(made, jax.random.key(1))
    assert not np.array_equal(starts[:, :3], other[:, :3])


def test_losses_are_means_over_the_rows_and_reach_every_weight(made):
    target, draft = target_of(0), head()
    options: list[dict] = [{}, {"divergence": "kl"}, {"token_loss": "lk"}]
    objectives = [PEagleObjective(0.8, 0.6, chunk=7, **chosen) for chosen in options]
    batch, key = batch_of() | {"features": made.features, "answers": made.answers}, jax.random.key(0)
    arrays = {path: array for path, array in params.flatten(draft).items() if path != "target_ids"}

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(arrays):
        model = params.load(draft, arrays | {"target_ids": draft.target_ids[...]})
        prepared = objectives[0].draw(model, objectives[0].prepare(model, target, batch), key)
        counts = objectives[0].counts(prepared)
        _, chains = prepared
        sums = [objective.sums(model, target, prepared, counts, key) for objective in objectives]
        x = p_eagle.row_outputs(model, target, made, chains.starts, SHARES)
        return sum(loss for loss, _ in sums), (chains, x, [metrics for _, metrics in sums])

    gradients, (chains, x, metrics) = gradient(arrays)
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values()) and "mask_hidden" in gradients
    pairs, depths = (np.asarray(rows) for rows in p_eagle.rows_of(chains.starts, WIDTH, groups(WIDTH, SHARES)))
    ours = jax.nn.log_softmax(np.asarray(x) @ np.asarray(draft.lm_head[...]).T)
    rows = np.asarray(target.output_weight())[np.asarray(draft.target_ids[...])]
    before = np.minimum(pairs + 1 + depths, WIDTH - 1)
    teacher = jax.nn.log_softmax(np.asarray(made.answers)[np.arange(2)[:, None], before] @ rows.T)
    crossed = -(np.exp(teacher) * ours).sum(axis=-1)
    relative = crossed + (np.exp(teacher) * teacher).sum(axis=-1)
    accepted = -np.log(np.minimum(np.exp(ours), np.exp(teacher)).sum(axis=-1))
    for losses, measured in zip((crossed, relative, accepted), metrics, strict=True):
        np.testing.assert_allclose(measured["loss"], np.average(losses, weights=chains.weights), rtol=1e-4)
