"""Losses of the heads: golden values and gradients, the real decoder's steps, what the corrected alignment counts."""

from __future__ import annotations

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import Eagle3Draft, Llama
from eagle_jax.convert import names, to_official
from eagle_jax.drafts.protocol import Text
from eagle_jax.models import params
from eagle_jax.ops.attention import attention
from eagle_jax.train import eagle1_loss, eagle3_loss
from eagle_jax.train.loss import eagle
from tests.toy import (
    GOLDEN,
    draft_config,
    golden_pair,
    random_eagle1,
    random_eagle3,
    random_prompts,
    random_target,
    scaled,
)
from tests.train.steps import every_step

STEPS = 7
WITHOUT = ("d2t", "t2d", "embed_tokens.weight")  # no gradient of these was recorded: tables, and a frozen embedding


def batch_of(gold, case: str = "") -> tuple[jax.Array, jax.Array, jax.Array]:
    ids = gold["input_ids_raw" if not case else f"{case}/input_ids"]
    prefix = f"{case}/" if case else ""
    lengths = gold[f"{prefix}attention_mask"].sum(axis=1)
    return jnp.asarray(ids, jnp.int32), jnp.asarray(lengths, jnp.int32), jnp.asarray(gold[f"{prefix}loss_mask"])


def assert_gradients(gradient, gold, prefix: str = "") -> None:
    """Every recorded gradient and norm within 1e-4 of its largest magnitude."""
    ours = {name: array for name, array in to_official(gradient).items() if name not in WITHOUT}
    compared = 0
    for name, array in ours.items():
        if f"{prefix}grad/{name}" in gold:
            theirs = gold[f"{prefix}grad/{name}"]
            assert np.abs(array - theirs).max() <= 1e-4 * np.abs(theirs).max(), name
            compared += 1
        norm = gold[f"{prefix}gradnorm/{name}"]
        np.testing.assert_allclose(np.linalg.norm(array.astype(np.float64)), norm, rtol=1e-4)
    assert compared >= 3 and len(ours) >= 9


@functools.partial(jax.jit, static_argnames=("steps", "alignment"))
def total_eagle3(draft, target, tokens, lengths, loss_mask, *, steps=STEPS, alignment="official"):
    def total(draft):
        losses, accuracies = eagle3_loss(draft, target, tokens, lengths, loss_mask, steps, alignment)
        return (losses * 0.8 ** jnp.arange(steps)).sum(), (losses, accuracies)

    return jax.value_and_grad(total, has_aux=True, allow_int=True)(draft)


@pytest.mark.parametrize("case", ["init", "trained"])
@pytest.mark.parametrize("head", ["dv96", "dv256"])
def test_eagle3_equals_the_reference(head, case):
    gold = np.load(GOLDEN / f"train_eagle3_{head}.npz")
    target, draft = golden_pair(f"t1_eagle3_{head}")
    if case == "init":
        arrays = params.flatten(draft)
        for path in [path for path in arrays if path != "target_ids"]:
            official = gold["init_weights/" + names.official_name(names.EAGLE3, path)]
            arrays[path] = jnp.asarray(official).reshape(arrays[path].shape)
        draft = params.load(draft, arrays)
    (whole, (losses, accuracies)), gradient = total_eagle3(draft, target, *batch_of(gold, case))
    np.testing.assert_allclose(losses, gold[f"{case}/plosses"], rtol=1e-5)
    np.testing.assert_allclose(whole, gold[f"{case}/loss"], rtol=1e-5)
    np.testing.assert_allclose(accuracies, gold[f"{case}/acces"], atol=1e-6)
    assert_gradients(gradient, gold, f"{case}/")


