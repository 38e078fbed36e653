"""A tree policy of a user's that says that its shape is fixed: a draft model draws its nodes at random."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eagle_jax
from eagle_jax import Llama, SamplingConfig, StaticTree
from eagle_jax.decode.cycle import propose
from eagle_jax.decode.state import context_of
from eagle_jax.tree import NEVER, DraftStep, Tree
from eagle_jax.tree.policy import step_mask
from tests.decode.test_sampled_distribution import tiny_config
from tests.drafts.kinds import model
from tests.toy import scaled


@dataclasses.dataclass(frozen=True)
class Comb:
    """A chain, each of whose nodes has `teeth` children; the first goes on. It uses the second of two slots."""

    depth: int = 3
    teeth: int = 2
    width: int = 2
    claim: tuple[int, ...] | None = None

    @property
    def num_nodes(self):
        return 1 + self.depth * self.teeth

    @property
    def scored_at(self):
        if self.claim is not None:
            return self.claim
        row = [0]
        for level in range(self.depth):
            row += [2 + level * self.width if level < self.depth - 1 else NEVER] + [NEVER] * (self.teeth - 1)
        return tuple(row)

    def grow(self, root, logits, carry, draft_fn, target_ids=None):
        batch, zeros = root.shape[0], jnp.zeros((root.shape[0], 1), jnp.int32)
        mask = jnp.zeros((batch, self.width, (self.depth - 1) * self.width), bool)
        tokens, parents, depths, scores = [root[:, None]], [zeros - 1], [zeros], [zeros.astype(jnp.float32)]
        for level in range(self.depth):
            best, ids = jax.lax.top_k(jax.nn.log_softmax(logits), self.teeth)
            each = jnp.zeros_like(ids)
            parent = 0 if level == 0 else 1 + (level - 1) * self.teeth
            scores.append(best + scores[-1][:, :1])
            tokens, parents, depths = [*tokens, ids], [*parents, each + parent], [*depths, each + level + 1]
            if level < self.depth - 1:
                slots = jnp.full((batch, self.width), min(level, 1), jnp.int32)
                mask = step_mask(mask, slots, jnp.int32(level))
                both = jnp.broadcast_to(ids[:, :1], (batch, self.width))
                of_slots, carry = draft_fn(carry, DraftStep(both, slots, mask, jnp.int32(level)))
                logits = of_slots[:, 1]
        return Tree(*(jnp.concatenate(values, axis=1) for values in (tokens, parents, depths, scores))), carry


SAME = StaticTree([[0], [1], [0, 0], [0, 1], [0, 0, 0], [0, 0, 1]])


@functools.cache
def case():
    config = dataclasses.replace(tiny_config(), num_layers=1)
    return scaled(Llama(config, jax.random.key(0)), 8.0), model(config, 1, 8.0)


def proposal(tree, **options):
    """The first one after two prompts, one of them greedy."""
    target, draft = case()

    @jax.jit
    def run():
        sampling = SamplingConfig(np.array([0.8, 0.0], np.float32), top_k=7, **options)
        tokens, lengths = jnp.array([[1, 2, 3], [4, 5, 0]]), jnp.array([3, 2])
        state = eagle_jax.prefill(target, draft, tokens, lengths, jax.random.key(0), sampling=sampling, tree=tree)
        return propose(target, draft, context_of(state, target.config.vocab_size), tree)

    return run()


def test_its_nodes_are_drawn_as_those_of_the_same_static_tree():
    """So the rule that test_accept_drawn.py enumerates keeps the target's distribution here, too."""
    ours, theirs = proposal(Comb()), proposal(SAME)
    assert ours.probs is not None
    for field in ("tokens", "parents", "depths"):
        np.testing.assert_array_equal(getattr(ours.tree, field), getattr(theirs.tree, field))
    np.testing.assert_allclose(ours.tree.scores[0], theirs.tree.scores[0], atol=1e-5)
    np.testing.assert_allclose(ours.probs, theirs.probs, atol=1e-6)
    inner = np.array(Comb().scored_at) != NEVER
    np.testing.assert_allclose(ours.probs.sum(axis=-1), np.stack([inner, 0 * inner]), atol=1e-5)  # zeros: greedy
    assert ((ours.probs[0] > 0).sum(axis=-1)[inner] == 7).all()


def test_children_that_leave_out_a_rank_are_not_drawn():
    """The third of three draws follows another distribution than the second of two."""
    assert StaticTree([[0], [1], [1, 0]]).scored_at == (0, NEVER, 1, NEVER)
    for paths in ([[1]], [[0], [2]], [[0], [0, 1]]):
        assert StaticTree(paths).scored_at is None
    assert proposal(StaticTree([[0], [2]])).probs is None


@pytest.mark.parametrize("claim", [(0,) * 6, (1, 2, -1, 4, -1, -1, -1), (0, 5, -1, 2, -1, -1, -1)])
def test_places_that_are_not_the_tree_s_are_refused(claim):
    with pytest.raises(ValueError, match=r"scored_at of a Comb must hold a number for each of its 7 nodes: .* -1 to 4"):
        proposal(Comb(claim=claim))
