"""Phases of a cycle: their programs do the work that is timed, and their sum is the cycle."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp

import eagle_jax
from eagle_jax import TreeConfig
from eagle_jax.decode.cycle import propose
from eagle_jax.decode.state import context_of
from eagle_jax.measure import phases
from eagle_jax.measure.phases import Phases
from tests.toy import golden_pair


def test_a_part_that_noise_makes_negative_is_0():
    assert Phases(draft=1.0, verify=2.0, cycle=3.5).rest == 0.5
    assert Phases(draft=1.0, verify=2.0, cycle=2.75).rest == 0


def test_a_part_of_a_cycle_multiplies_in_its_loop_alone():
    """XLA moves out of a loop what does not change in it, and the part would seem to take less time."""
    target, draft = golden_pair()
    tree = TreeConfig(2, 1, 3)
    shaped = jax.eval_shape
    prompt = jax.ShapeDtypeStruct((1, 3), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    state = shaped(functools.partial(eagle_jax.prefill, max_new_tokens=99, tree=tree), target, draft, *prompt)
    context = shaped(functools.partial(context_of, vocab_size=target.config.vocab_size), state)
    nodes = shaped(functools.partial(propose, tree=tree), target, draft, context).tree
    verified = shaped(phases.verifications, target, draft, state, nodes)
    for lowered in (
        phases.verifications.lower(target, draft, state, nodes),
        phases.updates.lower(target, draft, state, nodes, *verified, tree=tree),
    ):
        loops, outside = lowered.compile().as_text().split("\nENTRY ")
        products = re.compile(r" dot\(|kind=kCustom")
        assert products.search(loops) and not products.search(outside)
