"""`eagle_jax.testing`: lossless rules and drafts pass, and each kind of loss is found and named."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eagle_jax import DraftModel, Llama, Proposal, SamplingConfig, StaticTree
from eagle_jax.decode.accept import accept
from eagle_jax.testing import assert_lossless, toy_draft, toy_target
from eagle_jax.tree import Acceptance, Tree, accept_coupled, accept_greedy, accept_sampled
from tests.drafts.successors import Successors
from tests.toy import scaled

CHAIN = StaticTree.chain(2)


def small_model() -> DraftModel:
    """Of one layer, because every level of the chain compiles anew."""
    config = dataclasses.replace(toy_target().config, num_layers=1)
    return DraftModel(scaled(Llama(config, jax.random.key(1)), 12.0))


def with_probs(draft, probs):
    """The draft, saying other probabilities than those it drew from."""

    class Liar(type(draft)):
        def propose(self, target, state, tree, noise=None):
            proposal = super().propose(target, state, tree, noise)
            return proposal._replace(probs=probs(proposal.probs))

    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(Liar))(draft.model)


def test_lossless_rules_and_drafts_pass():
    """A sampling rule is tried by the documentation's page, which test_docs.py runs."""
    greedy = assert_lossless(accept_greedy, sampling=None)
    assert greedy.accepted > 0.2 and greedy.p_value is None
    warm = SamplingConfig(temperature=0.8, repetition_penalty=1.3)
    assert_lossless(small_model(), tree=CHAIN, sampling=warm, draws=1000)


def test_a_rule_gets_the_arguments_that_its_signature_names():
    """Named so, it does what the default rule does: with drawn drafts, and with noise that draft and target share."""

    def drawn(tree, logits, keys, *, draft_probs):
        return accept_sampled(tree, logits, keys, draft_probs)

    def coupled(tree, logits, keys, noise=None):
        return accept_coupled(tree, logits, noise)

    keys = jax.random.split(jax.random.key(0), 4)
    logits, q = jax.random.normal(keys[0], (64, 4, 7)), jax.nn.softmax(jax.random.normal(keys[1], (64, 4, 7)), axis=-1)
    tokens = jax.random.randint(keys[2], (64, 4), 0, 7, jnp.int32)
    parents, depths = (jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32) - back, (64, 4)) for back in (1, 0))
    proposal = Proposal(Tree(tokens=tokens, parents=parents, depths=depths, scores=jnp.zeros((64, 4))), q)
    context = SimpleNamespace(
        tokens=tokens, lengths=jnp.ones(64, jnp.int32), keys=jax.random.split(keys[3], 64), noise=None
    )
    for rule, noise in ((drawn, None), (coupled, jax.random.gumbel(keys[3], (64, 4, 7)))):
        context.sampling, context.noise = SamplingConfig(1.0, coupled=noise is not None), noise
        ours, default = (accept(context, proposal, logits, accept_fn, depth=3) for accept_fn in (rule, None))
        jax.tree.map(np.testing.assert_array_equal, ours, default)
        assert ours.acceptance.length.max() > 0


def typical_acceptance(tree: Tree, logits: jax.Array, keys: jax.Array | None) -> Acceptance:
    """Accepts any first child whose probability is above a tenth, whatever the others' are."""
    exact = accept_sampled(tree, logits, keys) if keys is not None else accept_greedy(tree, logits)
    likely = jnp.take_along_axis(jax.nn.softmax(logits[:, 0], axis=-1), tree.tokens[:, 1:2], axis=1)[:, 0] > 0.1
    take = likely & (exact.length == 0)
    path = exact.path.at[:, 1].set(jnp.where(take, 1, exact.path[:, 1]))
    return Acceptance(path, exact.length + take, jnp.where(take, jnp.argmax(logits[:, 1], -1), exact.bonus))


def second_best(tree: Tree, logits: jax.Array, keys: jax.Array | None) -> Acceptance:
    """The greedy rule with the second largest logit as its bonus."""
    greedy = accept_greedy(tree, logits)
    last = jnp.take_along_axis(greedy.path, greedy.length[:, None], axis=1)[:, :, None]
    return dataclasses.replace(greedy, bonus=jnp.argsort(jnp.take_along_axis(logits, last, axis=1)[:, 0])[:, -2])


def test_a_rule_that_is_not_lossless_is_found():
    with pytest.raises(
        AssertionError, match=r"the greedy text of sequence 0 parts from plain decoding at position \d+"
    ):
        assert_lossless(second_best, sampling=None)
    with pytest.raises(AssertionError, match=r"(greedy text|do not have the target's distribution: p = )"):
        assert_lossless(typical_acceptance, draws=1000)


def test_a_draft_that_claims_other_probabilities_is_found():
    liar = with_probs(small_model(), lambda probs: None if probs is None else probs[..., ::-1])
    with pytest.raises(AssertionError, match="distribution"):
        assert_lossless(liar, tree=CHAIN, draws=1000)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Gossip(Successors):
    """Drafts what its neighbour in the batch would."""

    def propose(self, target, state, tree, noise=None):
        proposal = super().propose(target, state, tree, noise)
        return proposal._replace(tree=dataclasses.replace(proposal.tree, tokens=jnp.roll(proposal.tree.tokens, 1, 0)))


def test_a_draft_that_looks_at_its_neighbours_is_found():
    with pytest.raises(AssertionError, match="text"):
        assert_lossless(Gossip(3))


def test_a_target_of_many_tokens_is_refused():
    with pytest.raises(ValueError, match="the target has 97 tokens"):
        assert_lossless(accept_sampled, target=toy_target(vocab_size=97))


def test_the_toy_draft_fits_its_target():
    target = toy_target(vocab_size=13)
    toy_draft(target).check_fits(target)
