"""What a draft is given: a Context to propose from, Committed positions to learn from."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

import eagle_jax
from eagle_jax import Context, Draft, Proposal, SamplingConfig, TreeConfig
from eagle_jax.decode.state import context_of
from eagle_jax.tree import Tree
from tests.toy import random_target

PROMPTS = jnp.zeros((2, 5), jnp.int32), jnp.array([5, 3])


@dataclasses.dataclass(frozen=True)
class Guess(Draft):
    """Proposes the root alone, and keeps what it was given."""

    seen: list = dataclasses.field(default_factory=list, compare=False)

    def depth(self, tree):
        return 0

    def start(self, target, batch, rows):
        return {"count": jnp.zeros(batch, jnp.int32)}

    def update(self, target, memory, committed):
        self.seen.append(committed)
        return {"count": memory["count"] + committed.count}

    def propose(self, target, context, tree, noise=None):
        self.seen.append((context, noise))
        return Proposal(Tree.root(context.root))


jax.tree_util.register_static(Guess)


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(0.5), SamplingConfig(0.5, coupled=True)])
def test_a_draft_proposes_from_a_context(sampling):
    target, draft = random_target(0), Guess()
    key = None if sampling.greedy else jax.random.key(0)
    options = dict(max_new_tokens=4, sampling=sampling)
    state = jax.eval_shape(functools.partial(eagle_jax.prefill, target, draft, **options), *PROMPTS, key)
    chunk, first = draft.seen[0], draft.seen[-1]
    assert chunk.tree is None and chunk.tokens.shape == (2, 5)
    assert first.tree is None and first.tokens.shape == (2, 1) and first.output.hidden.shape == (2, 1, 32)
    jax.eval_shape(functools.partial(eagle_jax.cycle, tree=TreeConfig(2, 1, 3)), target, draft, state)
    (context, noise), committed = draft.seen[-2:]
    assert type(context) is Context and context.noise is noise
    assert (noise is not None) == sampling.coupled and (noise is None or noise.shape == (2, 1, 97))
    assert (context.keys is None) == (context.sampling is None) == sampling.greedy
    assert context.tokens.shape == (2, 9) and context.root.shape == context.root_position.shape == (2,)
    assert context.draft is context.memory and set(context.memory) == {"count"}
    assert committed.tree.num_nodes == 1 and committed.logits.shape == (2, 1, 97)
    assert committed.tokens.shape == committed.next_tokens.shape == (2, 1)


def test_the_root_is_the_last_token():
    target = random_target(0)
    state = eagle_jax.empty_state(target, None, 3, 8)
    state = dataclasses.replace(state, tokens=jnp.arange(24).reshape(3, 8), lengths=jnp.array([1, 0, 8]))
    context = context_of(state, 97)
    assert context.root.tolist() == state.root.tolist() == [0, 8, 23]
    assert context.root_position.tolist() == state.root_position.tolist() == [0, 0, 7]
