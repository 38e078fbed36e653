"""What is drawn of a cycle, and where."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from eagle_jax.measure import plot
from eagle_jax.measure.drawn import describe
from eagle_jax.tree import Acceptance, Tree


def test_nodes_without_a_guess_are_left_out():
    tree = Tree(
        tokens=jnp.array([[1, 2, 3, 4]]),
        parents=jnp.array([[-1, 0, 1, 0]]),
        depths=jnp.array([[0, 1, 2, 1]]),
        scores=jnp.array([[0.0, 0.0, -jnp.inf, -jnp.inf]]),
    )
    acceptance = Acceptance(jnp.array([[0, 1, -1, -1]]), jnp.array([1]), jnp.array([9]))
    drawn = describe(tree, acceptance, str, gained=2)
    assert [(node.text, node.probability, node.accepted) for node in drawn.nodes] == [
        ("1", None, True),
        ("2", None, True),
    ]
    assert (drawn.last_accepted, drawn.bonus, drawn.omitted) == (1, "9", 2)
    assert describe(tree, acceptance, str, gained=1).bonus is None
    guessed = dataclasses.replace(tree, scores=jnp.log(jnp.array([[1.0, 0.5, 0.25, 0.125]])))
    drawn = describe(guessed, acceptance, str, gained=2)
    assert [node.probability for node in drawn.nodes] == [None, 0.5, 0.25, 0.125]
    # A leaf has a column of its own; a parent stands above the middle of its children.
    assert plot._columns(drawn) == {2: 0.0, 1: 0.0, 3: 1.0, 0: 0.5}
