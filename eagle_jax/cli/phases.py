"""Where a cycle's time goes: drafting, verifying, the rest. Each part runs alone, many times in one program."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from eagle_jax.decode import cycle, gained, propose, verify
from eagle_jax.drafts.protocol import Draft
from eagle_jax.models.llama import Llama
from eagle_jax.state import DecodeState
from eagle_jax.tree import TreePolicy

RUNS = 10  # of a part in one program, so that starting it counts little


@dataclasses.dataclass(frozen=True)
class Phases:
    """Milliseconds a cycle. draft: proposing the tree and learning what was accepted; verify: the target's pass.

    rest: what a whole cycle takes beyond them: acceptance, commit, bookkeeping. Below 0 by noise, or where the parts,
      run apart, miss a fusion that the whole has.
    """

    draft: float
    verify: float
    rest: float

    @property
    def cycle(self) -> float:
        return self.draft + self.verify + self.rest


def measure_phases(
    target: Llama, draft: Draft | None, tree: TreePolicy, state: DecodeState, repeats: int = 3
) -> Phases:
    """Times the parts of the next cycle of a greedy state; medians of `repeats` runs, without compilation.

    Args:
      state: prefilled with the draft, with room for RUNS cycles.
    """
    programs = (_cycles, _verifications) if draft is None else (_cycles, _verifications, _proposals, _updates)
    seconds = []
    for program in programs:
        run = functools.partial(program, target, draft, state, tree=None if draft is None else tree)
        jax.block_until_ready(run())
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            jax.block_until_ready(run())
            times.append((time.perf_counter() - began) / RUNS)
        seconds.append(1000 * statistics.median(times))
    whole, verifying, *drafting = seconds
    return Phases(draft=sum(drafting), verify=verifying, rest=whole - verifying - sum(drafting))


def _again(part, state: DecodeState) -> Any:
    """Runs part(state) RUNS times, one after the other: the barrier makes each run wait for the one before."""

    def body(_, carry):
        state, result = jax.lax.optimization_barrier(carry)
        del result
        return state, part(state)

    return jax.lax.fori_loop(1, RUNS, body, (state, part(state)))[1]


@functools.partial(jax.jit, static_argnames="tree")
def _cycles(target, draft, state, *, tree):
    options = {} if tree is None else {"tree": tree}
    return jax.lax.fori_loop(0, RUNS, lambda _, state: cycle(target, draft, state, **options), state)


@functools.partial(jax.jit, static_argnames="tree")
def _proposals(target, draft, state, *, tree):
    return _again(lambda state: propose(target, draft, state, tree), state)


@functools.partial(jax.jit, static_argnames="tree")
def _verifications(target, draft, state, *, tree):
    nodes = propose(target, draft, state, tree).tree

    def part(state):
        out = verify(target, draft, state, nodes)
        return target.logits(out.hidden), out.rows

    return _again(part, state)


@functools.partial(jax.jit, static_argnames="tree")
def _updates(target, draft, state, *, tree):
    nodes = propose(target, draft, state, tree).tree
    out = verify(target, draft, state, nodes)
    logits = target.logits(out.hidden)
    batch, depth = nodes.tokens.shape[0], draft.depth(tree)
    path = jnp.zeros((batch, depth + 1), jnp.int32)
    new = jnp.take_along_axis(nodes.tokens, path, axis=1)

    def part(state):
        text = gained(state, nodes, out, logits, path, new, jnp.ones_like(state.lengths))
        return draft.update(target, state.draft, text)

    return _again(part, state)
