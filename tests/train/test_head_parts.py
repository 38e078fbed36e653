"""Heads of several layers, with windows and the norms of EAGLE-3.1: their losses are the decoder's steps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import StaticTree
from eagle_jax.models import params
from eagle_jax.train import eagle1_loss, eagle3_loss
from eagle_jax.train.loss import eagle
from tests.drafts.kinds import KINDS
from tests.toy import TARGET, random_prompts
from tests.train.steps import every_step

HEADS = ("eagle3 parts", "eagle3.1")
STEPS = 5


def pair(kind):
    """A target, and a head over the whole vocabulary, so that every drafted token is a token of the loss."""
    config = dataclasses.replace(TARGET, vocab_size=24)
    target = eagle_jax.Llama(config, jax.random.key(0))
    return jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, target), KINDS[kind].build(config, 1, 6.0)


@pytest.mark.parametrize("kind", HEADS)
def test_the_steps_of_the_loss_draft_what_the_decoder_drafts(kind):
    """The probability of each token of a drafted chain, from the loss's logits over the prompt and that chain."""
    target, draft = pair(kind)
    tokens, lengths = random_prompts(2, 2, 9, vocab=24)
    chain = jax.jit(eagle_jax.propose, static_argnames="tree")(
        target, draft, tokens, lengths, tree=StaticTree.chain(STEPS)
    )
    places = lengths[:, None] + jnp.arange(STEPS + 1)[None]
    text = jnp.pad(tokens, [(0, 0), (0, STEPS + 1)]).at[jnp.arange(2)[:, None], places].set(chain.tokens)

    @jax.jit
    def logits_of(draft, target):
        made = eagle.examples(draft, target, text, lengths + STEPS + 1, jnp.ones(text.shape))
        outputs = eagle.eagle3_outputs(draft, target, made, STEPS)
        return outputs.x @ outputs.weight.T

    logits = jax.nn.log_softmax(logits_of(draft, target))[:, jnp.arange(2), lengths - 1]  # [steps, batch, vocab]
    ids = np.arange(24) if draft.target_ids is None else np.asarray(draft.target_ids[...])
    drafted = ids[np.asarray(logits.argmax(axis=-1))]
    np.testing.assert_array_equal(drafted.T, chain.tokens[:, 1:])
    np.testing.assert_allclose(jnp.cumsum(logits.max(axis=-1), axis=0).T, chain.scores[:, 1:], atol=1e-4)
    assert len(np.unique(drafted)) > 2


def test_the_step_of_an_eagle1_head_with_norms_is_the_decoders():
    """The loss, from the hidden states that `draft_forward` gives for the same pairs; over the whole vocabulary."""
    target, draft = pair("eagle1 parts")
    tokens, lengths = random_prompts(2, 2, 9, vocab=24)
    mask = jnp.ones(tokens.shape)

    @jax.jit
    def both(draft, target):
        made = eagle.examples(draft, target, tokens, lengths, mask)
        following = jnp.pad(tokens, [(0, 0), (0, 1)])[:, 1:]
        hidden, _ = eagle_jax.draft_forward(draft, target, made.features, following, lengths)
        logits = target.logits(hidden)
        weights = eagle.eagle1_weights(made)
        answers = jnp.pad(made.features, [(0, 0), (0, 1), (0, 0)])[:, 1:]
        teacher = jax.nn.softmax(target.logits(answers))
        token = -(teacher * jax.nn.log_softmax(logits)).sum(axis=-1)
        sums = (weights * eagle.smooth_l1(hidden, answers)).sum(), (weights * token).sum()
        return eagle1_loss(draft, target, tokens, lengths, mask), [one / (weights.sum() + 1e-5) for one in sums]

    losses, expected = both(draft, target)
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    gradient = params.flatten(jax.grad(lambda draft: sum(both(draft, target)[0]), allow_int=True)(draft))
    assert all(
        jnp.abs(gradient[norm]).max() > 1e-6 for norm in ("embed_norm", "hidden_norm", "layer.input_norm", "norm")
    )


@pytest.mark.parametrize("kind", HEADS)
def test_losses_and_gradients_are_those_of_plain_autodiff(kind):
    """Against the cross-entropies of steps under explicit masks, differentiated without rematerialisation."""
    target, draft = pair(kind)
    tokens, lengths = random_prompts(3, 2, 8, vocab=24)
    lengths = lengths.at[0].set(8)
    floats = {path: x for path, x in params.flatten(draft).items() if path != "target_ids"}

    def head(floats):
        return params.load(draft, params.flatten(draft) | floats)

    def ours(floats):
        return eagle3_loss(head(floats), target, tokens, lengths, jnp.ones((2, 8)), 3)[0].sum()

    def plain(floats):
        logits, _ = every_step(head(floats), target, tokens, lengths, 3)
        answers, _ = eagle_jax.forward(target, tokens, lengths)
        ids = jnp.arange(24) if draft.target_ids is None else draft.target_ids[...]
        known = jnp.isin(answers.argmax(axis=-1), ids)
        total = 0.0
        for step in range(3):
            wanted, counts = (jnp.roll(x, -1 - step, axis=1) for x in (jax.nn.softmax(answers[..., ids]), known))
            counts = counts * (jnp.arange(8)[None] + step + 2 < lengths[:, None])
            cross = -(wanted * jax.nn.log_softmax(logits[step])).sum(axis=-1)
            total += (cross * counts).sum() / counts.sum()
        return total

    (loss, gradient), (expected, theirs) = (jax.jit(jax.value_and_grad(one))(floats) for one in (ours, plain))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for path, array in theirs.items():
        largest = jnp.abs(array).max()
        assert largest > 0, path
        np.testing.assert_allclose(gradient[path], array, atol=2e-5 * largest + 1e-7, err_msg=path)
