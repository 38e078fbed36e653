"""A draft that scores all depths in one pass reads its weights once a cycle, counted in the compiled cycle."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

import eagle_jax
from bench.aot import hlo
from eagle_jax import StaticTree
from eagle_jax.decode.cycle import step
from tests.drafts.kinds import KINDS
from tests.drafts.test_lossless import CONFIG, target_of

WIDTH = 52  # of the head's MLPs, which nothing else has


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        *((kind, lambda depth: 1) for kind in ("p-eagle", "dflash", "jetspec", "dspark")),
        ("eagle3", lambda depth: depth),
    ],
)
def test_products_of_a_cycle(kind, passes):
    """Two products a layer, gate and up. Of nine sequences, as a CPU multiplies up to eight rows one at a time."""
    draft = KINDS[kind].build(dataclasses.replace(CONFIG, intermediate_size=WIDTH), 1, 1.0)
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((9, 8), (9,)))
    state = jax.eval_shape(functools.partial(eagle_jax.prefill, max_new_tokens=8), target_of(0), draft, tokens, lengths)
    for depth in (2, 4):
        cycle = functools.partial(step, tree=StaticTree.chain(depth))
        text = jax.jit(cycle).lower(target_of(0), draft, state).compile().as_text()
        found = sum(count for array, count in hlo.products(text).items() if re.search(rf"[\[,]{WIDTH}\]", array))
        assert found == 2 * draft.config.num_layers * passes(depth)
