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
    """Milliseconds a cycle. draft: proposing the tree and learning what was accepted; verify: the target's pass."""

    draft: float
    verify: float
    cycle: float

    @property
    def rest(self) -> float:
        """What a whole cycle takes beyond them: acceptance, commit, bookkeeping.

        0 if the parts, timed alone, take longer than the whole: by noise, or because XLA fuses across parts there.
        """
        return max(self.cycle - self.draft - self.verify, 0.0)


def measure_phases(
    target: Llama, draft: Draft | None, tree: TreePolicy, state: DecodeState, repeats: int = 3
) -> Phases:
    """Times the parts of the next cycle of a greedy state; medians of `repeats` runs, without compilation.

    Args:
      state: prefilled with the draft, with room for RUNS cycles.
    """
    whole, _ = timed(cycles, repeats, target, draft, state, tree=tree)
    drafting, proposal = timed(proposals, repeats, target, draft, state, tree=tree)
    verifying, verified = timed(verifications, repeats, target, draft, state, proposal.tree)
    if draft is None:
        drafting = 0.0
    else:
        updating, _ = timed(updates, repeats, target, draft, state, proposal.tree, *verified, tree=tree)
        drafting += updating
    return Phases(draft=drafting, verify=verifying, cycle=whole)


def timed(program, repeats: int, *args: Any, **options: Any) -> tuple[float, Any]:
    """Milliseconds of one of a program's RUNS, the median of `repeats` calls, and its result."""
    result = jax.block_until_ready(program(*args, **options))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(*args, **options))
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds) / RUNS, result


def _again(part, *inputs: Any) -> Any:
    """Runs part(*inputs) RUNS times, one after the other: the barrier makes each run wait for the one before.

    All inputs of the part go through the barrier. Otherwise XLA hoists loop-invariant work, such as products of
    weights and unchanged inputs, and the part seems faster than it is.
    """

    def body(_, carry):
        inputs, _ = jax.lax.optimization_barrier(carry)
        return inputs, part(*inputs)

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, *inputs))
    return jax.lax.fori_loop(0, RUNS, body, (inputs, nothing))[1]


@functools.partial(jax.jit, static_argnames="tree")
def cycles(target, draft, state, *, tree):
    """RUNS cycles."""
    return jax.lax.fori_loop(0, RUNS, lambda _, state: cycle(target, draft, state, tree=tree), state)


@functools.partial(jax.jit, static_argnames="tree")
def proposals(target, draft, state, *, tree):
    """Proposes the tree of the next cycle, RUNS times."""
    return _again(lambda state: propose(target, draft, state, tree), state)


@jax.jit
def verifications(target, draft, state, nodes):
    """The target's pass over `nodes` and its logits, RUNS times."""

    def part(state, nodes):
        out = verify(target, draft, state, nodes)
        return out, target.logits(out.hidden)

    return _again(part, state, nodes)


@functools.partial(jax.jit, static_argnames="tree")
def updates(target, draft, state, nodes, out, logits, *, tree):
    """The draft learns of a first accepted token, RUNS times."""
    path = jnp.zeros((nodes.tokens.shape[0], draft.depth(tree) + 1), jnp.int32)

    def part(state, nodes, out, logits):
        new = jnp.take_along_axis(nodes.tokens, path, axis=1)
        text = gained(state, nodes, out, logits, path, new, jnp.ones_like(state.lengths))
        return draft.update(target, state.draft, text)

    return _again(part, state, nodes, out, logits)
