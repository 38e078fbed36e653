"""The blocks that a DFlash head is trained on are those that the decoder runs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax import Committed, TargetOutput
from eagle_jax.models import params
from eagle_jax.train.loss import dflash
from eagle_jax.train.loss.dflash import DFlashObjective, choose_blocks
from tests.drafts.kinds import KINDS
from tests.drafts.test_lossless import CONFIG, target_of

# Two documents in the first sequence, one and padding in the second.
DOCUMENTS = np.array([[0] * 9 + [1] * 11, [0] * 14 + [1] * 6], np.int32)
LENGTHS = np.array([20, 14], np.int32)
SIZE = 4


def batch_of() -> dict[str, jax.Array]:
    tokens = np.random.default_rng(0).integers(2, CONFIG.vocab_size, (2, 20)).astype(np.int32)
    mask = np.ones((2, 20), np.int32)
    mask[0, :4] = 0
    mask[1, 14:] = 0  # padding is not to be learned
    batch = {"tokens": tokens, "loss_mask": mask, "lengths": LENGTHS, "documents": DOCUMENTS}
    return {name: jnp.asarray(array) for name, array in batch.items()}


@jax.jit
def decoded(target, draft, made, start, end):
    """Logits of a block at position `end` of the first sequence, whose document begins at `start`."""
    memory = draft.start(target, 1, 128)
    features = jax.lax.dynamic_slice_in_dim(made.features[:1], start, 11, axis=1)
    count = end - start
    tokens = jnp.zeros((1, 11), jnp.int32)
    output = TargetOutput(features[:, :, : CONFIG.hidden_size], features)
    lengths = jnp.full(1, 3, jnp.int32)
    committed = Committed(tokens, tokens, jnp.zeros(1, jnp.int32), count[None], output, lengths)
    memory = draft.update(target, memory, committed)
    return draft.block_logits(target, memory, made.tokens[:1, end], SIZE, lengths)[0]


@pytest.fixture(scope="module")
def made():
    """The examples of the batch; all heads here read the same layers."""
    return jax.jit(dflash.examples)(KINDS["dflash"].build(CONFIG, 1, 6.0), target_of(0), batch_of())


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_in_training_is_a_block_of_the_decoder(made, causal):
    target, draft = target_of(0), KINDS["dflash"].build(CONFIG, 1, 6.0)
    draft.config = dataclasses.replace(draft.config, causal=causal)
    anchors = jnp.array([[1, 6, 10, 17], [3, 2, 1, 12]], jnp.int32)
    x = jax.jit(dflash.block_outputs, static_argnames="size")(draft, target, made, anchors, size=SIZE)
    ours = np.asarray(x) @ np.asarray(target.output_weight()).T
    for index, (start, end) in enumerate([(0, 1), (0, 6), (9, 10), (9, 17)]):
        theirs = decoded(target, draft, made, jnp.int32(start), jnp.int32(end))
        np.testing.assert_allclose(ours[0, index], theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours).max() > 1


def test_anchors_are_those_that_decoding_can_have(made):
    chosen = jax.jit(lambda key: choose_blocks(made, key, 20, SIZE, 2.0))
    anchors, weights = map(np.asarray, chosen(jax.random.key(0)))
    for row, usable in enumerate([{3, 4, 5, 6, 7, *range(10, 19)}, set(range(1, 13))]):
        used = weights[row].max(axis=1) > 0
        assert set(anchors[row][used].tolist()) == usable and used.sum() == len(usable)
    of_anchor = dict(zip(anchors[0].tolist(), weights[0], strict=True))
    np.testing.assert_allclose(of_anchor[7], [1, 0, 0])  # its document ends
    np.testing.assert_allclose(of_anchor[4], np.exp([0, -0.5, -1]), rtol=1e-6)
    other, _ = chosen(jax.random.key(1))
    assert not np.array_equal(anchors[:, :3], other[:, :3])


def test_losses_are_means_over_the_blocks_and_reach_every_weight(made):
    target, draft = target_of(0), KINDS["dflash"].build(CONFIG, 1, 6.0)
    options: list[dict] = [{}, {"labels": "data"}, {"divergence": "kl"}, {"token_loss": "lk"}]
    objectives = [DFlashObjective(anchors=5, chunk=7, **chosen) for chosen in options]
    batch, key = batch_of() | {"features": made.features, "answers": made.answers}, jax.random.key(0)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(arrays):
        model = params.load(draft, arrays)
        prepared = objectives[0].draw(model, objectives[0].prepare(model, target, batch), key)
        counts = objectives[0].counts(prepared)
        _, blocks = prepared
        sums = [objective.sums(model, target, prepared, counts, key) for objective in objectives]
        x = dflash.block_outputs(model, target, made, blocks.anchors, draft.config.block_size)
        return sum(loss for loss, _ in sums), (blocks, x, [metrics for _, metrics in sums])

    gradients, (blocks, x, metrics) = gradient(params.flatten(draft))
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())
    output = np.asarray(target.output_weight())
    places = np.asarray(blocks.anchors)[:, :, None] + np.arange(1, draft.config.block_size)
    rows, inside = np.arange(2)[:, None, None], np.minimum(places, 19)
    ours = jax.nn.log_softmax(np.asarray(x) @ output.T)
    teacher = jax.nn.log_softmax((np.asarray(made.answers) @ output.T)[rows, inside - 1])
    crossed = -(np.exp(teacher) * ours).sum(axis=-1)
    of_labels = -np.take_along_axis(ours, np.asarray(made.tokens)[rows, inside][..., None], axis=-1)[..., 0]
    relative = crossed + (np.exp(teacher) * teacher).sum(axis=-1)
    accepted = -np.log(np.minimum(np.exp(ours), np.exp(teacher)).sum(axis=-1))
    for losses, measured in zip((crossed, of_labels, relative, accepted), metrics, strict=True):
        np.testing.assert_allclose(measured["loss"], np.average(losses, weights=blocks.weights), rtol=1e-4)
