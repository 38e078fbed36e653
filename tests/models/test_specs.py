"""Layers that do not attend as Llama's do: their specs reach every pass, while decoding and while training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import eagle_jax
from eagle_jax import DraftModel, Llama, LlamaConfig
from eagle_jax.ops.spec import PLAIN, Spec
from eagle_jax.train.loss.objective import TargetObjective
from tests.models.reference import SMALL, load_target
from tests.toy import NEW, TARGET, TREE, random_prompts, scaled


@dataclasses.dataclass(frozen=True)
class Mixed(LlamaConfig):
    """A Llama whose layers have the specs `specs`, the last one's for those after it."""

    specs: tuple[Spec, ...] = (PLAIN,)

    def attention_spec(self, layer: int) -> Spec:
        return self.specs[min(layer, len(self.specs) - 1)]


def mixed(config: LlamaConfig, *specs: Spec) -> Mixed:
    return Mixed(**dataclasses.asdict(config) | {"rope": config.rope}, specs=specs)


def test_a_window_is_that_of_mistral():
    """transformers' model, which differs from a Llama by its window alone."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        **SMALL | dict(num_key_value_heads=2, sliding_window=4, initializer_range=0.2, attn_implementation="eager")
    )
    theirs = transformers.MistralForCausalLM(config).eval()
    fields = theirs.config.to_dict() | dict(model_type="llama", sliding_window=None)
    config = mixed(LlamaConfig.from_hf(fields), Spec(window=theirs.config.sliding_window))
    ours = load_target(config, {name: weight.detach().numpy() for name, weight in theirs.state_dict().items()})
    tokens = np.random.default_rng(1).integers(0, SMALL["vocab_size"], (2, 15))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    logits, _ = eagle_jax.forward(ours, jnp.asarray(tokens, jnp.int32), jnp.array([15, 15]))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    # Two layers of a window of 4 see 7 tokens.
    elsewhere, _ = eagle_jax.forward(ours, jnp.asarray(tokens, jnp.int32).at[:, 0].add(1) % 61, jnp.array([15, 15]))
    moved = np.abs(elsewhere - logits).max(axis=(0, 2))
    assert (moved[:7] > 1e-3).all() and (moved[7:] == 0).all()


def test_specs_by_layer_hold_in_prompts_trees_and_training():
    """A pass over whole texts agrees with the decoder's chunks and trees, and with the loss."""
    specs = Spec(window=3), Spec(softcap=2.0, scale=0.5), Spec(window=7, first=2)
    target = scaled(Llama(mixed(TARGET, *specs), jax.random.key(0)), 6.0)
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