def test_a_head_without_lm_head_learns_with_the_targets():
    """Losses and gradients equal those of a head that holds a copy of the target's lm_head."""
    gold = np.load(GOLDEN / "train_eagle3_dv256.npz")
    target, draft = golden_pair("t1_eagle3_dv256")
    rows = {"lm_head": target.output_weight()}
    copied = params.load(draft, params.flatten(draft) | rows)
    borrows = copy.copy(draft)
    borrows.lm_head, borrows.config = None, dataclasses.replace(draft.config, own_lm_head=False)
    (whole, _), gradient = total_eagle3(copied, target, *batch_of(gold, "trained"))
    (ours, _), found = total_eagle3(borrows, target, *batch_of(gold, "trained"))
    np.testing.assert_allclose(ours, whole, rtol=1e-6)
    expected, found = params.flatten(gradient), params.flatten(found)
    assert expected.keys() - found.keys() == {"lm_head"}
    for path, array in found.items():
        np.testing.assert_allclose(array, expected[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize("head", ["bias", "nobias"])
def test_eagle1_equals_the_reference(head):
    gold = np.load(GOLDEN / f"train_eagle1_{head}.npz")
    target, draft = golden_pair(f"t2_eagle1_{head}", "t2_target")

    def total(draft):
        feature_loss, token_loss = eagle1_loss(draft, target, *batch_of(gold))
        return feature_loss + 0.1 * token_loss, (feature_loss, token_loss)

    (whole, (feature_loss, token_loss)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(draft)
    np.testing.assert_allclose(feature_loss, gold["vloss_main"], rtol=1e-5)
    np.testing.assert_allclose(token_loss, gold["ploss_main"], rtol=1e-5)
    np.testing.assert_allclose(whole, gold["loss_main"], rtol=1e-5)
    assert_gradients(gradient, gold)


def with_cap(target: Llama, softcap: float) -> Llama:
    """Returns the target with capped logits."""
    made = copy.copy(target)
    made.config = dataclasses.replace(target.config, logit_softcap=softcap)
    return made


@pytest.mark.parametrize("capped", [False, True])
def test_the_corrected_alignment_counts_what_is_predicted(capped):
    """Against the same hidden states, a row, a step and a token at a time; the head's window holds in every step."""
    target, draft = random_target(0, 6.0), eagle_jax.with_window(random_eagle3(1, 6.0), 1, 4)
    target = with_cap(target, 2.0) if capped else target
    tokens, lengths = random_prompts(2, 3, 14)
    lengths = lengths.at[0].set(14)
    mask = jnp.asarray(np.random.default_rng(3).integers(0, 2, (3, 14)))
    (_, (losses, accuracies)), _ = total_eagle3(draft, target, tokens, lengths, mask, steps=3, alignment="corrected")
    logits, hidden = every_step(draft, target, tokens, lengths, 3)
    del hidden
    answers, _ = eagle_jax.forward(target, tokens, lengths)
    ids = np.asarray(draft.target_ids[...])
    for step in range(3):
        entropies, matches, learned = [], [], 0
        for row in range(3):
            for place in range(int(lengths[row]) - step - 2):
                if not mask[row, place + step + 2]:
                    continue
                learned += 1
                wanted = np.asarray(answers[row, place + step + 1], np.float64)
                if int(wanted.argmax()) not in ids.tolist():
                    continue
                p = np.exp(wanted[ids] - wanted[ids].max())
                log_q = np.asarray(jax.nn.log_softmax(logits[step][row, place]), np.float64)
                entropies.append(-(p / p.sum() * log_q).sum())
                matches.append(ids[log_q.argmax()] == wanted.argmax())
        np.testing.assert_allclose(losses[step], np.mean(entropies), rtol=1e-5)
        np.testing.assert_allclose(accuracies[step], sum(matches) / learned, atol=1e-6)


def test_both_sides_of_the_loss_are_capped_where_the_draft_has_the_targets_lm_head():
    """EAGLE-1's token loss, and that of an EAGLE-3 head without lm_head, from the logits that decoding computes."""
    target, tokens, lengths = with_cap(random_target(0, 6.0), 2.0), random_prompts(2, 2, 9)[0], jnp.array([9, 9])
    eagle3 = scaled(Eagle3Draft(draft_config(own_lm_head=False, draft_vocab_size=97), 3, jax.random.key(1)), 6.0)
    following, mask = jnp.pad(tokens, [(0, 0), (0, 1)])[:, 1:], jnp.ones_like(tokens)
    answers = jax.nn.softmax(eagle_jax.forward(target, tokens, lengths)[0])
    for draft, loss, last in (
        (random_eagle1(1, 6.0), lambda draft: eagle1_loss(draft, target, tokens, lengths, mask)[1], 1),
        (eagle3, lambda draft: eagle3_loss(draft, target, tokens, lengths, mask, steps=1)[0][0], 2),
    ):
        _, features = eagle_jax.forward(target, tokens, lengths, draft)
        _, logits = eagle_jax.draft_forward(draft, target, features, following, lengths)
        assert np.abs(logits).max() <= 2.0
        expected = -(answers[:, 1:] * jax.nn.log_softmax(logits)[:, :-1]).sum(axis=-1)[:, : 9 - last].mean()
        np.testing.assert_allclose(loss(draft), expected, rtol=1e-4)


def test_a_step_is_the_decoder_s_drafting_step():
    """Row j of step k: what the decoder's head makes k drafting steps after it read the text's first j + 2 tokens."""
    target, draft = golden_pair()
    tokens, _ = random_prompts(4, 1, 16, vocab=120)
    _, states = every_step(draft, target, tokens, jnp.array([16]), 4)
    place = 7
    drafted = jax.jit(functools.partial(_drafted, place=place, steps=4))(target, draft, tokens)
    for hidden, state in zip(drafted, states, strict=True):
        np.testing.assert_allclose(hidden, state[0, place], atol=1e-5)


def _drafted(target, draft, tokens, place, steps):
    """The head's outputs [D] after the pair at `place`, by the decoder's own update, then a drafted token at a time."""
    text = tokens[:, : place + 2]  # its last token is the root
    count = jnp.array([place + 1])
    mask = jnp.tri(place + 1, dtype=bool)[None]
    positions = jnp.arange(place + 1)[None]
    out = target(text[:, :-1], positions, mask, prompt_lengths=count, taps=draft.taps(target))
    memory = draft.update(
        target, draft.start(target, 1, 64), Text(text[:, :-1], text[:, 1:], jnp.array([0]), count, out, count)
    )
    kept = []

    def attend(index, q, k, v):
        del index
        kept.append((k, v))
        keys, values = (jnp.concatenate(rows, axis=2) for rows in zip(*kept, strict=True))
        return attention(q, keys, values, jnp.ones((1, 1, keys.shape[2]), bool), memory.cache.layer(0)), None

    hidden = memory.hidden[:, None]
    drafted = [hidden[0, 0]]
    for step in range(1, steps):
        token, position = tokens[:, place + 1 + step][:, None], jnp.array([[place + step]])
        hidden, _ = draft(target, hidden, token, position, attend, prompt_lengths=count)
        drafted.append(hidden[0, 0])
    return drafted


def test_chunks_of_positions_change_nothing():
    target, draft = random_target(0, 6.0), random_eagle3(1, 6.0)
    head1 = random_eagle1(2, 6.0)
    tokens, lengths = random_prompts(5, 2, 23)
    mask = jnp.ones((2, 23), jnp.int32)

    def measure(chunk):
        run = jax.jit(lambda draft: eagle3_loss(draft, target, tokens, lengths, mask, steps=3, chunk=chunk)[0].sum())
        grad = jax.grad(lambda draft: sum(eagle1_loss(draft, target, tokens, lengths, mask, chunk=chunk)))
        return run(draft), jax.jit(grad)(head1)

    whole, whole_gradient = measure(46)
    split, split_gradient = measure(7)
    np.testing.assert_allclose(split, whole, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(whole_gradient), jax.tree.leaves(split_gradient), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def test_the_feature_regression_is_of_the_hidden_states_that_logits_are_made_of():
    target, draft = random_target(0, 6.0), random_eagle3(1, 6.0)
    tokens, lengths = random_prompts(5, 2, 23)
    made = eagle.examples(draft, target, tokens, lengths, jnp.ones((2, 23)))
    _, weights = eagle.eagle3_weights(made, 2)

    @jax.jit
    def measure(draft, target, made, weights):
        return eagle.feature_distances(eagle.eagle3_outputs(draft, target, made, 2), weights)

    distances = measure(draft, target, made, weights)
    hidden, _ = eagle_jax.draft_forward(draft, target, made.features[:, :-1], tokens[:, 1:], lengths)
    distance = np.abs(np.asarray(draft.before_logits(hidden)) - np.asarray(made.answers)[:, 1:])
    smooth = np.where(distance < 1, distance**2 / 2, distance - 0.5).mean(axis=-1)
    np.testing.assert_allclose(distances[0], (smooth * weights[0][:, :-1]).sum(), rtol=1e-5)
    assert distances[1] > 0


def test_noise_needs_a_key_and_changes_the_features():
    target, draft = random_target(0, 6.0), random_eagle1(1, 6.0)
    tokens, lengths = random_prompts(5, 2, 23)
    run = jax.jit(functools.partial(eagle1_loss, draft, target, tokens, lengths, jnp.ones((2, 23), jnp.int32)))
    assert run()[0] == run()[0] != run(jax.random.key(0))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment": "exact"}, 'alignment must be "corrected" or "official"'),
        ({"steps": 0}, "steps must be a positive"),
    ],
)
def test_wrong_settings(changes, message):
    target, draft = random_target(0), random_eagle3(1)
    tokens, lengths = random_prompts(5, 2, 8)
    with pytest.raises(ValueError, match=message):
        eagle3_loss(draft, target, tokens, lengths, jnp.ones((2, 8)), **changes)
