"""Times the phases of a cycle: drafting, verifying, the rest. Each part runs alone, many times in one program.

Each program runs its part RUNS times and returns the last run's result.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from eagle_jax.decode.commit import newly_committed
from eagle_jax.decode.cycle import propose, step, verify
from eagle_jax.decode.state import DecodeState, context_of
from eagle_jax.drafts.none import as_draft
from eagle_jax.drafts.protocol import Draft
from eagle_jax.measure.timing import median_seconds, repeat
from eagle_jax.models.target import Target
from eagle_jax.tree import TreePolicy

RUNS = 10  # of a part in one program: amortises the dispatch


@dataclasses.dataclass(frozen=True)
class Phases:
    """Milliseconds a cycle. draft: proposing the tree and the draft's update; verify: the target's pass."""

    draft: float
    verify: float
    cycle: float

    @property
    def rest(self) -> float:
        """What a whole cycle takes beyond both: acceptance, commit, bookkeeping.

        0 if the parts, timed alone, take longer than the whole: by noise, or because XLA fuses across parts there.
        """
        return max(self.cycle - self.draft - self.verify, 0.0)


def measure_phases(
    target: Target, draft: Draft | None, tree: TreePolicy, state: DecodeState, repeats: int = 3
) -> Phases:
    """Times the parts of the next cycle of a greedy state; medians of `repeats` runs, without compilation.

    Args:
      state: prefilled with the draft, with room for RUNS cycles.
    """
    whole, _ = milliseconds(cycles, repeats, target, draft, state, tree=tree)
    drafting, proposal = milliseconds(proposals, repeats, target, draft, state, tree=tree)
    verifying, verified = milliseconds(verifications, repeats, target, draft, state, proposal.tree)
    if draft is None:
        drafting = 0.0
    else:
        updating, _ = milliseconds(updates, repeats, target, draft, state, proposal.tree, *verified, tree=tree)
        drafting += updating
    return Phases(draft=drafting, verify=verifying, cycle=whole)


def milliseconds(program: Any, repeats: int, *args: Any, **options: Any) -> tuple[float, Any]:
    """Returns the milliseconds of one of a program's RUNS, the median of `repeats` calls, and its result."""
    call = functools.partial(program, *args, **options)
    result = jax.block_until_ready(call())  # compiles
    return 1000 * median_seconds(call, repeats) / RUNS, result


@functools.partial(jax.jit, static_argnames="tree")
def cycles(target, draft, state, *, tree):
    """Runs RUNS cycles; returns the state after them."""
    return jax.lax.fori_loop(0, RUNS, lambda _, state: step(target, draft, state, tree=tree).state, state)


@functools.partial(jax.jit, static_argnames="tree")
def proposals(target, draft, state, *, tree):
    """Proposes the tree of the next cycle."""

    def part(models, state, _):
        target, draft = models
        context = context_of(state, target.config.vocab_size, draft.depth(tree))
        return propose(target, draft, context, tree), ()

    return repeat(part, RUNS, (target, as_draft(target, draft)), state, ())[0]


@jax.jit
def verifications(target, draft, state, nodes):
    """Runs the target over the tree `nodes`; returns its output and logits."""

    def part(models, inputs, _):
        target, draft = models
        state, nodes = inputs
        return verify(target, draft, state, nodes), ()

    return repeat(part, RUNS, (target, draft), (state, nodes), ())[0]


@functools.partial(jax.jit, static_argnames="tree")
def updates(target, draft, state, nodes, out, logits, *, tree):
    """Updates the draft's memory as after a cycle that accepted the first draft token of `nodes`."""
    path = jnp.zeros((nodes.tokens.shape[0], draft.depth(tree) + 1), jnp.int32)

    def part(models, inputs, _):
        target, draft = models
        state, nodes, out, logits = inputs
        new = jnp.take_along_axis(nodes.tokens, path, axis=1)
        committed = newly_committed(state, nodes, out, logits, path, new, jnp.ones_like(state.lengths))
        return draft.update(target, state.memory, committed), ()

    return repeat(part, RUNS, (target, draft), (state, nodes, out, logits), ())[0]
