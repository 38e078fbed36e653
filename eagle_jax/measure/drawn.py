"""Describes one decoding cycle for a drawing: its draft tree, the accepted nodes, and the bonus token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from eagle_jax.decode.cycle import step
from eagle_jax.decode.prefill import prefill
from eagle_jax.tree import Acceptance, Tree


@dataclasses.dataclass(frozen=True)
class Node:
    """A node to draw. probability: cumulative, or None where the draft gives none. parent: None for the root."""

    index: int
    parent: int | None
    depth: int
    text: str
    probability: float | None
    accepted: bool


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A cycle to draw: nodes in the tree's order, the deepest accepted one, and the bonus token after it.

    bonus: None where the text ended before it. omitted: number of nodes left out of `nodes`.
    """

    nodes: list[Node]
    last_accepted: int
    bonus: str | None
    omitted: int

    def node(self, index: int) -> Node:
        return next(node for node in self.nodes if node.index == index)


def decode_to(target: Any, draft: Any, tree: Any, tokens: Any, lengths: Any, cycle: int, **options: Any) -> Any:
    """Returns the state before a cycle of the first sequence's greedy text, and the cycle's `Step`.

    Args:
      options: max_new_tokens, capacity and stop_tokens, as in `prefill`.
    Raises:
      ValueError: if the text ends before that cycle.
    """
    options["tree"] = tree
    state = jax.jit(prefill, static_argnames=tuple(options))(target, draft, tokens, lengths, **options)
    one_step = jax.jit(functools.partial(step, tree=tree))
    for number in range(1, cycle + 1):
        if bool(state.done[0]):
            raise ValueError(
                f"the text ends in cycle {number - 1}, at {int(state.lengths[0])} tokens, before --cycle {cycle}"
            )
        if number < cycle:
            state = one_step(target, draft, state).state
    return state, one_step(target, draft, state)


def describe(tree: Tree, acceptance: Acceptance, spell: Callable[[int], str], gained: int) -> Drawn:
    """Describes the first sequence's tree and what was accepted of it. Nodes that stand for no guess are omitted.

    Args:
      spell: token id to text.
      gained: number of new tokens in the text; fewer than were accepted if it ended.
    """
    tokens, parents, depths, scores = (
        np.asarray(field[0]) for field in (tree.tokens, tree.parents, tree.depths, tree.scores)
    )
    accepted = [int(i) for i in np.asarray(acceptance.path[0]) if i >= 0]
    path = accepted[: gained + 1]  # the root was in the text before
    has_probabilities = not np.isin(scores, (0, -np.inf)).all()
    kept = [i for i in range(len(tokens)) if scores[i] > -np.inf or i in path]
    nodes = [
        Node(
            index=i,
            parent=None if i == 0 else int(parents[i]),
            depth=int(depths[i]),
            text=spell(int(tokens[i])),
            probability=float(np.exp(scores[i])) if has_probabilities and i else None,
            accepted=i in path,
        )
        for i in kept
    ]
    bonus = spell(int(acceptance.bonus[0])) if gained == len(accepted) else None
    return Drawn(nodes, path[-1], bonus, len(tokens) - len(kept))
