"""Layers that do not attend as Llama's do: their specs reach every pass, while decoding and while training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import eagle_jax
from eagle_jax import DraftModel, Llama, LlamaConfig
from eagle_jax.ops.spec import PLAIN, Spec
from eagle_jax.train.loss.objective import TargetObjective
from tests.toy import NEW, TARGET, TREE, random_prompts, scaled


@dataclasses.dataclass(frozen=True)
class Mixed(LlamaConfig):
    """A Llama whose layers have the specs `specs`, the last one's for those after it."""

    specs: tuple[Spec, ...] = (PLAIN,)

    def attention_spec(self, layer: int) -> Spec:
        return self.specs[min(layer, len(self.specs) - 1)]


def mixed(config: LlamaConfig, *specs: Spec) -> Mixed:
    return Mixed(**dataclasses.asdict(config) | {"rope": config.rope}, specs=specs)


def test_specs_by_layer_hold_in_prompts_trees_and_training():
    """A pass over whole texts agrees with the decoder's chunks and trees, and with the loss; logits are capped."""
    specs = Spec(window=3), Spec(softcap=2.0, scale=0.5), Spec(window=7, first=2)
    target = scaled(Llama(mixed(dataclasses.replace(TARGET, logit_softcap=5.0), *specs), jax.random.key(0)), 6.0)
    tokens, _ = random_prompts(2, 3, 10)
    lengths = np.array([10, 1, 6])
    out = eagle_jax.generate(target, DraftModel(target), tokens, jnp.asarray(lengths), tree=TREE, max_new_tokens=NEW)
    assert out.accepted[:, 1:].sum() > 0
    logits, _ = eagle_jax.forward(target, out.tokens, out.lengths)
    chosen = np.take_along_axis(np.asarray(logits)[:, :-1], np.asarray(out.tokens)[:, 1:, None], axis=-1)[..., 0]
    at = np.arange(chosen.shape[1]) + 1
    new = (at >= lengths[:, None]) & (at < np.asarray(out.lengths)[:, None])
    np.testing.assert_allclose(chosen[new], np.asarray(logits)[:, :-1].max(axis=-1)[new], atol=1e-3)

    batch = dict(tokens=out.tokens, lengths=out.lengths, loss_mask=jnp.ones(out.tokens.shape), documents=None)
    objective = TargetObjective()
    prepared = objective.prepare(target, None, batch)
    loss, _ = jax.jit(objective.sums)(target, None, prepared, objective.counts(prepared), jax.random.key(0))
    likely = jax.nn.log_softmax(logits[:, :-1])
    likely = np.take_along_axis(np.asarray(likely), np.asarray(out.tokens)[:, 1:, None], axis=-1)[..., 0]
    inside = at < np.asarray(out.lengths)[:, None]
    np.testing.assert_allclose(loss, -likely[inside].mean(), rtol=1e-4)
