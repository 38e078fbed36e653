"""A caller's own `jax.jit(generate)` under `jax.set_mesh`: its axes may be explicit, and are none of ours."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

import eagle_jax
from tests.toy import NEW, TREE, rows_of, small_case


@pytest.mark.parametrize("axes", [AxisType.Explicit, AxisType.Auto])
def test_generate_under_a_mesh_of_the_caller_s(axes):
    target, draft, tokens, lengths = small_case()
    expected = eagle_jax.generate(target, draft, tokens, lengths, tree=TREE, max_new_tokens=NEW)
    run = jax.jit(eagle_jax.generate, static_argnames=("tree", "max_new_tokens"))
    with jax.set_mesh(jax.make_mesh((2, 2), ("a", "b"), axis_types=(axes,) * 2)):
        out = run(target, draft, tokens, lengths, tree=TREE, max_new_tokens=NEW)
    assert rows_of(out) == rows_of(expected)
