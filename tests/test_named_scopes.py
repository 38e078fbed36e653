"""Profiles can be read: every phase, every part of a layer and every loss has its name in the programs."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import eagle_jax
from eagle_jax.train import eagle1_loss, eagle3_loss
from eagle_jax.train.loss.dflash import DFlashObjective
from eagle_jax.train.loss.objective import TargetObjective
from eagle_jax.train.loss.p_eagle import PEagleObjective
from tests.drafts.kinds import KINDS
from tests.toy import TREE, random_eagle1, small_case

TARGET, EAGLE3, TOKENS, LENGTHS = small_case()
IN_TRAINING = (TOKENS, LENGTHS, jnp.ones(TOKENS.shape, jnp.int32))
LAYER = ("norm", "attention/rope", *(f"attention/{part}" for part in "qkvo"), "mlp/gate", "mlp/up", "mlp/down")


def scopes(function, *args) -> list[str]:
    """The names of a program's operations, as a profile shows them: "jit(f)/layers.0/attention/q/dot_general"."""
    text = jax.jit(function).lower(*args).as_text(debug_info=True)
    return [re.sub(r"\w+\(([\w.]*)\)", r"\1", name) for name in re.findall(r'loc\("([^"]*)"', text)]


def target_loss(model):
    batch = dict(zip(("tokens", "lengths", "loss_mask"), IN_TRAINING, strict=True), documents=None)
    objective = TargetObjective()
    prepared = objective.prepare(model, None, batch)
    return objective.sums(model, None, prepared, objective.counts(prepared), jax.random.key(0))[0]


def drawn_loss(objective, draft):
    batch, key = dict(zip(("tokens", "lengths", "loss_mask"), IN_TRAINING, strict=True)), jax.random.key(0)
    prepared = objective.draw(draft, objective.prepare(draft, TARGET, batch), key)
    return objective.sums(draft, TARGET, prepared, objective.counts(prepared), key)[0]


def trained(loss, draft):
    """The gradient of a loss."""
    return jax.grad(
        lambda draft: sum(value.sum() for value in loss(draft, TARGET, *IN_TRAINING)), allow_int=True
    ), draft


def trained_by(objective, kind):
    """The gradient of what an objective draws."""
    draft = KINDS[kind].build(TARGET.config, 1, 1.0)
    return jax.grad(functools.partial(drawn_loss, objective), allow_int=True), draft


DECODING = functools.partial(eagle_jax.generate, tree=TREE, max_new_tokens=4), TARGET, EAGLE3, TOKENS, LENGTHS
PHASES = ("prefill", "propose", "verify", "accept", "commit", "update")
PROGRAMS = {
    "decoding": (
        DECODING,
        [*PHASES, "embed", "lm_head", "fc", "attention/new_kv", "attention/cache"],
        ["layers.2", "layer"],
    ),
    "eagle3_loss": (
        trained(functools.partial(eagle3_loss, steps=2), EAGLE3),
        ["eagle3_loss/first_step", "later_step", "vocabulary_loss", "likeliest_tokens", "attention/causal", "own_keys"],
        ["target/layers.2", "layer"],
    ),
    "eagle1_loss": (
        trained(eagle1_loss, random_eagle1(1)),
        ["eagle1_loss/embed", "feature_loss", "vocabulary_loss"],
        ["target/layers.2", "eagle1_loss/layer"],
    ),
    "dflash_loss": (
        trained_by(DFlashObjective(anchors=2), "dflash"),
        ["dflash_loss/embed", "dflash_loss/fc", "vocabulary_loss"],
        ["target/layers.1"],
    ),
    "p_eagle_loss": (
        trained_by(PEagleObjective(least_retention=0.7), "p-eagle"),
        ["p_eagle_loss/embed", "p_eagle_loss/fc", "vocabulary_loss", "attention/causal"],
        ["target/layers.1", "p_eagle_loss/layer"],
    ),
    "target_loss": (
        (jax.grad(target_loss), TARGET),
        ["target_loss/embed", "vocabulary_loss"],
        ["target_loss/layers.2"],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_name_their_parts(name):
    program, parts, layers = PROGRAMS[name]
    found = scopes(*program)
    wanted = [*parts, *(f"{layer}/{part}" for layer in layers for part in LAYER)]
    assert [scope for scope in wanted if not any(f"/{scope}/" in f"/{place}/" for place in found)] == []
